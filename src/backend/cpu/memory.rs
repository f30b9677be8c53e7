//! Memory for weights, activations and K/V: zeroed, 64-byte aligned, in large anonymous mappings for which huge pages are
//! asked before the first touch (they double what two threads can read a second). Where the system has none, it goes on without.
//!
//! Invariant: a range of a mapping is handed out once; the mapping lives as long as any of its ranges.

#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use bytemuck::Pod;
use memmap2::MmapMut;

use crate::backend::BackendError;

/// Alignment of every allocation: a cache line, and the widest vector.
const ALIGN: usize = 64;
/// Size of a huge page.
const HUGE: usize = 2 << 20;
/// Least size of a mapping; what nobody touches costs nothing.
const REGION: usize = 32 << 20;

/// Where memory comes from: bump allocation in mappings that are never reused.
#[derive(Default)]
pub struct Arena {
    current: Option<Region>,
}

struct Region {
    mapping: Arc<Mapping>,
    /// First free byte, counted from the mapping's aligned start.
    free: usize,
}

struct Mapping {
    start: *mut u8,
    len: usize,
    _map: MmapMut,
}

// SAFETY: `start` points into `_map`, which is Send and Sync; who may touch which bytes is `Memory`'s invariant.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// Gives back to the system what was freed: reading a tokenizer or a checkpoint leaves the heap full of holes. Does nothing where the
/// C library has no word for it.
pub fn trim_heap() {
    // SAFETY: locks the heap by itself; takes nothing that is in use.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Keeps what is freed instead of giving it back: whoever frees and takes the same megabytes at every step (a trainer) pays for fresh
/// pages otherwise. Does nothing where the C library has no word for it.
pub fn keep_heap() {
    // SAFETY: sets three numbers of the heap under its own lock.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}

/// What [`Arena::zeroed`] takes for so many bytes.
pub const fn occupied(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGN)
}

impl Arena {
    /// `len` zeros for `what`.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] when the size overflows or the system refuses the mapping.
    pub fn zeroed<T: Pod>(&mut self, what: &str, len: usize) -> Result<Memory<T>, BackendError> {
        let refused = |bytes| BackendError::OutOfMemory {
            what: what.to_owned(),
            bytes,
            device: "cpu",
        };
        let wanted = len.checked_mul(size_of::<T>());
        let bytes = wanted
            .and_then(|bytes| bytes.checked_next_multiple_of(ALIGN))
            .filter(|bytes| *bytes <= isize::MAX as usize - 2 * HUGE)
            .ok_or_else(|| refused(usize::MAX))?;
        if bytes == 0 {
            return Ok(Memory::empty());
        }
        let room = |region: &&mut Region| region.mapping.len - region.free >= bytes;
        let region = match self.current.as_mut().filter(room) {
            Some(region) => region,
            None => {
                let mapping = Mapping::new(bytes.max(REGION)).map_err(|_| refused(bytes))?;
                self.current.insert(Region {
                    mapping: Arc::new(mapping),
                    free: 0,
                })
            }
        };
        let at = region.free;
        region.free += bytes;
        Ok(Memory {
            // SAFETY: `at + bytes` is within the mapping by the check of its room.
            start: unsafe { region.mapping.start.add(at) }.cast(),
            len,
            _mapping: Some(Arc::clone(&region.mapping)),
            owns: PhantomData,
        })
    }
}

impl Mapping {
    fn new(bytes: usize) -> std::io::Result<Self> {
        let len = bytes.next_multiple_of(HUGE);
        let mut map = MmapMut::map_anon(len + HUGE)?;
        // Only speed depends on it: a kernel without huge pages refuses, and 4 KiB pages serve as well.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let offset = map.as_ptr().align_offset(HUGE);
        // SAFETY: `offset` is below HUGE, by which the map is larger than `len`.
        let start = unsafe { map.as_mut_ptr().add(offset) };
        Ok(Self {
            start,
            len,
            _map: map,
        })
    }
}

/// A boxed slice in a mapping of an [`Arena`].
pub struct Memory<T> {
    start: *mut T,
    len: usize,
    _mapping: Option<Arc<Mapping>>,
    owns: PhantomData<T>,
}

// SAFETY: it owns its range alone (the module's invariant), as a box would.
unsafe impl<T: Send> Send for Memory<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Memory<T> {}

impl<T: Pod> Memory<T> {
    /// No elements.
    pub fn empty() -> Self {
        Self {
            start: std::ptr::dangling_mut(),
            len: 0,
            _mapping: None,
            owns: PhantomData,
        }
    }
}

impl<T: Pod> Deref for Memory<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the range is mapped, aligned to 64 bytes, zeroed or written as T, and any bytes are a T (Pod).
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl<T: Pod> DerefMut for Memory<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and nobody else has this range.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn ranges_are_zeroed_aligned_disjoint_and_outlive_the_arena() {
        let mut arena = Arena::default();
        let sizes = [1, 0, 15, 16, 17, REGION / 4 - 100, REGION / 2, 3];
        let mut all: Vec<Memory<f32>> = sizes
            .iter()
            .map(|len| arena.zeroed("test", *len).unwrap())
            .collect();
        drop(arena);
        for (i, memory) in all.iter_mut().enumerate() {
            assert_eq!(memory.len(), sizes[i]);
            assert!(memory.is_empty() || (memory.as_ptr() as usize).is_multiple_of(ALIGN));
            assert!(memory.iter().all(|x| *x == 0.0));
            memory.fill(i as f32);
        }
        for (i, memory) in all.iter().enumerate() {
            assert!(memory.iter().all(|x| *x == i as f32));
        }
    }

    #[test]
    fn an_absurd_size_is_an_error() {
        let mut arena = Arena::default();
        for len in [usize::MAX, usize::MAX / 4, isize::MAX as usize / 4] {
            assert!(arena.zeroed::<f32>("test", len).is_err());
        }
    }
}
