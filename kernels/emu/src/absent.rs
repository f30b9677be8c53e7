//! What stands for the emulator where no C++ compiler built it: memory, and a refusal of every launch.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ffi::{c_char, c_int, c_void};

use super::RawLaunch;

/// Writes why it refuses.
///
/// # Safety
/// `message` must have room for `message_bytes`.
pub unsafe fn emu_launch(
    _: *const RawLaunch,
    _: *const c_char,
    _: *const c_char,
    _: *const *const c_void,
    message: *mut c_char,
    message_bytes: usize,
) -> c_int {
    let text = super::ABSENT.unwrap_or_default().as_bytes();
    let len = text.len().min(message_bytes.saturating_sub(1));
    // SAFETY: within the room that the caller promises; the terminator fits behind.
    unsafe {
        message.copy_from_nonoverlapping(text.as_ptr().cast(), len);
        message.add(len).write(0);
    }
    1
}

fn layout(bytes: usize) -> Layout {
    // Sizes come from slices in memory; 16 is a power of two.
    Layout::from_size_align(bytes.max(1), 16).unwrap_or(Layout::new::<u128>())
}

/// 16-byte aligned.
pub unsafe fn emu_alloc(bytes: usize) -> *mut c_void {
    // SAFETY: the size is not 0.
    let start = unsafe { alloc(layout(bytes)) };
    if start.is_null() {
        handle_alloc_error(layout(bytes));
    }
    start.cast()
}

/// # Safety
/// `start` must come from [`emu_alloc`] with the same size.
pub unsafe fn emu_free(start: *mut c_void, bytes: usize) {
    // SAFETY: the caller's promise.
    unsafe { dealloc(start.cast(), layout(bytes)) }
}
