//! Work captured once and replayed with one call.

use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::{Device, Error, Result};

/// A captured sequence of launches and copies. It belongs to the thread that made it, and the
/// memory that it names must outlive it.
pub struct Graph {
    graph: CudaGraph,
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Graph")
    }
}

impl Graph {
    /// Captures what `enqueue` puts on the device's stream; none of it runs.
    ///
    /// `enqueue` must not allocate, wait or copy from pageable memory: any of it ends the capture
    /// with an error. Other threads may do as they like.
    pub fn capture(device: &Device, enqueue: impl FnOnce() -> Result<()>) -> Result<Self> {
        let stream = device.stream();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let enqueued = enqueue();
        // Always ended: a stream left in capture could do nothing else.
        let captured = stream.end_capture(CUgraphInstantiate_flags(0));
        enqueued?;
        let graph = captured?.ok_or_else(|| Error::Driver("the captured graph is empty".into()))?;
        Ok(Self { graph })
    }

    /// Enqueues everything captured.
    pub fn launch(&self) -> Result<()> {
        Ok(self.graph.launch()?)
    }
}
