//! The tokenizer of a model, read from its `tokenizer.json`.
//!
//! It encodes and decodes whole texts and never keeps state between calls; token by token is the
//! [`detokenizer`](crate::detokenizer)'s work.

use std::fs;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use nano_core::error::panic_message;
use nano_core::ids::TokenId;

use crate::error::{Error, Result};
use crate::token_bytes::max_token_bytes;

const CACHED_WORDS: usize = 1000;

/// A tokenizer that panics refuses one text, and its caller goes on.
fn caught<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(outcome) => outcome.map_err(|reason| reason.to_string()),
        Err(panic) => Err(format!("a panic: {}", panic_message(panic.as_ref()))),
    }
}

/// Text to token ids and back; a clone is another handle to the same tokenizer.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    max_token_bytes: Option<usize>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model directory, `None` if there is none.
    ///
    /// A model without it loads all the same and takes token ids; [`Error::no_tokenizer`] is the
    /// answer to text.
    ///
    /// # Errors
    /// [`Error::TokenizerUnreadable`] or [`Error::TokenizerInvalid`] if the file is there but no
    /// good.
    pub fn from_dir(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join("tokenizer.json");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::TokenizerUnreadable { path, source }),
        };
        Self::from_bytes(&bytes)
            .map(Some)
            .map_err(|reason| Error::TokenizerInvalid { path, reason: reason.to_string() })
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> tokenizers::Result<Self> {
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes)?;
        // Many checkpoints carry the settings of their training here; a prompt is taken as it is.
        inner.with_truncation(None)?.with_padding(None);
        // Of words, one for each thread that encodes, which keeps it until it ends.
        let mut model = inner.get_model().clone();
        model.resize_cache(CACHED_WORDS);
        inner.with_model(model);
        Ok(Self { max_token_bytes: max_token_bytes(&inner), inner: Arc::new(inner) })
    }

    /// The tokens of a text, with those that the post-processor adds (BOS) if
    /// `add_special_tokens`. Nothing is truncated or padded.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<TokenId>> {
        let encoding = caught(|| self.inner.encode_fast(text, add_special_tokens))
            .map_err(|reason| Error::EncodeFailed { num_bytes: text.len(), reason })?;
        Ok(encoding.get_ids().iter().copied().map(TokenId).collect())
    }

    /// How many tokens a text of so many bytes has at least; 0 if this tokenizer does not tell.
    pub fn min_num_tokens(&self, num_bytes: usize) -> usize {
        self.max_token_bytes.map_or(0, |most| num_bytes.div_ceil(most))
    }

    /// The text of tokens; ids outside the vocabulary have none.
    pub fn decode(&self, tokens: &[TokenId], skip_special_tokens: bool) -> Result<String> {
        let ids: Vec<u32> = tokens.iter().map(|token| token.0).collect();
        self.decode_ids(&ids, skip_special_tokens)
    }

    pub(crate) fn decode_ids(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        caught(|| self.inner.decode(ids, skip_special_tokens))
            .map_err(|reason| Error::DecodeFailed { num_tokens: ids.len(), reason })
    }

    /// The number of different tokens, added ones included. The model may have more embeddings.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The id of a token as the vocabulary spells it.
    pub fn token_to_id(&self, token: &str) -> Option<TokenId> {
        self.inner.token_to_id(token).map(TokenId)
    }

    /// The token as the vocabulary spells it, which is not its text.
    pub fn id_to_token(&self, token: TokenId) -> Option<String> {
        self.inner.id_to_token(token.0)
    }

    /// Whether `decode` looks at the token at all.
    pub(crate) fn is_decoded(&self, token: TokenId, skip_special_tokens: bool) -> bool {
        self.inner.id_to_token(token.0).is_some_and(|text| {
            !skip_special_tokens || !self.inner.get_added_vocabulary().is_special_token(&text)
        })
    }
}

#[cfg(test)]
mod tests {
    use tempfile::tempdir;

    use super::*;
    use crate::fixture;

    #[test]
    fn a_directory_with_tokenizer_json_gives_a_tokenizer() {
        let dir = tempdir().unwrap();
        fs::write(dir.path().join("tokenizer.json"), fixture::metaspace_json()).unwrap();
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap().unwrap();
        assert_eq!(tokenizer.vocab_size(), 3 + 256 + 26 + 7);
    }

    #[test]
    fn a_directory_without_any_tokenizer_gives_none_and_a_reason() {
        let dir = tempdir().unwrap();
        assert!(Tokenizer::from_dir(dir.path()).unwrap().is_none());
        let reason = Error::no_tokenizer(dir.path());
        assert_eq!(reason.code(), "tokenizer_missing");
        assert!(reason.to_string().contains(&dir.path().display().to_string()));
    }

    #[test]
    fn a_directory_with_only_tokenizer_model_gives_none_and_a_hint() {
        let dir = tempdir().unwrap();
        fs::write(dir.path().join("tokenizer.model"), b"\n").unwrap();
        assert!(Tokenizer::from_dir(dir.path()).unwrap().is_none());
        let reason = Error::no_tokenizer(dir.path());
        assert_eq!(reason.code(), "tokenizer_unsupported");
        assert!(reason.to_string().contains("save_pretrained"));
    }

    #[test]
    fn broken_and_unreadable_files_are_errors_that_name_the_path() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        fs::write(&path, b"{").unwrap();
        let error = Tokenizer::from_dir(dir.path()).unwrap_err();
        assert_eq!(error.code(), "tokenizer_invalid");
        assert!(error.to_string().contains(&path.display().to_string()));
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert_eq!(Tokenizer::from_dir(dir.path()).unwrap_err().code(), "tokenizer_unreadable");
    }

    #[test]
    fn bos_is_added_only_when_asked_for() {
        let tokenizer = fixture::metaspace();
        let bos = tokenizer.token_to_id("<s>").unwrap();
        let plain = tokenizer.encode("hello", false).unwrap();
        let with_bos = tokenizer.encode("hello", true).unwrap();
        assert_eq!(with_bos, [&[bos], plain.as_slice()].concat());
        assert_eq!(tokenizer.id_to_token(bos).as_deref(), Some("<s>"));
        assert_eq!(tokenizer.decode(&with_bos, true).unwrap(), "hello");
        assert_eq!(tokenizer.decode(&with_bos, false).unwrap(), "<s> hello");
    }

    #[test]
    fn truncation_and_padding_of_the_file_are_not_applied() {
        let tokenizer = fixture::metaspace();
        assert!(fixture::metaspace_json().contains("\"max_length\":2"));
        assert_eq!(tokenizer.encode("ababababab", false).unwrap().len(), 11);
        assert_eq!(tokenizer.encode("", true).unwrap().len(), 1);
    }

    #[test]
    fn ids_outside_the_vocabulary_have_no_text() {
        let tokenizer = fixture::byte_level();
        let mut tokens = tokenizer.encode("ab", false).unwrap();
        tokens.insert(1, TokenId(1 << 30));
        assert_eq!(tokenizer.decode(&tokens, true).unwrap(), "ab");
    }
}
