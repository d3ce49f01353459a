//! Model directories with random weights.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::path::Path;

use nano_core::Executor;
use nano_model::{DeviceChoice, ModelConfig, ModelInfo, ModelOptions, Result};
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};
use tempfile::TempDir;

pub(crate) const BLOCK_SIZE: u32 = 4;
pub(crate) const NUM_BLOCKS: u32 = 64;

/// A small Ministral: one layer sees all, one a window; two query heads to each head of keys.
pub(crate) fn config() -> Value {
    json!({
        "architectures": ["MinistralForCausalLM"],
        "vocab_size": 31,
        "hidden_size": 20,
        "intermediate_size": 27,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "sliding_window": 7,
        "layer_types": ["full_attention", "sliding_attention"],
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "tie_word_embeddings": false,
        "dtype": "float32",
        "eos_token_id": 2
    })
}

/// Name and shape of every tensor of [`config`].
pub(crate) fn shapes() -> Vec<(String, Vec<usize>)> {
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![31, 20]),
        ("model.norm.weight".to_owned(), vec![20]),
        ("lm_head.weight".to_owned(), vec![31, 20]),
    ];
    for layer in 0..2 {
        let parts = [
            ("input_layernorm", vec![20]),
            ("post_attention_layernorm", vec![20]),
            ("self_attn.q_proj", vec![24, 20]),
            ("self_attn.k_proj", vec![12, 20]),
            ("self_attn.v_proj", vec![12, 20]),
            ("self_attn.o_proj", vec![20, 24]),
            ("mlp.gate_proj", vec![27, 20]),
            ("mlp.up_proj", vec![27, 20]),
            ("mlp.down_proj", vec![20, 27]),
        ];
        let named =
            parts.map(|(part, shape)| (format!("model.layers.{layer}.{part}.weight"), shape));
        shapes.extend(named);
    }
    shapes
}

/// Numbers that look random, so large that logits tell tokens apart; near 1 for a norm.
pub(crate) fn tensor(name: &str, shape: &[usize]) -> Vec<f32> {
    let mut state = name.bytes().fold(7_u32, |state, byte| {
        state.wrapping_mul(31).wrapping_add(u32::from(byte)).wrapping_mul(2_654_435_761)
    });
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let is_norm = shape.len() == 1;
    let number = |value: f32| if is_norm { 1.0 + 0.2 * value } else { 0.5 * value };
    (0..shape.iter().product()).map(|_| number(next())).collect()
}

/// Writes the named tensors in float32.
pub(crate) fn write_safetensors(path: &Path, tensors: &[(String, Vec<usize>)]) {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(name, shape)| tensor(name, shape).iter().flat_map(|x| x.to_le_bytes()).collect())
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape), bytes)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    std::fs::write(path, serialize(views, None).unwrap()).unwrap();
}

pub(crate) fn write_json(path: &Path, value: &Value) {
    std::fs::write(path, value.to_string()).unwrap();
}

/// A whole model.
pub(crate) fn model() -> TempDir {
    let dir = TempDir::new().unwrap();
    write_json(&dir.path().join("config.json"), &config());
    write_safetensors(&dir.path().join("model.safetensors"), &shapes());
    dir
}

pub(crate) fn load(dir: &Path, options: &ModelOptions) -> Result<(Box<dyn Executor>, ModelInfo)> {
    nano_model::load(ModelConfig::from_dir(dir)?, options)
}

pub(crate) fn options() -> ModelOptions {
    ModelOptions {
        device: DeviceChoice::Cpu,
        gpu_memory_utilization: 0.9,
        deterministic: false,
        max_num_seqs: 64,
        max_num_batched_tokens: Some(512),
        max_itl: None,
        dtype: None,
        dummy_weights: false,
        block_size: BLOCK_SIZE,
        num_blocks: Some(NUM_BLOCKS),
        kv_cache_bytes: None,
        num_threads: None,
        seed: 0,
        max_model_len: None,
    }
}
