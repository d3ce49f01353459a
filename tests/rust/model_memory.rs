//! What a model of half a gigabyte takes at its fullest.
#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod model_fixture;

use model_fixture::{load, options, write_json};
use nano_core::TokenId;
use nano_core::{EngineCore, Request, RequestId, RequestKind, RequestLimits, SamplingParams};
use nano_model::{ModelConfig, ModelOptions};
use serde_json::json;

const NUM_PROMPTS: u64 = 64;
const PROMPT_LEN: u32 = 40;
const MAX_TOKENS: u32 = 8;
const BLOCK_SIZE: u32 = 16;
const NUM_LOGIT_ROWS: u32 = 512;

/// A line of the process's status: `VmRSS` is what is resident, `VmHWM` the most that ever was.
fn resident_bytes(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// More tokens than one step takes, in a cache far larger than they need: the peak stays within 1.2
/// times the weights and the blocks that were written. Then a request of logits, which leaves nothing.
#[test]
fn the_peak_is_near_the_weights_and_the_part_of_the_cache_that_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "architectures": ["MistralForCausalLM"], "vocab_size": 32000, "hidden_size": 1024,
        "intermediate_size": 3584, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
    });
    write_json(&dir.path().join("config.json"), &config);
    let options = ModelOptions {
        dummy_weights: true,
        block_size: BLOCK_SIZE,
        num_blocks: None,
        kv_cache_bytes: Some(1 << 30),
        max_num_batched_tokens: None,
        ..options()
    };
    let before = resident_bytes("VmRSS");
    let (executor, info) = load(dir.path(), &options).unwrap();
    assert_eq!(info.step_limits.max_num_batched_tokens, 2048);
    let limits = RequestLimits { eos_token_ids: [].into(), ..info.request_limits };
    let num_blocks = limits.num_blocks;
    let mut core = EngineCore::new(info.step_limits, executor).unwrap();
    for id in 0..NUM_PROMPTS {
        let prompt = (0..PROMPT_LEN).map(|at| TokenId(at * 7 + id as u32)).collect();
        let params = SamplingParams { max_tokens: MAX_TOKENS, ..SamplingParams::default() };
        let kind = RequestKind::Generate(params);
        core.add(Request::new(RequestId(id), prompt, kind, &limits).unwrap());
    }
    while !core.is_idle() {
        core.step().unwrap();
    }
    let peak = resident_bytes("VmHWM") - before;
    let written = NUM_PROMPTS * u64::from((PROMPT_LEN + MAX_TOKENS).div_ceil(BLOCK_SIZE));
    let cache = written * ((1 << 30) / u64::from(num_blocks));
    let checkpoint = ModelConfig::from_dir(dir.path()).unwrap().spec.num_parameters() as u64 * 2;
    let ratio = peak as f64 / (checkpoint + cache) as f64;
    println!("peak {} MiB, {ratio:.3} of the checkpoint's weights and the cache", peak >> 20);
    // Beyond what weights take in memory, which is less where they are coded.
    let beyond = peak.saturating_sub(info.weight_bytes + cache);
    let share = beyond as f64 / (checkpoint + cache) as f64;
    assert!(share <= 0.2, "{share}");

    let kept = resident_bytes("VmRSS");
    let prompt = (0..NUM_LOGIT_ROWS).map(TokenId).collect();
    let request = Request::new(RequestId(NUM_PROMPTS), prompt, RequestKind::Logits, &limits);
    core.add(request.unwrap());
    let mut num_logits = 0;
    while !core.is_idle() {
        let events = core.step().unwrap();
        num_logits +=
            events.iter().filter_map(|it| it.logits.as_ref()).map(Vec::len).sum::<usize>();
    }
    assert_eq!(num_logits, NUM_LOGIT_ROWS as usize * 32000);
    // Of four bytes each.
    let grown = resident_bytes("VmRSS").saturating_sub(kept);
    assert!(grown < num_logits as u64, "{} MiB stay of a request of logits", grown >> 20);
}
