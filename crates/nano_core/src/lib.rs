//! What runs next.
//!
//! `nano_core` knows token ids, blocks and limits. It knows no tensors, no device, no text, no
//! Python and no network, so it builds and tests in seconds and its behaviour can be read and
//! proved without any of them.
//!
//! Modules come in levels, and a module imports only from lower ones:
//! 0. plain validated data: [`error`], [`ids`], [`sampling_params`], [`request`];
//! 1. state: [`sequence`], [`kv_cache`];
//! 2. decisions and the seam to the hardware: [`scheduler`], [`executor`];
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

pub use engine_core::EngineCore;
pub use error::{Error, Result};
pub use executor::{Capacity, Executor};
pub use ids::{BlockId, RequestId, SequenceId, TokenId};
pub use request::{Request, RequestKind, RequestLimits};
pub use sampling_params::SamplingParams;
pub use scheduler::{FinishReason, ScheduleOutput, Scheduler, SchedulerConfig, TokenEvent};
