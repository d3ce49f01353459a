//! `generation_config.json`: the sampling defaults, and what it asks for in vain.

use nano_core::{Error as CoreError, SamplingParams};
use serde_json::Value;

use super::fields::Fields;
use crate::error::Result;

/// The sampling defaults of `generation_config.json`, used when a request gives no parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// The temperature; 0 when `do_sample` is false.
    pub temperature: Option<f32>,
    /// The nucleus.
    pub top_p: Option<f32>,
    /// The number of tokens kept.
    pub top_k: Option<u32>,
    /// The least share of the best token's probability.
    pub min_p: Option<f32>,
    /// Tokens of the answer at most: `max_new_tokens`.
    pub max_tokens: Option<u32>,
}

pub(super) fn defaults(fields: &Fields<'_>) -> Result<GenerationDefaults> {
    let number = |name: &str| -> Result<Option<f32>> {
        Ok(fields.optional_number(name)?.map(|number| number as f32))
    };
    let is_greedy = fields.optional_bool("do_sample")? == Some(false);
    let temperature = number("temperature")?;
    let defaults = GenerationDefaults {
        temperature: if is_greedy { Some(0.0) } else { temperature },
        top_p: number("top_p")?,
        top_k: top_k(fields)?,
        min_p: number("min_p")?,
        max_tokens: max_tokens(fields)?,
    };
    // Now, or every request without parameters would be refused for what it did not say.
    match sampling_params(&defaults).validate() {
        Err(CoreError::InvalidSamplingParam { name, range, .. }) => {
            let value = fields.get(name).unwrap_or(&Value::Null);
            Err(fields.bad(name, format!("must be {range}, got {value}")))
        }
        _ => Ok(defaults),
    }
}

fn sampling_params(defaults: &GenerationDefaults) -> SamplingParams {
    let neutral = SamplingParams::default();
    SamplingParams {
        temperature: defaults.temperature.unwrap_or(neutral.temperature),
        top_p: defaults.top_p.unwrap_or(neutral.top_p),
        top_k: defaults.top_k,
        min_p: defaults.min_p.unwrap_or(neutral.min_p),
        ..neutral
    }
}

fn top_k(fields: &Fields<'_>) -> Result<Option<u32>> {
    let Some(k) = fields.optional_number("top_k")? else { return Ok(None) };
    if k.fract() != 0.0 || !(-1.0..=f64::from(u32::MAX)).contains(&k) {
        return Err(
            fields.bad("top_k", format!("must be -1 or 0 (all tokens) or a count, got {k}"))
        );
    }
    Ok((k > 0.0).then_some(k as u32))
}

/// Some write a number beyond every length for no limit.
fn max_tokens(fields: &Fields<'_>) -> Result<Option<u32>> {
    match fields.optional_number("max_new_tokens")? {
        Some(count) if count.fract() != 0.0 || count < 1.0 => {
            let reason = format!("must be a whole number of at least 1, got {count}");
            Err(fields.bad("max_new_tokens", reason))
        }
        count => Ok(count.map(|count| count as u32)),
    }
}

/// Keys that change the output in transformers and are not built, and the value that changes nothing
/// where that is a number.
const UNSUPPORTED: [(&str, Option<f64>); 18] = [
    ("min_new_tokens", Some(0.0)),
    ("min_length", Some(0.0)),
    ("num_beams", Some(1.0)),
    ("penalty_alpha", Some(0.0)),
    ("guidance_scale", Some(1.0)),
    ("repetition_penalty", Some(1.0)),
    ("encoder_repetition_penalty", Some(1.0)),
    ("no_repeat_ngram_size", Some(0.0)),
    ("typical_p", Some(1.0)),
    ("epsilon_cutoff", Some(0.0)),
    ("eta_cutoff", Some(0.0)),
    ("bad_words_ids", None),
    ("sequence_bias", None),
    ("suppress_tokens", None),
    ("begin_suppress_tokens", None),
    ("forced_eos_token_id", None),
    ("stop_strings", None),
    ("watermarking_config", None),
];

/// What the file asks for in vain, as `name value`.
pub(super) fn unsupported(fields: &Fields<'_>) -> Vec<String> {
    let asked = |&(name, neutral): &(&str, Option<f64>)| {
        let value = fields.get(name)?;
        let is_neutral = neutral.is_some_and(|neutral| value.as_f64() == Some(neutral));
        let is_empty = value.as_array().is_some_and(Vec::is_empty);
        (!is_neutral && !is_empty).then(|| format!("{name} {value}"))
    };
    UNSUPPORTED.iter().filter_map(asked).collect()
}
