//! The engine's two threads over an executor that can be made to fail: every stream ends, with
//! tokens or with a typed error, and nobody waits for anybody else.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by a panic")]
#![expect(clippy::float_cmp, reason = "the fake's logits are whole numbers")]

mod fake_executor;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use nano_core::{Capacity, Executor, RequestLimits, SamplingParams, SchedulerConfig, TokenId};
use nano_engine::{Delta, Engine, Error, Finish, RequestStream};
use nano_model::{GenerationDefaults, ModelInfo};

use fake_executor::{FakeExecutor, Fault};

const VOCAB_SIZE: u32 = 50;
/// "Within a second", and no test may hang.
const SOON: Duration = Duration::from_secs(1);

fn capacity(max_steps_in_flight: u32) -> Capacity {
    Capacity { num_blocks: 64, block_size: 4, max_steps_in_flight }
}

fn spawn(executor: FakeExecutor) -> Engine {
    spawn_of(VOCAB_SIZE, executor)
}

fn spawn_of(vocab_size: u32, executor: FakeExecutor) -> Engine {
    let model = ModelInfo {
        request_limits: RequestLimits {
            vocab_size,
            max_model_len: 200,
            num_blocks: executor.capacity().num_blocks,
            block_size: executor.capacity().block_size,
            eos_token_ids: [].into(),
            seed: 0,
        },
        step_limits: SchedulerConfig { max_num_seqs: 8, max_num_batched_tokens: 32, max_itl: None },
        generation: GenerationDefaults::default(),
        device: "fake".into(),
        dtype: "float32",
        weight_bytes: 0,
        stop: Arc::default(),
    };
    Engine::spawn("no tokenizer".into(), None, || Ok((Box::new(executor), model))).unwrap()
}

fn submit(engine: &Engine, first: u32, max_tokens: u32) -> RequestStream {
    let params = SamplingParams { max_tokens, ..SamplingParams::default() };
    engine.submit(prompt(first), params, None).unwrap()
}

fn prompt(first: u32) -> Vec<TokenId> {
    vec![TokenId(first % VOCAB_SIZE), TokenId(1), TokenId(2)]
}

/// What is left of a stream, whose end must come soon.
fn rest(stream: &RequestStream) -> Result<Delta, Arc<Error>> {
    match stream.collect(Instant::now() + SOON)? {
        Poll::Ready(delta) => Ok(delta),
        Poll::Pending => panic!("the stream did not end within {SOON:?}"),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "a stream that is over goes")]
fn end(stream: RequestStream) -> Result<Option<Finish>, Arc<Error>> {
    rest(&stream).map(|delta| delta.finish)
}

#[test]
fn many_requests_at_once_each_get_their_own_tokens() {
    for depth in [1, 2] {
        let engine = spawn(FakeExecutor::new(capacity(depth), VOCAB_SIZE));
        let streams: Vec<_> = (0..40).map(|i| submit(&engine, i, 10 + i)).collect();
        for (i, stream) in (0..).zip(streams) {
            let answer = rest(&stream).unwrap();
            let num_tokens = 10 + i as usize;
            let expected = FakeExecutor::continuation(&prompt(i), num_tokens, VOCAB_SIZE);
            assert_eq!(answer.token_ids, expected, "request {i} at depth {depth}");
            assert_eq!(answer.finish, Some(Finish::Length));
            assert!(answer.timing.first_token <= answer.timing.last_token);
        }
    }
}

#[test]
fn an_error_in_a_step_ends_every_stream_and_names_itself() {
    for depth in [1, 2] {
        for step in [1, 2, 5] {
            let executor = FakeExecutor::new(capacity(depth), VOCAB_SIZE);
            let engine = spawn(executor.with_fault(step, Fault::Error));
            // More than run at the same time: those that wait end as well.
            let streams: Vec<_> = (0..20).map(|i| submit(&engine, i, 50)).collect();
            for stream in streams {
                let error = end(stream).unwrap_err();
                assert!(matches!(*error, Error::EngineFailed { .. }), "{error}");
                assert!(error.to_string().contains("the fake fails"), "{error}");
            }
        }
    }
}

#[test]
fn a_panic_in_a_step_ends_every_stream_and_names_itself() {
    for depth in [1, 2] {
        let executor = FakeExecutor::new(capacity(depth), VOCAB_SIZE);
        let engine = spawn(executor.with_fault(3, Fault::Panic));
        let streams: Vec<_> = (0..20).map(|i| submit(&engine, i, 50)).collect();
        for stream in streams {
            let error = end(stream).unwrap_err();
            assert!(error.to_string().contains("a step panicked: the fake panics"), "{error}");
        }
    }
}

