//! An NVIDIA device behind `cuda::Driver`: libcuda and cublasLt, looked for when it is opened. Building needs neither, and a machine
//! without them gets an error, not a panic: every library is asked for before its first call.

#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::BackendError;
use super::cuda::{Arg, DeviceShape, Driver, Gemm, Launch};

mod copies;
mod graph;
mod limits;
mod products;

use copies::{HostMemory, Mark};
use graph::Graph;
use products::Products;

include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// CUDA 13.0: what the kernels' images and the bindings are made for.
const DRIVER_VERSION: i32 = 13_000;
/// Images begin with sm_80; older GPUs have neither bf16 nor cp.async.
const CAPABILITY: (i32, i32) = (8, 0);
/// Kernels compiled for this virtual architecture or a newer one wait by themselves for those before them (kernels/common.cuh:
/// wait_for_kernels_before).
const WAITING_PTX_VERSION: i32 = 90;
/// A page of device memory, and what the driver rounds pieces up to that share one.
const PAGE_BYTES: usize = 2 << 20;
const PIECE_BYTES: usize = 512;
/// Arguments of the longest kernel, and some more.
const ARGS_MAX: usize = 24;
/// Dynamic shared memory that every kernel may use without asking.
const SHARED_BYTES: u32 = 48 << 10;

/// What an operator wants to know of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// As the driver calls it.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Memory in all.
    pub total_bytes: usize,
    /// Memory that is free now.
    pub free_bytes: usize,
}

/// One GPU with a stream of compute and one of copies.
pub struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    copies: Arc<CudaStream>,
    shape: DeviceShape,
    modules: Vec<Module>,
    functions: RefCell<HashMap<&'static str, Function>>,
    products: Option<Products>,
}

struct Module(sys::CUmodule);
#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    /// Dynamic shared memory that it was allowed.
    shared_bytes: u32,
    /// It waits by itself for the kernels before it, so that it may be put on the device while they run.
    waits: bool,
}

// SAFETY: handles of the driver may be used from any thread; `Device` is not `Sync`, so from one at a time.
unsafe impl Send for Module {}
// SAFETY: as for `Module`.
unsafe impl Send for Function {}

fn unavailable(reason: impl Into<String>) -> BackendError {
    BackendError::Unavailable {
        device: "cuda",
        reason: reason.into(),
    }
}

/// What the driver refused, by its own name for it.
fn refused(what: &str) -> impl Fn(DriverError) -> BackendError {
    move |error| unavailable(format!("{what}: {error:?}"))
}

