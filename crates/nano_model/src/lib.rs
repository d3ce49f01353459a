//! The model: a directory in Hugging Face's form becomes an executor.
//!
//! [`config`] reads a family's `config.json` into one [`DecoderSpec`], [`weights`] maps the
//! checkpoint, [`decoder`] is the forward pass over the [`Backend`] seam, and [`executor`] runs it
//! for `nano_core`. It schedules nothing and knows no text.

pub mod backend;
pub mod batch;
pub mod config;
pub mod decoder;
pub mod dummy;
pub mod error;
pub mod executor;
pub mod load;
pub mod weights;

pub use backend::{Backend, Dtype};
pub use config::{DecoderSpec, GenerationDefaults, ModelConfig};
pub use error::{Error, Result};
pub use executor::CpuExecutor;
pub use load::{DeviceChoice, ModelInfo, ModelOptions, available_bytes, load};