#[test]
fn a_request_after_a_failure_is_told_the_reason() {
    let executor = FakeExecutor::new(capacity(1), VOCAB_SIZE);
    let engine = spawn(executor.with_fault(1, Fault::Error));
    end(submit(&engine, 0, 5)).unwrap_err();
    let error = end(submit(&engine, 0, 5)).unwrap_err();
    assert_eq!(error.code(), "engine_failed");
    engine.close();
}

#[test]
fn closing_a_stalled_engine_ends_every_stream_and_returns() {
    let released = Arc::new(AtomicBool::new(false));
    let executor = FakeExecutor::new(capacity(2), VOCAB_SIZE);
    let fault = Fault::Stall(Arc::clone(&released));
    let engine = spawn(executor.with_fault(3, fault));
    let streams: Vec<_> = (0..20).map(|i| submit(&engine, i, 50)).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| engine.close());
        for stream in streams {
            let error = end(stream).unwrap_err();
            assert!(matches!(*error, Error::EngineClosed), "{error}");
        }
    });
    let params = SamplingParams::default();
    let refused = engine.submit(prompt(0), params, None).unwrap_err();
    assert!(matches!(refused, Error::EngineClosed), "{refused}");
    released.store(true, Ordering::Relaxed);
}

#[test]
fn a_reader_that_takes_nothing_holds_up_nobody_and_gets_everything_merged() {
    let engine = spawn(FakeExecutor::new(capacity(1), VOCAB_SIZE));
    let slow = submit(&engine, 0, 100);
    for i in 1..20 {
        assert_eq!(end(submit(&engine, i, 100)).unwrap(), Some(Finish::Length));
    }
    let Ok(Poll::Ready(Some(delta))) = slow.next(Instant::now()) else { panic!("no news") };
    assert_eq!(delta.token_ids, FakeExecutor::continuation(&prompt(0), 100, VOCAB_SIZE));
    assert_eq!(delta.finish, Some(Finish::Length));
    assert!(matches!(slow.next(Instant::now()), Ok(Poll::Ready(None))));
    let nothing = rest(&slow).unwrap();
    assert_eq!((nothing.token_ids, nothing.finish), (vec![], Some(Finish::Length)));
}

#[test]
fn what_nobody_took_before_a_deadline_is_there_after_it() {
    let executor = FakeExecutor::new(capacity(1), VOCAB_SIZE);
    let engine = spawn(executor.with_step_time(Duration::from_millis(1)));
    let stream = submit(&engine, 0, 100);
    let mut num_waits = 0;
    let all = loop {
        match stream.collect(Instant::now() + Duration::from_millis(5)).unwrap() {
            Poll::Ready(all) => break all,
            Poll::Pending => num_waits += 1,
        }
    };
    assert!(num_waits > 1, "the stream ended before the first deadline");
    assert_eq!(all.token_ids, FakeExecutor::continuation(&prompt(0), 100, VOCAB_SIZE));
}

#[test]
fn what_broke_a_stream_off_is_told_to_every_reader() {
    let executor = FakeExecutor::new(capacity(1), VOCAB_SIZE);
    let engine = spawn(executor.with_step_time(Duration::from_millis(5)));
    let stream = submit(&engine, 0, 190);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..4).map(|_| scope.spawn(|| rest(&stream))).collect();
        engine.close();
        for reader in readers {
            assert!(matches!(*reader.join().unwrap().unwrap_err(), Error::EngineClosed));
        }
    });
    while let Ok(Poll::Ready(delta)) = stream.next(Instant::now()) {
        assert!(delta.is_some(), "a broken stream ended as if it were whole");
    }
    assert!(matches!(stream.next(Instant::now()), Err(error) if error.code() == "engine_closed"));
}

#[test]
fn an_aborted_request_ends_with_abort_and_a_dropped_one_leaves_no_block() {
    let executor = FakeExecutor::new(capacity(2), VOCAB_SIZE);
    let engine = spawn(executor.with_step_time(Duration::from_millis(1)));
    let aborted = submit(&engine, 0, 190);
    drop(submit(&engine, 1, 190));
    let kept = submit(&engine, 2, 20);
    engine.abort(aborted.id()).unwrap();
    assert_eq!(end(aborted).unwrap(), Some(Finish::Abort));
    assert_eq!(end(kept).unwrap(), Some(Finish::Length));
    let deadline = Instant::now() + SOON;
    while engine.stats().unwrap().num_free_blocks < 64 {
        assert!(Instant::now() < deadline, "blocks are lost: {:?}", engine.stats());
        std::thread::yield_now();
    }
    assert_eq!((engine.stats().unwrap().num_running, engine.stats().unwrap().num_waiting), (0, 0));
}

