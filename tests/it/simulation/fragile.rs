//! A real backend that fails when told to.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use midpo::backend::cpu::Cpu;
use midpo::backend::{
    Backend, BackendError, HostMatrix, KvShape, StepLayout, StepLimits, WeightFormat, Workload, ops,
};

/// What the next steps meet. Shared with the test.
#[derive(Clone, Default)]
pub(crate) struct Faults(Arc<AtomicU32>);

const PANIC: u32 = u32::MAX;

impl Faults {
    /// The next `count` steps fail with an error.
    pub(crate) fn fail(&self, count: u32) {
        self.0.store(count, Ordering::SeqCst);
    }

    /// The next step panics.
    pub(crate) fn panic(&self) {
        self.0.store(PANIC, Ordering::SeqCst);
    }

    fn strike(&self) -> Result<(), BackendError> {
        match self.0.load(Ordering::SeqCst) {
            0 => Ok(()),
            PANIC => panic!("the test asked for a panic"),
            count => {
                self.0.store(count - 1, Ordering::SeqCst);
                Err(BackendError::Unavailable {
                    device: "fragile",
                    reason: "the test asked for an error".to_owned(),
                })
            }
        }
    }
}

/// The CPU, until a fault strikes. Forwards each method that the CPU has: its answers are to be the CPU's, to the bit.
pub(crate) struct Fragile {
    pub inner: Cpu,
    pub faults: Faults,
}

type Made<T> = Result<T, BackendError>;

impl Backend for Fragile {
    type Buffer = <Cpu as Backend>::Buffer;
    type Matrix = <Cpu as Backend>::Matrix;
    type KvCache = <Cpu as Backend>::KvCache;
    type Step = <Cpu as Backend>::Step;

    fn name(&self) -> &'static str {
        "fragile"
    }

    fn quantises(&self) -> bool {
        self.inner.quantises()
    }

    fn matrix(
        &self,
        parts: &[HostMatrix<'_>],
        extension: Option<HostMatrix<'_>>,
        format: WeightFormat,
    ) -> Made<Self::Matrix> {
        self.inner.matrix(parts, extension, format)
    }

    fn matrix_bytes(
        &self,
        parts: &[HostMatrix<'_>],
        extension: Option<HostMatrix<'_>>,
        format: WeightFormat,
    ) -> Made<usize> {
        self.inner.matrix_bytes(parts, extension, format)
    }

    fn experts(&self, lora_a: HostMatrix<'_>, gates: HostMatrix<'_>) -> Made<Self::Matrix> {
        self.inner.experts(lora_a, gates)
    }

    fn experts_bytes(&self, lora_a: HostMatrix<'_>, gates: HostMatrix<'_>) -> Made<usize> {
        self.inner.experts_bytes(lora_a, gates)
    }

    fn buffer_bytes(&self, rows: usize, width: usize) -> usize {
        self.inner.buffer_bytes(rows, width)
    }

    fn reserve(&mut self, work: &Workload) -> Made<()> {
        self.inner.reserve(work)
    }

    fn workspace_bytes(&self, work: &Workload) -> usize {
        self.inner.workspace_bytes(work)
    }

    fn buffer(&self, rows: usize, width: usize) -> Made<Self::Buffer> {
        self.inner.buffer(rows, width)
    }

    fn write(&self, buffer: &mut Self::Buffer, values: &[f32]) -> Made<()> {
        self.inner.write(buffer, values)
    }

    fn fetch(&self, buffer: &mut Self::Buffer, rows: usize) -> Made<()> {
        self.inner.fetch(buffer, rows)
    }

    fn read<'a>(&'a self, buffer: &'a mut Self::Buffer, rows: usize) -> Made<&'a [f32]> {
        self.inner.read(buffer, rows)
    }

    fn kv_cache(&self, shape: KvShape) -> Made<Self::KvCache> {
        self.inner.kv_cache(shape)
    }

    fn kv_block_bytes(&self, shape: KvShape) -> Made<usize> {
        self.inner.kv_block_bytes(shape)
    }

    fn step(&self, limits: StepLimits) -> Made<Self::Step> {
        self.inner.step(limits)
    }

    fn load_step(&self, layout: &StepLayout<'_>, step: &mut Self::Step) -> Made<()> {
        self.inner.load_step(layout, step)
    }

    fn embed(&mut self, args: ops::Embed<'_, Self>) -> Made<()> {
        let ops::Embed { step, table, x } = args;
        self.inner.embed(ops::Embed { step, table, x })
    }

    fn rms_norm(&mut self, args: ops::RmsNorm<'_, Self>) -> Made<()> {
        let ops::RmsNorm {
            n,
            x,
            weight,
            eps,
            y,
        } = args;
        self.inner.rms_norm(ops::RmsNorm {
            n,
            x,
            weight,
            eps,
            y,
        })
    }

    fn matmul(&mut self, args: ops::MatMul<'_, Self>) -> Made<()> {
        let ops::MatMul { n, x, w, y, add } = args;
        self.inner.matmul(ops::MatMul { n, x, w, y, add })
    }

    fn rope_kv_write(&mut self, args: ops::RopeKvWrite<'_, Self>) -> Made<()> {
        let ops::RopeKvWrite {
            step,
            layer,
            heads,
            rope,
            qkv,
            cache,
        } = args;
        self.inner.rope_kv_write(ops::RopeKvWrite {
            step,
            layer,
            heads,
            rope,
            qkv,
            cache,
        })
    }

    /// Strikes here: K and V of some layers are written, as in a real accident.
    fn attention(&mut self, args: ops::Attention<'_, Self>) -> Made<()> {
        if args.layer == 1 {
            self.faults.strike()?;
        }
        let ops::Attention {
            step,
            layer,
            heads,
            qkv,
            cache,
            y,
        } = args;
        self.inner.attention(ops::Attention {
            step,
            layer,
            heads,
            qkv,
            cache,
            y,
        })
    }

    fn silu_mul_expert_mix(&mut self, args: ops::SiluMulExpertMix<'_, Self>) -> Made<()> {
        let ops::SiluMulExpertMix {
            step,
            layer,
            gate_up,
            experts,
            hu,
            gates,
            z,
        } = args;
        self.inner.silu_mul_expert_mix(ops::SiluMulExpertMix {
            step,
            layer,
            gate_up,
            experts,
            hu,
            gates,
            z,
        })
    }

    fn expert_mix(&mut self, args: ops::ExpertMix<'_, Self>) -> Made<()> {
        let ops::ExpertMix {
            step,
            layer,
            shape,
            z,
            u,
            gates,
        } = args;
        self.inner.expert_mix(ops::ExpertMix {
            step,
            layer,
            shape,
            z,
            u,
            gates,
        })
    }

    fn gather_rows(&mut self, args: ops::GatherRows<'_, Self>) -> Made<()> {
        let ops::GatherRows { step, x, y } = args;
        self.inner.gather_rows(ops::GatherRows { step, x, y })
    }
}
