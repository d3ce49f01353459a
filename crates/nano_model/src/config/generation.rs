//! `generation_config.json`: the sampling defaults, and what it asks for in vain.

use nano_core::{Error as CoreError, SamplingParams};
use serde_json::Value;

use super::fields::Fields;
use crate::error::Result;

/// The sampling defaults of `generation_config.json`, used when a request gives no parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// The temperature; 0 when `do_sample` is false.
    pub temperature: Option<f64>,
    /// The nucleus.
    pub top_p: Option<f64>,
    /// The number of tokens kept.
    pub top_k: Option<u32>,
    /// The least share of the best token's probability.
    pub min_p: Option<f64>,
    /// Tokens of the answer at most: `max_new_tokens`.
    pub max_tokens: Option<u32>,
}

pub(super) fn defaults(fields: &Fields<'_>) -> Result<GenerationDefaults> {
    let is_greedy = fields.optional_bool("do_sample")? == Some(false);
    let temperature = fields.optional_number("temperature")?;
    let defaults = GenerationDefaults {
        temperature: if is_greedy { Some(0.0) } else { temperature },
        top_p: fields.optional_number("top_p")?,
        top_k: top_k(fields)?,
        min_p: fields.optional_number("min_p")?,
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

/// Keys that are read above or with the config, and those that change nothing about the tokens.
const KNOWN: [&str; 32] = [
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_new_tokens",
    // The model's length, where transformers or a template wrote it: not a wish for shorter answers.
    "max_length",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    // How transformers runs, not what comes out.
    "use_cache",
    "cache_implementation",
    "cache_config",
    "compile_config",
    "disable_compile",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "is_assistant",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "return_dict_in_generate",
    // Where the file comes from.
    "transformers_version",
    "_from_model_config",
    "_commit_hash",
];

/// Of keys that are numbers, the one that means off in transformers.
const NEUTRAL: [(&str, f64); 17] = [
    ("min_new_tokens", 0.0),
    ("min_length", 0.0),
    ("num_beams", 1.0),
    ("num_beam_groups", 1.0),
    ("num_return_sequences", 1.0),
    ("diversity_penalty", 0.0),
    ("length_penalty", 1.0),
    ("penalty_alpha", 0.0),
    ("guidance_scale", 1.0),
    ("repetition_penalty", 1.0),
    ("encoder_repetition_penalty", 1.0),
    ("no_repeat_ngram_size", 0.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("typical_p", 1.0),
    ("top_h", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
];

/// What the file asks for in vain, as `name value`: every key that is not known and not off.
pub(super) fn unsupported(fields: &Fields<'_>) -> Vec<String> {
    let is_off = |name: &str, value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => NEUTRAL.contains(&(name, number.as_f64().unwrap_or(f64::NAN))),
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.is_empty(),
        _ => false,
    };
    let asked = fields.all().filter(|(name, value)| !KNOWN.contains(name) && !is_off(name, value));
    asked.map(|(name, value)| format!("{name} {value}")).collect()
}
