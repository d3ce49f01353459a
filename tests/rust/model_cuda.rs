//! A model on a GPU, through the engine core: near the CPU's numbers, and the same in any batch.
//! Skips where there is no GPU.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by a panic and says why it is skipped"
)]

mod model_fixture;

use std::collections::BTreeMap;

use model_fixture::{load, options, write_json};
use nano_core::step::SampledRow;
use nano_core::{
    Capacity, EngineCore, Executor, Request, RequestId, RequestKind, RequestLimits, SamplingParams,
    ScheduleOutput, TokenId,
};
use nano_kernels::cuda::{Device, Error};
use nano_kernels::reference::sampling::{Sampling, sample};
use nano_model::{DeviceChoice, ModelInfo, ModelOptions};
use serde_json::{Value, json};
use tempfile::TempDir;

const VOCAB_SIZE: u32 = 300;

/// The GPU, or `None` with the reason printed.
fn gpu() -> Option<Device> {
    match Device::new(0) {
        Ok(device) => Some(device),
        Err(error @ Error::NoDevice(_)) => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// A model whose layers have a window and none in turn, of dummy weights.
fn model(head_dim: u32) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut config = model_fixture::config();
    let changes = json!({
        "vocab_size": VOCAB_SIZE, "hidden_size": 256, "intermediate_size": 512,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": head_dim,
        "sliding_window": 21, "max_position_embeddings": 512,
    });
    let Value::Object(changes) = changes else { panic!("an object") };
    for (name, value) in changes {
        config[name] = value;
    }
    write_json(&dir.path().join("config.json"), &config);
    dir
}

fn gpu_options() -> ModelOptions {
    ModelOptions {
        device: DeviceChoice::Cuda(0),
        dummy_weights: true,
        block_size: 16,
        num_blocks: Some(200),
        ..options()
    }
}

fn limited(max_num_seqs: u32, budget: u32) -> ModelOptions {
    ModelOptions { max_num_seqs, max_num_batched_tokens: Some(budget), ..gpu_options() }
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<u32>,
    logits: Vec<f32>,
}

/// Runs all requests together; the model is loaded for it and given back.
fn serve(
    dir: &TempDir,
    options: &ModelOptions,
    eos: &[u32],
    requests: &[(Vec<u32>, RequestKind)],
) -> Vec<Answer> {
    let (executor, info) = load(dir.path(), options).unwrap();
    run(executor, &info, eos, requests)
}

fn run(
    executor: Box<dyn Executor>,
    info: &ModelInfo,
    eos: &[u32],
    requests: &[(Vec<u32>, RequestKind)],
) -> Vec<Answer> {
    let eos_token_ids = eos.iter().map(|&token| TokenId(token)).collect();
    let limits = RequestLimits { eos_token_ids, ..info.request_limits.clone() };
    let mut core = EngineCore::new(info.step_limits, executor).unwrap();
    for (id, (prompt, kind)) in requests.iter().enumerate() {
        let prompt = prompt.iter().map(|&token| TokenId(token)).collect();
        core.add(Request::new(RequestId(id as u64), prompt, kind.clone(), &limits).unwrap());
    }
    let mut answers: BTreeMap<u64, Answer> = BTreeMap::new();
    while !core.is_idle() {
        for event in core.step().unwrap() {
            let answer = answers.entry(event.request.0).or_default();
            answer.tokens.extend(event.token.iter().map(|token| token.0));
            answer.logits.extend(event.logits.unwrap_or_default());
        }
    }
    answers.into_values().collect()
}

fn prompt(number: u32, len: u32) -> Vec<u32> {
    (0..len).map(|at| (at * at * 31 + at * 7 + number * 11 + 1) % VOCAB_SIZE).collect()
}

fn generate(temperature: f64, seed: u64, max_tokens: u32) -> RequestKind {
    RequestKind::Generate(SamplingParams {
        temperature,
        top_p: 0.9,
        top_k: Some(50),
        seed: Some(seed),
        max_tokens,
        ignore_eos: true,
        ..SamplingParams::default()
    })
}

/// 16 requests of many lengths, half of them greedy.
fn mix() -> Vec<(Vec<u32>, RequestKind)> {
    let lengths = [1, 2, 3, 5, 8, 15, 16, 17, 21, 27, 31, 32, 33, 40, 130, 200];
    let request = |(number, &len): (usize, &u32)| {
        let temperature = if number % 2 == 0 { 0.0 } else { 0.8 };
        (prompt(number as u32, len), generate(temperature, number as u64, 32))
    };
    lengths.iter().enumerate().map(request).collect()
}

#[test]
fn logits_are_near_those_of_the_cpu_in_float32() {
    if gpu().is_none() {
        return;
    }
    for head_dim in [64, 128] {
        let dir = model(head_dim);
        let request = [(prompt(3, 150), RequestKind::Logits)];
        let cpu = ModelOptions { device: DeviceChoice::Cpu, ..gpu_options() };
        let exact = &serve(&dir, &cpu, &[], &request)[0].logits;
        let rms = |values: &mut dyn Iterator<Item = f32>| {
            (values.map(|it| f64::from(it).powi(2)).sum::<f64>() / exact.len() as f64).sqrt()
        };
        let spread = rms(&mut exact.iter().copied());
        assert!(spread > 0.2, "logits this flat would hide mistakes: {spread}");
        for (deterministic, budget) in
            [(false, 512), (false, 16), (false, 33), (false, 1), (true, 50)]
        {
            let options = ModelOptions { deterministic, ..limited(4, budget) };
            let found = &serve(&dir, &options, &[], &request)[0].logits;
            assert_eq!(found.len(), exact.len());
            let error = rms(&mut found.iter().zip(exact).map(|(a, b)| a - b)) / spread;
            println!("head_dim {head_dim}, chunks of {budget}: relative error {error:.1e}");
            assert!(error < 2e-2, "{error}");
        }
    }
}

#[test]
fn a_deterministic_sequence_says_the_same_in_any_batch_chunk_and_after_preemption() {
    if gpu().is_none() {
        return;
    }
    let dir = model(64);
    let options = |max_num_seqs, budget, num_blocks| ModelOptions {
        num_blocks: Some(num_blocks),
        deterministic: true,
        ..limited(max_num_seqs, budget)
    };
    let alone = serve(&dir, &options(1, 512, 200), &[], &mix());
    assert!(alone.iter().all(|answer| answer.tokens.len() == 32));
    for (max_num_seqs, budget, num_blocks) in
        [(16, 512, 200), (16, 16, 200), (16, 33, 200), (3, 512, 200), (16, 1, 200), (16, 64, 17)]
    {
        let together = serve(&dir, &options(max_num_seqs, budget, num_blocks), &[], &mix());
        assert!(
            together == alone,
            "{max_num_seqs} sequences, {budget} tokens, {num_blocks} blocks"
        );
    }
}

/// The same executor, one step at a time.
#[derive(Debug)]
struct OneStep(Box<dyn Executor>);

impl Executor for OneStep {
    fn capacity(&self) -> Capacity {
        Capacity { max_steps_in_flight: 1, ..self.0.capacity() }
    }

    fn launch(&mut self, step: &ScheduleOutput) -> nano_core::Result<()> {
        self.0.launch(step)
    }

    fn collect(&mut self) -> nano_core::Result<Vec<SampledRow>> {
        self.0.collect()
    }
}

#[test]
fn one_step_in_flight_says_what_two_do() {
    if gpu().is_none() {
        return;
    }
    let dir = model(64);
    let options = ModelOptions { deterministic: true, ..gpu_options() };
    let (executor, info) = load(dir.path(), &options).unwrap();
    assert_eq!(executor.capacity().max_steps_in_flight, 2);
    let one = run(Box::new(OneStep(executor)), &info, &[], &mix());
    assert!(one == serve(&dir, &options, &[], &mix()));
}

#[test]
fn tokens_are_chosen_as_the_reference_chooses_from_the_same_logits() {
    if gpu().is_none() {
        return;
    }
    let dir = model(64);
    let options = ModelOptions { deterministic: true, ..gpu_options() };
    let prompts: Vec<Vec<u32>> = (0..6).map(|number| prompt(number, 20 + number)).collect();
    let logits: Vec<_> = prompts.iter().map(|it| (it.clone(), RequestKind::Logits)).collect();
    let kinds = [0.0, 0.7, 1.0, 3.0, 0.0, 0.2];
    let sampled = prompts.iter().zip(kinds).map(|(it, heat)| (it.clone(), generate(heat, 7, 1)));
    // Logits and tokens in one step.
    let mixed: Vec<_> = logits.into_iter().chain(sampled).collect();
    let answers = serve(&dir, &options, &[], &mixed);
    for (number, temperature) in kinds.into_iter().enumerate() {
        let sampling = Sampling {
            temperature: temperature as f32,
            top_k: Some(50),
            top_p: 0.9,
            min_p: 0.0,
            seed: 7,
            position: prompts[number].len() as u32,
            index: 0,
        };
        let logits = &answers[number].logits;
        let last = &logits[logits.len() - VOCAB_SIZE as usize..];
        assert_eq!(answers[6 + number].tokens, [sample(last, &sampling).unwrap()]);
    }
}

#[test]
fn the_end_of_sequence_is_not_chosen_before_min_tokens() {
    if gpu().is_none() {
        return;
    }
    let dir = model(64);
    let greedy = |min_tokens| {
        let params = SamplingParams {
            temperature: 0.0,
            min_tokens,
            max_tokens: 20,
            ..SamplingParams::default()
        };
        [(prompt(1, 9), RequestKind::Generate(params))]
    };
    let options = ModelOptions { deterministic: true, ..gpu_options() };
    let free = serve(&dir, &options, &[], &greedy(0)).remove(0).tokens;
    let eos = free[2];
    let at = free.iter().position(|&token| token == eos).unwrap();
    assert_eq!(serve(&dir, &options, &[eos], &greedy(0))[0].tokens, free[..=at]);
    let held = serve(&dir, &options, &[eos], &greedy(8)).remove(0).tokens;
    assert!(held.len() >= 8 && !held[..8].contains(&eos), "{held:?} without {eos}");
}

#[test]
fn all_memory_is_given_back_and_can_be_had_again() {
    let Some(device) = gpu() else { return };
    let dir = model(128);
    let options = ModelOptions { num_blocks: None, ..gpu_options() };
    let free = |device: &Device| device.memory().unwrap().free_bytes;
    serve(&dir, &options, &[], &mix());
    let before = free(&device);
    for round in 0..5 {
        serve(&dir, &options, &[], &mix());
        let lost = before.saturating_sub(free(&device)) >> 20;
        println!("round {round}: {lost} MiB lost");
        assert!(lost <= 64, "{lost} MiB");
    }
}

#[test]
fn what_the_kernels_cannot_run_is_refused_by_name_and_left_to_the_cpu_by_auto() {
    let dir = model(16);
    let options = ModelOptions { device: DeviceChoice::Auto, ..gpu_options() };
    assert_eq!(load(dir.path(), &options).unwrap().1.device, "cpu");
    // Before a device is opened: there need be none.
    let error = |options: ModelOptions| load(dir.path(), &options).unwrap_err().to_string();
    assert!(error(gpu_options()).contains("head_dim must be 64 or 128"));
    let block_size = error(ModelOptions { block_size: 8, ..gpu_options() });
    assert!(block_size.contains("block_size must be 16"), "{block_size}");
    let nowhere = ModelOptions { device: DeviceChoice::Cuda(99), ..gpu_options() };
    let nowhere = load(model(64).path(), &nowhere).unwrap_err().to_string();
    assert!(nowhere.contains("no CUDA device"), "{nowhere}");
}

#[test]
fn a_cache_that_cannot_fit_is_refused_with_what_is_free_and_what_helps() {
    if gpu().is_none() {
        return;
    }
    let dir = model(64);
    let too_many = ModelOptions { num_blocks: Some(1 << 27), ..gpu_options() };
    let error = load(dir.path(), &too_many).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("num_blocks") && message.contains("GiB"), "{message}");
    assert!(message.contains("gpu_memory_utilization"), "{message}");
    let nothing = ModelOptions { gpu_memory_utilization: 1e-4, num_blocks: None, ..gpu_options() };
    let message = load(dir.path(), &nothing).unwrap_err().to_string();
    assert!(message.contains("gpu_memory_utilization"), "{message}");
    let error = load(dir.path(), &limited(4, 1 << 30)).unwrap_err();
    assert_eq!(error.code(), "invalid_config");
    assert!(error.to_string().contains("max_num_batched_tokens"), "{error}");
}
