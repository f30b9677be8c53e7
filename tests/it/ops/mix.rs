//! silu_mul_expert_mix, and what ops keep for the product behind them.

use midpo::backend::cpu::Cpu;
use midpo::backend::ops::{self, ExpertShape, Heads};
use midpo::backend::reference::Reference;
use midpo::backend::{Backend, KvFormat, StepLayout, StepSequence, WeightFormat, Workload};
use midpo::dtype::DType;
use midpo::types::{BlockId, GateOverride, GateRule, TokenId, Variant};

use super::attention::AttentionCase;
use super::{Random, Weights, assert_close, assert_same_bits, cpus, exact, filled, label, limits};

pub(crate) struct MixCase {
    pub(crate) m: usize,
    pub(crate) n: usize,
    /// A_s and A_h, the rows of both gates.
    pub(crate) experts: Option<([Weights; 2], ExpertShape)>,
    pub(crate) gates: Vec<GateOverride>,
    pub(crate) gate_up: Vec<f32>,
}

impl MixCase {
    pub(crate) fn new(
        random: &mut Random,
        (m, n): (usize, usize),
        ranks: (usize, usize),
        dtype: DType,
    ) -> Self {
        let shape = ExpertShape {
            safety_rank: ranks.0,
            helpfulness_rank: ranks.1,
            safety_bias: 0.3,
            helpfulness_bias: -0.2,
        };
        let lora_a = Weights::random(random, shape.width(), m, dtype);
        let gate_rows = Weights::random(random, 2, m, DType::F32);
        let mut gate_up = random.numbers(n * 2 * m);
        gate_up.iter_mut().for_each(|x| *x *= 4.0);
        Self {
            m,
            n,
            experts: Some(([lora_a, gate_rows], shape)),
            gates: (0..n).map(|_| gates(random)).collect(),
            gate_up,
        }
    }

    /// (n, m + w) and (n, 6): layer 1 of 3.
    pub(crate) fn run<B: Backend>(
        &self,
        backend: &mut B,
        rows: std::ops::Range<usize>,
    ) -> (Vec<f32>, Vec<f32>) {
        let n = rows.len();
        let (mut hu, mut gates) = self.run_into(backend, rows);
        let hu = backend.read(&mut hu, n).unwrap().to_vec();
        (hu, backend.read(&mut gates, n).unwrap().to_vec())
    }

    fn run_into<B: Backend>(
        &self,
        backend: &mut B,
        rows: std::ops::Range<usize>,
    ) -> (B::Buffer, B::Buffer) {
        let n = rows.len();
        let (step, gate_up, experts) = self.operands(backend, rows);
        let mut hu = backend.buffer(n, self.m + self.width()).unwrap();
        let mut gates = exact(backend, n, 6, &vec![9.0; n * 6]);
        let call = ops::SiluMulExpertMix {
            step: &step,
            layer: 1,
            gate_up: &gate_up,
            experts: experts.as_ref().map(|(e, shape)| (e, *shape)),
            hu: &mut hu,
            gates: &mut gates,
            z: None,
        };
        backend.silu_mul_expert_mix(call).unwrap();
        (hu, gates)
    }

    /// As [`Self::run`], with z on its way through memory.
    pub(crate) fn run_apart<B: Backend>(
        &self,
        backend: &mut B,
        rows: std::ops::Range<usize>,
    ) -> (Vec<f32>, Vec<f32>) {
        let (n, m, w) = (rows.len(), self.m, self.width());
        let (step, gate_up, experts) = self.operands(backend, rows);
        let mut h = backend.buffer(n, m).unwrap();
        let mut z = exact(backend, n, w + 2, &vec![9.0; n * (w + 2)]);
        let mut gates = exact(backend, n, 6, &vec![9.0; n * 6]);
        let (e, shape) = experts.unwrap();
        let call = ops::SiluMulExpertMix {
            step: &step,
            layer: 1,
            gate_up: &gate_up,
            experts: Some((&e, shape)),
            hu: &mut h,
            gates: &mut gates,
            z: Some(&mut z),
        };
        backend.silu_mul_expert_mix(call).unwrap();
        let untouched = backend.read(&mut gates, n).unwrap();
        assert!(untouched.iter().all(|gate| *gate == 9.0));
        let mut u = backend.buffer(n, w).unwrap();
        let call = ops::ExpertMix {
            step: &step,
            layer: 1,
            shape,
            z: &z,
            u: &mut u,
            gates: &mut gates,
        };
        backend.expert_mix(call).unwrap();
        let h = backend.read(&mut h, n).unwrap().to_vec();
        let u = backend.read(&mut u, n).unwrap().to_vec();
        let hu = (0..n).flat_map(|i| [&h[i * m..][..m], &u[i * w..][..w]].concat());
        (hu.collect(), backend.read(&mut gates, n).unwrap().to_vec())
    }

