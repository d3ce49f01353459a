//! `config.json` and `generation_config.json` of every family and version, and what is wrong with
//! the others.
#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod model_fixture;

use std::path::Path;

use model_fixture::{config, write_json};
use nano_core::TokenId;
use nano_model::config::{CheckpointDtype, LayerSpec};
use nano_model::{GenerationDefaults, ModelConfig, Result};
use serde_json::{Value, json};

/// `base` with some fields set, or removed where the new value is "absent".
fn with(mut base: Value, changes: &Value) -> Value {
    let fields = base.as_object_mut().unwrap();
    for (name, value) in changes.as_object().unwrap() {
        if value == "absent" {
            fields.remove(name);
        } else {
            fields.insert(name.clone(), value.clone());
        }
    }
    base
}

fn read(config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
    let dir = tempfile::tempdir().unwrap();
    write_json(&dir.path().join("config.json"), config);
    if let Some(generation) = generation {
        write_json(&dir.path().join("generation_config.json"), generation);
    }
    ModelConfig::from_dir(dir.path())
}

fn changed(changes: &Value) -> ModelConfig {
    read(&with(config(), changes), None).unwrap()
}

fn refused(changes: &Value, words: &[&str]) {
    let error = read(&with(config(), changes), None).unwrap_err();
    let message = error.to_string();
    assert!(words.iter().all(|word| message.contains(word)), "{changes} gives {message:?}");
}

/// As Mistral 7B v0.1's file, of transformers 4.
fn v0_1() -> Value {
    json!({
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000
    })
}

#[test]
fn mistral_7b_v0_1_is_read() {
    let config = read(&v0_1(), None).unwrap();
    let spec = &config.spec;
    assert_eq!((spec.num_heads, spec.num_kv_heads, spec.head_dim), (32, 8, 128));
    assert_eq!(spec.layers, vec![LayerSpec { window: Some(4096) }; 32]);
    assert_eq!(spec.num_parameters(), 7_241_732_096);
    assert_eq!(config.max_position_embeddings, 32768);
    assert_eq!(config.dtype, Some(CheckpointDtype::BFloat16));
    assert_eq!(config.eos_token_ids, [TokenId(2)]);
    assert!(!spec.tied);
}

#[test]
fn later_mistrals_have_no_window_and_a_head_dim_of_their_own() {
    let nemo = json!({
        "hidden_size": 5120, "head_dim": 128, "sliding_window": null, "rope_theta": 1e6,
        "vocab_size": 131_072, "tie_word_embeddings": true
    });
    let spec = read(&with(v0_1(), &nemo), None).unwrap().spec;
    assert_eq!(spec.head_dim, 128);
    assert_eq!(spec.layers[7], LayerSpec { window: None });
    assert!(spec.tied);
}

#[test]
fn transformers_5_writes_the_same_model_otherwise() {
    let five = json!({
        "rope_theta": "absent", "torch_dtype": "absent", "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "head_dim": null
    });
    let (four, five) = (read(&v0_1(), None).unwrap(), read(&with(v0_1(), &five), None).unwrap());
    assert_eq!(four.spec, five.spec);
    assert_eq!(four.dtype, five.dtype);
}

#[test]
fn ministral_says_for_each_layer_whether_it_has_the_window() {
    let layers = changed(&json!({})).spec.layers;
    assert_eq!(layers, [LayerSpec { window: None }, LayerSpec { window: Some(7) }]);
    let layers = changed(&json!({"layer_types": "absent"})).spec.layers;
    assert_eq!(layers, [LayerSpec { window: Some(7) }; 2]);
    refused(&json!({"layer_types": ["full_attention"]}), &["layer_types", "2", "1"]);
    refused(&json!({"layer_types": ["full_attention", "chunked"]}), &["layer_types", "chunked"]);
    refused(&json!({"sliding_window": null}), &["sliding_window"]);
}

#[test]
fn frequencies_are_those_of_transformers() {
    // Printed by transformers 5.24 for head_dim 6, theta 10000, 512 positions.
    let rope = |parameters: Value| {
        let changes = json!({"rope_parameters": parameters, "max_position_embeddings": 512});
        changed(&changes).spec.rope
    };
    let plain = rope(json!({"rope_type": "default", "rope_theta": 10000.0}));
    assert_eq!(plain.inv_freq, [1.0, 0.046_415_884, 0.002_154_434_3]);
    let linear = rope(json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}));
    assert_eq!(linear.inv_freq, [0.25, 0.011_603_971, 0.000_538_608_6]);
    let stretched = |kind: &str, more: Value| {
        let base = json!({
            "rope_type": kind, "factor": 4.0, "rope_theta": 10000.0,
            "original_max_position_embeddings": 64
        });
        rope(with(base, &more))
    };
    let llama3 = stretched("llama3", json!({"low_freq_factor": 1.0, "high_freq_factor": 4.0}));
    assert_eq!(llama3.inv_freq, [1.0, 0.011_603_971, 0.000_538_608_6]);
    let yarn = stretched("yarn", json!({}));
    assert_eq!(yarn.inv_freq, [1.0, 0.011_603_971, 0.000_538_608_6]);
    assert!((yarn.attention_factor - 1.138_629_4).abs() < 1e-7);
    let four = changed(&json!({
        "rope_parameters": "absent", "rope_theta": 10000.0,
        "rope_scaling": {"type": "linear", "factor": 4.0}
    }));
    assert_eq!(four.spec.rope, linear);
}

