//! What the user sent, validated once: past [`Request::new`] a request is valid by its type.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::ids::{RequestId, TokenId};
use crate::sampling_params::SamplingParams;

/// What a request asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum RequestKind {
    /// Tokens that continue the prompt.
    Generate(SamplingParams),
    /// The logits at every position of the prompt, and no new token.
    Logits,
}

/// What a running engine can take; the yardstick of [`Request::new`].
#[derive(Clone, Debug)]
pub struct RequestLimits {
    /// Token ids are below this.
    pub vocab_size: u32,
    /// Tokens of prompt and output together.
    pub max_model_len: u32,
    /// Blocks of the KV cache.
    pub num_blocks: u32,
    /// Token slots of a block.
    pub block_size: u32,
    /// The model's end-of-sequence tokens.
    pub eos_token_ids: Arc<[TokenId]>,
    /// What the seeds of unseeded requests derive from.
    pub seed: u64,
}

/// A validated request.
#[derive(Clone, Debug)]
pub struct Request {
    pub(crate) id: RequestId,
    pub(crate) prompt: Vec<TokenId>,
    pub(crate) params: Arc<SamplingParams>,
    pub(crate) wants_logits: bool,
    pub(crate) seed: u64,
    pub(crate) max_tokens: u32,
    pub(crate) eos_token_ids: Arc<[TokenId]>,
    pub(crate) banned_before_min_tokens: Arc<[TokenId]>,
}

impl Request {
    /// Checks `prompt` and `kind` against `limits`.
    ///
    /// `max_tokens` is lowered to what `max_model_len` leaves after the prompt, as in vLLM: such a
    /// request ends with [`FinishReason::Length`](crate::FinishReason::Length).
    ///
    /// # Errors
    /// Names the first limit that does not hold, with limit and value.
    pub fn new(
        id: RequestId,
        prompt: Vec<TokenId>,
        kind: RequestKind,
        limits: &RequestLimits,
    ) -> Result<Self> {
        let wants_logits = kind == RequestKind::Logits;
        let params = match kind {
            RequestKind::Generate(params) => params,
            RequestKind::Logits => SamplingParams::default(),
        };
        params.validate()?;
        let prompt_len = prompt.len();
        if prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let outside = prompt.iter().position(|token| token.0 >= limits.vocab_size);
        if let Some(position) = outside {
            let (token, vocab_size) = (prompt[position], limits.vocab_size);
            return Err(Error::TokenOutsideVocabulary { token, position, vocab_size });
        }
        let max_model_len = limits.max_model_len;
        let longest = if wants_logits { max_model_len } else { max_model_len.saturating_sub(1) };
        if prompt_len > longest as usize {
            return Err(Error::PromptTooLong { prompt_len, max_model_len });
        }
        // The last generated token is returned but never run, so it needs no slot.
        let max_tokens = params.max_tokens.min(max_model_len - prompt_len as u32);
        let num_tokens = prompt_len as u32 + max_tokens.saturating_sub(1);
        let num_tokens = if wants_logits { prompt_len as u32 } else { num_tokens };
        let needed_blocks = num_tokens.div_ceil(limits.block_size);
        if needed_blocks > limits.num_blocks {
            let RequestLimits { block_size, num_blocks, .. } = *limits;
            return Err(Error::NeverFits { needed_blocks, num_tokens, block_size, num_blocks });
        }
        let eos_token_ids =
            if params.ignore_eos { Arc::from([]) } else { Arc::clone(&limits.eos_token_ids) };
        let banned_before_min_tokens =
            eos_token_ids.iter().chain(params.stop_token_ids.iter()).copied().collect();
        Ok(Self {
            id,
            prompt,
            wants_logits,
            seed: params.seed.unwrap_or_else(|| derived_seed(limits.seed, id)),
            max_tokens,
            eos_token_ids,
            banned_before_min_tokens,
            params: Arc::new(params),
        })
    }

    /// The id that its events carry.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// The prompt's tokens, at least one.
    pub fn prompt(&self) -> &[TokenId] {
        &self.prompt
    }
}

/// One step of `SplitMix64` over the engine's seed and the request's number, so that neighbours
/// share nothing (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
fn derived_seed(engine_seed: u64, id: RequestId) -> u64 {
    let mut z = engine_seed.wrapping_add(id.0.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