    fn width(&self) -> usize {
        self.experts.as_ref().map_or(0, |(_, shape)| shape.width())
    }

    #[allow(clippy::type_complexity)]
    fn operands<B: Backend>(
        &self,
        backend: &mut B,
        rows: std::ops::Range<usize>,
    ) -> (B::Step, B::Buffer, Option<(B::Matrix, ExpertShape)>) {
        let n = rows.len();
        let tokens = vec![TokenId(0); n];
        // Each row a sequence of its own, so that each has its own rule.
        let tables: Vec<_> = (0..n).map(|i| [BlockId::new(i as u32)]).collect();
        let sequences: Vec<_> = rows
            .clone()
            .zip(&tables)
            .map(|(row, table)| StepSequence {
                rows: 1,
                start: 0,
                block_table: table,
                gates: self.gates[row],
            })
            .collect();
        let mut step = backend.step(limits(n)).unwrap();
        let layout = StepLayout {
            tokens: &tokens,
            sequences: &sequences,
            logit_rows: &[],
        };
        backend.load_step(&layout, &mut step).unwrap();
        let experts = self.experts.as_ref().map(|(e, shape)| {
            let [lora_a, gates] = e.each_ref().map(Weights::host);
            (backend.experts(lora_a, gates).unwrap(), *shape)
        });
        let m = self.m;
        let values = &self.gate_up[rows.start * 2 * m..rows.end * 2 * m];
        (step, filled(backend, n, 2 * m, values), experts)
    }
}

/// A variant as it is, or a rule with bias, floor and ceiling.
fn gates(random: &mut Random) -> GateOverride {
    if random.below(2) == 0 {
        return Variant::ALL[random.below(5)].gates();
    }
    let mut rule =
        |floor: f32, ceiling: f32| GateRule::new(random.number() * 2.0, floor, ceiling).unwrap();
    GateOverride {
        safety: rule(0.4, 1.0),
        helpfulness: rule(0.0, 0.6),
    }
}

pub(crate) fn columns(values: &[f32], width: usize, columns: std::ops::Range<usize>) -> Vec<f32> {
    let rows = values.chunks_exact(width);
    rows.flat_map(|row| row[columns.clone()].to_vec()).collect()
}

fn check_mix(case: &MixCase, cpus: &mut [Vec<Cpu>]) {
    let (want, want_gates) = case.run(&mut Reference, 0..case.n);
    let (m, n) = (case.m, case.n);
    let width = m + case.experts.as_ref().map_or(0, |(_, shape)| shape.width());
    let tolerance = ops::SILU_MUL_EXPERT_MIX.tolerance.f32;
    for set in cpus {
        let mut first = None;
        for cpu in set {
            let what = format!("mix {} m {m} n {n} width {width}", label(cpu));
            let (got, got_gates) = case.run(cpu, 0..n);
            for part in [0..m, m..width] {
                let (got, want) = (
                    columns(&got, width, part.clone()),
                    columns(&want, width, part),
                );
                assert_close(&what, tolerance, &got, &want);
            }
            assert_close(&what, tolerance, &got_gates, &want_gates);
            if case.experts.is_some() {
                let (hu, gates) = case.run_apart(cpu, 0..n);
                assert_same_bits(&what, &hu, &got);
                assert_same_bits(&what, &gates, &got_gates);
            }
            for (i, rule) in case.gates.iter().enumerate().step_by(7) {
                let alone = case.run(cpu, i..i + 1);
                assert_same_bits(&what, &alone.0, &got[i * width..][..width]);
                assert_same_bits(&what, &alone.1, &got_gates[i * 6..][..6]);
                if case.experts.is_some() && *rule == Variant::Base.gates() {
                    assert_eq!(alone.1[2..4], [0.0, 0.0], "{what}: gates of base");
                    assert!(alone.0[m..].iter().all(|u| *u == 0.0), "{what}: u of base");
                }
            }
            let first = first.get_or_insert_with(|| (got.clone(), got_gates.clone()));
            assert_same_bits(&what, &got, &first.0);
            assert_same_bits(&what, &got_gates, &first.1);
        }
    }
}

