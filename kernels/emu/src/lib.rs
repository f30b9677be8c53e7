//! Runs CUDA kernels on the CPU, thread by thread, from Rust: the same `kernels/*.cu` that nvcc compiles for the device.
//!
//! A kernel is launched by its name with a list of arguments, as the driver's API does it, and the arguments are checked against
//! the kernel's C++ signature. [`Memory`] stands for device memory: it starts as NaN and ends at a page that faults.

#[cfg(no_compiler)]
mod absent;

use std::ffi::{CString, c_void};
#[cfg(not(no_compiler))]
use std::ffi::{c_char, c_int};

#[cfg(no_compiler)]
use absent::{emu_alloc, emu_free, emu_launch};

/// Why no kernel runs here, where the build found no C++ compiler: tests print it and leave their kernels out.
pub const ABSENT: Option<&str> = match cfg!(no_compiler) {
    true => Some("kernels/emu was built without a C++ compiler"),
    false => None,
};

/// In which order blocks run, and a block's threads between two barriers. A kernel without races gives the same bits under all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Schedule {
    /// First to last.
    #[default]
    Ascending,
    /// Last to first.
    Descending,
    /// A permutation of the threads of each block; blocks first to last.
    Shuffled(u32),
}

impl Schedule {
    /// A few of each kind.
    pub const ALL: [Self; 4] = [
        Self::Ascending,
        Self::Descending,
        Self::Shuffled(1),
        Self::Shuffled(2),
    ];
}

/// One argument of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    /// Device address.
    Pointer(u64),
    /// `int`.
    I32(i32),
    /// `unsigned`.
    U32(u32),
    /// `uint64_t`.
    U64(u64),
    /// `float`.
    F32(f32),
}

impl Arg {
    fn kind(&self) -> u8 {
        match self {
            Self::Pointer(_) => b'p',
            Self::I32(_) => b'i',
            Self::U32(_) => b'u',
            Self::U64(_) => b'l',
            Self::F32(_) => b'f',
        }
    }

    fn place(&self) -> *const c_void {
        match self {
            Self::Pointer(x) | Self::U64(x) => std::ptr::from_ref(x).cast(),
            Self::I32(x) => std::ptr::from_ref(x).cast(),
            Self::U32(x) => std::ptr::from_ref(x).cast(),
            Self::F32(x) => std::ptr::from_ref(x).cast(),
        }
    }
}

/// A kernel, its grid and its block.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// Name of the `extern "C"` entry.
    pub kernel: &'a str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory.
    pub shared_bytes: u32,
    /// Order of threads and blocks.
    pub schedule: Schedule,
}

/// What the emulator refused: a deadlock, a collective that lanes disagree on, a misaligned copy, arguments of another kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct EmuError(pub String);

impl std::fmt::Display for EmuError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for EmuError {}

#[repr(C)]
struct RawLaunch {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    schedule: u32,
}

#[cfg(not(no_compiler))]
unsafe extern "C" {
    fn emu_launch(
        launch: *const RawLaunch,
        kernel: *const c_char,
        kinds: *const c_char,
        arguments: *const *const c_void,
        message: *mut c_char,
        message_bytes: usize,
    ) -> c_int;
    fn emu_alloc(bytes: usize) -> *mut c_void;
    fn emu_free(start: *mut c_void, bytes: usize);
}

impl Launch<'_> {
    /// Runs every thread of every block on the calling OS thread.
    ///
    /// # Errors
    /// An unknown kernel, arguments that do not fit it, or what the emulator caught. What a device would fault on ends the process,
    /// after a line that names block and thread.
    ///
    /// # Safety
    /// The pointers among `args` must be valid for all that the kernel reads and writes.
    pub unsafe fn run(&self, args: &[Arg]) -> Result<(), EmuError> {
        let raw = RawLaunch {
            grid: self.grid,
            block: self.block,
            shared_bytes: self.shared_bytes,
            schedule: match self.schedule {
                Schedule::Ascending => 0,
                Schedule::Descending => 1,
                Schedule::Shuffled(seed) => seed.saturating_add(2),
            },
        };
        let text =
            |bytes: Vec<u8>| CString::new(bytes).map_err(|error| EmuError(error.to_string()));
        let kernel = text(self.kernel.into())?;
        let kinds = text(args.iter().map(Arg::kind).collect())?;
        let places: Vec<_> = args.iter().map(Arg::place).collect();
        let mut message = [0u8; 1024];
        // SAFETY: all pointers live until the call returns; the emulator checks the kinds before it reads the places.
        let failed = unsafe {
            let room = (message.as_mut_ptr().cast(), message.len());
            emu_launch(
                &raw,
                kernel.as_ptr(),
                kinds.as_ptr(),
                places.as_ptr(),
                room.0,
                room.1,
            )
        };
        if failed == 0 {
            return Ok(());
        }
        let end = message
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(message.len());
        Err(EmuError(
            String::from_utf8_lossy(&message[..end]).into_owned(),
        ))
    }
}

/// Device memory: running past its end faults instead of reading a neighbour, and what nobody wrote is NaN.
#[derive(Debug)]
pub struct Memory {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: it owns its pages.
unsafe impl Send for Memory {}

impl Memory {
    /// 0xff in every byte: NaN in f32, bf16 and f16.
    pub fn new(bytes: usize) -> Self {
        // SAFETY: emu_alloc ends the process rather than fail; the pages hold `bytes`.
        let start = unsafe {
            let start = emu_alloc(bytes).cast::<u8>();
            start.write_bytes(0xff, bytes);
            start
        };
        Self { start, bytes }
    }

    /// Where it begins, 16-byte aligned.
    pub fn address(&self) -> u64 {
        self.start as u64
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What it holds.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `bytes` initialised bytes; kernels run only inside `Launch::run`.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    /// What it holds, to be changed.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`; `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: from emu_alloc with the same size.
        unsafe { emu_free(self.start.cast(), self.bytes) }
    }
}
