//! Random requests on a random tiny engine, an oracle for what each must get, and a watch on
//! every step.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use nano_core::step::{LogitRows, SampledRow, ScheduledSequence, TokenSource};
use nano_core::{
    Capacity, EngineCore, Error, Executor, FinishReason, Request, RequestId, RequestKind,
    RequestLimits, SamplingParams, ScheduleOutput, SchedulerConfig, TokenEvent, TokenId,
};
use proptest::prelude::*;

use crate::fake_executor::{FakeExecutor, Fault};
use crate::{Mix, SEED, count};

const MAX_MODEL_LEN: u32 = 30;

/// An engine in small.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    capacity: Capacity,
    config: SchedulerConfig,
    vocab_size: u32,
    eos: Vec<u32>,
    fault: Option<(u64, Fault)>,
}

/// What somebody asks for; tokens of the prompt are taken modulo the vocabulary, stop tokens outside
/// it are left out.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    prompt: Vec<u32>,
    wants_logits: bool,
    max_tokens: u32,
    min_tokens: u32,
    stop: Vec<u32>,
    ignore_eos: bool,
    seed: Option<u64>,
}

#[derive(Clone, Debug)]
pub(crate) enum Op {
    Add(Ask),
    Step,
    /// One of all requests so far, counted around.
    Abort(usize),
}

pub(crate) fn machine() -> impl Strategy<Value = Machine> {
    let capacity = (2_u32..=12, 1_u32..=4, 1_u32..=3);
    // Steps large enough for a pace to cut them are few: small ones show more.
    let max_num_batched_tokens = prop_oneof![4 => 1_u32..=9, 1 => 17_u32..=40];
    let max_itl = prop_oneof![Just(1), Just(3_600_000_000_000)].prop_map(Duration::from_nanos);
    let config = (1_u32..=5, max_num_batched_tokens, prop::option::of(max_itl));
    let eos = prop::collection::vec(0_u32..6, 0..=2);
    let fault = prop_oneof![Just(Fault::Error), Just(Fault::Row)];
    let fault = prop::option::weighted(0.2, (1_u64..100, fault));
    (capacity, config, 2_u32..=5, eos, fault).prop_map(|(capacity, config, vocab, eos, fault)| {
        let (num_blocks, block_size, max_steps_in_flight) = capacity;
        let (max_num_seqs, max_num_batched_tokens, max_itl) = config;
        Machine {
            capacity: Capacity { num_blocks, block_size, max_steps_in_flight },
            config: SchedulerConfig { max_num_seqs, max_num_batched_tokens, max_itl },
            vocab_size: vocab,
            eos: eos.into_iter().filter(|eos| *eos < vocab).collect(),
            fault,
        }
    })
}

fn ask() -> impl Strategy<Value = Ask> {
    let prompt = prop::collection::vec(0_u32..60, 1..=10);
    let lengths = (1_u32..=12, 0_u32..=12);
    let stop = prop::collection::vec(0_u32..10, 0..=2);
    let seed = any::<Option<u64>>();
    let parts = (prompt, prop::bool::weighted(0.2), lengths, stop, any::<bool>(), seed);
    parts.prop_map(|(prompt, wants_logits, (max_tokens, min_tokens), stop, ignore_eos, seed)| {
        let min_tokens = min_tokens.saturating_sub(6).min(max_tokens);
        Ask { prompt, wants_logits, max_tokens, min_tokens, stop, ignore_eos, seed }
    })
}

pub(crate) fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        5 => ask().prop_map(Op::Add),
        16 => Just(Op::Step),
        1 => any::<usize>().prop_map(Op::Abort),
    ]
}

/// What a request must get if it is left alone.
#[derive(Debug)]
struct Outcome {
    tokens: Vec<TokenId>,
    logits: Vec<f32>,
    finish: FinishReason,
}

