//! The seam to whatever runs the model.

use std::fmt::Debug;

use crate::error::Result;
use crate::step::{SampledRow, ScheduleOutput};

/// What an executor has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Blocks of the KV cache.
    pub num_blocks: u32,
    /// Token slots of a block.
    pub block_size: u32,
    /// Steps that may be launched and not yet collected, at least 1.
    pub max_steps_in_flight: u32,
}

/// Runs steps. Steps are launched ahead and collected in order, so that the host prepares step
/// n + 1 while step n runs.
///
/// At most [`Capacity::max_steps_in_flight`] steps are launched and not collected. An error ends the
/// engine: what the device holds is unknown after it. An executor is built, used and dropped on
/// the engine thread.
pub trait Executor: Debug {
    /// Fixed for the executor's life.
    fn capacity(&self) -> Capacity;

    /// Starts the forward pass and the sampling of `step`.
    fn launch(&mut self, step: &ScheduleOutput) -> Result<()>;

    /// Waits for the oldest step in flight: one row for each sequence whose
    /// [`LogitRows`](crate::step::LogitRows) is not `None`, in the order of the step's sequences.
    fn collect(&mut self) -> Result<Vec<SampledRow>>;
}
