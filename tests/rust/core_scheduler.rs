//! The scheduler step by step: who runs, and in which order.
#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod core_engine;
mod core_fake;
mod core_outcome;
mod core_pace;
mod core_run;
mod fake_executor;

use std::time::Duration;

use nano_core::step::{LogitRows, TokenSource};
use nano_core::{
    Capacity, FinishReason, RequestKind, SamplingParams, Scheduler, SchedulerConfig, SequenceId,
};

use core_run::{Run, WIDE, continuation, generate, parts, prompt, request};

#[test]
fn a_limit_of_zero_is_refused() {
    let capacity = Capacity { num_blocks: 1, block_size: 1, max_steps_in_flight: 1 };
    let message = |max_num_seqs, max_num_batched_tokens| {
        let config = SchedulerConfig { max_num_seqs, max_num_batched_tokens, ..WIDE };
        Scheduler::new(config, capacity).unwrap_err().to_string()
    };
    assert_eq!(message(0, 1), "max_num_seqs must be at least 1, got 0");
    assert_eq!(message(1, 0), "max_num_batched_tokens must be at least 1, got 0");
    let smallest = SchedulerConfig {
        max_num_seqs: 1,
        max_num_batched_tokens: 1,
        max_itl: Some(Duration::from_nanos(1)),
    };
    assert!(Scheduler::new(smallest, capacity).is_ok());
    let none = SchedulerConfig { max_itl: Some(Duration::ZERO), ..smallest };
    let error = Scheduler::new(none, capacity).unwrap_err();
    assert_eq!(error.to_string(), "max_itl_ms must be above 0, got 0");
}

#[test]
fn a_long_prompt_runs_in_chunks_and_samples_after_the_last() {
    let config = SchedulerConfig { max_num_batched_tokens: 4, ..WIDE };
    let mut run = Run::new(config, 10, 2).with([generate(0, 10, 1)]);
    let steps: Vec<_> = (0..3).map(|_| run.launch()).collect();
    let all: Vec<_> = steps.iter().flat_map(parts).collect();
    assert_eq!(all, [(0, 0, 4), (0, 4, 4), (0, 8, 2)]);
    let rows: Vec<_> = steps.iter().map(|step| step.sequences[0].logit_rows).collect();
    assert_eq!(rows, [LogitRows::None, LogitRows::None, LogitRows::Last]);
    let tables: Vec<_> = steps.iter().map(|step| step.block_ids.len()).collect();
    assert_eq!(tables, [2, 4, 5]);
    assert!(run.collect().is_empty() && run.collect().is_empty());
    run.collect();
    assert_eq!(run.tokens[&0], continuation(0, 10, 1));
}

#[test]
fn decodes_and_prefills_share_a_step_oldest_first() {
    let config = SchedulerConfig { max_num_batched_tokens: 6, ..WIDE };
    let mut run = Run::new(config, 100, 2).with([generate(0, 2, 4), generate(1, 7, 2)]);
    assert_eq!(run.step(), [(0, 0, 2), (1, 0, 4)]);
    run.scheduler.add(generate(2, 3, 2));
    let step = run.launch();
    assert_eq!(parts(&step), [(0, 2, 1), (1, 4, 3), (2, 0, 2)]);
    assert_eq!(step.num_tokens, 6);
    run.collect();
    assert_eq!(run.step(), [(0, 3, 1), (1, 7, 1), (2, 2, 1)]);
    run.finish();
    assert_eq!(run.tokens[&0], continuation(0, 2, 4));
    assert_eq!(run.tokens[&1], continuation(1, 7, 2));
    assert_eq!(run.tokens[&2], continuation(2, 3, 2));
}

#[test]
fn a_budget_below_the_number_of_sequences_serves_the_oldest() {
    let config = SchedulerConfig { max_num_batched_tokens: 2, ..WIDE };
    let mut run = Run::new(config, 100, 1).with((0..4).map(|id| generate(id, 1, 2)));
    assert_eq!(run.step(), [(0, 0, 1), (1, 0, 1)]);
    assert_eq!(run.step(), [(0, 1, 1), (1, 1, 1)]);
    assert_eq!(run.step(), [(2, 0, 1), (3, 0, 1)]);
    run.finish();
    assert_eq!(run.finished.len(), 4);
}

#[test]
fn no_more_than_max_num_seqs_run_and_others_join_when_one_ends() {
    let config = SchedulerConfig { max_num_seqs: 2, ..WIDE };
    let mut run = Run::new(config, 100, 1);
    run = run.with([generate(0, 1, 2), generate(1, 1, 3), generate(2, 1, 1)]);
    assert_eq!(run.step(), [(0, 0, 1), (1, 0, 1)]);
    assert_eq!((run.stats().num_running, run.stats().num_waiting), (2, 1));
    assert_eq!(run.step(), [(0, 1, 1), (1, 1, 1)]);
    assert_eq!(run.step(), [(1, 2, 1), (2, 0, 1)]);
    assert!(run.scheduler.is_idle());
}