#[test]
fn an_abort_does_not_wait_for_the_step_that_runs() {
    let released = Arc::new(AtomicBool::new(false));
    let executor = FakeExecutor::new(capacity(1), VOCAB_SIZE);
    let engine = spawn(executor.with_fault(3, Fault::Stall(Arc::clone(&released))));
    let streams: Vec<_> = (0..20).map(|i| submit(&engine, i, 50)).collect();
    for stream in streams {
        engine.abort(stream.id()).unwrap();
        assert_eq!(end(stream).unwrap(), Some(Finish::Abort));
    }
    released.store(true, Ordering::Relaxed);
    let after = submit(&engine, 0, 10);
    let unknown = nano_core::RequestId(after.id().0 + 1);
    assert_eq!(engine.abort(unknown).unwrap_err().code(), "unknown_request");
    assert_eq!(end(after).unwrap(), Some(Finish::Length));
}

#[test]
fn a_bad_request_is_refused_and_harms_no_other() {
    let engine = spawn(FakeExecutor::new(capacity(1), VOCAB_SIZE));
    let good = submit(&engine, 0, 100);
    let refuse =
        |tokens: Vec<TokenId>, params| engine.submit(tokens, params, None).unwrap_err().to_string();
    let default = SamplingParams::default;
    assert_eq!(refuse(vec![], default()), "prompt is empty: at least one token is needed");
    assert_eq!(
        refuse(vec![TokenId(1), TokenId(50)], default()),
        "prompt token 50 at position 1 is outside the vocabulary of 50"
    );
    let stop = SamplingParams { stop_token_ids: [TokenId(99_999)].into(), ..default() };
    assert_eq!(
        refuse(vec![TokenId(1)], stop),
        "stop_token_ids token 99999 at position 0 is outside the vocabulary of 50"
    );
    assert_eq!(
        refuse(vec![TokenId(1); 201], default()),
        "prompt has 201 tokens, but max_model_len is 200"
    );
    let cold = SamplingParams { temperature: -1.0, ..default() };
    assert_eq!(refuse(prompt(0), cold), "temperature must be finite and at least 0, got -1");
    let text = engine.encode("Emma").unwrap_err();
    assert_eq!(text.code(), "tokenizer_missing");
    assert_eq!(end(good).unwrap(), Some(Finish::Length));
}

#[test]
fn an_executor_that_cannot_be_built_says_why_also_by_a_panic() {
    type Built = nano_engine::Result<(Box<dyn Executor>, ModelInfo)>;
    let spawn = |build: fn() -> Built| {
        Engine::spawn("no tokenizer".into(), None, build).unwrap_err().to_string()
    };
    let failing = || Err(nano_core::Error::ExecutorFailed { message: "no device".into() }.into());
    assert_eq!(spawn(failing), "executor failed: no device");
    assert_eq!(
        spawn(|| panic!("libtorch is out")),
        "the engine has failed: loading panicked: libtorch is out"
    );
}

#[test]
fn logits_arrive_whole_however_they_were_chunked() {
    let engine = spawn(FakeExecutor::new(capacity(2), VOCAB_SIZE));
    let tokens: Vec<_> = (0..150).map(|i| TokenId(i % VOCAB_SIZE)).collect();
    let logits = rest(&engine.logits(tokens.clone()).unwrap()).unwrap().logits;
    assert_eq!(logits.len(), tokens.len() * VOCAB_SIZE as usize);
    for (row, token) in logits.chunks(VOCAB_SIZE as usize).zip(&tokens) {
        assert_eq!(row[0], token.0 as f32);
    }
}

#[test]
fn logits_that_there_is_no_memory_for_are_refused_with_what_is_free() {
    let engine = spawn_of(u32::MAX, FakeExecutor::new(capacity(1), VOCAB_SIZE));
    let error = engine.logits(vec![TokenId(1); 200]).unwrap_err();
    assert_eq!(error.code(), "out_of_memory");
    let words = "logits of 200 tokens take 6400.000 GiB while they are handed over, but ";
    assert!(error.to_string().starts_with(words), "{error}");
}
