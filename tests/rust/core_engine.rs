//! The loop over the fake executor, at every depth of its pipeline.
#![expect(clippy::panic, reason = "a test ends at the first surprise")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nano_core::step::SampledRow;
use nano_core::{
    Capacity, EngineCore, Executor, FinishReason, Request, RequestId, RequestKind, Result,
    SamplingParams, ScheduleOutput, SchedulerConfig, TokenId,
};

use crate::core_run::{self, VOCAB_SIZE};
use crate::fake_executor::{FakeExecutor, Fault};

fn fake(depth: u32, num_blocks: u32) -> FakeExecutor {
    let capacity = Capacity { num_blocks, block_size: 1, max_steps_in_flight: depth };
    FakeExecutor::new(capacity, VOCAB_SIZE)
}

fn engine(executor: FakeExecutor) -> EngineCore {
    let config = SchedulerConfig { max_num_seqs: 4, max_num_batched_tokens: 8, max_itl: None };
    EngineCore::new(config, Box::new(executor)).unwrap()
}

/// The prompt of request `id` has three tokens more than that.
fn request(id: u64, params: SamplingParams) -> Request {
    core_run::request(id, 3 + id as u32, RequestKind::Generate(params))
}

fn generate(id: u64, max_tokens: u32) -> Request {
    core_run::generate(id, 3 + id as u32, max_tokens)
}

fn continuation(id: u64, num_tokens: usize) -> Vec<TokenId> {
    core_run::continuation(id, 3 + id as u32, num_tokens)
}

/// Far more steps than any test here needs: a test ends, also where the engine would not.
const MAX_STEPS: usize = 200;

/// Steps until nothing is left, and the tokens of every request.
fn run(engine: &mut EngineCore) -> BTreeMap<u64, Vec<TokenId>> {
    let mut tokens: BTreeMap<u64, Vec<TokenId>> = BTreeMap::new();
    for _ in 0..MAX_STEPS {
        if engine.is_idle() {
            return tokens;
        }
        for event in engine.step().unwrap() {
            tokens.entry(event.request.0).or_default().extend(event.token);
        }
        engine.check_invariants();
    }
    panic!("requests are left after {MAX_STEPS} steps");
}

#[test]
fn the_output_is_the_same_at_every_depth() {
    for depth in 1..=3 {
        let mut engine = engine(fake(depth, 14));
        (0..6).for_each(|id| engine.add(generate(id, 5)));
        let tokens = run(&mut engine);
        assert!(engine.stats().num_preemptions > 0, "depth {depth}");
        for id in 0..6 {
            assert_eq!(tokens[&id], continuation(id, 5), "request {id} at depth {depth}");
        }
    }
}

#[test]
fn an_idle_engine_has_nothing_to_do() {
    let mut engine = engine(fake(2, 4));
    assert!(engine.is_idle());
    assert_eq!(engine.step(), Ok(Vec::new()));
}

#[test]
fn the_first_step_is_collected_while_the_second_runs() {
    let mut engine = engine(fake(2, 20));
    engine.add(generate(0, 2));
    assert_eq!(engine.step(), Ok(Vec::new()));
    let num_events: Vec<_> = (0..2).map(|_| engine.step().unwrap().len()).collect();
    assert_eq!(num_events, [1, 1]);
    assert!(engine.is_idle());
}

#[test]
fn the_row_after_a_stop_token_is_computed_in_vain_and_its_block_comes_back() {
    let expected = continuation(0, 1);
    let stop_token_ids = Arc::from([expected[0]]);
    let mut engine = engine(fake(2, 20));
    engine.add(request(0, SamplingParams { stop_token_ids, ..SamplingParams::default() }));
    assert!(engine.step().unwrap().is_empty());
    let [event] = &engine.step().unwrap()[..] else { panic!("one event") };
    assert_eq!(event.token.as_slice(), expected);
    assert_eq!(event.finish, Some(FinishReason::Stop(Some(expected[0]))));
    // The step in flight names four blocks.
    assert!(!engine.is_idle());
    assert_eq!(engine.stats().num_free_blocks, 16);
    assert_eq!(engine.step(), Ok(Vec::new()));
    assert!(engine.is_idle());
    assert_eq!(engine.stats().num_free_blocks, 20);
}

