//! Everything that can go wrong between a prompt and its tokens, as far as token ids go.

use crate::ids::TokenId;

/// The result of `nano_core`.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a request was refused or a step failed; every message names the limit and the value.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A sampling parameter is outside its range.
    #[error("{name} must be {range}, got {value}")]
    InvalidSamplingParam {
        /// The parameter as the user spells it.
        name: &'static str,
        /// The values that it may take.
        range: &'static str,
        /// What was given.
        value: String,
    },
    /// An engine limit is outside its range.
    #[error("{name} must be {range}, got {value}")]
    InvalidConfig {
        /// The parameter as the user spells it.
        name: &'static str,
        /// The values that it may take.
        range: &'static str,
        /// What was given.
        value: String,
    },
    /// A prompt without a single token.
    #[error("prompt is empty: at least one token is needed")]
    EmptyPrompt,
    /// A prompt token that the model has no embedding for.
    #[error(
        "prompt token {token} at position {position} is outside the vocabulary of {vocab_size}"
    )]
    TokenOutsideVocabulary {
        /// The offending token.
        token: TokenId,
        /// Its index in the prompt.
        position: usize,
        /// Token ids are below this.
        vocab_size: u32,
    },
    /// A prompt that leaves no room for one generated token.
    #[error(
        "prompt has {prompt_len} tokens, but max_model_len is {max_model_len}{}",
        if *prompt_len == *max_model_len as usize { " and one more has to be generated" } else { "" }
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt_len: usize,
        /// Tokens of prompt and output together.
        max_model_len: u32,
    },
    /// A request that would not fit the KV cache even if it ran alone.
    #[error(
        "request needs {needed_blocks} KV cache blocks ({num_tokens} tokens in blocks of \
         {block_size}), but num_blocks is {num_blocks}"
    )]
    NeverFits {
        /// Blocks for prompt and `max_tokens`.
        needed_blocks: u32,
        /// Tokens whose keys and values are kept at the end.
        num_tokens: u32,
        /// Token slots of a block.
        block_size: u32,
        /// Blocks of the whole cache.
        num_blocks: u32,
    },
    /// The forward pass failed; the state of the device is unknown, and the engine has ended.
    #[error("executor failed: {message}")]
    ExecutorFailed {
        /// What the executor said.
        message: String,
    },
}

impl Error {
    /// A stable word for HTTP, metrics and Python.
    pub fn code(&self) -> &'static str {
        match self {
            Self::InvalidSamplingParam { .. } => "invalid_sampling_params",
            Self::InvalidConfig { .. } => "invalid_config",
            Self::EmptyPrompt => "empty_prompt",
            Self::TokenOutsideVocabulary { .. } => "token_outside_vocabulary",
            Self::PromptTooLong { .. } => "prompt_too_long",
            Self::NeverFits { .. } => "kv_cache_too_small",
            Self::ExecutorFailed { .. } => "executor_failed",
        }
    }
}
