//! Checkpoints that are whole, and those that are not: each is refused in a sentence that names the
//! file or the tensor.
#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod model_fixture;

use std::path::Path;

use model_fixture::{config, load, model, options, shapes, tensor, write_json, write_safetensors};
use nano_model::weights::WeightMap;
use nano_model::{ModelConfig, ModelOptions};
use serde_json::json;

/// What loading says, which must hold each of `words`.
fn refused(dir: &Path, code: &str, words: &[&str]) {
    let error = load(dir, &options()).unwrap_err();
    let message = error.to_string();
    assert_eq!(error.code(), code, "{message}");
    for word in words {
        assert!(message.contains(word), "{message:?} lacks {word:?}");
    }
}

/// The model in two files, with an index.
fn sharded() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_json(&dir.path().join("config.json"), &config());
    let shapes = shapes();
    let mut index = serde_json::Map::new();
    for (number, part) in shapes.chunks(11).enumerate() {
        let name = format!("model-0000{}-of-00002.safetensors", number + 1);
        write_safetensors(&dir.path().join(&name), part);
        index.extend(part.iter().map(|(tensor, _)| (tensor.clone(), json!(name))));
    }
    let path = dir.path().join("model.safetensors.index.json");
    write_json(&path, &json!({"weight_map": index}));
    dir
}

#[test]
fn every_tensor_of_one_file_or_several_is_found_with_its_bytes() {
    for dir in [model(), sharded()] {
        let map = WeightMap::open(dir.path()).unwrap();
        for (name, shape) in shapes() {
            let bytes: Vec<u8> =
                tensor(&name, &shape).iter().flat_map(|value| value.to_le_bytes()).collect();
            assert_eq!(map.tensor(&name, &shape).unwrap().bytes, bytes, "{name}");
            // Pages given back are read again.
            map.release(&name);
            assert_eq!(map.tensor(&name, &shape).unwrap().bytes, bytes, "{name}");
        }
        load(dir.path(), &options()).unwrap();
    }
}

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    let dir = model();
    let path = dir.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for len in [0, 1, 7, 8, 9, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..len]).unwrap();
        refused(dir.path(), "model_file_invalid", &["model.safetensors"]);
    }
}

#[test]
fn a_header_of_absurd_length_is_refused() {
    let dir = model();
    let path = dir.path().join("model.safetensors");
    let mut file = std::fs::read(&path).unwrap();
    for len in [0, 1 << 20, 1 << 40, 1 << 63, u64::MAX] {
        file[..8].copy_from_slice(&len.to_le_bytes());
        std::fs::write(&path, &file).unwrap();
        refused(dir.path(), "model_file_invalid", &["model.safetensors", "header"]);
    }
}

#[test]
fn a_header_with_any_byte_changed_is_refused_or_loads_but_never_panics() {
    let dir = model();
    let path = dir.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for at in (0..1500).step_by(13) {
        let mut file = whole.clone();
        file[at] ^= 0x11;
        std::fs::write(&path, &file).unwrap();
        if let Err(error) = load(dir.path(), &options()) {
            assert!(error.to_string().len() > 10);
        }
    }
}

#[test]
fn a_missing_tensor_is_named() {
    for missing in ["lm_head.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"]
    {
        let dir = model();
        let kept: Vec<_> = shapes().into_iter().filter(|(name, _)| name != missing).collect();
        write_safetensors(&dir.path().join("model.safetensors"), &kept);
        refused(dir.path(), "tensor_missing", &[missing]);
    }
}

#[test]
fn what_would_be_left_out_is_named_and_what_changes_nothing_is_not_missed() {
    let dir = model();
    let with = |name: &str| {
        let mut shapes = shapes();
        shapes.push((name.to_owned(), vec![3]));
        write_safetensors(&dir.path().join("model.safetensors"), &shapes);
    };
    for extra in [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.10.self_attn.inv_freq",
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "lm_head.bias",
    ] {
        with(extra);
        refused(dir.path(), "tensor_unexpected", &[extra, "num_hidden_layers is 2"]);
    }
    for allowed in ["model.layers.1.self_attn.rotary_emb.inv_freq", "model.layers.x", "more"] {
        with(allowed);
        load(dir.path(), &options()).unwrap();
    }
}

