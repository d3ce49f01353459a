//! What runs next.
//!
//! `nano_core` knows token ids, blocks and limits. It knows no tensors, no device, no text, no
//! Python and no network, so it builds and tests in seconds and its behaviour can be read and
//! proved without any of them.
//!
//! Modules come in levels, and a module imports only from lower ones:
//! 0. plain data: [`error`], [`ids`], [`sampling_params`], [`request`], [`step`];
//! 1. state and the seam to the hardware: [`sequence`], [`kv_cache`], [`executor`];
//! 2. decisions: [`scheduler`];
//! 3. the loop: [`engine_core`].

pub mod engine_core;
pub mod error;
pub mod executor;
pub mod ids;
pub mod kv_cache;
pub mod request;
pub mod sampling_params;
pub mod scheduler;
pub mod sequence;
pub mod step;

pub use engine_core::EngineCore;
pub use error::{Error, Result};
pub use executor::{Capacity, Executor};
pub use ids::{BlockId, RequestId, SequenceId, TokenId};
pub use request::{Request, RequestKind, RequestLimits};
pub use sampling_params::SamplingParams;
pub use scheduler::{Scheduler, SchedulerConfig};
pub use step::{FinishReason, ScheduleOutput, TokenEvent};
