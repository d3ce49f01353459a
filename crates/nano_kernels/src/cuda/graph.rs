//! Work captured once and replayed with one call.

use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::{Device, Error};

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
    pub fn capture<E: From<Error>>(
        device: &Device,
        enqueue: impl FnOnce() -> Result<(), E>,
    ) -> Result<Self, E> {
        let stream = device.stream();
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(Error::from)?;
        let enqueued = enqueue();
        // Always ended: a stream left in capture could do nothing else.
        let captured = stream.end_capture(CUgraphInstantiate_flags(0)).map_err(Error::from);
        enqueued?;
        let graph = captured?.ok_or_else(|| Error::Driver("the captured graph is empty".into()))?;
        Ok(Self { graph })
    }

    /// Enqueues everything captured.
    pub fn launch(&self) -> super::Result<()> {
        Ok(self.graph.launch()?)
    }
}