impl Device {
    /// The `ordinal`-th GPU that CUDA_VISIBLE_DEVICES shows.
    ///
    /// # Errors
    /// No driver, one that is too old, no GPU, one that is too old: each by its name.
    pub fn open(ordinal: usize) -> Result<Self, BackendError> {
        // SAFETY: it only looks for the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(unavailable(
                "no NVIDIA driver: libcuda.so was not found (driver 580 or newer is needed)",
            ));
        }
        let mut version = 0;
        // SAFETY: the library is there, and this call is in all its versions.
        let asked = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
        asked.map_err(refused("cuDriverGetVersion"))?;
        if version < DRIVER_VERSION {
            return Err(unavailable(format!(
                "the driver knows CUDA {}.{}; 13.0 is needed (driver 580 or newer)",
                version / 1000,
                version % 1000 / 10
            )));
        }
        let count = CudaContext::device_count().map_err(refused("looking for GPUs"))?;
        if usize::try_from(count).unwrap_or(0) <= ordinal {
            return Err(unavailable(format!(
                "GPU {ordinal} was asked for; there are {count}"
            )));
        }
        let context = CudaContext::new(ordinal).map_err(refused("opening the GPU"))?;
        let capability = context.compute_capability();
        let capability = capability.map_err(refused("its compute capability"))?;
        if capability < CAPABILITY {
            return Err(unavailable(format!(
                "compute capability {}.{}; 8.0 (Ampere) or newer is needed",
                capability.0, capability.1
            )));
        }
        Self::on(context)
    }

    fn on(context: Arc<CudaContext>) -> Result<Self, BackendError> {
        // SAFETY: computation is on one stream, in order, and waits for the other one by our own events.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(refused("making a stream"))?;
        let copies = context.new_stream().map_err(refused("making a stream"))?;
        let load = |fatbin: &[u8]| {
            // SAFETY: a whole image that nvcc wrote; the driver copies what it needs.
            let module = unsafe { result::module::load_data(fatbin.as_ptr().cast()) };
            module.map(Module).map_err(refused("loading the kernels"))
        };
        let modules = fatbins::<NO_KERNELS>().iter().copied().map(load);
        let modules = modules.collect::<Result<_, _>>()?;
        let shape = shape(&context).map_err(refused("the size of its parts"))?;
        let mut device = Self {
            context,
            stream,
            copies,
            shape,
            modules,
            functions: RefCell::new(HashMap::new()),
            products: None,
        };
        device.products = Products::new(&device)?;
        Ok(device)
    }

    /// Name, capability and memory.
    ///
    /// # Errors
    /// The driver.
    pub fn info(&self) -> Result<DeviceInfo, BackendError> {
        self.bind()?;
        let memory = result::mem_get_info().map_err(refused("asking for free memory"))?;
        Ok(DeviceInfo {
            name: self.context.name().map_err(refused("its name"))?,
            capability: self
                .context
                .compute_capability()
                .map_err(refused("its compute capability"))?,
            total_bytes: memory.1,
            free_bytes: memory.0,
        })
    }

    /// Whether products run on cublasLt; else all run on our own kernels.
    pub fn has_cublaslt(&self) -> bool {
        self.products.is_some()
    }

    /// Calls of the driver act on the calling thread's context.
    fn bind(&self) -> Result<(), BackendError> {
        self.context.bind_to_thread().map_err(refused("the device"))
    }

    fn function(&self, launch: &Launch<'_>) -> Result<Function, BackendError> {
        let mut functions = self.functions.borrow_mut();
        let function = match functions.get(launch.kernel) {
            Some(function) => *function,
            None => self.find(launch.kernel)?,
        };
        let allowed = function.shared_bytes.max(launch.shared_bytes);
        if allowed > function.shared_bytes {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of a loaded module.
            let set = unsafe {
                result::function::set_function_attribute(function.handle, attribute, allowed as i32)
            };
            set.map_err(refused(launch.kernel))?;
        }
        let kept = Function {
            shared_bytes: allowed,
            ..function
        };
        functions.insert(launch.kernel, kept);
        Ok(kept)
    }

    fn find(&self, kernel: &'static str) -> Result<Function, BackendError> {
        for module in &self.modules {
            let name = CString::new(kernel).map_err(|error| unavailable(error.to_string()))?;
            // SAFETY: a loaded module.
            if let Ok(handle) = unsafe { result::module::get_function(module.0, name) } {
                let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION;
                // SAFETY: a function of a loaded module.
                let version =
                    unsafe { result::function::get_function_attribute(handle, attribute) };
                return Ok(Function {
                    handle,
                    shared_bytes: SHARED_BYTES,
                    waits: version.map_err(refused(kernel))? >= WAITING_PTX_VERSION,
                });
            }
        }
        Err(unavailable(format!("no kernel is called {kernel}")))
    }
}

fn shape(context: &CudaContext) -> Result<DeviceShape, DriverError> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as SHARED,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as MULTIPROCESSORS,
    };
    let number = |attribute| {
        context
            .attribute(attribute)
            .map(|value| value.max(0) as usize)
    };
    Ok(DeviceShape {
        multiprocessors: number(MULTIPROCESSORS)?,
        shared_bytes: number(SHARED)?,
    })
}

/// A kernel may be put on the device before the one in front of it is done.
fn starts_early() -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue {
            programmaticStreamSerializationAllowed: 1,
        },
    }
}

/// A piece of device memory.
pub struct DeviceMemory {
    address: sys::CUdeviceptr,
    bytes: usize,
    context: Arc<CudaContext>,
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.address == 0 || self.context.bind_to_thread().is_err() {
            return;
        }
        // SAFETY: it came from malloc_sync; the call waits for all work that may use it. An error here is one that earlier work
        // left, and the next call reports it.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

impl Driver for Device {
    type Memory = DeviceMemory;
    type HostMemory = HostMemory;
    type Mark = Mark;
    type Graph = Graph;

    fn shape(&self) -> DeviceShape {
        self.shape
    }

    fn allocate(&self, what: &str, bytes: usize) -> Result<DeviceMemory, BackendError> {
        self.bind()?;
        let address = match bytes {
            0 => 0,
            // SAFETY: nobody reads it before it was written (Driver::allocate: of any content).
            _ => unsafe { result::malloc_sync(bytes) }.map_err(|error| match error.0 {
                sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => BackendError::OutOfMemory {
                    what: what.to_owned(),
                    bytes,
                    device: "cuda",
                },
                _ => refused(what)(error),
            })?,
        };
        Ok(DeviceMemory {
            address,
            bytes,
            context: Arc::clone(&self.context),
        })
    }