#[test]
fn scalings_that_cannot_be_run_are_refused_by_name() {
    let rope = |parameters: Value| json!({"rope_parameters": parameters});
    refused(&rope(json!({"rope_type": "longrope", "factor": 4.0})), &["longrope", "yarn"]);
    refused(&rope(json!({"rope_type": 3})), &["rope_type"]);
    refused(&rope(json!({"factor": 3.0})), &["rope_type"]);
    refused(&rope(json!({"rope_type": "linear"})), &["factor", "missing"]);
    refused(&rope(json!({"rope_type": "linear", "factor": 0})), &["factor", "0"]);
    refused(&rope(json!({"full_attention": {"rope_type": "default"}})), &["full_attention"]);
    refused(&rope(json!({"partial_rotary_factor": 0.5})), &["partial_rotary_factor", "0.5"]);
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64
    });
    refused(&rope(llama3), &["high_freq_factor", "low_freq_factor"]);
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": -1});
    refused(&rope(yarn), &["original_max_position_embeddings"]);
    refused(&rope(json!({"rope_theta": -1.0})), &["rope_theta"]);
    let unknown = json!({"rope_parameters": "absent", "rope_scaling": {"type": "su", "factor": 2}});
    refused(&unknown, &["su", "yarn"]);
    let scaling = json!({"rope_parameters": "absent", "rope_scaling": [null]});
    refused(&scaling, &["config.json: rope_scaling must be a JSON object, got [null]"]);
    let parameters = json!({"rope_parameters": 5});
    refused(&parameters, &["config.json: rope_parameters must be a JSON object, got 5"]);
}

#[test]
fn sizes_that_make_no_model_are_refused() {
    for field in [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "sliding_window",
    ] {
        for value in [json!(0), json!(-1), json!(1.5), json!("8"), json!(1_u64 << 60), json!([])] {
            refused(&json!({field: value}), &[field]);
        }
    }
    refused(&json!({"num_key_value_heads": 3}), &["num_attention_heads", "3", "4"]);
    refused(&json!({"head_dim": 7}), &["head_dim", "7"]);
    refused(&json!({"head_dim": "absent", "hidden_size": 21}), &["head_dim", "21", "4"]);
    for field in ["vocab_size", "hidden_size", "num_hidden_layers"] {
        refused(&json!({field: "absent"}), &[field, "missing"]);
    }
}

#[test]
fn sizes_whose_product_overflows_are_refused() {
    let most = 1 << 20;
    let all = json!({
        "vocab_size": most, "hidden_size": most, "intermediate_size": most,
        "num_hidden_layers": most, "num_attention_heads": most, "num_key_value_heads": most,
        "head_dim": most, "layer_types": "absent"
    });
    refused(&all, &["parameters"]);
    let cache = json!({
        "num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12, "head_dim": 1 << 17,
        "hidden_size": 1
    });
    refused(&cache, &["KV cache"]);
}

#[test]
fn what_is_not_a_mistral_is_refused() {
    refused(&json!({"architectures": ["LlamaForCausalLM"]}), &["LlamaForCausalLM", "Mistral"]);
    refused(&json!({"architectures": []}), &["MistralForCausalLM"]);
    refused(&json!({"hidden_act": "gelu"}), &["hidden_act", "gelu"]);
    refused(&json!({"rms_norm_eps": 0}), &["rms_norm_eps", "above 0", "got 0"]);
    refused(&json!({"rms_norm_eps": -1e-5}), &["rms_norm_eps", "above 0", "-0.00001"]);
    refused(&json!({"hidden_act": 3}), &["hidden_act", "3"]);
    refused(&json!({"attention_bias": true}), &["attention_bias"]);
    refused(&json!({"quantization_config": {"quant_method": "gptq"}}), &["quantization_config"]);
    refused(&json!({"dtype": "float8_e4m3fn"}), &["dtype", "float8_e4m3fn"]);
    refused(&json!({"tie_word_embeddings": "no"}), &["tie_word_embeddings"]);
    refused(&json!({"eos_token_id": -1}), &["eos_token_id"]);
}

