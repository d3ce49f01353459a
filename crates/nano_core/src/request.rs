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
        let vocab_size = limits.vocab_size;
        let lists = [("prompt", &prompt[..]), ("stop_token_ids", &params.stop_token_ids[..])];
        for (list, tokens) in lists {
            if let Some(position) = tokens.iter().position(|token| token.0 >= vocab_size) {
                let token = tokens[position];
                return Err(Error::TokenOutsideVocabulary { list, token, position, vocab_size });
            }
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
            banned_tokens(&eos_token_ids, &params.stop_token_ids, vocab_size);
        let nothing_is_left = banned_before_min_tokens.len() == vocab_size as usize;
        if params.min_tokens > 0 && nothing_is_left {
            let (name, range) = ("min_tokens", "0 when every token of the vocabulary stops");
            let value = params.min_tokens.to_string();
            return Err(Error::InvalidSamplingParam { name, range, value });
        }
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
}

/// The tokens that end a sequence, each once. A config may name an end-of-sequence token outside the
/// vocabulary: it can never be sampled, so there is nothing to ban, and no executor has to guard its
/// bans against it.
fn banned_tokens(eos: &[TokenId], stop: &[TokenId], vocab_size: u32) -> Arc<[TokenId]> {
    let known = eos.iter().chain(stop).copied().filter(|token| token.0 < vocab_size);
    let mut banned: Vec<_> = known.collect();
    banned.sort_unstable();
    banned.dedup();
    banned.into()
}

