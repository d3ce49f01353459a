//! Token ids to text and back.
//!
//! `nano_text` owns the tokenizer, the decoding of one token after another, and stop strings. It
//! knows no engine, no model and no threads: the engine encodes prompts with it on the caller's
//! thread and drives one [`TextDecoder`] per request on the output thread.

pub mod detokenizer;
pub mod error;
#[cfg(test)]
mod fixture;
pub mod stop;
pub mod text_decoder;
mod token_bytes;
pub mod tokenizer;

pub use detokenizer::IncrementalDetokenizer;
pub use error::{Error, Result};
pub use stop::{StopMatcher, TextStep};
pub use text_decoder::{TextDecoder, TextOptions};
pub use tokenizer::Tokenizer;
