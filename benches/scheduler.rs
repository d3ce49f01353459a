//! What one step costs the scheduler: 256 sequences of 512 tokens in blocks of 16.
//!
//! `cargo bench -p nano_core --bench scheduler`. The target is 100 us for each way a step can go;
//! only `schedule` delays the launch of a step, `update` is paid while the next one runs.
#![expect(missing_docs, reason = "criterion_group! writes a function without them")]
#![expect(clippy::unwrap_used, reason = "a bench ends at the first surprise")]

use std::sync::Arc;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use nano_core::step::{LogitRows, RowAnswer, SampledRow};
use nano_core::{
    Capacity, Request, RequestId, RequestKind, RequestLimits, SamplingParams, ScheduleOutput,
    Scheduler, SchedulerConfig, TokenId,
};

const NUM_SEQUENCES: u32 = 256;
const CONTEXT_LEN: u32 = 512;
const BLOCK_SIZE: u32 = 16;

/// One way that a step can go.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    /// Requests that arrive before the step.
    num_joining: u32,
    joining_len: u32,
    num_blocks: u32,
    /// What the step must turn out to be.
    num_scheduled: usize,
    num_preempted: u32,
}

/// With exactly as many blocks as the prompts fill, each of the 248 that go on needs a new one,
/// and each of 8 that give way has 32.
const CASES: [Case; 3] = [
    Case {
        name: "256 decodes",
        num_joining: 0,
        joining_len: 0,
        num_blocks: 16_384,
        num_scheduled: 256,
        num_preempted: 0,
    },
    Case {
        name: "256 decodes and 64 joining prompts of 128",
        num_joining: 64,
        joining_len: 128,
        num_blocks: 16_384,
        num_scheduled: 320,
        num_preempted: 0,
    },
    Case {
        name: "248 decodes and 8 preemptions",
        num_joining: 0,
        joining_len: 0,
        num_blocks: NUM_SEQUENCES * CONTEXT_LEN / BLOCK_SIZE,
        num_scheduled: 248,
        num_preempted: 8,
    },
];

fn request(id: u32, prompt_len: u32) -> Request {
    let limits = RequestLimits {
        vocab_size: 32_000,
        max_model_len: 4096,
        num_blocks: 1 << 20,
        block_size: BLOCK_SIZE,
        eos_token_ids: Arc::from([TokenId(2)]),
        seed: 0,
    };
    let params = SamplingParams { max_tokens: 256, ..SamplingParams::default() };
    let prompt = vec![TokenId(1); prompt_len as usize];
    Request::new(RequestId(u64::from(id)), prompt, RequestKind::Generate(params), &limits).unwrap()
}

/// What an executor would answer.
fn answer(step: &ScheduleOutput) -> Vec<SampledRow> {
    let sampled = step.sequences.iter().filter(|s| s.logit_rows != LogitRows::None);
    let row = sampled.map(|scheduled| SampledRow {
        sequence: scheduled.sequence,
        answer: RowAnswer::Token(TokenId(7)),
    });
    row.collect()
}

/// All sequences have run their prompts; the next step is the one of the case.
fn scheduler(case: Case) -> Scheduler {
    let config =
        SchedulerConfig { max_num_seqs: 512, max_num_batched_tokens: 1 << 20, max_itl: None };
    let Case { num_blocks, .. } = case;
    let capacity = Capacity { num_blocks, block_size: BLOCK_SIZE, max_steps_in_flight: 1 };
    let mut scheduler = Scheduler::new(config, capacity).unwrap();
    (0..NUM_SEQUENCES).for_each(|id| scheduler.add(request(id, CONTEXT_LEN)));
    let step = scheduler.schedule();
    let output = answer(&step);
    scheduler.update(&step, output).unwrap();
    (0..case.num_joining)
        .for_each(|id| scheduler.add(request(NUM_SEQUENCES + id, case.joining_len)));
    scheduler
}

fn bench(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("scheduler");
    for case in CASES {
        let mut probe = scheduler(case);
        let step = probe.schedule();
        assert_eq!(step.sequences.len(), case.num_scheduled, "{}", case.name);
        assert_eq!(step.num_preempted, case.num_preempted, "{}", case.name);
        group.bench_function(format!("schedule {}", case.name), |bencher| {
            bencher.iter_batched_ref(
                || scheduler(case),
                Scheduler::schedule,
                BatchSize::PerIteration,
            );
        });
        group.bench_function(format!("schedule and update {}", case.name), |bencher| {
            bencher.iter_batched_ref(
                || (scheduler(case), Some(answer(&step))),
                |(scheduler, output)| {
                    let step = scheduler.schedule();
                    scheduler.update(&step, output.take().unwrap_or_default()).unwrap()
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
