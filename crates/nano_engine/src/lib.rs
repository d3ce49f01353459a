//! The composition root: a model directory becomes a running engine.
//!
//! Two threads serve all requests. The engine thread owns scheduler, cache and executor and turns
//! requests into tokens; the output thread turns tokens into text and hands it to one
//! [`RequestStream`] per request. The way back is a single command: abort.

mod engine;
mod engine_thread;
mod error;
mod output_thread;
mod stream;

pub use engine::Engine;
pub use error::{Error, Result};
pub use nano_text::TextOptions;
pub use stream::{Delta, Finish, RequestStream, StopReason, Timing};
