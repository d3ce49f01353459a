//! Everything that can go wrong between a prompt and its tokens, as far as token ids go.

use crate::ids::TokenId;

/// The result of `nano_core`.
pub type Result<T> = std::result::Result<T, Error>;

/// What a panic said.
pub fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

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
    /// A prompt token that the model has no embedding for, or a stop token that it cannot sample.
    #[error(
        "{list} token {token} at position {position} is outside the vocabulary of {vocab_size}"
    )]
    TokenOutsideVocabulary {
        /// "prompt", or the parameter as the user spells it.
        list: &'static str,
        /// The offending token.
        token: TokenId,
        /// Its index in the list.
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
    /// The model gave no number to choose a token by: its weights or its sums are not finite.
    #[error("the logits for position {position} hold no finite number")]
    LogitsNotFinite {
        /// The index that the token would have had.
        position: u32,
    },
    /// The forward pass failed; the state of the device is unknown, and the engine has ended.
    #[error("executor failed: {message}")]
    ExecutorFailed {
        /// What the executor said.
        message: String,
    },
    /// The forward pass was told to end: the engine is being closed.
    #[error("the step was stopped")]
    Stopped,
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
            Self::LogitsNotFinite { .. } => "logits_not_finite",
            Self::ExecutorFailed { .. } => "executor_failed",
            Self::Stopped => "engine_closed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_has_its_word_and_names_limit_and_value() {
        let (name, range) = ("top_p", "in (0, 1]");
        let value = "2".to_owned();
        let cases = [
            (
                Error::InvalidSamplingParam { name, range, value: value.clone() },
                "invalid_sampling_params",
                "top_p must be in (0, 1], got 2",
            ),
            (
                Error::InvalidConfig { name, range, value },
                "invalid_config",
                "top_p must be in (0, 1], got 2",
            ),
            (Error::EmptyPrompt, "empty_prompt", "prompt is empty: at least one token is needed"),
            (
                Error::TokenOutsideVocabulary {
                    list: "prompt",
                    token: TokenId(9),
                    position: 2,
                    vocab_size: 8,
                },
                "token_outside_vocabulary",
                "prompt token 9 at position 2 is outside the vocabulary of 8",
            ),
            (
                Error::PromptTooLong { prompt_len: 9000, max_model_len: 8192 },
                "prompt_too_long",
                "prompt has 9000 tokens, but max_model_len is 8192",
            ),
            (
                Error::PromptTooLong { prompt_len: 8192, max_model_len: 8192 },
                "prompt_too_long",
                "prompt has 8192 tokens, but max_model_len is 8192 and one more has to be generated",
            ),
            (
                Error::NeverFits {
                    needed_blocks: 3,
                    num_tokens: 33,
                    block_size: 16,
                    num_blocks: 2,
                },
                "kv_cache_too_small",
                "request needs 3 KV cache blocks (33 tokens in blocks of 16), but num_blocks is 2",
            ),
            (
                Error::LogitsNotFinite { position: 7 },
                "logits_not_finite",
                "the logits for position 7 hold no finite number",
            ),
            (
                Error::ExecutorFailed { message: "out of memory".to_owned() },
                "executor_failed",
                "executor failed: out of memory",
            ),
        ];
        for (error, code, message) in cases {
            assert_eq!((error.code(), error.to_string().as_str()), (code, message));
        }
    }
}
