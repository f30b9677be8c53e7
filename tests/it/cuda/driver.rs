//! What the CUDA backend's host code runs on in tests: `kernels/emu`, or a GPU.

use cuda_emu::{Memory, Schedule};
use midpo::backend::BackendError;
use midpo::backend::cuda::{Arg, DeviceShape, Driver, Gemm, Launch};
#[cfg(feature = "cuda")]
use midpo::backend::device::Device;

use super::copies::Copies;
use super::graphs::{Recorder, Recording};

/// The emulator as a device, or a device.
pub(crate) enum TestDriver {
    /// `kernels/emu`, with threads in this order.
    Emulated(Schedule, Recorder, Copies),
    /// A GPU.
    #[cfg(feature = "cuda")]
    Gpu(Device),
}

/// A recording of a [`TestDriver`].
pub(crate) enum TestGraph {
    Emulated(Recording),
    #[cfg(feature = "cuda")]
    Gpu(<Device as Driver>::Graph),
}

impl TestDriver {
    pub(crate) fn emulated(schedule: Schedule) -> Self {
        Self::Emulated(schedule, Recorder::default(), Copies::default())
    }

    fn refuse_while_recording(&self) {
        match self {
            Self::Emulated(_, recorder, _) => recorder.refuse_else(),
            #[cfg(feature = "cuda")]
            Self::Gpu(_) => {}
        }
    }
}

/// Memory of a [`TestDriver`].
pub(crate) enum TestMemory {
    Emulated(Memory),
    #[cfg(feature = "cuda")]
    Gpu(<Device as Driver>::Memory),
}

#[cfg(feature = "cuda")]
macro_rules! on_gpu {
    ($driver:expr, $memory:expr, |$gpu:ident, $on_gpu:ident| $call:expr) => {
        if let (TestDriver::Gpu($gpu), TestMemory::Gpu($on_gpu)) = ($driver, &mut *$memory) {
            return $call;
        }
    };
}

impl TestMemory {
    fn emulated(&self) -> &Memory {
        match self {
            Self::Emulated(memory) => memory,
            #[cfg(feature = "cuda")]
            Self::Gpu(_) => unreachable!("memory of another driver"),
        }
    }

    fn emulated_mut(&mut self) -> &mut Memory {
        match self {
            Self::Emulated(memory) => memory,
            #[cfg(feature = "cuda")]
            Self::Gpu(_) => unreachable!("memory of another driver"),
        }
    }
}

/// Host memory of a [`TestDriver`].
pub(crate) enum TestHostMemory {
    Emulated(Vec<u8>),
    #[cfg(feature = "cuda")]
    Gpu(<Device as Driver>::HostMemory),
}

impl AsRef<[u8]> for TestHostMemory {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Emulated(bytes) => bytes,
            #[cfg(feature = "cuda")]
            Self::Gpu(memory) => memory.as_ref(),
        }
    }
}

impl AsMut<[u8]> for TestHostMemory {
    fn as_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Emulated(bytes) => bytes,
            #[cfg(feature = "cuda")]
            Self::Gpu(memory) => memory.as_mut(),
        }
    }
}

/// A mark of a [`TestDriver`].
pub(crate) enum TestMark {
    Emulated(usize),
    #[cfg(feature = "cuda")]
    Gpu(<Device as Driver>::Mark),
}

impl Driver for TestDriver {
    type Memory = TestMemory;
    type HostMemory = TestHostMemory;
    type Mark = TestMark;
    type Graph = TestGraph;

    fn shape(&self) -> DeviceShape {
        match self {
            // Few and odd, so that blocks share tiles and take several; shared memory of Hopper.
            Self::Emulated(..) => DeviceShape {
                multiprocessors: 5,
                shared_bytes: 227 << 10,
            },
            #[cfg(feature = "cuda")]
            Self::Gpu(gpu) => gpu.shape(),
        }
    }

    #[cfg_attr(not(feature = "cuda"), expect(unused_variables))]
    fn allocate(&self, what: &str, bytes: usize) -> Result<TestMemory, BackendError> {
        match self {
            Self::Emulated(..) => {
                self.refuse_while_recording();
                Ok(TestMemory::Emulated(Memory::new(bytes)))
            }
            #[cfg(feature = "cuda")]
            Self::Gpu(gpu) => gpu.allocate(what, bytes).map(TestMemory::Gpu),
        }
    }

    fn occupied(&self, bytes: usize) -> usize {
        match self {
            Self::Emulated(..) => bytes,
            #[cfg(feature = "cuda")]
            Self::Gpu(gpu) => gpu.occupied(bytes),
        }
    }

    fn address(&self, memory: &TestMemory) -> u64 {
        match (self, memory) {
            #[cfg(feature = "cuda")]
            (Self::Gpu(gpu), TestMemory::Gpu(memory)) => gpu.address(memory),
            _ => memory.emulated().address(),
        }
    }

    fn zero(&self, memory: &mut TestMemory) -> Result<(), BackendError> {
        #[cfg(feature = "cuda")]
        on_gpu!(self, memory, |gpu, memory| gpu.zero(memory));
        memory.emulated_mut().as_mut_slice().fill(0);
        Ok(())
    }

