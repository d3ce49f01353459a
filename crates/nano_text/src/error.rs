//! Everything that can go wrong between text and token ids.

use std::io;
use std::path::{Path, PathBuf};

/// The result of `nano_text`.
pub type Result<T> = std::result::Result<T, Error>;

/// Why text could not become token ids, or token ids text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Text was given, but the model directory has no tokenizer at all.
    #[error(
        "model directory {} has no tokenizer.json: give token ids instead of text",
        .dir.display()
    )]
    TokenizerMissing {
        /// The model directory.
        dir: PathBuf,
    },
    /// Text was given, but the model directory has a tokenizer only in sentencepiece's own format.
    #[error(
        "model directory {} has tokenizer.model but no tokenizer.json: convert it with \
         transformers' save_pretrained, or give token ids instead of text",
        .dir.display()
    )]
    TokenizerUnsupported {
        /// The model directory.
        dir: PathBuf,
    },
    /// The file is there but cannot be read.
    #[error("cannot read {}: {source}", .path.display())]
    TokenizerUnreadable {
        /// The tokenizer file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is no tokenizer.
    #[error("{} is not a valid tokenizer: {reason}", .path.display())]
    TokenizerInvalid {
        /// The tokenizer file.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// The tokenizer could not encode a text.
    #[error("cannot encode a text of {num_bytes} bytes: {reason}")]
    EncodeFailed {
        /// The length of the text.
        num_bytes: usize,
        /// What the tokenizer said.
        reason: String,
    },
    /// The tokenizer could not decode tokens.
    #[error("cannot decode {num_tokens} tokens: {reason}")]
    DecodeFailed {
        /// How many were decoded together.
        num_tokens: usize,
        /// What the tokenizer said.
        reason: String,
    },
    /// A stop string without a single character, which would match everywhere.
    #[error("stop must hold no empty string, got one at position {position}")]
    EmptyStop {
        /// Its index in the list.
        position: usize,
    },
    /// Stop strings for a request whose tokens are not decoded.
    #[error("stop has {num_stops} strings, but there is no tokenizer to find them with")]
    StopWithoutTokenizer {
        /// How many were given.
        num_stops: usize,
    },
}

impl Error {
    /// Why `dir`, for which [`Tokenizer::from_dir`](crate::Tokenizer::from_dir) gave `None`, takes
    /// no text: the answer to whoever submits some.
    pub fn no_tokenizer(dir: &Path) -> Self {
        let dir = dir.to_path_buf();
        if dir.join("tokenizer.model").exists() {
            Self::TokenizerUnsupported { dir }
        } else {
            Self::TokenizerMissing { dir }
        }
    }

    /// The stable word for HTTP answers, metrics and Python.
    pub fn code(&self) -> &'static str {
        match self {
            Self::TokenizerMissing { .. } => "tokenizer_missing",
            Self::TokenizerUnsupported { .. } => "tokenizer_unsupported",
            Self::TokenizerUnreadable { .. } => "tokenizer_unreadable",
            Self::TokenizerInvalid { .. } => "tokenizer_invalid",
            Self::EncodeFailed { .. } => "encode_failed",
            Self::DecodeFailed { .. } => "decode_failed",
            Self::EmptyStop { .. } | Self::StopWithoutTokenizer { .. } => "invalid_sampling_params",
        }
    }
}
