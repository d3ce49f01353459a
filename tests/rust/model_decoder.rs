//! The decoder as a whole, through the executor: chunks, batches and back ends play no part in what
//! a sequence says.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test ends at the first surprise")]

mod model_fixture;
mod tch_backend;

use std::sync::Arc;

use model_fixture::{BLOCK_SIZE, NUM_BLOCKS, load, model, options, write_json};
use nano_core::step::{LogitRows, RowAnswer, ScheduledSequence, TokenSource};
use nano_core::{BlockId, Error, Executor, SamplingParams, ScheduleOutput, SequenceId, TokenId};
use nano_kernels::reference::sampling::{Sampling, sample};
use nano_model::backend::Backend;
use nano_model::batch::Batch;
use nano_model::decoder::forward;
use nano_model::load::{Source, load_decoder};
use nano_model::{Dtype, ModelConfig, ModelOptions};
use tch_backend::TchBackend;

const VOCAB_SIZE: usize = 31;
const BOUND: f32 = 2e-5;

fn executor(options: &ModelOptions) -> Box<dyn Executor> {
    load(model().path(), options).unwrap().0
}

/// A sequence with its blocks, of which every third one is its own.
#[derive(Clone)]
struct Run {
    number: u32,
    tokens: Vec<u32>,
    params: SamplingParams,
}

impl Run {
    fn new(number: u32, len: u32) -> Self {
        let tokens = (0..len).map(|at| (at * 7 + number * 11 + 1) % VOCAB_SIZE as u32).collect();
        Self { number, tokens, params: SamplingParams::default() }
    }

    fn schedule(&self, step: &mut ScheduleOutput, computed: u32, end: u32, rows: LogitRows) {
        let first = step.token_ids.len() as u32;
        let tokens = &self.tokens[computed as usize..end as usize];
        step.token_ids.extend(tokens.iter().map(|&token| TokenId(token)));
        let table = step.block_ids.len() as u32;
        let blocks = 0..end.div_ceil(BLOCK_SIZE);
        step.block_ids.extend(blocks.map(|at| BlockId((3 * at + self.number) % NUM_BLOCKS)));
        step.sequences.push(ScheduledSequence {
            sequence: SequenceId(self.number.into()),
            tokens: TokenSource::Host(first..step.token_ids.len() as u32),
            num_computed_tokens: computed,
            num_scheduled_tokens: end - computed,
            block_table: table..step.block_ids.len() as u32,
            logit_rows: rows,
            banned: None,
            params: Arc::new(self.params.clone()),
            seed: 1000 + u64::from(self.number),
        });
        step.num_tokens += end - computed;
    }
}

fn run(executor: &mut dyn Executor, step: &ScheduleOutput) -> Vec<RowAnswer> {
    executor.launch(step).unwrap();
    let rows = executor.collect().unwrap();
    let asked = step.sequences.iter().filter(|it| it.logit_rows != LogitRows::None);
    assert!(asked.clone().count() == rows.len());
    assert!(asked.zip(&rows).all(|(scheduled, row)| scheduled.is_answered_by(row)));
    rows.into_iter().map(|row| row.answer).collect()
}

fn token(answer: &RowAnswer) -> TokenId {
    let RowAnswer::Token(token) = answer else { panic!("no token but {answer:?}") };
    *token
}

fn rows_of(answer: &RowAnswer) -> &[f32] {
    let RowAnswer::Logits(logits) = answer else { panic!("no logits but {answer:?}") };
    logits
}

/// The logits of all tokens, in chunks that end where `ends` says.
fn logits(executor: &mut dyn Executor, sequence: &Run, ends: &[u32]) -> Vec<f32> {
    let mut logits = Vec::new();
    let mut computed = 0;
    for &end in ends {
        let mut step = ScheduleOutput::default();
        sequence.schedule(&mut step, computed, end, LogitRows::All);
        let rows = run(executor, &step);
        logits.extend_from_slice(rows_of(&rows[0]));
        computed = end;
    }
    logits
}

