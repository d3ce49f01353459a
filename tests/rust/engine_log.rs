//! A handler of the log that does not return: it holds one thread, and nobody waits for that.

mod fake_executor;

use std::sync::mpsc::channel;
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use nano_core::{Capacity, RequestLimits, SamplingParams, SchedulerConfig, TokenId};
use nano_engine::{Engine, Prompt};
use nano_model::{GenerationDefaults, ModelInfo};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use fake_executor::{FakeExecutor, Fault};

/// What only something that hangs exceeds.
const MINUTE: Duration = Duration::from_secs(60);

struct Holding;

impl Subscriber for Holding {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        loop {
            thread::park();
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[test]
fn closing_does_not_wait_for_a_handler_of_the_log() {
    tracing::subscriber::set_global_default(Holding).unwrap();
    let model = ModelInfo {
        request_limits: RequestLimits {
            vocab_size: 10,
            max_model_len: 20,
            num_blocks: 8,
            block_size: 4,
            eos_token_ids: [].into(),
            seed: 0,
        },
        step_limits: SchedulerConfig { max_num_seqs: 1, max_num_batched_tokens: 8, max_itl: None },
        generation: GenerationDefaults::default(),
        device: "fake".into(),
        dtype: "float32",
        weight_bytes: 0,
    };
    let capacity = Capacity { num_blocks: 8, block_size: 4, max_steps_in_flight: 1 };
    let executor = FakeExecutor::new(capacity, 10).with_fault(1, Fault::Error);
    let engine =
        Engine::spawn("no tokenizer".into(), None, || Ok((Box::new(executor), model))).unwrap();
    let prompt = Prompt::Tokens(vec![TokenId(1)]);
    let stream = engine.submit(prompt, SamplingParams::default(), None).unwrap();
    match stream.collect(Instant::now() + MINUTE) {
        Err(error) => assert_eq!(error.code(), "engine_failed"),
        Ok(Poll::Ready(_)) => panic!("the fake did not fail"),
        Ok(Poll::Pending) => panic!("the reader waits for the handler"),
    }
    let (closed, close) = channel();
    thread::spawn(move || {
        engine.close();
        closed.send(()).unwrap();
    });
    close.recv_timeout(MINUTE).unwrap();
}
