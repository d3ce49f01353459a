//! Times of one step with random weights: `cargo run --release -p nano_model --example step_time`,
//! with the directory of a `config.json` if it shall not be the model below. Prints milliseconds:
//! the median of launches and of steps, and the quickest step.
#![expect(clippy::print_stdout, reason = "a table is what this program is for")]

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use nano_core::step::{LogitRows, ScheduledSequence, TokenSource};
use nano_core::{BlockId, Executor, SamplingParams, ScheduleOutput, SequenceId, TokenId};
use nano_model::{DeviceChoice, ModelConfig, ModelOptions};

const BLOCK_SIZE: u32 = 16;
const NUM_BLOCKS: u32 = 1024;
const CONFIG: &str = r#"{
    "architectures": ["MistralForCausalLM"], "vocab_size": 32000, "hidden_size": 1024,
    "intermediate_size": 3584, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "bfloat16", "eos_token_id": 2
}"#;

/// `num_sequences` that have `computed` tokens in the cache and run `scheduled` more.
fn step(num_sequences: u32, computed: u32, scheduled: u32, temperature: f64) -> ScheduleOutput {
    let mut step = ScheduleOutput { step: 1, ..ScheduleOutput::default() };
    let params = Arc::new(SamplingParams { temperature, ..SamplingParams::default() });
    let num_blocks = (computed + scheduled).div_ceil(BLOCK_SIZE);
    for index in 0..num_sequences {
        let tokens = step.token_ids.len() as u32..step.token_ids.len() as u32 + scheduled;
        let table = step.block_ids.len() as u32..step.block_ids.len() as u32 + num_blocks;
        step.token_ids.extend(tokens.clone().map(|token| TokenId(token * 7919 % 251)));
        // Scattered: neighbours in a table are `num_sequences` apart.
        step.block_ids.extend((0..num_blocks).map(|at| BlockId(at * num_sequences + index)));
        step.sequences.push(ScheduledSequence {
            sequence: SequenceId(index.into()),
            tokens: TokenSource::Host(tokens),
            num_computed_tokens: computed,
            num_scheduled_tokens: scheduled,
            block_table: table,
            logit_rows: LogitRows::Last,
            banned: None,
            params: Arc::clone(&params),
            seed: index.into(),
        });
    }
    step.num_tokens = num_sequences * scheduled;
    step
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn time(
    executor: &mut dyn Executor,
    name: &str,
    step: &ScheduleOutput,
    num_runs: usize,
) -> Result<(), Box<dyn Error>> {
    let (mut launches, mut steps) = (Vec::new(), Vec::new());
    for _ in 0..num_runs {
        let start = Instant::now();
        executor.launch(step)?;
        launches.push(start.elapsed().as_secs_f64() * 1e3);
        executor.collect()?;
        steps.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let (launch, step, best) = (median(&mut launches), median(&mut steps), steps[0]);
    println!("{name:40} {launch:8.2} {step:8.2} {best:8.2}");
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    if let Some(dir) = std::env::args_os().nth(1) {
        return run(Path::new(&dir));
    }
    let dir = std::env::temp_dir().join(format!("step_time.{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    std::fs::write(dir.join("config.json"), CONFIG)?;
    let result = run(&dir);
    std::fs::remove_dir_all(&dir)?;
    result
}

fn run(dir: &Path) -> Result<(), Box<dyn Error>> {
    let options = ModelOptions {
        device: DeviceChoice::Auto,
        gpu_memory_utilization: 0.9,
        deterministic: false,
        max_num_seqs: 64,
        max_num_batched_tokens: Some(512),
        max_itl: None,
        dtype: None,
        dummy_weights: true,
        block_size: BLOCK_SIZE,
        num_blocks: Some(NUM_BLOCKS),
        kv_cache_bytes: None,
        num_threads: None,
        seed: 0,
        max_model_len: None,
    };
    let start = Instant::now();
    let (mut executor, info) = nano_model::load(ModelConfig::from_dir(dir)?, &options)?;
    let mib = info.weight_bytes >> 20;
    println!("{} of {mib} MiB, made in {:.2} s", info.dtype, start.elapsed().as_secs_f64());
    println!("{:40} {:>8} {:>8} {:>8}", "milliseconds", "launch", "step", "best");
    let cases = [
        ("decode, 1 row, context 100", step(1, 99, 1, 0.0), 60),
        ("decode, 1 row, context 1000", step(1, 999, 1, 0.0), 60),
        ("decode, 4 rows, context 100", step(4, 99, 1, 0.0), 60),
        ("decode, 16 rows, context 100", step(16, 99, 1, 0.0), 60),
        ("decode, 16 rows, context 100, sampled", step(16, 99, 1, 1.0), 30),
        ("decode, 16 rows, context 1000", step(16, 999, 1, 0.0), 30),
        ("decode, 64 rows, context 100", step(64, 99, 1, 0.0), 15),
        ("prefill, 32 rows", step(1, 0, 32, 0.0), 20),
        ("prefill, 16 x 32 rows", step(16, 0, 32, 0.0), 9),
        ("prefill, 512 rows", step(1, 0, 512, 0.0), 9),
        ("prefill, 4 x 512 rows", step(4, 0, 512, 0.0), 3),
        ("prefill, 512 rows on 1536", step(1, 1536, 512, 0.0), 5),
    ];
    let only = std::env::var("STEP_ONLY").unwrap_or_default();
    for (name, step, num_runs) in cases.iter().filter(|(name, ..)| only.is_empty() || *name == only)
    {
        time(&mut *executor, name, step, *num_runs)?;
    }
    Ok(())
}
