//! A scheduler and a fake executor, launched and collected by hand.
#![expect(clippy::panic, reason = "a test ends at the first surprise")]

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use nano_core::scheduler::SchedulerStats;
use nano_core::step::ScheduledSequence;
use nano_core::{
    Capacity, Executor, FinishReason, Request, RequestId, RequestKind, RequestLimits,
    SamplingParams, ScheduleOutput, Scheduler, SchedulerConfig, TokenEvent, TokenId,
};

use crate::fake_executor::FakeExecutor;

pub(crate) const VOCAB_SIZE: u32 = 50;

/// Limits of a step that no test reaches by accident.
pub(crate) const WIDE: SchedulerConfig =
    SchedulerConfig { max_num_seqs: 100, max_num_batched_tokens: 1000, max_itl: None };

pub(crate) fn prompt(id: u64, len: u32) -> Vec<TokenId> {
    (0..len).map(|position| TokenId((id as u32 * 7 + position) % VOCAB_SIZE)).collect()
}

pub(crate) fn request(id: u64, prompt_len: u32, kind: RequestKind) -> Request {
    let limits = RequestLimits {
        vocab_size: VOCAB_SIZE,
        max_model_len: 1000,
        num_blocks: 1000,
        block_size: 1,
        eos_token_ids: Arc::from([]),
        seed: 0,
    };
    Request::new(RequestId(id), prompt(id, prompt_len), kind, &limits).unwrap()
}

pub(crate) fn generate(id: u64, prompt_len: u32, max_tokens: u32) -> Request {
    let params = SamplingParams { max_tokens, ..SamplingParams::default() };
    request(id, prompt_len, RequestKind::Generate(params))
}

pub(crate) fn continuation(id: u64, prompt_len: u32, num_tokens: usize) -> Vec<TokenId> {
    FakeExecutor::continuation(&prompt(id, prompt_len), num_tokens, VOCAB_SIZE)
}

/// Who runs in `step`: sequence, first position, tokens.
pub(crate) fn parts(step: &ScheduleOutput) -> Vec<(u64, u32, u32)> {
    let part =
        |s: &ScheduledSequence| (s.sequence.0, s.num_computed_tokens, s.num_scheduled_tokens);
    step.sequences.iter().map(part).collect()
}

/// See the [module](self). News of every request are kept by its id.
pub(crate) struct Run {
    pub(crate) scheduler: Scheduler,
    pub(crate) executor: FakeExecutor,
    pub(crate) in_flight: VecDeque<ScheduleOutput>,
    pub(crate) tokens: BTreeMap<u64, Vec<TokenId>>,
    pub(crate) logits: BTreeMap<u64, Vec<f32>>,
    pub(crate) finished: BTreeMap<u64, FinishReason>,
}

impl Run {
    /// `num_blocks` blocks of `block_size` tokens.
    pub(crate) fn new(config: SchedulerConfig, num_blocks: u32, block_size: u32) -> Self {
        let capacity = Capacity { num_blocks, block_size, max_steps_in_flight: 3 };
        Self {
            scheduler: Scheduler::new(config, capacity).unwrap(),
            executor: FakeExecutor::new(capacity, VOCAB_SIZE),
            in_flight: VecDeque::new(),
            tokens: BTreeMap::new(),
            logits: BTreeMap::new(),
            finished: BTreeMap::new(),
        }
    }

    pub(crate) fn with(mut self, requests: impl IntoIterator<Item = Request>) -> Self {
        requests.into_iter().for_each(|request| self.scheduler.add(request));
        self
    }

    pub(crate) fn launch(&mut self) -> ScheduleOutput {
        let step = self.scheduler.schedule();
        self.scheduler.check_invariants();
        if !step.sequences.is_empty() {
            self.executor.launch(&step).unwrap();
            self.in_flight.push_back(step.clone());
        }
        step
    }

    pub(crate) fn collect(&mut self) -> Vec<TokenEvent> {
        let step = self.in_flight.pop_front().unwrap();
        let output = self.executor.collect().unwrap();
        let events = self.scheduler.update(&step, output).unwrap();
        self.scheduler.check_invariants();
        for event in events.clone() {
            self.note(event);
        }
        events
    }

    fn note(&mut self, event: TokenEvent) {
        let id = event.request.0;
        assert!(!self.finished.contains_key(&id), "news of request {id}, which has ended");
        self.tokens.entry(id).or_default().extend(event.token);
        self.logits.entry(id).or_default().extend(event.logits.unwrap_or_default());
        self.finished.extend(event.finish.map(|reason| (id, reason)));
    }

    /// One step from start to end.
    pub(crate) fn step(&mut self) -> Vec<(u64, u32, u32)> {
        let step = self.launch();
        if !step.sequences.is_empty() {
            self.collect();
        }
        parts(&step)
    }

    pub(crate) fn finish(&mut self) {
        self.finish_ahead(1);
    }

    /// Steps until nothing is left, with up to `num_ahead` steps in flight.
    pub(crate) fn finish_ahead(&mut self, num_ahead: usize) {
        // Far more than any test here needs: a test ends, also where the scheduler would not.
        for _ in 0..200 {
            if self.scheduler.is_idle() {
                return;
            }
            let launched = !self.launch().sequences.is_empty();
            if !launched || self.in_flight.len() == num_ahead {
                assert!(!self.in_flight.is_empty(), "nothing runs, and yet requests are left");
                self.collect();
            }
        }
        panic!("requests are left after 200 steps");
    }

    pub(crate) fn stats(&self) -> SchedulerStats {
        self.scheduler.stats()
    }
}