fn assert_close(found: &[f32], expected: &[f32], bound: f32) {
    assert_eq!(found.len(), expected.len());
    let errors = found.iter().zip(expected).map(|(found, expected)| (found - expected).abs());
    let error = errors.fold(0.0, f32::max);
    assert!(error <= bound, "off by {error}");
}

#[test]
fn chunks_and_single_tokens_give_the_logits_of_the_whole() {
    let mut executor = executor(&options());
    let sequence = Run::new(0, 33);
    let whole = logits(&mut *executor, &sequence, &[33]);
    let spread = whole.iter().copied().fold(0.0, f32::max);
    assert!(spread > 0.5, "logits this flat would hide mistakes: {spread}");
    for ends in [vec![16, 33], vec![1, 5, 6, 20, 33], (1..=33).collect()] {
        assert_close(&logits(&mut *executor, &sequence, &ends), &whole, BOUND);
    }
}

#[test]
fn neighbours_in_a_batch_change_nothing() {
    let mut executor = executor(&options());
    let (first, second, third) = (Run::new(0, 30), Run::new(1, 9), Run::new(2, 18));
    let alone = [&first, &second, &third]
        .map(|sequence| logits(&mut *executor, sequence, &[sequence.tokens.len() as u32]));
    // A decode, a whole prefill and the second chunk of one, after the caches' first parts.
    let mut before = ScheduleOutput::default();
    first.schedule(&mut before, 0, 29, LogitRows::None);
    third.schedule(&mut before, 0, 7, LogitRows::None);
    assert!(run(&mut *executor, &before).is_empty());
    let mut step = ScheduleOutput::default();
    first.schedule(&mut step, 29, 30, LogitRows::All);
    second.schedule(&mut step, 0, 9, LogitRows::All);
    third.schedule(&mut step, 7, 18, LogitRows::All);
    let rows = run(&mut *executor, &step);
    for ((row, alone), skipped) in rows.iter().zip(&alone).zip([29, 0, 7]) {
        assert_close(rows_of(row), &alone[skipped * VOCAB_SIZE..], BOUND);
    }
}

#[test]
fn bfloat16_is_near_float32() {
    let sequence = Run::new(0, 33);
    let exact = logits(&mut *executor(&options()), &sequence, &[33]);
    let options = ModelOptions { dtype: Some(Dtype::BFloat16), ..options() };
    let mut executor = executor(&options);
    let largest = exact.iter().copied().fold(0.0, f32::max);
    for ends in [vec![33], (1..=33).collect()] {
        let rounded = logits(&mut *executor, &sequence, &ends);
        assert_close(&rounded, &exact, 0.06 * largest.max(1.0));
    }
}

#[test]
fn tokens_are_sampled_from_the_last_row_as_the_reference_does() {
    let mut executor = executor(&options());
    let mut sequence = Run::new(5, 21);
    let all = logits(&mut *executor, &sequence, &[21]);
    let last = &all[20 * VOCAB_SIZE..];
    for temperature in [0.0, 0.7, 3.0] {
        sequence.params = SamplingParams { temperature, top_k: Some(9), ..sequence.params };
        let mut step = ScheduleOutput::default();
        sequence.schedule(&mut step, 0, 21, LogitRows::Last);
        let rows = run(&mut *executor, &step);
        let sampling = Sampling {
            temperature: temperature as f32,
            top_k: Some(9),
            top_p: 1.0,
            min_p: 0.0,
            seed: 1005,
            position: 21,
            index: 0,
        };
        assert_eq!(token(&rows[0]).0, sample(last, &sampling).unwrap());
    }
}

#[test]
fn banned_tokens_are_never_sampled_and_others_are_not_banned() {
    let mut executor = executor(&options());
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let sequences = [3, 4].map(|number| Run { params: greedy.clone(), ..Run::new(number, 5) });
    let mut step = ScheduleOutput::default();
    for sequence in &sequences {
        sequence.schedule(&mut step, 0, 5, LogitRows::Last);
    }
    let free = run(&mut *executor, &step);
    let best = token(&free[1]);
    // A token outside the vocabulary is nothing to ban.
    step.sequences[1].banned = Some(Arc::from([best, TokenId(9999)]));
    let masked = run(&mut *executor, &step);
    assert_eq!(masked[0], free[0]);
    assert_ne!(token(&masked[1]), best);
}