#[test]
fn a_block_of_a_step_in_flight_is_not_reused_by_a_request_that_came_later() {
    let mut engine = engine(fake(2, 4));
    engine.add(generate(0, 2));
    assert!(engine.step().unwrap().is_empty());
    assert_eq!(engine.abort(RequestId(0)).unwrap().finish, Some(FinishReason::Abort));
    engine.add(generate(1, 1));
    // One free block does not suffice, and the other three are named by the step in flight.
    assert_eq!((engine.step(), engine.stats().num_free_blocks), (Ok(Vec::new()), 4));
    assert_eq!(run(&mut engine)[&1], continuation(1, 1));
    assert_eq!(engine.abort(RequestId(1)), None);
}

#[test]
fn a_failed_step_is_an_error_and_changes_no_request() {
    for depth in 1..=2 {
        let mut engine = engine(fake(depth, 20).with_fault(2, Fault::Error));
        (0..5).for_each(|id| engine.add(generate(id, 9)));
        let error = (0..MAX_STEPS).find_map(|_| engine.step().err()).unwrap();
        assert_eq!(error.to_string(), "executor failed: the fake fails");
        let stats = engine.stats();
        assert_eq!(stats.num_running + stats.num_waiting, 5, "depth {depth}");
    }
}

#[test]
#[should_panic(expected = "the fake panics")]
fn a_panic_of_the_executor_is_not_swallowed() {
    let mut engine = engine(fake(1, 20).with_fault(2, Fault::Panic));
    engine.add(generate(0, 9));
    run(&mut engine);
}

#[test]
fn a_stalled_step_is_waited_for() {
    let released = Arc::new(AtomicBool::new(false));
    let mut engine = engine(fake(2, 20).with_fault(2, Fault::Stall(Arc::clone(&released))));
    engine.add(generate(0, 4));
    let start = Instant::now();
    let other = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(30));
        released.store(true, Ordering::Relaxed);
    });
    assert_eq!(run(&mut engine)[&0], continuation(0, 4));
    assert!(start.elapsed() >= Duration::from_millis(30));
    other.join().unwrap();
}

/// Notes the prompt tokens of each step that has any.
#[derive(Debug)]
struct Noting {
    fake: FakeExecutor,
    chunks: Rc<RefCell<Vec<u32>>>,
}

impl Executor for Noting {
    fn capacity(&self) -> Capacity {
        self.fake.capacity()
    }

    fn launch(&mut self, step: &ScheduleOutput) -> Result<()> {
        let chunk = (step.num_prompt_tokens > 0).then_some(step.num_prompt_tokens);
        self.chunks.borrow_mut().extend(chunk);
        self.fake.launch(step)
    }

    fn collect(&mut self) -> Result<Vec<SampledRow>> {
        self.fake.collect()
    }
}

/// The chunks of a prompt of 3 tokens and, once that request decodes, of one of 603; steps
/// take 3 ms or more.
fn chunks(depth: u32, max_itl: Option<Duration>) -> Vec<u32> {
    let config = SchedulerConfig { max_num_seqs: 4, max_num_batched_tokens: 1000, max_itl };
    let fake = fake(depth, 1000).with_step_time(Duration::from_millis(3));
    let chunks = Rc::default();
    let noting = Noting { fake, chunks: Rc::clone(&chunks) };
    let mut engine = EngineCore::new(config, Box::new(noting)).unwrap();
    engine.add(generate(0, 60));
    assert!(engine.step().unwrap().len() <= 1);
    engine.add(generate(600, 2));
    let tokens = run(&mut engine);
    assert_eq!(tokens[&600], continuation(600, 2));
    assert!(continuation(0, 60).ends_with(&tokens[&0]));
    chunks.take()
}

#[test]
fn without_a_pace_a_prompt_takes_the_whole_step() {
    assert_eq!(chunks(1, None), [3, 603]);
    assert_eq!(chunks(2, None), [3, 603]);
}

#[test]
fn a_prompt_gets_less_of_each_step_that_is_too_long_and_more_of_one_that_is_not() {
    let ms = |ms| Some(Duration::from_millis(ms));
    let least = vec![16; 23];
    assert_eq!(chunks(1, ms(1)), [&[3, 128, 64, 32][..], &least, &[11]].concat());
    assert_eq!(chunks(1, ms(3_600_000)), [3, 128, 256, 219]);
    // With two in flight the second goes out before the first one's time is known.
    assert_eq!(chunks(2, ms(1))[..4], [3, 128, 128, 64]);
    assert_eq!(chunks(2, ms(3_600_000)), [3, 128, 128, 256, 91]);
}
