//! What the host code asks of a device. Two implementations run: the CUDA driver (`backend/device`), and the tests' emulation of the same
//! kernels on the CPU (`kernels/emu`).

use super::super::BackendError;

/// How activations, weights, K and V are stored. Sums, the residual stream, gates and logits are f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Storage {
    /// f32's range in two bytes.
    #[default]
    BF16,
    /// Finer, up to 65,504.
    F16,
}

/// A kernel's entry points, by storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    bf16: &'static str,
    f16: &'static str,
}

impl Kernel {
    /// Entries `NAME_bf16` and `NAME_f16`.
    pub const fn new(bf16: &'static str, f16: &'static str) -> Self {
        Self { bf16, f16 }
    }

    /// A kernel that is the same for every storage.
    pub const fn exact(name: &'static str) -> Self {
        Self::new(name, name)
    }

    /// The name in the kernels' module.
    pub fn name(self, storage: Storage) -> &'static str {
        match storage {
            Storage::BF16 => self.bf16,
            Storage::F16 => self.f16,
        }
    }
}

/// A [`Kernel`] by its name without the storage, in pieces.
macro_rules! kernel {
    ($($name:literal),+) => {
        $crate::backend::cuda::Kernel::new(concat!($($name),+, "_bf16"), concat!($($name),+, "_f16"))
    };
}
pub(super) use kernel;

/// One argument of a kernel, of exactly the type that its C++ declaration says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    /// A device address; 0 is null.
    Pointer(u64),
    /// `int`.
    I32(i32),
    /// `float`.
    F32(f32),
}

/// A launch on the compute stream.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// Entry point.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory.
    pub shared_bytes: u32,
    /// In the order of the declaration.
    pub args: &'a [Arg],
}

/// y (n, o) (+)= x (n, k) W (o, k)^T, row-major; addresses are 16-byte aligned and rows padded with zeros to the strides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gemm {
    /// Rows of x and y.
    pub n: usize,
    /// Rows of W.
    pub o: usize,
    /// Padded inputs: the stride of x and of W.
    pub k: usize,
    /// Of x and W, and of y unless `exact`.
    pub storage: Storage,
    /// y is f32.
    pub exact: bool,
    /// Add to y.
    pub add: bool,
    /// Numbers from one row of y to the next.
    pub y_stride: usize,
    /// Address of x.
    pub x: u64,
    /// Address of W.
    pub w: u64,
    /// Address of y.
    pub y: u64,
}

/// What decides how work is cut into blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceShape {
    /// Multiprocessors; blocks that share a product by the number of these all run at once.
    pub multiprocessors: usize,
    /// Shared memory that a block may have.
    pub shared_bytes: usize,
}

/// A device with one stream of compute and one of copies. Each does its work in the order in which it is asked for.
pub trait Driver: Send + 'static {
    /// A piece of device memory, freed when it is dropped and no work needs it any more.
    type Memory: Send;
    /// A piece of the host's memory that the device copies from and to by itself; freed as [`Self::Memory`].
    type HostMemory: AsRef<[u8]> + AsMut<[u8]> + Send;
    /// A point among the copies.
    type Mark: Send;
    /// Work that was recorded ([`Self::begin_recording`]).
    type Graph: Send;

    /// Of the device.
    fn shape(&self) -> DeviceShape;

    /// Memory of any content, 256-byte aligned on a device.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    fn allocate(&self, what: &str, bytes: usize) -> Result<Self::Memory, BackendError>;

    /// What an allocation of `bytes` takes of the device's memory.
    fn occupied(&self, bytes: usize) -> usize;

    /// Where `memory` begins.
    fn address(&self, memory: &Self::Memory) -> u64;

    /// Zeroes all of `memory`.
    ///
    /// # Errors
    /// The device.
    fn zero(&self, memory: &mut Self::Memory) -> Result<(), BackendError>;

    /// Copies `bytes` to `offset`. The caller's slice may change as soon as this returns.
    ///
    /// # Errors
    /// The device.
    ///
    /// # Panics
    /// Past the end of `memory`.
    fn upload(
        &self,
        memory: &mut Self::Memory,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), BackendError>;

    /// Host memory, zeroed.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    fn host_memory(&self, bytes: usize) -> Result<Self::HostMemory, BackendError>;

    /// Starts a copy of the first `bytes` bytes of `from` to the beginning of `into`, behind all computation asked for so far.
    ///
    /// # Errors
    /// The device.
    ///
    /// # Panics
    /// Past the end of either.
    ///
    /// # Safety
    /// `into` is not touched before [`Self::wait`] has returned.
    unsafe fn fetch(
        &self,
        from: &Self::Memory,
        into: &mut Self::HostMemory,
        bytes: usize,
    ) -> Result<(), BackendError>;

    /// Waits for all computation asked for so far, and for what it fetched.
    ///
    /// # Errors
    /// The device, for this or for earlier work.
    fn wait(&self) -> Result<(), BackendError>;

    /// Starts a copy of the first `bytes` bytes of `from` to `offset` of `to`, on the stream of copies.
    ///
    /// # Errors
    /// The device.
    ///
    /// # Panics
    /// Past the end of either.
    ///
    /// # Safety
    /// `from` is not changed before the mark is reached, and no computation has a use for `to` before [`Self::join`].
    unsafe fn push(
        &self,
        to: &mut Self::Memory,
        offset: usize,
        from: &Self::HostMemory,
        bytes: usize,
    ) -> Result<Self::Mark, BackendError>;

    /// Waits until the copies are past `mark`.
    ///
    /// # Errors
    /// The device, for this or for earlier copies.
    fn reached(&self, mark: &Self::Mark) -> Result<(), BackendError>;

    /// Computation asked for from here on begins behind all copies asked for so far.
    ///
    /// # Errors
    /// The device.
    fn join(&self) -> Result<(), BackendError>;

    /// Starts a kernel.
    ///
    /// # Errors
    /// An unknown kernel or a refused launch. What goes wrong inside shows at a later call.
    ///
    /// # Safety
    /// The arguments must be those of the kernel's declaration, with addresses of live memory as large as it touches.
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), BackendError>;

    /// The vendor's GEMM; `false`: there is none for this, take `kernels/gemm.cu`.
    ///
    /// # Errors
    /// A refused call.
    ///
    /// # Safety
    /// The addresses must span what the shapes say.
    unsafe fn gemm(&self, gemm: &Gemm) -> Result<bool, BackendError>;

    /// From here on launches and products are recorded instead of started; nothing else may be asked for until
    /// [`Self::end_recording`].
    ///
    /// # Errors
    /// The device; nothing is recorded then.
    fn begin_recording(&self) -> Result<(), BackendError>;

    /// Ends the recording, whether what was asked for was refused or not.
    ///
    /// # Errors
    /// The device, for this or for what it could not record; launches are started again either way.
    fn end_recording(&self) -> Result<Self::Graph, BackendError>;

    /// Starts all that was recorded, in its order and with its arguments.
    ///
    /// # Errors
    /// A refused launch.
    ///
    /// # Safety
    /// The addresses among the arguments must still be those of live memory.
    unsafe fn replay(&self, graph: &Self::Graph) -> Result<(), BackendError>;
}
