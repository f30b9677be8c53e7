//! Work that the driver has recorded from the stream.

use std::sync::Arc;

use cudarc::driver::{CudaContext, result, sys};

use super::super::BackendError;
use super::{Device, refused};

/// A recording that is ready to run.
pub struct Graph {
    exec: sys::CUgraphExec,
    context: Arc<CudaContext>,
}

// SAFETY: handles of the driver may be used from any thread, one at a time.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: made once, destroyed once; the driver keeps what still runs. There is nothing to do about an error.
            let _ = unsafe { result::graph::exec_destroy(self.exec) };
        }
    }
}

impl Device {
    pub(super) fn begin_graph(&self) -> Result<(), BackendError> {
        self.bind()?;
        // Of this thread alone: another device's thread may do as it likes.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: our own stream.
        let begun = unsafe { result::stream::begin_capture(self.stream.cu_stream(), mode) };
        begun.map_err(refused("recording a step"))
    }

    pub(super) fn end_graph(&self) -> Result<Graph, BackendError> {
        self.bind()?;
        let stream = self.stream.cu_stream();
        // SAFETY: our own stream, which records.
        let recorded = unsafe { result::stream::end_capture(stream) };
        let graph = recorded.map_err(refused("a recorded step"))?;
        // SAFETY: the recording is live until it is destroyed, once; what is made of it stands alone.
        let exec = unsafe {
            let made = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let destroyed = result::graph::destroy(graph);
            made.and_then(|exec| destroyed.map(|()| exec))
        };
        let graph = Graph {
            exec: exec.map_err(refused("making a recorded step ready"))?,
            context: Arc::clone(&self.context),
        };
        // Now, not at the first step that needs it.
        // SAFETY: both are live.
        let uploaded = unsafe { result::graph::upload(graph.exec, stream) };
        uploaded.map_err(refused("a recorded step's room on the device"))?;
        Ok(graph)
    }

    pub(super) fn run_graph(&self, graph: &Graph) -> Result<(), BackendError> {
        self.bind()?;
        // SAFETY: both are live; the caller of `Driver::replay` answers for the addresses.
        let started = unsafe { result::graph::launch(graph.exec, self.stream.cu_stream()) };
        started.map_err(refused("replaying a step"))
    }
}
