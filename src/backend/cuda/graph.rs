//! Work recorded once and launched as a whole.

use super::failed;
use crate::Result;
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DriverError, sys};
use std::sync::Arc;

/// Launches recorded from a stream. They read and write the same places at every launch.
pub(crate) struct Graph {
    ready: sys::CUgraphExec,
    stream: Arc<CudaStream>,
}

// SAFETY: CUDA lets any thread use a graph as long as no two do so at once, and there is no way to use it through a shared
// reference from two threads: `Graph` is not `Sync`.
unsafe impl Send for Graph {}

/// What a recording left, destroyed in time.
struct Recorded(sys::CUgraph);

impl Drop for Recorded {
    fn drop(&mut self) {
        // SAFETY: nobody else has the graph.
        unsafe { sys::cuGraphDestroy(self.0) };
    }
}

impl Recorded {
    fn instantiate(&self) -> std::result::Result<sys::CUgraphExec, DriverError> {
        let mut parameters = sys::CUDA_GRAPH_INSTANTIATE_PARAMS {
            flags: 0,
            hUploadStream: std::ptr::null_mut(),
            hErrNode_out: std::ptr::null_mut(),
            result_out: sys::CUgraphInstantiateResult::CUDA_GRAPH_INSTANTIATE_SUCCESS,
        };
        let mut ready = std::ptr::null_mut();
        // SAFETY: the graph and both places exist.
        unsafe { sys::cuGraphInstantiateWithParams(&raw mut ready, self.0, &raw mut parameters) }.result()?;
        Ok(ready)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.stream.context().bind_to_thread();
        // SAFETY: nobody else has it; a launch that is under way ends first.
        unsafe { sys::cuGraphExecDestroy(self.ready) };
    }
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Graph")
    }
}

impl Graph {
    /// Records what `work` puts into the device's stream, without doing it. `work` must have run before, so that all its
    /// kernels are loaded.
    ///
    /// # Errors
    /// Those of `work`, or a call in it that cannot be recorded.
    pub(crate) fn record(device: &CudaDevice, what: &str, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let stream = device.cuda_stream();
        let fail = |error| failed(&format!("{what}: recording a graph"), error);
        // other threads may go on with what they do
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(fail)?;
        let done = work();
        // ended in any case: a stream left recording would take no other work
        let mut recorded = std::ptr::null_mut();
        // SAFETY: the stream is recording, and the place for the graph exists.
        let ended = unsafe { sys::cuStreamEndCapture(stream.cu_stream(), &raw mut recorded) };
        let recorded = (!recorded.is_null()).then(|| Recorded(recorded));
        done?;
        ended.result().map_err(fail)?;
        let Some(recorded) = recorded else {
            return Err(crate::Error::value(what, "work to record", "none"));
        };
        let ready = recorded.instantiate().map_err(fail)?;
        Ok(Self { ready, stream })
    }

    /// Puts the recorded work into the stream it was recorded from.
    ///
    /// # Safety
    /// Every place it reads or writes still exists.
    pub(crate) unsafe fn launch(&self, what: &str) -> Result<()> {
        let launched = self.stream.context().bind_to_thread().and_then(|()| {
            // SAFETY: the graph is of this context; the rest is the caller's promise.
            unsafe { sys::cuGraphLaunch(self.ready, self.stream.cu_stream()) }.result()
        });
        launched.map_err(|error| failed(&format!("{what}: launching a graph"), error))
    }
}
