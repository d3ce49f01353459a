//! Prompts that join running streams under a pace, with times that are made up.

use std::time::Duration;

use nano_core::scheduler::Pace;
use nano_core::{RequestKind, SchedulerConfig};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};

use crate::core_run::{Run, WIDE, continuation, generate, parts, request};

const TARGET: Duration = Duration::from_millis(10);
const PACED: SchedulerConfig = SchedulerConfig { max_itl: Some(TARGET), ..WIDE };

#[test]
fn a_prompt_has_the_whole_step_until_somebody_decodes() {
    let mut run = Run::new(PACED, 1000, 1).with([generate(0, 300, 9), generate(1, 300, 9)]);
    assert_eq!(run.step(), [(0, 0, 300), (1, 0, 300)]);
    run = run.with([generate(2, 300, 9)]);
    assert_eq!(run.step(), [(0, 300, 1), (1, 300, 1), (2, 0, 128)]);
}

#[test]
fn a_token_in_flight_decodes() {
    let mut run = Run::new(PACED, 1000, 1).with([generate(0, 1, 3)]);
    run.launch();
    run = run.with([generate(1, 300, 1)]);
    assert_eq!(parts(&run.launch()), [(0, 1, 1), (1, 0, 128)]);
    assert_eq!(parts(&run.launch()), [(0, 2, 1), (1, 128, 128)]);
    run.collect();
    // The last token of request 0 is in flight and need not run: nobody decodes any more.
    run = run.with([generate(2, 300, 1)]);
    assert_eq!(parts(&run.launch()), [(1, 256, 44), (2, 0, 300)]);
}

#[test]
fn prompts_share_the_budget_oldest_first_and_logits_are_prompts() {
    let mut run = Run::new(PACED, 1000, 1).with([generate(0, 1, 9)]);
    run.step();
    run = run.with([request(1, 100, RequestKind::Logits), generate(2, 100, 9), generate(3, 1, 1)]);
    let step = run.launch();
    assert_eq!(parts(&step), [(0, 1, 1), (1, 0, 100), (2, 0, 28)]);
    assert_eq!((step.num_tokens, step.num_prompt_tokens), (129, 128));
    run.collect();
    assert_eq!(run.step(), [(0, 2, 1), (2, 28, 72), (3, 0, 1)]);
}

#[test]
fn only_steps_of_both_are_learnt_from() {
    let mut run = Run::new(PACED, 1000, 1).with([generate(0, 100, 9)]);
    let prompt = run.launch();
    run.scheduler.observe(&prompt, 9 * TARGET);
    run.collect();
    let decode = run.launch();
    assert_eq!((decode.num_tokens, decode.num_prompt_tokens), (1, 0));
    run.scheduler.observe(&decode, 9 * TARGET);
    run.collect();
    run = run.with([generate(1, 900, 9)]);
    let both = run.launch();
    assert_eq!(parts(&both), [(0, 101, 1), (1, 0, 128)]);
    run.scheduler.observe(&both, 9 * TARGET);
    run.collect();
    assert_eq!(run.step(), [(0, 102, 1), (1, 128, 64)]);
}

/// When it comes, tokens of its prompt, `max_tokens`, whether it wants logits.
type Ask = (usize, u32, u32, bool);

/// Runs requests with made-up times, and steps as a pace of its own says.
fn check(config: SchedulerConfig, num_blocks: u32, ahead: usize, asks: &[Ask], times: &[u64]) {
    let mut pace = Pace::new(TARGET, config.max_num_batched_tokens);
    let mut run = Run::new(config, num_blocks, 1);
    let mut times = times.iter().cycle().map(|us| Duration::from_micros(*us));
    for round in 0..20_000 {
        for (id, (_, len, max_tokens, wants_logits)) in
            (0..).zip(asks).filter(|(_, ask)| ask.0 == round)
        {
            let logits = || request(id, *len, RequestKind::Logits);
            let ask = if *wants_logits { logits() } else { generate(id, *len, *max_tokens) };
            run.scheduler.add(ask);
        }
        let step = run.launch();
        let num_decodes = step.num_tokens - step.num_prompt_tokens;
        if num_decodes > 0 {
            assert!(step.num_prompt_tokens <= pace.num_prompt_tokens(), "over the pace");
        }
        let is_empty = step.sequences.is_empty();
        if run.in_flight.len() == ahead || is_empty && !run.in_flight.is_empty() {
            let oldest = run.in_flight[0].clone();
            let time = times.next().unwrap_or_default();
            run.scheduler.observe(&oldest, time);
            if oldest.num_prompt_tokens > 0 && oldest.num_prompt_tokens < oldest.num_tokens {
                pace.observe(oldest.num_prompt_tokens, time);
            }
            run.collect();
        } else {
            assert!(!is_empty || run.scheduler.is_idle(), "nothing runs, yet requests are left");
        }
        if run.finished.len() == asks.len() && run.in_flight.is_empty() {
            break;
        }
    }
    for (id, (_, len, max_tokens, wants_logits)) in (0..).zip(asks) {
        assert!(run.finished.contains_key(&id), "request {id} never ended");
        if !wants_logits {
            assert_eq!(run.tokens[&id], continuation(id, *len, *max_tokens as usize));
        }
    }
    assert_eq!(run.stats().num_free_blocks, num_blocks);
}

#[test]
fn whatever_steps_take_every_request_gets_its_tokens_within_the_pace() {
    let ask = (0_usize..40, 1_u32..=150, 1_u32..=20, prop::bool::weighted(0.2));
    let limits = (1_u32..=6, 1_u32..=300, 170_u32..=400, 1_usize..=3);
    let asks = prop::collection::vec(ask, 1..=8);
    // Around the target, now and then far from it.
    let time = prop_oneof![4 => 1_000_u64..30_000, 1 => Just(0), 1 => Just(10_000_000)];
    let scenario = (limits, asks, prop::collection::vec(time, 1..=50));
    let config = Config {
        cases: 300,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(20_240_229),
        ..Config::default()
    };
    TestRunner::new(config)
        .run(
            &scenario,
            |((max_num_seqs, max_num_batched_tokens, num_blocks, ahead), asks, times)| {
                let config = SchedulerConfig { max_num_seqs, max_num_batched_tokens, ..PACED };
                check(config, num_blocks, ahead, &asks, &times);
                Ok(())
            },
        )
        .unwrap();
}