#[test]
fn a_token_may_come_from_the_step_before() {
    let mut executor = executor(&options());
    let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let mut sequence = Run { params, ..Run::new(1, 6) };
    let mut step = ScheduleOutput::default();
    Run::new(0, 3).schedule(&mut step, 0, 3, LogitRows::None);
    sequence.schedule(&mut step, 0, 6, LogitRows::Last);
    sequence.tokens.push(token(&run(&mut *executor, &step)[0]).0);
    let mut step = ScheduleOutput::default();
    sequence.schedule(&mut step, 6, 7, LogitRows::All);
    let from_host = run(&mut *executor, &step);
    // The same again, with the token named by the row that sampled it.
    let mut before = ScheduleOutput::default();
    Run::new(0, 3).schedule(&mut before, 0, 3, LogitRows::None);
    sequence.schedule(&mut before, 0, 6, LogitRows::Last);
    run(&mut *executor, &before);
    step.sequences[0].tokens = TokenSource::PreviousStep { row: 1 };
    let from_step = run(&mut *executor, &step);
    assert_eq!(rows_of(&from_step[0]), rows_of(&from_host[0]));
}

#[test]
fn logits_that_are_no_numbers_end_their_own_request() {
    let dir = model();
    let path = dir.path().join("model.safetensors");
    let mut file = std::fs::read(&path).unwrap();
    let len = file.len();
    // Whatever tensor is last, infinity in it reaches every row.
    file[len - 2000..].as_chunks_mut::<4>().0.fill(f32::INFINITY.to_le_bytes());
    std::fs::write(&path, file).unwrap();
    let (mut executor, _) = load(dir.path(), &options()).unwrap();
    let mut step = ScheduleOutput::default();
    Run::new(0, 3).schedule(&mut step, 0, 3, LogitRows::Last);
    let rows = run(&mut *executor, &step);
    assert_eq!(rows, [RowAnswer::Error(Error::LogitsNotFinite { position: 3 })]);
}

#[test]
fn the_whole_agrees_with_libtorch() {
    let dir = model();
    let mut executor = executor(&options());
    let sequences = [Run::new(0, 30), Run::new(1, 9), Run::new(2, 18)];
    let mut step = ScheduleOutput::default();
    for sequence in &sequences {
        sequence.schedule(&mut step, 0, sequence.tokens.len() as u32, LogitRows::All);
    }
    let rows = run(&mut *executor, &step);
    let found: Vec<f32> = rows.iter().flat_map(rows_of).copied().collect();

    let config = ModelConfig::from_dir(dir.path()).unwrap();
    let mut oracle = TchBackend::new(config.spec.clone(), Dtype::Float32, NUM_BLOCKS, BLOCK_SIZE);
    let source = Source::open(&config, &options()).unwrap();
    let decoder = load_decoder(&config.spec, &source, &mut oracle).unwrap();
    let batch = Batch::ordered(&step, 0..step.sequences.len(), BLOCK_SIZE, &[]);
    let prepared = oracle.prepare(&batch).unwrap();
    let logits = forward(&mut oracle, &decoder, &prepared).unwrap();
    let mut expected = Vec::new();
    oracle.to_host(logits, &mut expected).unwrap();
    assert_close(&found, &expected, BOUND);
}

#[test]
fn dummy_weights_need_no_file_and_repeat_themselves() {
    let dir = tempfile::tempdir().unwrap();
    write_json(&dir.path().join("config.json"), &model_fixture::config());
    let run = |seed| {
        let options = ModelOptions { dummy_weights: true, seed, ..options() };
        let (mut executor, info) = load(dir.path(), &options).unwrap();
        assert_eq!(executor.capacity().num_blocks, NUM_BLOCKS);
        assert_eq!((info.request_limits.vocab_size, info.dtype), (31, "float32"));
        logits(&mut *executor, &Run::new(0, 5), &[5])
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}