impl Machine {
    fn limits(&self) -> RequestLimits {
        RequestLimits {
            vocab_size: self.vocab_size,
            max_model_len: MAX_MODEL_LEN,
            num_blocks: self.capacity.num_blocks,
            block_size: self.capacity.block_size,
            eos_token_ids: self.eos.iter().copied().map(TokenId).collect(),
            seed: SEED,
        }
    }

    fn prompt(&self, ask: &Ask) -> Vec<TokenId> {
        ask.prompt.iter().map(|token| TokenId(token % self.vocab_size)).collect()
    }

    fn request(&self, id: u64, ask: &Ask) -> nano_core::Result<Request> {
        let stop = ask.stop.iter().filter(|token| **token < self.vocab_size);
        let params = SamplingParams {
            seed: ask.seed,
            stop_token_ids: stop.copied().map(TokenId).collect(),
            ignore_eos: ask.ignore_eos,
            max_tokens: ask.max_tokens,
            min_tokens: ask.min_tokens,
            ..SamplingParams::default()
        };
        let kind =
            if ask.wants_logits { RequestKind::Logits } else { RequestKind::Generate(params) };
        Request::new(RequestId(id), self.prompt(ask), kind, &self.limits())
    }

    /// The oracle: one request, one token at a time, without blocks, chunks or neighbours.
    fn outcome(&self, ask: &Ask) -> Outcome {
        let prompt = self.prompt(ask);
        if ask.wants_logits {
            let row = |token: &TokenId| {
                let zeros = std::iter::repeat_n(0.0, self.vocab_size as usize - 1);
                std::iter::once(token.0 as f32).chain(zeros)
            };
            let logits = prompt.iter().flat_map(row).collect();
            return Outcome { tokens: Vec::new(), logits, finish: FinishReason::Length };
        }
        let stops = |token: TokenId| {
            let is_eos = !ask.ignore_eos && self.eos.contains(&token.0);
            let is_stop = || ask.stop.contains(&token.0).then_some(FinishReason::Stop(Some(token)));
            if is_eos { Some(FinishReason::Stop(None)) } else { is_stop() }
        };
        let mut all = prompt.clone();
        let finish = loop {
            let mut token = FakeExecutor::continuation(&all, 1, self.vocab_size)[0];
            let num_tokens = (all.len() - prompt.len()) as u32;
            while num_tokens < ask.min_tokens && stops(token).is_some() {
                token = TokenId((token.0 + 1) % self.vocab_size);
            }
            all.push(token);
            let is_full = num_tokens + 1 == ask.max_tokens || all.len() == MAX_MODEL_LEN as usize;
            let length = is_full.then_some(FinishReason::Length);
            if let Some(finish) = stops(token).or(length) {
                break finish;
            }
        };
        Outcome { tokens: all.split_off(prompt.len()), logits: Vec::new(), finish }
    }
}

/// A fake executor that looks at every step before it runs.
#[derive(Debug)]
struct Watched {
    fake: FakeExecutor,
    config: SchedulerConfig,
    last_step: u64,
    /// By sequence, where the request named one.
    seeds: Rc<RefCell<Vec<Option<u64>>>>,
    mix: Rc<RefCell<Mix>>,
}

impl Watched {
    fn check(&self, step: &ScheduleOutput) {
        let SchedulerConfig { max_num_seqs, max_num_batched_tokens, .. } = self.config;
        assert_eq!(step.step, self.last_step + 1);
        assert!((1..=max_num_batched_tokens).contains(&step.num_tokens), "over the budget");
        assert!((1..=max_num_seqs as usize).contains(&step.sequences.len()), "too many run");
        assert!(step.sequences.is_sorted_by(|a, b| a.sequence < b.sequence), "out of order");
        let distinct: BTreeSet<_> = step.block_ids.iter().collect();
        assert_eq!(distinct.len(), step.block_ids.len(), "a block is in two tables");
        for scheduled in &step.sequences {
            assert!(scheduled.num_scheduled_tokens > 0, "scheduled without a token");
            let num_blocks = scheduled.context_len().div_ceil(self.fake.capacity().block_size);
            assert_eq!(scheduled.block_table.len(), num_blocks as usize, "too many blocks");
            let seed = self.seeds.borrow()[scheduled.sequence.0 as usize];
            assert!(seed.is_none_or(|seed| seed == scheduled.seed), "a foreign seed");
        }
    }