#[test]
fn silu_mul_expert_mix_matches_the_reference_for_all_rules_and_sizes() {
    let (random, mut cpus) = (&mut Random(9), cpus());
    for m in [1, 16, 37, 255, 256, 257, 1100] {
        for n in [0, 1, 2, 5, 6, 7, 37] {
            let ranks = [(16, 16), (3, 5), (1, 40)][(m + n) % 3];
            let dtype = [DType::F32, DType::BF16][n % 2];
            check_mix(&MixCase::new(random, (m, n), ranks, dtype), &mut cpus);
        }
    }
    for m in [32, 256, 288, 1120] {
        for n in [1, 3, 12, 37] {
            let ranks = [(16, 16), (3, 5)][n % 2];
            let case = MixCase::new(random, (m, n), ranks, DType::Q8_0);
            check_mix(&case, &mut cpus);
        }
    }
}

type CpuBuffer = <Cpu as Backend>::Buffer;

/// Into `y`, which was made before `x` was written: making a buffer forgets what was kept of the last one.
fn product(
    cpu: &mut Cpu,
    w: &<Cpu as Backend>::Matrix,
    (x, y): (&CpuBuffer, &mut CpuBuffer),
    n: usize,
) -> Vec<f32> {
    let call = ops::MatMul {
        n,
        x,
        w,
        y,
        add: false,
    };
    cpu.matmul(call).unwrap();
    cpu.read(y, n).unwrap().to_vec()
}

/// What an op left in `x` (n, width), read by a product behind it, and by one that nothing was kept for.
fn check_product_behind(
    cpu: &mut Cpu,
    (mut x, y): (CpuBuffer, &mut CpuBuffer),
    (n, width): (usize, usize),
) {
    let w = Weights::random(&mut Random(18), 50, width, DType::Q4_0);
    let matrix = cpu.matrix(&[w.host()], None, WeightFormat::Stored).unwrap();
    let behind = product(cpu, &matrix, (&x, &mut *y), n);
    let values = cpu.read(&mut x, n).unwrap().to_vec();
    let alone = filled(cpu, n, width, &values);
    let what = format!("{} {n} x {width}", label(cpu));
    assert_same_bits(&what, &behind, &product(cpu, &matrix, (&alone, y), n));
}