#[test]
fn a_misshapen_tensor_is_named_with_both_shapes() {
    let dir = model();
    let mut shapes = shapes();
    let (name, shape) = &mut shapes[5];
    let (name, right) = (name.clone(), format!("{shape:?}"));
    shape.reverse();
    let wrong = format!("{shape:?}");
    write_safetensors(&dir.path().join("model.safetensors"), &shapes);
    refused(dir.path(), "tensor_misshapen", &[&name, &right, &wrong]);
}

#[test]
fn a_shard_that_is_missing_or_elsewhere_is_named() {
    let dir = sharded();
    std::fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).unwrap();
    refused(dir.path(), "model_file_invalid", &["model-00002-of-00002.safetensors"]);
    let index = dir.path().join("model.safetensors.index.json");
    let outside = sharded();
    let name = outside.path().file_name().unwrap().to_str().unwrap();
    let elsewhere = format!("../{name}/model-00001-of-00002.safetensors");
    assert!(dir.path().join(&elsewhere).exists());
    write_json(&index, &json!({"weight_map": {"model.norm.weight": elsewhere}}));
    refused(dir.path(), "model_file_invalid", &[&elsewhere, "not beside it"]);
    write_json(&index, &json!({"weights": {}}));
    refused(dir.path(), "model_file_invalid", &["weight_map"]);
}

#[test]
fn other_formats_are_named() {
    for name in ["pytorch_model.bin", "model.gguf", "consolidated.00.pth"] {
        let dir = tempfile::tempdir().unwrap();
        write_json(&dir.path().join("config.json"), &config());
        std::fs::write(dir.path().join(name), [0; 64]).unwrap();
        refused(dir.path(), "model_missing", &[name, "safetensors"]);
    }
}

#[test]
fn options_that_do_not_fit_are_refused_with_their_limits() {
    let dir = model();
    let refused = |options: &ModelOptions, words: &[&str]| {
        let message = load(dir.path(), options).unwrap_err().to_string();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    };
    let plain = options();
    refused(&ModelOptions { max_model_len: Some(129), ..plain.clone() }, &["128", "129"]);
    refused(&ModelOptions { num_blocks: Some(0), ..plain.clone() }, &["num_blocks"]);
    refused(&ModelOptions { num_blocks: Some(u32::MAX), ..plain.clone() }, &["num_blocks"]);
    refused(&ModelOptions { block_size: 0, ..plain.clone() }, &["block_size"]);
    refused(&ModelOptions { num_threads: Some(0), ..plain.clone() }, &["num_threads", "0"]);
    refused(&ModelOptions { num_threads: Some(1 << 40), ..plain.clone() }, &["num_threads"]);
    let tiny = ModelOptions { num_blocks: None, kv_cache_bytes: Some(10), ..plain };
    // A block is 4 slots of 2 layers of 2 heads of 6 elements, keys and values, 4 bytes each.
    refused(&tiny, &["kv_cache_gib", "from 0.000000715 to", "got 0.000000009 (0 blocks)"]);
}

#[test]
fn the_longest_sequence_is_what_the_cache_holds() {
    let dir = model();
    let options = |num_blocks| ModelOptions { num_blocks: Some(num_blocks), ..options() };
    let loaded = |num_blocks| load(dir.path(), &options(num_blocks)).unwrap();
    assert_eq!(loaded(10).1.request_limits.max_model_len, 40);
    assert_eq!(loaded(64).1.request_limits.max_model_len, 128);
    // 2 layers of 2 heads of 6 elements, keys and values, 4 bytes each.
    assert_eq!(loaded(10).0.capacity().num_blocks, 10);
    let num_parameters: usize =
        shapes().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    let config = ModelConfig::from_dir(dir.path()).unwrap();
    assert_eq!(config.spec.num_parameters(), num_parameters as u128);
    // Of float32, which is never coded; the rows of each matrix are filled up to pairs of panels, to 32.
    let (ends, merged) = (2 * 32 * 20, 64 * 20 + 64 * 20);
    let layer = merged + 32 * 24 + 32 * 27 + 2 * 20;
    assert_eq!(loaded(10).1.weight_bytes, 4 * (ends + 2 * layer + 20));
}

#[test]
fn a_directory_without_weights_says_that_dummy_needs_none() {
    let dir = tempfile::tempdir().unwrap();
    write_json(&dir.path().join("config.json"), &config());
    refused(dir.path(), "model_missing", &["model.safetensors", "dummy"]);
    load(dir.path(), &ModelOptions { dummy_weights: true, ..options() }).unwrap();
}
