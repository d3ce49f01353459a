//! Everything that a user of the engine can be told.

use nano_core::RequestId;

/// The result of `nano_engine`.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an engine did not start, a request was refused or a stream broke off.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A request or limit that does not hold.
    #[error(transparent)]
    Core(#[from] nano_core::Error),
    /// Text that cannot become tokens, or the other way round.
    #[error(transparent)]
    Text(#[from] nano_text::Error),
    /// A text that is too long however it is encoded.
    #[error(
        "prompt of {num_bytes} bytes has at least {least} tokens, but max_model_len is \
         {max_model_len}"
    )]
    TextTooLong {
        /// Bytes of the text.
        num_bytes: usize,
        /// Its tokens, if each were the longest one.
        least: usize,
        /// Tokens of prompt and output together.
        max_model_len: u32,
    },
    /// Logits that there is no memory for.
    #[error(
        "logits of {num_tokens} tokens take {needed_gib:.3} GiB while they are handed over, but \
         {free_gib:.3} GiB of memory are free"
    )]
    LogitsTooLarge {
        /// Tokens of the request.
        num_tokens: usize,
        /// What the logits take.
        needed_gib: f64,
        /// What the process may still take.
        free_gib: f64,
    },
    /// A model that cannot be loaded.
    #[error(transparent)]
    Model(#[from] nano_model::Error),
    /// An id that no request has had.
    #[error("there is no request {id:?}")]
    UnknownRequest {
        /// What was given.
        id: String,
    },
    /// The engine was closed by its owner.
    #[error("the engine is closed")]
    EngineClosed,
    /// The engine ended because a step failed.
    #[error("the engine has failed: {message}")]
    EngineFailed {
        /// What the executor said.
        message: String,
    },
    /// One request's text could not be made; no other request is touched.
    #[error("the text of request {id} could not be made: {message}")]
    TextFailed {
        /// The request.
        id: RequestId,
        /// What the tokenizer said.
        message: String,
    },
    /// The engine's threads live in the process that made it.
    #[error(
        "the engine belongs to process {owner} and cannot be used after a fork, in process {here}"
    )]
    UsedAfterFork {
        /// The process that made the engine.
        owner: u32,
        /// The present process.
        here: u32,
    },
    /// The operating system gave no thread.
    #[error("could not start a thread: {0}")]
    Thread(#[from] std::io::Error),
}

impl Error {
    /// A stable word for HTTP, metrics and Python.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Core(error) => error.code(),
            Self::Text(error) => error.code(),
            Self::Model(error) => error.code(),
            Self::TextTooLong { .. } => "prompt_too_long",
            Self::LogitsTooLarge { .. } => "out_of_memory",
            Self::UnknownRequest { .. } => "unknown_request",
            Self::EngineClosed => "engine_closed",
            Self::EngineFailed { .. } => "engine_failed",
            Self::TextFailed { .. } => "text_failed",
            Self::UsedAfterFork { .. } => "used_after_fork",
            Self::Thread(_) => "thread_failed",
        }
    }
}