/// As of the mix below, of all others that products follow, on a backend that was told how wide products are.
#[test]
fn a_product_behind_a_norm_attention_or_silu_has_the_bits_of_one_that_met_its_input_alone() {
    let (random, mut cpus) = (&mut Random(17), cpus());
    for cpu in cpus.iter_mut().flatten() {
        for (n, size, inputs) in [
            (1, 32, 320),
            (7, 64, 320),
            (45, 96, 288),
            (6, 48, 320),
            (9, 64, 64),
        ] {
            let heads = Heads {
                query: 3,
                kv: 1,
                size,
            };
            let work = Workload {
                limits: limits(n),
                heads,
                layers: 1,
                mlp_width: 320,
                expert_width: 0,
                quantised_inputs: inputs,
            };
            cpu.reserve(&work).unwrap();
            let mut out = cpu.buffer(n, 50).unwrap();
            let (x, weight) = (random.numbers(n * 288), random.numbers(288));
            let (x, weight) = (exact(cpu, n, 288, &x), exact(cpu, 1, 288, &weight));
            let mut y = cpu.buffer(n, 288).unwrap();
            let norm = ops::RmsNorm {
                n,
                x: &x,
                weight: &weight,
                eps: 1e-5,
                y: &mut y,
            };
            cpu.rms_norm(norm).unwrap();
            check_product_behind(cpu, (y, &mut out), (n, 288));
            let case = AttentionCase::new(random, heads, KvFormat::BF16, &[n]);
            let mut cache = case.cache(cpu);
            let y = case.run_into(cpu, &mut cache, &case.whole()[0], |x| x);
            if (3 * size).is_multiple_of(32) {
                check_product_behind(cpu, (y, &mut out), (n, 3 * size));
            }
            let silu = MixCase {
                experts: None,
                ..MixCase::new(random, (320, n), (4, 4), DType::F32)
            };
            let (hu, _) = silu.run_into(cpu, 0..n);
            check_product_behind(cpu, (hu, &mut out), (n, 320));
        }
    }
}

/// A mix whose hu a product reads next: what the mix kept of hu for it must be what the product would make of it.
#[test]
fn a_product_behind_the_mix_has_the_bits_of_one_that_met_hu_alone() {
    let (random, mut cpus) = (&mut Random(15), cpus());
    for (n, ranks, extension) in [
        (1, (16, 16), DType::Q8_0),
        (5, (16, 16), DType::BF16),
        (40, (16, 16), DType::Q8_0),
        (7, (3, 5), DType::BF16),
    ] {
        let mix = MixCase::new(random, (288, n), ranks, DType::Q8_0);
        let w = ranks.0 + ranks.1;
        let down = Weights::random(random, 50, 288, DType::Q4_0);
        let extension = Weights::random(random, 50, w, extension);
        for cpu in cpus.iter_mut().flatten() {
            let matrix = cpu
                .matrix(&[down.host()], Some(extension.host()), WeightFormat::Stored)
                .unwrap();
            let mut y = cpu.buffer(n, 50).unwrap();
            let mut product = |cpu: &mut Cpu, hu: &_| product(cpu, &matrix, (hu, &mut y), n);
            let (mut hu, _) = mix.run_into(cpu, 0..n);
            let behind = product(cpu, &hu);
            let values = cpu.read(&mut hu, n).unwrap().to_vec();
            let alone = filled(cpu, n, 288 + w, &values);
            assert_same_bits(&label(cpu), &behind, &product(cpu, &alone));
            // What wrote over hu since is not forgotten.
            let (mut hu, _) = mix.run_into(cpu, 0..n);
            let zeros = filled(cpu, n, 288 + w, &vec![0.0; n * (288 + w)]);
            let weight = exact(cpu, 1, 288 + w, &vec![1.0; 288 + w]);
            let norm = ops::RmsNorm {
                n,
                x: &zeros,
                weight: &weight,
                eps: 1.0,
                y: &mut hu,
            };
            cpu.rms_norm(norm).unwrap();
            assert!(product(cpu, &hu).iter().all(|y| *y == 0.0));
        }
    }
}

#[test]
fn silu_mul_without_experts_leaves_the_gates_alone_and_h_as_with_them() {
    let (random, mut cpus) = (&mut Random(10), cpus());
    for n in [1, 13, 60] {
        let with = MixCase::new(random, (300, n), (16, 16), DType::BF16);
        let without = MixCase {
            experts: None,
            gates: with.gates.clone(),
            gate_up: with.gate_up.clone(),
            ..with
        };
        check_mix(&without, &mut cpus);
        for cpu in cpus.iter_mut().flatten() {
            let (h, gates) = without.run(cpu, 0..n);
            assert!(gates.iter().all(|gate| *gate == 9.0));
            let (hu, _) = with.run(cpu, 0..n);
            assert_same_bits(&label(cpu), &h, &columns(&hu, 332, 0..300));
        }
    }
}
