//! The fake executor notices what it is there to notice.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nano_core::step::{LogitRows, RowAnswer, ScheduledSequence, TokenSource};
use nano_core::{BlockId, Capacity, Executor, ScheduleOutput, SequenceId, TokenId};

use crate::fake_executor::FakeExecutor;

const CAPACITY: Capacity = Capacity { num_blocks: 4, block_size: 2, max_steps_in_flight: 2 };

fn tokens(ids: &[u32]) -> Vec<TokenId> {
    ids.iter().copied().map(TokenId).collect()
}

/// A step of one sequence that runs `ids` at positions from `first` on.
fn step(number: u64, sequence: u64, first: u32, ids: &[u32], table: &[u32]) -> ScheduleOutput {
    ScheduleOutput {
        step: number,
        sequences: vec![ScheduledSequence {
            sequence: SequenceId(sequence),
            tokens: TokenSource::Host(0..ids.len() as u32),
            num_computed_tokens: first,
            num_scheduled_tokens: ids.len() as u32,
            block_table: 0..table.len() as u32,
            logit_rows: LogitRows::Last,
            banned: None,
            params: Arc::default(),
            seed: 0,
        }],
        token_ids: tokens(ids),
        block_ids: table.iter().copied().map(BlockId).collect(),
        num_tokens: ids.len() as u32,
        num_prompt_tokens: ids.len() as u32,
        num_preempted: 0,
    }
}

fn sampled(executor: &mut FakeExecutor, step: &ScheduleOutput) -> RowAnswer {
    executor.launch(step).unwrap();
    executor.collect().unwrap().remove(0).answer
}

#[test]
fn the_continuation_goes_on_where_it_was_cut() {
    let all = FakeExecutor::continuation(&tokens(&[5, 1]), 6, 1000);
    let head = FakeExecutor::continuation(&tokens(&[5, 1]), 2, 1000);
    let prompt = [tokens(&[5, 1]), head.clone()].concat();
    let tail = FakeExecutor::continuation(&prompt, 4, 1000);
    assert_eq!(all, [head, tail].concat());
    assert_ne!(all, FakeExecutor::continuation(&tokens(&[1, 5]), 6, 1000));
}

#[test]
fn chunks_in_scattered_blocks_lead_to_the_continuation() {
    let mut executor = FakeExecutor::new(CAPACITY, 1000);
    sampled(&mut executor, &step(1, 0, 0, &[5, 1], &[3]));
    sampled(&mut executor, &step(2, 0, 2, &[7], &[3, 0]));
    let next = sampled(&mut executor, &step(3, 0, 3, &[2, 4], &[3, 0, 2]));
    let expected = FakeExecutor::continuation(&tokens(&[5, 1, 7, 2, 4]), 1, 1000)[0];
    assert_eq!(next, RowAnswer::Token(expected));
    let wrong = sampled(&mut executor, &step(4, 0, 4, &[4], &[0, 3, 2]));
    assert_ne!(wrong, next);
}

#[test]
fn there_is_nothing_to_collect_without_a_step() {
    let error = FakeExecutor::new(CAPACITY, 10).collect().unwrap_err();
    assert_eq!(error.to_string(), "executor failed: no step is in flight");
}

#[test]
fn a_step_takes_at_least_its_time() {
    let mut executor = FakeExecutor::new(CAPACITY, 10).with_step_time(Duration::from_millis(3));
    let start = Instant::now();
    sampled(&mut executor, &step(1, 0, 0, &[1], &[0]));
    assert!(start.elapsed() >= Duration::from_millis(3));
}

#[test]
#[should_panic(expected = "block 1 is reused while a step in flight names it")]
fn a_block_of_a_step_in_flight_given_to_another_sequence_is_noticed() {
    let mut executor = FakeExecutor::new(CAPACITY, 10);
    executor.launch(&step(1, 0, 0, &[1, 2, 3], &[0, 1])).unwrap();
    executor.launch(&step(2, 1, 0, &[1], &[1])).unwrap();
}

#[test]
#[should_panic(expected = "the table does not cover 2")]
fn a_table_that_is_too_short_is_noticed() {
    let _ = FakeExecutor::new(CAPACITY, 10).launch(&step(1, 0, 0, &[1, 2, 3], &[0]));
}

#[test]
#[should_panic(expected = "too deep")]
fn a_step_too_many_in_flight_is_noticed() {
    let mut executor = FakeExecutor::new(CAPACITY, 10);
    for number in 1..=3 {
        executor.launch(&step(number, 0, 0, &[1], &[0])).unwrap();
    }
}