/// One step of `SplitMix64` over the engine's seed and the request's number, so that neighbours
/// share nothing (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
fn derived_seed(engine_seed: u64, id: RequestId) -> u64 {
    let mut z = engine_seed.wrapping_add(id.0.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two tokens of ten end a sequence; 12 tokens in all; 4 blocks of 3.
    fn limits() -> RequestLimits {
        RequestLimits {
            vocab_size: 10,
            max_model_len: 12,
            num_blocks: 4,
            block_size: 3,
            eos_token_ids: Arc::from([TokenId(8), TokenId(2)]),
            seed: 7,
        }
    }

    fn prompt(len: usize) -> Vec<TokenId> {
        vec![TokenId(1); len]
    }

    fn generate(max_tokens: u32) -> SamplingParams {
        SamplingParams { max_tokens, ..SamplingParams::default() }
    }

    fn request(len: usize, params: SamplingParams, limits: &RequestLimits) -> Result<Request> {
        Request::new(RequestId(3), prompt(len), RequestKind::Generate(params), limits)
    }

    fn logits(len: usize, limits: &RequestLimits) -> Result<Request> {
        Request::new(RequestId(3), prompt(len), RequestKind::Logits, limits)
    }

    fn message(result: Result<Request>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn a_valid_request_keeps_id_and_prompt() {
        let request = request(5, generate(4), &limits()).unwrap();
        assert_eq!((request.id, &request.prompt), (RequestId(3), &prompt(5)));
        assert!(!request.wants_logits);
        assert!(logits(5, &limits()).unwrap().wants_logits);
    }

    #[test]
    fn an_empty_prompt_is_refused() {
        assert_eq!(request(0, generate(1), &limits()).unwrap_err(), Error::EmptyPrompt);
        assert_eq!(logits(0, &limits()).unwrap_err(), Error::EmptyPrompt);
    }

    #[test]
    fn invalid_sampling_parameters_are_refused() {
        assert_eq!(
            message(request(1, generate(0), &limits())),
            "max_tokens must be at least 1, got 0"
        );
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_refused_by_its_position() {
        let kind = || RequestKind::Generate(generate(1));
        let with_last = |last| vec![TokenId(0), TokenId(9), TokenId(last)];
        assert!(Request::new(RequestId(0), with_last(9), kind(), &limits()).is_ok());
        assert_eq!(
            message(Request::new(RequestId(0), with_last(10), kind(), &limits())),
            "prompt token 10 at position 2 is outside the vocabulary of 10"
        );
    }

    #[test]
    fn a_prompt_must_leave_room_for_one_token_unless_only_logits_are_wanted() {
        assert!(request(11, generate(1), &limits()).is_ok());
        assert_eq!(
            message(request(12, generate(1), &limits())),
            "prompt has 12 tokens, but max_model_len is 12 and one more has to be generated"
        );
        assert_eq!(
            message(request(13, generate(1), &limits())),
            "prompt has 13 tokens, but max_model_len is 12"
        );
        assert!(logits(12, &limits()).is_ok());
        assert_eq!(message(logits(13, &limits())), "prompt has 13 tokens, but max_model_len is 12");
    }

    #[test]
    fn a_max_model_len_of_zero_refuses_every_prompt() {
        let limits = RequestLimits { max_model_len: 0, ..limits() };
        let expected = "prompt has 1 tokens, but max_model_len is 0";
        assert_eq!(message(request(1, generate(1), &limits)), expected);
        assert_eq!(message(logits(1, &limits)), expected);
    }

    #[test]
    fn max_tokens_is_lowered_to_what_max_model_len_leaves() {
        for (prompt_len, max_tokens, expected) in [(5, 4, 4), (5, 7, 7), (5, 8, 7), (11, 99, 1)] {
            let request = request(prompt_len, generate(max_tokens), &limits()).unwrap();
            assert_eq!(request.max_tokens, expected, "{prompt_len} + {max_tokens}");
        }
    }

    #[test]
    fn a_request_fits_up_to_the_last_slot_and_not_one_token_further() {
        let limits = RequestLimits { num_blocks: 3, ..limits() };
        // 9 slots: the last generated token needs none.
        assert!(request(5, generate(5), &limits).is_ok());
        assert!(request(9, generate(1), &limits).is_ok());
        assert_eq!(
            message(request(5, generate(6), &limits)),
            "request needs 4 KV cache blocks (10 tokens in blocks of 3), but num_blocks is 3"
        );
        assert_eq!(
            message(request(10, generate(1), &limits)),
            "request needs 4 KV cache blocks (10 tokens in blocks of 3), but num_blocks is 3"
        );
        // What max_model_len cuts off does not count: 8 + 4 tokens of which 11 are kept.
        assert_eq!(
            message(request(8, generate(99), &limits)),
            "request needs 4 KV cache blocks (11 tokens in blocks of 3), but num_blocks is 3"
        );
    }

    #[test]
    fn logits_need_slots_for_the_prompt_alone() {
        let limits = RequestLimits { num_blocks: 3, ..limits() };
        assert!(logits(9, &limits).is_ok());
        assert_eq!(
            message(logits(10, &limits)),
            "request needs 4 KV cache blocks (10 tokens in blocks of 3), but num_blocks is 3"
        );
    }

    #[test]
    fn a_seed_is_kept_and_a_missing_one_derives_from_engine_and_request() {
        let seed = |id, params, engine_seed| {
            let limits = RequestLimits { seed: engine_seed, ..limits() };
            Request::new(RequestId(id), prompt(1), RequestKind::Generate(params), &limits)
                .unwrap()
                .seed
        };
        let seeded = SamplingParams { seed: Some(42), ..generate(1) };
        assert_eq!(seed(0, seeded.clone(), 0), 42);
        assert_eq!(seed(5, seeded, 9), 42);
        // The first outputs of SplitMix64 with seed 0, as its authors publish them.
        assert_eq!(seed(0, generate(1), 0), 0xE220_A839_7B1D_CDAF);
        assert_eq!(seed(1, generate(1), 0), 0x6E78_9E6A_A1B9_65F4);
        assert_ne!(seed(0, generate(1), 0), seed(0, generate(1), 1));
        assert_eq!(seed(3, generate(1), 5), seed(3, generate(1), 5));
    }

    #[test]
    fn eos_counts_unless_it_is_ignored_and_stop_tokens_always_do() {
        let params = SamplingParams {
            stop_token_ids: Arc::from([TokenId(5), TokenId(2), TokenId(5)]),
            ..generate(4)
        };
        let strict = request(1, params.clone(), &limits()).unwrap();
        assert_eq!(*strict.eos_token_ids, [TokenId(8), TokenId(2)]);
        assert_eq!(*strict.banned_before_min_tokens, [TokenId(2), TokenId(5), TokenId(8)]);
        let ignoring = SamplingParams { ignore_eos: true, ..params };
        let ignoring = request(1, ignoring, &limits()).unwrap();
        assert!(ignoring.eos_token_ids.is_empty());
        assert_eq!(*ignoring.banned_before_min_tokens, [TokenId(2), TokenId(5)]);
    }

    #[test]
    fn a_stop_token_outside_the_vocabulary_is_refused_by_its_position() {
        let with_last = |last| SamplingParams {
            stop_token_ids: Arc::from([TokenId(9), TokenId(last)]),
            ..generate(4)
        };
        assert!(request(1, with_last(9), &limits()).is_ok());
        for last in [10, u32::MAX] {
            assert_eq!(
                message(request(1, with_last(last), &limits())),
                format!(
                    "stop_token_ids token {last} at position 1 is outside the vocabulary of 10"
                )
            );
        }
    }

    #[test]
    fn an_end_of_sequence_token_outside_the_vocabulary_bans_nothing() {
        let eos_token_ids = Arc::from([TokenId(10), TokenId(9), TokenId(u32::MAX)]);
        let limits = RequestLimits { eos_token_ids, ..limits() };
        let request = request(1, generate(4), &limits).unwrap();
        assert_eq!(*request.banned_before_min_tokens, [TokenId(9)]);
    }

    #[test]
    fn min_tokens_must_leave_a_token_to_choose() {
        let all_but_one = (0..9).map(TokenId).collect();
        let params = SamplingParams { stop_token_ids: all_but_one, min_tokens: 1, ..generate(2) };
        assert!(request(1, params.clone(), &limits()).is_ok());
        let params = SamplingParams { stop_token_ids: (0..10).map(TokenId).collect(), ..params };
        assert_eq!(
            message(request(1, params.clone(), &limits())),
            "min_tokens must be 0 when every token of the vocabulary stops, got 1"
        );
        assert!(request(1, SamplingParams { min_tokens: 0, ..params }, &limits()).is_ok());
    }
}
