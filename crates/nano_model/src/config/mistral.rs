//! The Mistral families: `MistralForCausalLM`, whose layers are alike, and
//! `MinistralForCausalLM`, whose `layer_types` say which layers have the sliding window.

use serde_json::Value;

use super::fields::Fields;
use super::{DecoderSpec, LayerSpec, rope};
use crate::error::{Error, Result};

const MAX_PARAMETERS: u128 = 1 << 44;
const MAX_KV_ELEMENTS: u128 = 1 << 28;

/// Where a layer's window comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Layers {
    /// `sliding_window` holds for all.
    Alike,
    /// `layer_types` says for which it holds.
    ByType,
}

pub(super) fn parse(fields: &Fields<'_>, layers: Layers) -> Result<DecoderSpec> {
    let hidden_size = fields.count("hidden_size")?;
    let num_heads = fields.count("num_attention_heads")?;
    let num_kv_heads = fields.optional_count("num_key_value_heads")?.unwrap_or(num_heads);
    if !num_heads.is_multiple_of(num_kv_heads) {
        let reason =
            format!("must be a multiple of num_key_value_heads {num_kv_heads}, got {num_heads}");
        return Err(fields.bad("num_attention_heads", reason));
    }
    let head_dim = match fields.optional_count("head_dim")? {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            let reason = format!(
                "is missing, and hidden_size {hidden_size} is no multiple of num_attention_heads \
                 {num_heads}"
            );
            return Err(fields.bad("head_dim", reason));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(fields.bad("head_dim", format!("must be even, got {head_dim}")));
    }
    let is_silu = |act: &&Value| matches!(act.as_str(), Some("silu" | "swish"));
    if let Some(other) = fields.get("hidden_act").filter(|act| !is_silu(act)) {
        return Err(fields.bad("hidden_act", format!("must be silu, got {other}")));
    }
    for name in ["attention_bias", "mlp_bias"] {
        if fields.optional_bool(name)? == Some(true) {
            return Err(fields.bad(name, "is not supported: Mistral's projections have no bias"));
        }
    }
    let spec = DecoderSpec {
        vocab_size: fields.count("vocab_size")?,
        hidden_size,
        intermediate_size: fields.count("intermediate_size")?,
        num_heads,
        num_kv_heads,
        head_dim,
        rms_norm_eps: fields.optional_positive("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        layers: layer_specs(fields, layers)?,
        rope: rope::parse(fields, head_dim)?,
        tied: fields.optional_bool("tie_word_embeddings")?.unwrap_or(false),
    };
    check_size(&spec)?;
    Ok(spec)
}

/// No later product of sizes overflows past this.
fn check_size(spec: &DecoderSpec) -> Result<()> {
    let too_large = |what: &str, number: u128, most: u128| Error::BadConfig {
        field: "the sizes together".to_owned(),
        reason: format!("make {number} {what}, but at most {most} can be run"),
    };
    let num_parameters = spec.num_parameters();
    if num_parameters > MAX_PARAMETERS {
        return Err(too_large("parameters", num_parameters, MAX_PARAMETERS));
    }
    let kv_elements = spec.kv_elements_per_token() as u128;
    if kv_elements > MAX_KV_ELEMENTS {
        return Err(too_large("elements of KV cache a token", kv_elements, MAX_KV_ELEMENTS));
    }
    Ok(())
}

fn layer_specs(fields: &Fields<'_>, layers: Layers) -> Result<Vec<LayerSpec>> {
    let num_layers = fields.count("num_hidden_layers")?;
    let window = fields.optional_count("sliding_window")?.map(|window| window as u32);
    let types = fields.get("layer_types").filter(|_| layers == Layers::ByType);
    let Some(types) = types else { return Ok(vec![LayerSpec { window }; num_layers]) };
    let types = types.as_array().map(Vec::as_slice).unwrap_or_default();
    if types.len() != num_layers {
        let reason = format!(
            "must be a list of num_hidden_layers {num_layers} entries, got {}",
            types.len()
        );
        return Err(fields.bad("layer_types", reason));
    }
    let layer = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(LayerSpec { window: None }),
        Some("sliding_attention") if window.is_some() => Ok(LayerSpec { window }),
        Some("sliding_attention") => {
            Err(fields.bad("sliding_window", "is missing, but layer_types has sliding_attention"))
        }
        _ => {
            let reason = format!("must hold full_attention or sliding_attention, got {kind}");
            Err(fields.bad("layer_types", reason))
        }
    };
    types.iter().map(layer).collect()
}