    fn occupied(&self, bytes: usize) -> usize {
        match bytes < PAGE_BYTES / 2 {
            // Small pieces share pages.
            true => bytes.next_multiple_of(PIECE_BYTES),
            false => bytes.next_multiple_of(PAGE_BYTES),
        }
    }

    fn address(&self, memory: &DeviceMemory) -> u64 {
        memory.address
    }

    fn zero(&self, memory: &mut DeviceMemory) -> Result<(), BackendError> {
        if memory.bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        let stream = self.stream.cu_stream();
        // SAFETY: all of one allocation.
        let set = unsafe { result::memset_d8_async(memory.address, 0, memory.bytes, stream) };
        set.map_err(refused("zeroing memory"))
    }

    fn upload(
        &self,
        memory: &mut DeviceMemory,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), BackendError> {
        assert!(
            offset + bytes.len() <= memory.bytes,
            "past the end of device memory"
        );
        if bytes.is_empty() {
            return Ok(());
        }
        self.bind()?;
        let (to, stream) = (memory.address + offset as u64, self.stream.cu_stream());
        // SAFETY: within the allocation. From pageable memory the driver has copied the bytes aside when it returns.
        let copied = unsafe { result::memcpy_htod_async(to, bytes, stream) };
        copied.map_err(refused("copying to the device"))
    }

    fn host_memory(&self, bytes: usize) -> Result<HostMemory, BackendError> {
        self.pinned(bytes)
    }

    unsafe fn fetch(
        &self,
        from: &DeviceMemory,
        into: &mut HostMemory,
        bytes: usize,
    ) -> Result<(), BackendError> {
        // SAFETY: the caller's promise.
        unsafe { self.copy_back(from, into, bytes) }
    }

    fn wait(&self) -> Result<(), BackendError> {
        self.bind()?;
        // SAFETY: our own stream.
        let done = unsafe { result::stream::synchronize(self.stream.cu_stream()) };
        done.map_err(refused("a step on the device"))
    }

    unsafe fn push(
        &self,
        to: &mut DeviceMemory,
        offset: usize,
        from: &HostMemory,
        bytes: usize,
    ) -> Result<Mark, BackendError> {
        // SAFETY: the caller's promise.
        unsafe { self.copy_in(to, offset, from, bytes) }
    }

    fn reached(&self, mark: &Mark) -> Result<(), BackendError> {
        self.wait_for(mark)
    }

    fn join(&self) -> Result<(), BackendError> {
        self.join_copies()
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), BackendError> {
        self.bind()?;
        let function = self.function(launch)?;
        let place = |arg: &Arg| -> *mut c_void {
            match arg {
                Arg::Pointer(x) => std::ptr::from_ref(x).cast_mut().cast(),
                Arg::I32(x) => std::ptr::from_ref(x).cast_mut().cast(),
                Arg::F32(x) => std::ptr::from_ref(x).cast_mut().cast(),
            }
        };
        // On the stack: a step allocates nothing.
        let mut places = [std::ptr::null_mut(); ARGS_MAX];
        let args = launch.args.len();
        assert!(args <= ARGS_MAX, "{} has {args} arguments", launch.kernel);
        places
            .iter_mut()
            .zip(launch.args)
            .for_each(|(to, arg)| *to = place(arg));
        let mut early = starts_early();
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream.cu_stream(),
            attrs: &mut early,
            numAttrs: u32::from(function.waits),
        };
        // SAFETY: the caller's promise; the driver copies configuration and arguments before it returns.
        let started = unsafe {
            sys::cuLaunchKernelEx(
                &config,
                function.handle,
                places.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        started.result().map_err(refused(launch.kernel))
    }

    unsafe fn gemm(&self, gemm: &Gemm) -> Result<bool, BackendError> {
        let Some(products) = &self.products else {
            return Ok(false);
        };
        self.bind()?;
        // SAFETY: the caller's promise.
        unsafe { products.run(gemm, self.stream.cu_stream()) }
    }

    fn begin_recording(&self) -> Result<(), BackendError> {
        self.begin_graph()
    }

    fn end_recording(&self) -> Result<Graph, BackendError> {
        self.end_graph()
    }

    unsafe fn replay(&self, graph: &Graph) -> Result<(), BackendError> {
        self.run_graph(graph)
    }
}
