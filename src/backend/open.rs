//! Which backend runs: the one place that knows what this build was made with.

use std::cell::Cell;

use super::cpu::{Cpu, CpuOptions};
use super::cuda::CudaOptions;
use super::{Backend, BackendError};

/// What a user asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU where there is one that can be used, else the processor.
    Auto,
    /// The processor.
    Cpu,
    /// A GPU.
    Cuda,
}

/// Memory of a device that has its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceBytes {
    /// All of it.
    pub total: u64,
    /// What nobody has taken yet.
    pub free: u64,
}

/// What a GPU can do at most, measured: one figure a repeat.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceLimits {
    /// Name, multiprocessors, and the driver's CUDA.
    pub name: String,
    /// Bytes read and written a second while a large piece of its memory is copied.
    pub copy_bytes_per_second: Vec<f64>,
    /// Operations a second (a multiply-add is two) of the vendor's largest product in bf16; empty without its library.
    pub bf16_ops_per_second: Vec<f64>,
}

/// What is done with the backend, whichever it is.
pub trait UseBackend {
    /// What comes of it.
    type Output;

    /// Does it. `memory`: of a device that has its own.
    fn run<B: Backend>(self, backend: B, memory: Option<DeviceBytes>) -> Self::Output;
}

/// What is done with several backends on one device.
pub trait UseBackends {
    /// What comes of it.
    type Output;

    /// Does it. Each call of `open` makes one more backend. `memory`: of a device that has its own.
    fn run<B: Backend>(
        self,
        open: impl Fn() -> Result<B, BackendError>,
        memory: Option<DeviceBytes>,
    ) -> Self::Output;
}

/// A user of one.
struct One<U>(U);

impl<U: UseBackend> UseBackends for One<U> {
    type Output = Result<U::Output, BackendError>;

    fn run<B: Backend>(
        self,
        open: impl Fn() -> Result<B, BackendError>,
        memory: Option<DeviceBytes>,
    ) -> Self::Output {
        Ok(self.0.run(open()?, memory))
    }
}

/// Opens the device and hands it to `user`. On `Auto`, a GPU that cannot be used is said in the log, and the processor taken.
///
/// # Errors
/// [`BackendError::Unavailable`]: a GPU is asked for and this build or machine has none; or the processor's threads.
pub fn open<U: UseBackend>(
    choice: DeviceChoice,
    cpu: CpuOptions,
    cuda: CudaOptions,
    user: U,
) -> Result<U::Output, BackendError> {
    open_each(choice, cpu, cuda, One(user))?
}

/// As [`open`], for a user of several backends.
///
/// # Errors
/// As [`open`].
pub fn open_each<U: UseBackends>(
    choice: DeviceChoice,
    cpu: CpuOptions,
    cuda: CudaOptions,
    user: U,
) -> Result<U::Output, BackendError> {
    let on_cpu = |user: U| Ok(user.run(|| Cpu::new(cpu), None));
    if choice == DeviceChoice::Cpu {
        return on_cpu(user);
    }
    match gpu(cuda) {
        Ok((backend, memory)) => {
            let first = Cell::new(Some(backend));
            let open = || match first.take() {
                Some(backend) => Ok(backend),
                None => gpu(cuda).map(|(backend, _)| backend),
            };
            Ok(user.run(open, Some(memory)))
        }
        Err(error) if choice == DeviceChoice::Cuda => Err(error),
        Err(error) => {
            // Nobody who built without the feature expects a GPU.
            if cfg!(feature = "cuda") {
                tracing::warn!(%error, "no GPU can be used: running on the processor");
            }
            on_cpu(user)
        }
    }
}

/// Measures the GPU that [`open`] opens, in less than a second; takes 4 GB of its memory for that time.
///
/// # Errors
/// [`BackendError::Unavailable`] without one; the device.
pub fn device_limits() -> Result<DeviceLimits, BackendError> {
    #[cfg(feature = "cuda")]
    return super::device::Device::open(0)?.limits();
    #[cfg(not(feature = "cuda"))]
    Err(no_gpu())
}

#[cfg(feature = "cuda")]
fn gpu(
    options: CudaOptions,
) -> Result<(super::cuda::Cuda<super::device::Device>, DeviceBytes), BackendError> {
    let device = super::device::Device::open(0)?;
    let info = device.info()?;
    tracing::info!(
        name = info.name,
        capability = format!("{}.{}", info.capability.0, info.capability.1),
        total_bytes = info.total_bytes,
        free_bytes = info.free_bytes,
        cublaslt = device.has_cublaslt(),
        "GPU"
    );
    let memory = DeviceBytes {
        total: info.total_bytes as u64,
        free: info.free_bytes as u64,
    };
    Ok((super::cuda::Cuda::new(device, options), memory))
}

#[cfg(not(feature = "cuda"))]
fn gpu(_: CudaOptions) -> Result<(Cpu, DeviceBytes), BackendError> {
    Err(no_gpu())
}

#[cfg(not(feature = "cuda"))]
fn no_gpu() -> BackendError {
    BackendError::Unavailable {
        device: "cuda",
        reason: "this build has no GPU backend: build with --features cuda".to_owned(),
    }
}
