//! Rotary position embedding: the angle of each pair of elements per position, and the scalings
//! that stretch a model's context.
//!
//! # Source
//! linear: Chen et al., Extending Context Window via Positional Interpolation, 2023; yarn: Peng et
//! al., YaRN: Efficient Context Window Extension, 2023; llama3: The Llama 3 Herd of Models, 2024.
//! Names, defaults and order of operations are those of transformers' `modeling_rope_utils`.

use std::f64::consts::PI;

use serde_json::Value;

use super::fields::Fields;
use crate::error::Result;

/// The rotation of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Angle per position of each pair of elements: `[head_dim / 2]`.
    pub inv_freq: Vec<f32>,
    /// What cosine and sine are multiplied by (yarn; 1 otherwise).
    pub attention_factor: f32,
}

/// `rope_parameters` as transformers 5 writes it, or `rope_theta` and `rope_scaling` as 4 did.
pub(super) fn parse(fields: &Fields<'_>, head_dim: usize) -> Result<RopeSpec> {
    let empty = Value::Object(serde_json::Map::new());
    let name = if fields.has("rope_parameters") { "rope_parameters" } else { "rope_scaling" };
    let scaling = fields.get(name).unwrap_or(&empty);
    if let Some(nested) =
        scaling.as_object().and_then(|all| all.iter().find(|(_, v)| v.is_object()))
    {
        let reason = format!("has its own parameters for {}, which is not supported", nested.0);
        return Err(fields.bad(name, reason));
    }
    let kind = ["rope_type", "type"].iter().find_map(|name| scaling.get(name)?.as_str());
    // The type belongs to the message: it says which fields are needed.
    let prefix = kind.map_or(format!("{name}."), |kind| format!("{name} of type {kind}: "));
    let scaling = Fields::new(scaling, &prefix)?;
    let theta_at = if scaling.has("rope_theta") { &scaling } else { fields };
    let theta = theta_at.optional_positive("rope_theta")?.unwrap_or(10_000.0);
    for at in [&scaling, fields] {
        if let Some(part) = at.optional_number("partial_rotary_factor")?.filter(|it| *it < 1.0) {
            let reason = format!("must be 1: heads turn as a whole, got {part}");
            return Err(at.bad("partial_rotary_factor", reason));
        }
    }
    let plain = plain(theta, head_dim);
    let mut attention_factor = 1.0;
    let inv_freq = match kind {
        None if ["rope_type", "type", "factor"].iter().any(|name| scaling.has(name)) => {
            let reason = "must be default, linear, llama3 or yarn, and is no text";
            return Err(scaling.bad("rope_type", reason));
        }
        None | Some("default") => plain,
        Some("linear") => {
            let factor = scaling.positive("factor")? as f32;
            plain.into_iter().map(|frequency| frequency / factor).collect()
        }
        Some("llama3") => llama3(&scaling, &plain)?,
        Some("yarn") => {
            let max_position = fields.count("max_position_embeddings")?;
            let yarn = Yarn { theta, head_dim, max_position: max_position as f64 };
            let (stretched, factor) = yarn.stretch(&scaling, &plain)?;
            attention_factor = factor;
            stretched
        }
        Some(other) => {
            let reason = format!("must be default, linear, llama3 or yarn, got {other:?}");
            return Err(scaling.bad("rope_type", reason));
        }
    };
    let attention_factor = attention_factor as f32;
    if !inv_freq.iter().chain([&attention_factor]).all(|number| number.is_finite()) {
        return Err(fields.bad(name, "gives angles that are not finite"));
    }
    Ok(RopeSpec { inv_freq, attention_factor })
}

/// `theta^(-2 i / head_dim)`, rounded to float32 after each operation as the reference does: at a
/// position of some thousands the last bit of a frequency is visible in the logits.
fn plain(theta: f64, head_dim: usize) -> Vec<f32> {
    let theta = f64::from(theta as f32);
    let frequency = |pair: usize| {
        let exponent = (2 * pair) as f32 / head_dim as f32;
        1.0 / theta.powf(f64::from(exponent)) as f32
    };
    (0..head_dim / 2).map(frequency).collect()
}

/// Long wavelengths are stretched by `factor`, short ones are kept, those between are blended.
fn llama3(scaling: &Fields<'_>, plain: &[f32]) -> Result<Vec<f32>> {
    let factor = scaling.positive("factor")? as f32;
    let low = scaling.positive("low_freq_factor")? as f32;
    let high = scaling.positive("high_freq_factor")? as f32;
    if high <= low {
        let reason = format!("must be above low_freq_factor {low}, got {high}");
        return Err(scaling.bad("high_freq_factor", reason));
    }
    let old_context = scaling.positive("original_max_position_embeddings")? as f32;
    let stretch = |&frequency: &f32| {
        let wavelength = 2.0 * PI as f32 / frequency;
        if wavelength < old_context / high {
            return frequency;
        }
        if wavelength > old_context / low {
            return frequency / factor;
        }
        let blend = (old_context / wavelength - low) / (high - low);
        (1.0 - blend) * frequency / factor + blend * frequency
    };
    Ok(plain.iter().map(stretch).collect())
}

struct Yarn {
    theta: f64,
    head_dim: usize,
    max_position: f64,
}

impl Yarn {
    fn stretch(&self, scaling: &Fields<'_>, plain: &[f32]) -> Result<(Vec<f32>, f64)> {
        let factor = scaling.positive("factor")?;
        let number = |name: &str, default: f64| -> Result<f64> {
            Ok(scaling.optional_number(name)?.unwrap_or(default))
        };
        let old_name = "original_max_position_embeddings";
        let is_given = scaling.has(old_name);
        let old_context = if is_given { scaling.positive(old_name)? } else { self.max_position };
        let (beta_fast, beta_slow) = (number("beta_fast", 32.0)?, number("beta_slow", 1.0)?);
        let truncate = scaling.optional_bool("truncate")?.unwrap_or(true);
        let mut low = self.pair_of(beta_fast, old_context);
        let mut high = self.pair_of(beta_slow, old_context);
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(self.head_dim as f64 - 1.0));
        let width = if high > low { high - low } else { 0.001 };
        let stretched = plain.iter().enumerate().map(|(pair, frequency)| {
            let interpolated = ((pair as f32 - low as f32) / width as f32).clamp(0.0, 1.0);
            frequency / factor as f32 * interpolated + frequency * (1.0 - interpolated)
        });
        let stretched = stretched.collect();
        if let Some(given) = scaling.optional_number("attention_factor")? {
            return Ok((stretched, given));
        }
        let mscale = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
        let (above, below) = (number("mscale", 0.0)?, number("mscale_all_dim", 0.0)?);
        let both = above != 0.0 && below != 0.0;
        let attention_factor = if both { mscale(above) / mscale(below) } else { mscale(1.0) };
        Ok((stretched, attention_factor))
    }

    /// The pair, as a real number, that turns `num_rotations` times over the old context.
    fn pair_of(&self, num_rotations: f64, old_context: f64) -> f64 {
        let ratio = old_context / (num_rotations * 2.0 * PI);
        self.head_dim as f64 * ratio.ln() / (2.0 * self.theta.ln())
    }
}