    fn upload(
        &self,
        memory: &mut TestMemory,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), BackendError> {
        #[cfg(feature = "cuda")]
        on_gpu!(self, memory, |gpu, memory| gpu
            .upload(memory, offset, bytes));
        self.refuse_while_recording();
        let to = memory.emulated_mut().as_mut_slice();
        to[offset..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn host_memory(&self, bytes: usize) -> Result<TestHostMemory, BackendError> {
        self.refuse_while_recording();
        match self {
            Self::Emulated(..) => Ok(TestHostMemory::Emulated(vec![0; bytes])),
            #[cfg(feature = "cuda")]
            Self::Gpu(gpu) => gpu.host_memory(bytes).map(TestHostMemory::Gpu),
        }
    }

    unsafe fn fetch(
        &self,
        from: &TestMemory,
        into: &mut TestHostMemory,
        bytes: usize,
    ) -> Result<(), BackendError> {
        match (self, from, into) {
            #[cfg(feature = "cuda")]
            // SAFETY: the caller's promise.
            (Self::Gpu(gpu), TestMemory::Gpu(from), TestHostMemory::Gpu(into)) => unsafe {
                gpu.fetch(from, into, bytes)
            },
            (Self::Emulated(_, recorder, copies), from, into) => {
                recorder.refuse_else();
                copies.fetch(&from.emulated().as_slice()[..bytes], into.as_mut());
                Ok(())
            }
            #[cfg(feature = "cuda")]
            _ => unreachable!("memory of another driver"),
        }
    }

    fn wait(&self) -> Result<(), BackendError> {
        match self {
            Self::Emulated(_, recorder, copies) => {
                recorder.refuse_else();
                copies.wait();
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Self::Gpu(gpu) => gpu.wait(),
        }
    }

    unsafe fn push(
        &self,
        to: &mut TestMemory,
        offset: usize,
        from: &TestHostMemory,
        bytes: usize,
    ) -> Result<TestMark, BackendError> {
        match (self, to, from) {
            #[cfg(feature = "cuda")]
            (Self::Gpu(gpu), TestMemory::Gpu(to), TestHostMemory::Gpu(from)) => {
                // SAFETY: the caller's promise.
                unsafe { gpu.push(to, offset, from, bytes) }.map(TestMark::Gpu)
            }
            (Self::Emulated(_, recorder, copies), to, from) => {
                recorder.refuse_else();
                let to = &mut to.emulated_mut().as_mut_slice()[offset..][..bytes];
                Ok(TestMark::Emulated(copies.push(to, &from.as_ref()[..bytes])))
            }
            #[cfg(feature = "cuda")]
            _ => unreachable!("memory of another driver"),
        }
    }

    fn reached(&self, mark: &TestMark) -> Result<(), BackendError> {
        match (self, mark) {
            #[cfg(feature = "cuda")]
            (Self::Gpu(gpu), TestMark::Gpu(mark)) => gpu.reached(mark),
            (Self::Emulated(_, _, copies), TestMark::Emulated(mark)) => {
                copies.reach(*mark);
                Ok(())
            }
            #[cfg(feature = "cuda")]
            _ => unreachable!("a mark of another driver"),
        }
    }

    fn join(&self) -> Result<(), BackendError> {
        match self {
            Self::Emulated(_, _, copies) => {
                copies.reach(usize::MAX);
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Self::Gpu(gpu) => gpu.join(),
        }
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), BackendError> {
        let schedule = match self {
            Self::Emulated(_, recorder, _) if recorder.keeps(launch) => return Ok(()),
            Self::Emulated(schedule, ..) => *schedule,
            #[cfg(feature = "cuda")]
            // SAFETY: the caller's promise.
            Self::Gpu(gpu) => return unsafe { gpu.launch(launch) },
        };
        let args = launch.args.iter().map(|arg| match arg {
            Arg::Pointer(x) => cuda_emu::Arg::Pointer(*x),
            Arg::I32(x) => cuda_emu::Arg::I32(*x),
            Arg::F32(x) => cuda_emu::Arg::F32(*x),
        });
        let args: Vec<_> = args.collect();
        let launch = cuda_emu::Launch {
            kernel: launch.kernel,
            grid: launch.grid,
            block: [launch.threads, 1, 1],
            shared_bytes: launch.shared_bytes,
            schedule,
        };
        // SAFETY: the caller's promise.
        let run = unsafe { launch.run(&args) };
        run.map_err(|error| BackendError::Unavailable {
            device: "emulation",
            reason: error.to_string(),
        })
    }

    #[cfg_attr(not(feature = "cuda"), expect(unused_variables))]
    unsafe fn gemm(&self, gemm: &Gemm) -> Result<bool, BackendError> {
        match self {
            Self::Emulated(..) => Ok(false),
            #[cfg(feature = "cuda")]
            // SAFETY: the caller's promise.
            Self::Gpu(gpu) => unsafe { gpu.gemm(gemm) },
        }
    }

    fn begin_recording(&self) -> Result<(), BackendError> {
        match self {
            Self::Emulated(_, recorder, _) => {
                recorder.begin();
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Self::Gpu(gpu) => gpu.begin_recording(),
        }
    }

    fn end_recording(&self) -> Result<TestGraph, BackendError> {
        match self {
            Self::Emulated(_, recorder, _) => Ok(TestGraph::Emulated(recorder.end())),
            #[cfg(feature = "cuda")]
            Self::Gpu(gpu) => gpu.end_recording().map(TestGraph::Gpu),
        }
    }

    unsafe fn replay(&self, graph: &TestGraph) -> Result<(), BackendError> {
        match (self, graph) {
            #[cfg(feature = "cuda")]
            // SAFETY: the caller's promise.
            (Self::Gpu(gpu), TestGraph::Gpu(graph)) => unsafe { gpu.replay(graph) },
            // SAFETY: the caller's promise.
            (_, TestGraph::Emulated(recording)) => unsafe { recording.replay(self) },
            #[cfg(feature = "cuda")]
            _ => unreachable!("a recording of another driver"),
        }
    }
}
