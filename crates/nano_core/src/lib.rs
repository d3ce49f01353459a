//! What runs next.
//!
//! `nano_core` knows token ids, blocks and limits. It knows no tensors, no device, no text, no
//! Python and no network, so it builds and tests in seconds and its behaviour can be read and
//! proved without any of them.
//!
//! From the bottom up, where a module imports only from those before it:
//! 1. plain data: [`ids`], [`error`], [`sampling_params`], [`request`], [`step`];
//! 2. state and the seam to the hardware: [`kv_cache`], [`sequence`], [`executor`];
//! 3. decisions: [`scheduler`];
//! 4. the loop: [`engine_core`].

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
