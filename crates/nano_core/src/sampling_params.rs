//! How the next token is chosen and when a sequence ends, as far as token ids go.
//!
//! Stop strings are text and live with the output side of the engine.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::ids::TokenId;

/// Sampling of one request: vLLM's names and defaults.
///
/// A token is the argmax of `logit / temperature + gumbel` over the tokens that `top_k`, `top_p`
/// and `min_p` leave, where the noise is a function of seed, position and token id alone: what
/// else is in the batch plays no part.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 chooses the largest logit, the lowest token id on a tie.
    pub temperature: f64,
    /// The smallest set of tokens whose probability reaches this is kept; in (0, 1].
    pub top_p: f64,
    /// The number of most likely tokens kept; `None` keeps all.
    pub top_k: Option<u32>,
    /// Tokens below this share of the most likely token's probability are dropped; in [0, 1].
    pub min_p: f64,
    /// The key of the noise; `None` derives it from the engine's seed and the request's number.
    pub seed: Option<u64>,
    /// Tokens that end the sequence beside the model's end-of-sequence tokens.
    pub stop_token_ids: Arc<[TokenId]>,
    /// Whether the model's end-of-sequence tokens are ordinary tokens.
    pub ignore_eos: bool,
    /// Tokens generated at most.
    pub max_tokens: u32,
    /// Tokens generated before an end-of-sequence or stop token may be chosen.
    pub min_tokens: u32,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: None,
            min_p: 0.0,
            seed: None,
            stop_token_ids: Arc::from([]),
            ignore_eos: false,
            max_tokens: 16,
            min_tokens: 0,
        }
    }
}

impl SamplingParams {
    /// Checks every range.
    ///
    /// # Errors
    /// [`Error::InvalidSamplingParam`] for the first value outside its range.
    pub fn validate(&self) -> Result<()> {
        let check = |ok: bool, name, range, value: String| {
            if ok { Ok(()) } else { Err(Error::InvalidSamplingParam { name, range, value }) }
        };
        let Self { temperature, top_p, top_k, min_p, max_tokens, min_tokens, .. } = *self;
        check(
            temperature.is_finite() && temperature >= 0.0,
            "temperature",
            "finite and at least 0",
            temperature.to_string(),
        )?;
        check(top_p > 0.0 && top_p <= 1.0, "top_p", "in (0, 1]", top_p.to_string())?;
        check(top_k != Some(0), "top_k", "-1 (all tokens) or at least 1", "0".to_owned())?;
        check((0.0..=1.0).contains(&min_p), "min_p", "in [0, 1]", min_p.to_string())?;
        check(max_tokens >= 1, "max_tokens", "at least 1", max_tokens.to_string())?;
        check(
            min_tokens <= max_tokens,
            "min_tokens",
            "at most max_tokens",
            format!("{min_tokens} with max_tokens {max_tokens}"),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(params: &SamplingParams) -> String {
        params.validate().unwrap_err().to_string()
    }

    #[test]
    fn the_defaults_are_valid_and_those_of_vllm() {
        let params = SamplingParams::default();
        params.validate().unwrap();
        let SamplingParams { temperature, top_p, top_k, min_p, seed, .. } = params;
        assert_eq!((temperature, top_p, top_k, min_p, seed), (1.0, 1.0, None, 0.0, None));
        assert_eq!((params.max_tokens, params.min_tokens, params.ignore_eos), (16, 0, false));
        assert!(params.stop_token_ids.is_empty());
    }

    #[test]
    fn the_ends_of_every_range_are_valid() {
        let smallest = SamplingParams {
            temperature: 0.0,
            top_p: f64::MIN_POSITIVE,
            top_k: Some(1),
            max_tokens: 1,
            ..SamplingParams::default()
        };
        let largest = SamplingParams {
            temperature: f64::MAX,
            top_k: Some(u32::MAX),
            min_p: 1.0,
            max_tokens: u32::MAX,
            min_tokens: u32::MAX,
            ..SamplingParams::default()
        };
        smallest.validate().unwrap();
        largest.validate().unwrap();
    }

    #[test]
    fn a_temperature_below_zero_or_not_finite_is_refused() {
        for (temperature, shown) in
            [(-0.5, "-0.5"), (f64::NAN, "NaN"), (f64::INFINITY, "inf"), (-1e-50, "-0.0000")]
        {
            let params = SamplingParams { temperature, ..SamplingParams::default() };
            let start = format!("temperature must be finite and at least 0, got {shown}");
            assert!(message(&params).starts_with(&start), "{}", message(&params));
        }
    }

    #[test]
    fn a_top_p_outside_its_range_is_refused() {
        for (top_p, shown) in
            [(0.0, "0"), (1.000_000_01, "1.00000001"), (-1.0, "-1"), (f64::NAN, "NaN")]
        {
            let params = SamplingParams { top_p, ..SamplingParams::default() };
            assert_eq!(message(&params), format!("top_p must be in (0, 1], got {shown}"));
        }
    }

    #[test]
    fn a_top_k_of_zero_is_refused() {
        let params = SamplingParams { top_k: Some(0), ..SamplingParams::default() };
        assert_eq!(message(&params), "top_k must be -1 (all tokens) or at least 1, got 0");
    }

    #[test]
    fn a_min_p_outside_its_range_is_refused() {
        for (min_p, shown) in [(-0.25, "-0.25"), (1.25, "1.25"), (f64::NAN, "NaN")] {
            let params = SamplingParams { min_p, ..SamplingParams::default() };
            assert_eq!(message(&params), format!("min_p must be in [0, 1], got {shown}"));
        }
    }

    #[test]
    fn a_max_tokens_of_zero_is_refused() {
        let params = SamplingParams { max_tokens: 0, ..SamplingParams::default() };
        assert_eq!(message(&params), "max_tokens must be at least 1, got 0");
    }

    #[test]
    fn a_min_tokens_above_max_tokens_is_refused() {
        let params = SamplingParams { max_tokens: 4, min_tokens: 5, ..SamplingParams::default() };
        assert_eq!(
            message(&params),
            "min_tokens must be at most max_tokens, got 5 with max_tokens 4"
        );
    }
}