    fn count(&self, step: &ScheduleOutput) {
        let of = |is: fn(&ScheduledSequence) -> bool| {
            step.sequences.iter().filter(|scheduled| is(scheduled)).count() as u64
        };
        let num_chunks = of(|s| s.logit_rows == LogitRows::None);
        let num_single = of(|s| s.logit_rows == LogitRows::Last && s.num_scheduled_tokens == 1);
        let num_named = of(|s| matches!(s.tokens, TokenSource::PreviousStep { .. }));
        count(&self.mix, "rows with bans", of(|s| s.banned.is_some()));
        count(&self.mix, "prompt chunks without a sample", num_chunks);
        count(&self.mix, "tokens named before they were seen", num_named);
        count(
            &self.mix,
            "steps of decodes and chunks",
            u64::from(num_chunks > 0 && num_single > 0),
        );
        count(&self.mix, "steps of several sequences", u64::from(step.sequences.len() > 1));
    }
}

impl Executor for Watched {
    fn capacity(&self) -> Capacity {
        self.fake.capacity()
    }

    fn launch(&mut self, step: &ScheduleOutput) -> nano_core::Result<()> {
        self.check(step);
        self.count(step);
        self.last_step = step.step;
        self.fake.launch(step)
    }

    fn collect(&mut self) -> nano_core::Result<Vec<SampledRow>> {
        self.fake.collect()
    }
}

/// One request on its way.
#[derive(Debug)]
struct Ticket {
    expected: Outcome,
    num_tokens: usize,
    num_logits: usize,
    has_ended: bool,
    /// Steps in which the oldest request surely ends.
    max_steps: usize,
}

pub(crate) struct Scene {
    machine: Machine,
    engine: EngineCore,
    /// By request id.
    tickets: Vec<Ticket>,
    seeds: Rc<RefCell<Vec<Option<u64>>>>,
    mix: Rc<RefCell<Mix>>,
    pub(crate) has_failed: bool,
}

impl Scene {
    pub(crate) fn new(machine: Machine, mix: &Rc<RefCell<Mix>>) -> Self {
        let Machine { capacity, config, vocab_size, .. } = machine;
        let mut fake = FakeExecutor::new(capacity, vocab_size);
        if let Some((step, fault)) = machine.fault.clone() {
            fake = fake.with_fault(step, fault);
        }
        let (seeds, mix) = (Rc::default(), Rc::clone(mix));
        let watched =
            Watched { fake, config, last_step: 0, seeds: Rc::clone(&seeds), mix: Rc::clone(&mix) };
        let engine = EngineCore::new(config, Box::new(watched)).unwrap();
        Self { machine, engine, tickets: Vec::new(), seeds, mix, has_failed: false }
    }

    fn count(&self, what: &'static str) {
        count(&self.mix, what, 1);
    }

    pub(crate) fn apply(&mut self, op: &Op) {
        match op {
            Op::Add(ask) => self.add(ask),
            Op::Step => self.step(),
            Op::Abort(nth) => self.abort(nth % self.tickets.len().max(1)),
        }
        self.engine.check_invariants();
    }

    fn add(&mut self, ask: &Ask) {
        match self.machine.request(self.tickets.len() as u64, ask) {
            Ok(request) => {
                self.count("add");
                self.engine.add(request);
                self.seeds.borrow_mut().push(ask.seed.filter(|_| !ask.wants_logits));
                self.tickets.push(Ticket {
                    expected: self.machine.outcome(ask),
                    num_tokens: 0,
                    num_logits: 0,
                    has_ended: false,
                    max_steps: ask.prompt.len() + ask.max_tokens as usize + 2,
                });
            }
            Err(error) => {
                let is_known = ["kv_cache_too_small", "invalid_sampling_params"];
                assert!(is_known.contains(&error.code()), "{error}");
                self.count("add in vain");
            }
        }
    }