#[test]
fn a_short_request_does_not_overtake_one_that_waits_for_blocks() {
    let mut run = Run::new(WIDE, 6, 1).with([generate(0, 4, 2)]);
    assert_eq!(run.step(), [(0, 0, 4)]);
    run = run.with([generate(1, 3, 1), generate(2, 1, 1)]);
    assert_eq!(run.step(), [(0, 4, 1)]);
    assert_eq!(run.step(), [(1, 0, 3), (2, 0, 1)]);
}

#[test]
fn the_newest_is_preempted_and_comes_back_before_newer_ones_with_the_same_output() {
    let config = SchedulerConfig { max_num_seqs: 3, ..WIDE };
    let requests = (0..4).map(|id| generate(id, 2, 5));
    let mut run = Run::new(config, 4, 2).with(requests);
    assert_eq!(run.step(), [(0, 0, 2), (1, 0, 2), (2, 0, 2)]);

    // The one free block goes to 0, so 1 takes the one of 2.
    let step = run.launch();
    assert_eq!((parts(&step), step.num_preempted), (vec![(0, 2, 1), (1, 2, 1)], 1));
    run.collect();
    // Now 2 waits, and before 3.
    assert_eq!(run.step(), [(0, 3, 1), (1, 3, 1)]);
    assert_eq!((run.stats().num_running, run.stats().num_waiting), (2, 2));

    let step = run.launch();
    assert_eq!((parts(&step), step.num_preempted), (vec![(0, 4, 1)], 1));
    run.collect();
    // One block is free, which 2 or 3 could use, but 1 is older and lacks three.
    assert_eq!((run.step(), run.stats().num_free_blocks), (vec![(0, 5, 1)], 4));
    assert_eq!(run.finished[&0], FinishReason::Length);
    assert_eq!(run.step(), [(1, 0, 5)]);
    assert_eq!(run.step(), [(1, 5, 1)]);
    assert_eq!(run.step(), [(2, 0, 3), (3, 0, 2)]);
    run.finish();
    for id in 0..4 {
        assert_eq!(run.tokens[&id], continuation(id, 2, 5), "request {id}");
    }
    // Number 3 gave way to number 2 once more.
    assert_eq!((run.stats().num_preemptions, run.stats().num_free_blocks), (3, 4));
}

#[test]
fn a_step_that_preempted_admits_nobody() {
    let mut run = Run::new(WIDE, 6, 1);
    run = run.with([generate(0, 2, 5), generate(1, 4, 2), generate(2, 1, 1)]);
    assert_eq!(run.step(), [(0, 0, 2), (1, 0, 4)]);
    let step = run.launch();
    assert_eq!((parts(&step), step.num_preempted), (vec![(0, 2, 1)], 1));
    assert_eq!(run.stats().num_free_blocks, 3);
}

#[test]
fn no_second_victim_falls_while_blocks_of_the_first_are_pending() {
    let mut run = Run::new(WIDE, 3, 1).with((0..3).map(|id| generate(id, 1, 2)));
    assert_eq!(parts(&run.launch()), [(0, 0, 1), (1, 0, 1), (2, 0, 1)]);
    for _ in 0..2 {
        assert!(run.launch().sequences.is_empty());
        assert_eq!((run.stats().num_preemptions, run.stats().num_running), (1, 2));
        assert_eq!(run.stats().num_free_blocks, 0);
    }
    run.collect();
    assert_eq!(run.step(), [(0, 1, 1)]);
    run.finish();
    for id in 0..3 {
        assert_eq!(run.tokens[&id], continuation(id, 1, 2), "request {id}");
    }
}

#[test]
fn one_falls_for_each_that_needs_a_block() {
    let mut run = Run::new(WIDE, 4, 1).with((0..4).map(|id| generate(id, 1, 3)));
    assert_eq!(run.step().len(), 4);
    let step = run.launch();
    assert_eq!((parts(&step), step.num_preempted), (vec![(0, 1, 1), (1, 1, 1)], 2));
    assert_eq!((run.stats().num_running, run.stats().num_waiting), (2, 2));
    run.collect();
    run.finish();
    for id in 0..4 {
        assert_eq!(run.tokens[&id], continuation(id, 1, 3), "request {id}");
    }
}