#[test]
fn the_generation_config_has_the_last_word() {
    let generation = json!({
        "eos_token_id": [5, 2], "do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 50,
        "min_p": 0.1, "max_new_tokens": 2_147_483_647, "max_length": 4096
    });
    let read_config = read(&config(), Some(&generation)).unwrap();
    assert_eq!(read_config.eos_token_ids, [TokenId(5), TokenId(2)]);
    let expected = GenerationDefaults {
        temperature: Some(0.6),
        top_p: Some(0.9),
        top_k: Some(50),
        min_p: Some(0.1),
        max_tokens: Some(2_147_483_647),
    };
    assert_eq!(read_config.generation, expected);
    let greedy = json!({"do_sample": false, "temperature": 0.6, "top_k": 0});
    let defaults = read(&config(), Some(&greedy)).unwrap();
    assert_eq!(defaults.generation.temperature, Some(0.0));
    assert_eq!(defaults.generation.top_k, None);
    assert_eq!(defaults.eos_token_ids, [TokenId(2)]);
    assert_eq!(read(&config(), None).unwrap().generation, GenerationDefaults::default());
}

#[test]
fn a_generation_config_that_does_not_hold_is_refused_by_its_own_name() {
    for (changes, words) in [
        (json!({"temperature": -3}), ["temperature", "at least 0", "got -3"]),
        (json!({"temperature": "hot"}), ["temperature", "a number", "\"hot\""]),
        (json!({"top_p": 0}), ["top_p", "(0, 1]", "got 0"]),
        (json!({"top_k": -2}), ["top_k", "-1 or 0", "got -2"]),
        (json!({"top_k": 2.5}), ["top_k", "a count", "got 2.5"]),
        (json!({"min_p": 1.5}), ["min_p", "[0, 1]", "got 1.5"]),
        (json!({"max_new_tokens": 0}), ["max_new_tokens", "at least 1", "got 0"]),
        (json!({"do_sample": 0}), ["do_sample", "true or false", "got 0"]),
        (json!({"eos_token_id": "</s>"}), ["eos_token_id", "token ids", "</s>"]),
        (json!([]), ["the file", "JSON object", ""]),
    ] {
        let message = read(&config(), Some(&changes)).unwrap_err().to_string();
        assert!(message.contains("/generation_config.json: "), "{message}");
        assert!(words.iter().all(|word| message.contains(word)), "{changes} gives {message:?}");
    }
}

#[test]
fn what_a_generation_config_asks_for_in_vain_is_listed() {
    let unsupported =
        |generation: Value| read(&config(), Some(&generation)).unwrap().unsupported_generation;
    let neutral = json!({
        "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "typical_p": 1,
        "min_length": 0, "bad_words_ids": [], "suppress_tokens": null, "pad_token_id": 0,
        "use_cache": true, "transformers_version": "5.0.0", "top_k": 50, "temperature": 0.5,
        "_from_model_config": true, "do_sample": true, "max_length": 4096, "max_new_tokens": 9,
        "num_assistant_tokens": 20, "cache_implementation": "hybrid", "length_penalty": 1, "early_stopping": false,
        "stop_strings": [], "sequence_bias": {}, "output_attentions": false
    });
    assert!(unsupported(neutral).is_empty());
    let asked = json!({
        "repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "num_beams": 4,
        "min_length": 200, "bad_words_ids": [[3, 4]], "max_time": 0, "top_h": 0.4,
        "renormalize_logits": true, "forced_bos_token_id": 7, "a_key_of_tomorrow": "a"
    });
    let listed = [
        "a_key_of_tomorrow \"a\"",
        "bad_words_ids [[3,4]]",
        "forced_bos_token_id 7",
        "max_time 0",
        "min_length 200",
        "no_repeat_ngram_size 3",
        "num_beams 4",
        "renormalize_logits true",
        "repetition_penalty 1.1",
        "top_h 0.4",
    ];
    let mut found = unsupported(asked);
    found.sort();
    assert_eq!(found, listed);
}

#[test]
fn a_directory_that_holds_no_model_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |path: &Path, words: &[&str]| {
        let message = ModelConfig::from_dir(path).unwrap_err().to_string();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    };
    refused(&dir.path().join("nowhere"), &["nowhere", "not a directory"]);
    refused(&dir.path().join("model.gguf"), &["GGUF", "safetensors"]);
    refused(dir.path(), &["config.json"]);
    for content in ["", "{", "[1]", "\u{0}"] {
        std::fs::write(dir.path().join("config.json"), content).unwrap();
        refused(dir.path(), &["config.json"]);
    }
}
