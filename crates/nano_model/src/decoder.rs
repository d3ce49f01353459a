//! The decoder: the one forward pass of every family, back end and device.
//!
//! # Source
//! Jiang et al., Mistral 7B, 2023; Touvron et al., LLaMA, 2023.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::backend::Backend;
use crate::error::{Error, Result};

/// The parameters of one layer.
#[derive(Debug)]
pub struct Layer<W> {
    /// `[hidden_size]`.
    pub attention_norm: W,
    /// Queries, keys and values, one below the other: `[qkv_size, hidden_size]`.
    pub qkv: W,
    /// `[hidden_size, num_heads * head_dim]`.
    pub output: W,
    /// `[hidden_size]`.
    pub mlp_norm: W,
    /// Gate and up, one below the other: `[2 * intermediate_size, hidden_size]`.
    pub gate_up: W,
    /// `[hidden_size, intermediate_size]`.
    pub down: W,
}

/// The parameters of a model.
#[derive(Debug)]
pub struct Decoder<B: Backend> {
    /// `[vocab_size, hidden_size]`.
    pub embedding: B::Weight,
    /// First to last.
    pub layers: Vec<Layer<B::Weight>>,
    /// `[hidden_size]`.
    pub norm: B::Weight,
    /// `[vocab_size, hidden_size]`; `None` when it is the embedding.
    pub lm_head: Option<B::Weight>,
    /// Set, it ends a step before its next layer, or before the logits.
    pub stop: Arc<AtomicBool>,
}

/// Runs a step and returns the logits of the rows that need them: `[num_logit_rows, vocab_size]`.
///
/// Keys and values of every row are in the cache afterwards.
///
/// # Errors
/// Those of the back end, and [`Error::Stopped`].
pub fn forward<B: Backend>(
    backend: &mut B,
    model: &Decoder<B>,
    step: &B::Step,
) -> Result<B::Hidden> {
    let mut hidden = backend.embed(&model.embedding, step)?;
    for (index, layer) in model.layers.iter().enumerate() {
        go_on(model)?;
        let qkv = backend.norm_product(&hidden, &layer.attention_norm, &layer.qkv)?;
        let query = backend.rope_write_kv(index, qkv, step)?;
        let mut context = backend.paged_attention(index, query, step)?;
        if index + 1 == model.layers.len() {
            // Keys and values are written: from here on a row matters to its own logits alone.
            (context, hidden) = backend.logit_rows(context, hidden, step)?;
        }
        hidden = backend.product_add(&context, &layer.output, hidden)?;

        let gated = backend.norm_gated_product(&hidden, &layer.mlp_norm, &layer.gate_up)?;
        hidden = backend.product_add(&gated, &layer.down, hidden)?;
    }
    go_on(model)?;
    let lm_head = model.lm_head.as_ref().unwrap_or(&model.embedding);
    backend.logits(&hidden, &model.norm, lm_head, step)
}

fn go_on<B: Backend>(model: &Decoder<B>) -> Result<()> {
    if model.stop.load(Ordering::Acquire) { Err(Error::Stopped) } else { Ok(()) }
}
