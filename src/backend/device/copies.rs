//! Copies that stop neither side: page-locked memory of the host, a stream of copies, and points on it.

use std::sync::Arc;

use cudarc::driver::{CudaContext, result, sys};

use super::super::BackendError;
use super::{Device, DeviceMemory, refused};

/// Page-locked memory of the host.
pub struct HostMemory {
    start: *mut u8,
    bytes: usize,
    context: Arc<CudaContext>,
}

// SAFETY: it owns what `start` points to.
unsafe impl Send for HostMemory {}

impl AsRef<[u8]> for HostMemory {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: its own bytes, zeroed when they were made; who starts a copy keeps away from them until it is done
        // (`Driver::fetch`, `Driver::push`).
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }
}

impl AsMut<[u8]> for HostMemory {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_err() {
            return;
        }
        // An error in either is one that earlier work left, and the next call reports it.
        let _ = result::ctx::synchronize();
        // SAFETY: it came from malloc_host, and no copy is under way any more.
        let _ = unsafe { result::free_host(self.start.cast()) };
    }
}

/// A point on a stream.
pub struct Mark {
    event: sys::CUevent,
    context: Arc<CudaContext>,
}

// SAFETY: handles of the driver may be used from any thread, one at a time.
unsafe impl Send for Mark {}

impl Drop for Mark {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: made once, destroyed once; the driver keeps what a stream still waits for. There is nothing to do about an error.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}

impl Device {
    pub(super) fn pinned(&self, bytes: usize) -> Result<HostMemory, BackendError> {
        self.bind()?;
        // SAFETY: written before it is read.
        let start = unsafe { result::malloc_host(bytes.max(1), 0) };
        let start = start.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => BackendError::OutOfMemory {
                what: "page-locked memory of the host".to_owned(),
                bytes,
                device: "cuda",
            },
            _ => refused("page-locked memory of the host")(error),
        })?;
        let start = start.cast::<u8>();
        // SAFETY: the driver gave `bytes` bytes.
        unsafe { start.write_bytes(0, bytes) };
        Ok(HostMemory {
            start,
            bytes,
            context: Arc::clone(&self.context),
        })
    }

    /// # Safety
    /// As `Driver::fetch`.
    pub(super) unsafe fn copy_back(
        &self,
        from: &DeviceMemory,
        into: &mut HostMemory,
        bytes: usize,
    ) -> Result<(), BackendError> {
        assert!(bytes <= from.bytes, "past the end of device memory");
        let into = &mut into.as_mut()[..bytes];
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: within both; the caller keeps away from `into`, which waits before it is freed.
        let copied =
            unsafe { result::memcpy_dtoh_async(into, from.address, self.stream.cu_stream()) };
        copied.map_err(refused("copying from the device"))
    }

    /// # Safety
    /// As `Driver::push`.
    pub(super) unsafe fn copy_in(
        &self,
        to: &mut DeviceMemory,
        offset: usize,
        from: &HostMemory,
        bytes: usize,
    ) -> Result<Mark, BackendError> {
        assert!(offset + bytes <= to.bytes, "past the end of device memory");
        let from = &from.as_ref()[..bytes];
        if bytes > 0 {
            self.bind()?;
            let (to, stream) = (to.address + offset as u64, self.copies.cu_stream());
            // SAFETY: within both; the caller leaves `from` as it is, which waits before it is freed.
            let copied = unsafe { result::memcpy_htod_async(to, from, stream) };
            copied.map_err(refused("copying to the device"))?;
        }
        self.mark_copies()
    }

    fn mark_copies(&self) -> Result<Mark, BackendError> {
        self.bind()?;
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let event = result::event::create(flags).map_err(refused("a mark among the copies"))?;
        let mark = Mark {
            event,
            context: Arc::clone(&self.context),
        };
        // SAFETY: both are live.
        let recorded = unsafe { result::event::record(event, self.copies.cu_stream()) };
        recorded.map_err(refused("a mark among the copies"))?;
        Ok(mark)
    }

    pub(super) fn wait_for(&self, mark: &Mark) -> Result<(), BackendError> {
        self.bind()?;
        // SAFETY: a live event.
        let reached = unsafe { result::event::synchronize(mark.event) };
        reached.map_err(refused("copying to the device"))
    }

    pub(super) fn join_copies(&self) -> Result<(), BackendError> {
        let mark = self.mark_copies()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both are live; the stream keeps what it waits for.
        let waits =
            unsafe { result::stream::wait_event(self.stream.cu_stream(), mark.event, flags) };
        waits.map_err(refused("waiting for copies"))
    }
}