    fn step(&mut self) {
        self.count("step");
        match self.engine.step() {
            Ok(events) => events.into_iter().for_each(|event| self.note(event)),
            Err(error) => {
                self.count("failed steps");
                assert!(matches!(self.machine.fault, Some((_, Fault::Error))), "{error}");
                self.has_failed = true;
                let left = self.tickets.iter_mut().filter(|ticket| !ticket.has_ended);
                let stats = self.engine.stats();
                let num_left = left.map(|ticket| ticket.has_ended = true).count();
                assert_eq!(num_left as u32, stats.num_running + stats.num_waiting, "one is lost");
            }
        }
    }

    fn abort(&mut self, nth: usize) {
        let event = self.engine.abort(RequestId(nth as u64));
        let is_running = self.tickets.get(nth).is_some_and(|ticket| !ticket.has_ended);
        assert_eq!(event.is_some(), is_running);
        self.count(if is_running { "abort" } else { "abort in vain" });
        if let Some(event) = event {
            assert_eq!(event.finish, Some(FinishReason::Abort));
            self.note(event);
        }
    }

    /// Every piece of news must continue what the request got so far.
    fn note(&mut self, event: TokenEvent) {
        let ticket = &mut self.tickets[event.request.0 as usize];
        assert!(!ticket.has_ended, "news after the end");
        let logits = event.logits.unwrap_or_default();
        let tokens_end = ticket.num_tokens + event.token.iter().len();
        let logits_end = ticket.num_logits + logits.len();
        let expected = &ticket.expected;
        assert_eq!(
            expected.tokens.get(ticket.num_tokens..tokens_end),
            Some(event.token.as_slice())
        );
        assert_eq!(expected.logits.get(ticket.num_logits..logits_end), Some(&logits[..]));
        ticket.num_tokens = tokens_end;
        ticket.num_logits = logits_end;
        let Some(finish) = event.finish else { return };
        ticket.has_ended = true;
        let fails = matches!(self.machine.fault, Some((_, Fault::Row)));
        let is_cut = finish == FinishReason::Abort
            || fails && finish == FinishReason::Error(Error::LogitsNotFinite { position: 0 });
        if !is_cut {
            assert_eq!(finish, expected.finish);
            assert_eq!(tokens_end, expected.tokens.len(), "ended early");
            assert_eq!(logits_end, expected.logits.len(), "ended early");
        }
        let is_logits = !expected.logits.is_empty();
        self.count(match finish {
            FinishReason::Stop(None) => "ended by eos",
            FinishReason::Stop(Some(_)) => "ended by a stop token",
            FinishReason::Length if is_logits => "ended with all logits",
            FinishReason::Length => "ended by length",
            FinishReason::Abort => "ended by abort",
            FinishReason::Error(_) => "ended by an error",
        });
    }

    /// Steps until nothing is left. The oldest request always goes on, so the bound is the sum of
    /// what each needs alone, times the calls that do nothing but collect.
    pub(crate) fn drain(&mut self) {
        let depth = self.machine.capacity.max_steps_in_flight as usize;
        let waiting = self.tickets.iter().filter(|ticket| !ticket.has_ended);
        let num_steps: usize = waiting.map(|ticket| ticket.max_steps).sum();
        let mut left = (num_steps + 1) * (depth + 1);
        while !self.engine.is_idle() && !self.has_failed {
            assert!(left > 0, "no end in sight");
            left -= 1;
            self.apply(&Op::Step);
        }
        let stats = self.engine.stats();
        count(&self.mix, "preemptions", stats.num_preemptions);
        assert!(self.tickets.iter().all(|ticket| ticket.has_ended), "one never ended");
        if !self.has_failed {
            assert_eq!(stats.num_free_blocks, self.machine.capacity.num_blocks);
            assert_eq!((stats.num_running, stats.num_waiting), (0, 0));
        }
    }
}
