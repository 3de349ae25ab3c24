//! Work recorded once and launched as a whole.

use super::failed;
use crate::Result;
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, sys};

/// Launches recorded from a stream. They read and write the same places at every launch.
pub(crate) struct Graph(CudaGraph);

// SAFETY: CUDA lets any thread use a graph as long as no two do so at once, and there is no way to use it through a shared
// reference from two threads: `Graph` is not `Sync`.
unsafe impl Send for Graph {}

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
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
        done?;
        match graph.map_err(fail)? {
            Some(graph) => Ok(Self(graph)),
            None => Err(crate::Error::value(what, "work to record", "none")),
        }
    }

    /// Puts the recorded work into the stream it was recorded from.
    ///
    /// # Safety
    /// Every place it reads or writes still exists.
    pub(crate) unsafe fn launch(&self, what: &str) -> Result<()> {
        self.0.launch().map_err(|error| failed(&format!("{what}: launching a graph"), error))
    }
}