#[test]
fn one_that_needs_a_block_and_is_itself_the_newest_gives_its_own_back() {
    let mut run = Run::new(WIDE, 6, 1).with([generate(0, 1, 6), generate(1, 4, 2)]);
    assert_eq!(run.step(), [(0, 0, 1), (1, 0, 4)]);
    let step = run.launch();
    assert_eq!((parts(&step), step.num_preempted), (vec![(0, 1, 1)], 1));
    assert_eq!(run.stats().num_free_blocks, 4);
    run.collect();
    run.finish();
    assert_eq!(run.tokens[&0], continuation(0, 1, 6));
    assert_eq!(run.tokens[&1], continuation(1, 4, 2));
}

#[test]
fn a_token_in_flight_is_named_by_its_row_in_the_step_before() {
    let config = SchedulerConfig { max_num_batched_tokens: 3, ..WIDE };
    let mut run = Run::new(config, 100, 2).with([generate(0, 2, 3), generate(1, 2, 3)]);
    let first = run.launch();
    assert_eq!(parts(&first), [(0, 0, 2), (1, 0, 1)]);
    let second = run.launch();
    assert_eq!(parts(&second), [(0, 2, 1), (1, 1, 1)]);
    assert_eq!(second.sequences[0].tokens, TokenSource::PreviousStep { row: 0 });
    assert_eq!(second.sequences[1].tokens, TokenSource::Host(0..1));
    assert_eq!(second.token_ids, prompt(1, 2)[1..]);
    let third = run.launch();
    assert_eq!(parts(&third), [(0, 3, 1), (1, 2, 1)]);
    assert_eq!(third.sequences[1].tokens, TokenSource::PreviousStep { row: 1 });
    // The last token of 0 is in flight and need not run; 1 goes on and moves up a row.
    run.collect();
    let fourth = run.launch();
    assert_eq!(parts(&fourth), [(1, 3, 1)]);
    assert_eq!(fourth.sequences[0].tokens, TokenSource::PreviousStep { row: 1 });
    for _ in 0..3 {
        run.collect();
    }
    assert_eq!(run.tokens[&0], continuation(0, 2, 3));
    assert_eq!(run.tokens[&1], continuation(1, 2, 3));
}

#[test]
fn a_token_in_flight_that_the_step_before_did_not_sample_is_waited_for() {
    let mut run = Run::new(WIDE, 4, 3).with([request(0, 2, RequestKind::Logits)]);
    assert_eq!(parts(&run.launch()), [(0, 0, 2)]);
    run = run.with([generate(1, 1, 3), generate(2, 3, 2), generate(3, 1, 2)]);
    assert_eq!(parts(&run.launch()), [(1, 0, 1), (2, 0, 3), (3, 0, 1)]);
    // 2 needs a block and takes it from 3, but has to wait for it.
    assert_eq!(parts(&run.launch()), [(1, 1, 1)]);
    // Now the block of 0 is free. The tokens of 2 and 3 are still unknown to the host, and the
    // step launched last does not sample them.
    run.collect();
    assert_eq!(run.stats().num_free_blocks, 1);
    assert_eq!(parts(&run.launch()), [(1, 2, 1)]);
    run.collect();
    assert_eq!(parts(&run.launch()), [(2, 3, 1), (3, 0, 2)]);
    for _ in 0..3 {
        run.collect();
    }
    run.finish();
    for (id, prompt_len, num_tokens) in [(1, 1, 3), (2, 3, 2), (3, 1, 2)] {
        assert_eq!(run.tokens[&id], continuation(id, prompt_len, num_tokens), "request {id}");
    }
}

#[test]
fn an_empty_step_uses_no_number() {
    let mut run = Run::new(WIDE, 4, 1);
    assert!(run.launch().sequences.is_empty());
    run = run.with([generate(0, 1, 2)]);
    assert_eq!(run.launch().step, 1);
    run.collect();
    assert_eq!(run.launch().step, 2);
    run.collect();
    assert!(run.scheduler.is_idle());
}

#[test]
fn a_scheduled_sequence_carries_parameters_seed_and_table() {
    let params = SamplingParams { seed: Some(11), temperature: 0.5, ..Default::default() };
    let mut run = Run::new(WIDE, 9, 2)
        .with([generate(0, 3, 2), request(1, 4, RequestKind::Generate(params.clone()))]);
    let step = run.launch();
    let [first, second] = &step.sequences[..] else { panic!("two sequences run") };
    assert_eq!((first.sequence, second.sequence), (SequenceId(0), SequenceId(1)));
    assert_eq!((&*second.params, second.seed), (&params, 11));
    assert_eq!(
        (first.tokens.clone(), second.tokens.clone()),
        (TokenSource::Host(0..3), TokenSource::Host(3..7))
    );
    assert_eq!((first.block_table.clone(), second.block_table.clone()), (0..2, 2..4));
    assert_eq!(step.token_ids, [prompt(0, 3), prompt(1, 4)].concat());
    assert_eq!((step.num_tokens, step.num_preempted, step.step), (7, 0, 1));
}
