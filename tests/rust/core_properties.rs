//! Random operations on tiny pools: the books balance after each one, and every request gets
//! what it would get alone.
//!
//! The seed is fixed and printed; `cargo test -- --nocapture` shows the mix of operations.
#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use nano_core::executor::fake::{FakeExecutor, Fault};
use nano_core::kv_cache::BlockAllocator;
use nano_core::scheduler::output::{LogitRows, StepOutput, TokenMasks, TokenSource};
use nano_core::{
    BlockId, Capacity, EngineCore, Executor, FinishReason, Request, RequestId, RequestKind,
    RequestLimits, SamplingParams, ScheduleOutput, SchedulerConfig, TokenEvent, TokenId,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};

const SEED: u64 = 20_240_229;
const MAX_MODEL_LEN: u32 = 30;

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config {
        cases,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(SEED),
        ..Config::default()
    })
}

/// How often what happened, over all cases.
type Mix = BTreeMap<&'static str, u64>;

fn count(mix: &RefCell<Mix>, what: &'static str, times: u64) {
    *mix.borrow_mut().entry(what).or_default() += times;
}

/// Asserts that all of `operations` together happened `total` times, and each thing of the mix
/// at least `each` times.
fn assert_mix(mix: &Mix, operations: &[&str], total: u64, things: &[&str], each: u64) {
    let num_operations: u64 = operations.iter().map(|what| mix[what]).sum();
    assert!(num_operations >= total, "{num_operations} operations");
    for what in operations.iter().chain(things) {
        let times = mix.get(what).copied().unwrap_or(0);
        assert!(times >= each, "{what}: {times} times");
    }
}

// ---- Blocks ------------------------------------------------------------------------------------

#[derive(Clone, Debug)]
enum BlockOp {
    Allocate,
    /// One of the blocks in use, counted around.
    Retain(usize),
    Free(usize),
}

fn block_op() -> impl Strategy<Value = BlockOp> {
    prop_oneof![
        3 => Just(BlockOp::Allocate),
        2 => any::<usize>().prop_map(BlockOp::Retain),
        4 => any::<usize>().prop_map(BlockOp::Free),
    ]
}

fn check_allocator(num_blocks: u32, ops: &[BlockOp], mix: &RefCell<Mix>) {
    let mut allocator = BlockAllocator::new(num_blocks);
    let mut holders: BTreeMap<BlockId, u32> = BTreeMap::new();
    for op in ops {
        let in_use = |nth: usize| holders.keys().nth(nth % holders.len().max(1)).copied();
        match *op {
            BlockOp::Allocate => {
                let block = allocator.allocate();
                assert_eq!(block.is_some(), holders.len() < num_blocks as usize);
                count(mix, if block.is_some() { "allocate" } else { "allocate in vain" }, 1);
                if let Some(block) = block {
                    assert!(block.0 < num_blocks);
                    assert_eq!(holders.insert(block, 1), None, "{block:?} is handed out twice");
                }
            }
            BlockOp::Retain(nth) => {
                let Some(block) = in_use(nth) else { continue };
                allocator.retain(block);
                *holders.get_mut(&block).unwrap() += 1;
                count(mix, "retain", 1);
            }
            BlockOp::Free(nth) => {
                let Some(block) = in_use(nth) else { continue };
                let left = holders[&block] - 1;
                assert_eq!(allocator.free(block), left == 0);
                if left == 0 {
                    holders.remove(&block)
                } else {
                    holders.insert(block, left)
                };
                count(mix, if left == 0 { "free the last" } else { "free one of several" }, 1);
            }
        }
        allocator.check_invariants();
        assert_eq!(allocator.num_free(), num_blocks - holders.len() as u32);
        for block in (0..num_blocks).map(BlockId) {
            assert_eq!(allocator.ref_count(block), holders.get(&block).copied().unwrap_or(0));
        }
    }
}

#[test]
fn blocks_are_free_or_held_exactly_as_often_as_the_model_says() {
    let mix = RefCell::new(Mix::new());
    let scenario = (0_u32..8, prop::collection::vec(block_op(), 0..200));
    runner(300)
        .run(&scenario, |(num_blocks, ops)| {
            check_allocator(num_blocks, &ops, &mix);
            Ok(())
        })
        .unwrap();
    let mix = mix.into_inner();
    println!("seed {SEED}: {mix:#?}");
    let operations =
        ["allocate", "allocate in vain", "retain", "free the last", "free one of several"];
    assert_mix(&mix, &operations, 20_000, &[], 1000);
}

// ---- Requests ----------------------------------------------------------------------------------

/// An engine in small.
#[derive(Clone, Debug)]
struct Machine {
    capacity: Capacity,
    config: SchedulerConfig,
    vocab_size: u32,
    eos: Vec<u32>,
    fault: Option<u64>,
}

/// What somebody asks for; token ids are taken modulo the vocabulary.
#[derive(Clone, Debug)]
struct Ask {
    prompt: Vec<u32>,
    wants_logits: bool,
    max_tokens: u32,
    min_tokens: u32,
    stop: Vec<u32>,
    ignore_eos: bool,
    seed: Option<u64>,
}

#[derive(Clone, Debug)]
enum Op {
    Add(Ask),
    Step,
    /// One of all requests so far, counted around.
    Abort(usize),
}

fn machine() -> impl Strategy<Value = Machine> {
    let capacity = (2_u32..=12, 1_u32..=4, 1_u32..=3);
    let config = (1_u32..=5, 1_u32..=9);
    let eos = prop::collection::vec(0_u32..20, 0..2);
    let fault = prop::option::weighted(0.1, 1_u64..60);
    (capacity, config, 2_u32..=5, eos, fault).prop_map(|(capacity, config, vocab, eos, fault)| {
        let (num_blocks, block_size, max_steps_in_flight) = capacity;
        let (max_num_seqs, max_num_batched_tokens) = config;
        Machine {
            capacity: Capacity { num_blocks, block_size, max_steps_in_flight },
            config: SchedulerConfig { max_num_seqs, max_num_batched_tokens },
            vocab_size: vocab,
            eos: eos.into_iter().filter(|eos| *eos < vocab).collect(),
            fault,
        }
    })
}

fn ask() -> impl Strategy<Value = Ask> {
    let prompt = prop::collection::vec(0_u32..60, 1..=10);
    let lengths = (1_u32..=12, 0_u32..=12);
    let stop = prop::collection::vec(0_u32..12, 0..=2);
    let seed = any::<Option<u64>>();
    let parts = (prompt, prop::bool::weighted(0.2), lengths, stop, any::<bool>(), seed);
    parts.prop_map(|(prompt, wants_logits, (max_tokens, min_tokens), stop, ignore_eos, seed)| {
        let min_tokens = min_tokens.saturating_sub(6).min(max_tokens);
        Ask { prompt, wants_logits, max_tokens, min_tokens, stop, ignore_eos, seed }
    })
}

fn op() -> impl Strategy<Value = Op> {
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
        let params = SamplingParams {
            seed: ask.seed,
            stop_token_ids: ask.stop.iter().copied().map(TokenId).collect(),
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

// ---- Steps -------------------------------------------------------------------------------------

/// A fake executor that looks at every step before it runs.
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
        let SchedulerConfig { max_num_seqs, max_num_batched_tokens } = self.config;
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
        let is_named = |tokens: &TokenSource| matches!(tokens, TokenSource::PreviousStep { .. });
        let of = |what: &dyn Fn(LogitRows, u32) -> bool| {
            let is = |s: &&_| {
                let s: &&nano_core::scheduler::output::ScheduledSequence = s;
                what(s.logit_rows, s.num_scheduled_tokens)
            };
            step.sequences.iter().filter(is).count() as u64
        };
        let num_chunks = of(&|rows, _| rows == LogitRows::None);
        let num_single = of(&|rows, num_tokens| rows == LogitRows::Last(1) && num_tokens == 1);
        let num_named = step.sequences.iter().filter(|s| is_named(&s.tokens)).count() as u64;
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

    fn sample(&mut self, masks: &TokenMasks) -> nano_core::Result<()> {
        count(&self.mix, "rows with bans", masks.banned.len() as u64);
        self.fake.sample(masks)
    }

    fn collect(&mut self) -> nano_core::Result<StepOutput> {
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

struct Scene {
    machine: Machine,
    engine: EngineCore<Watched>,
    /// By request id.
    tickets: Vec<Ticket>,
    seeds: Rc<RefCell<Vec<Option<u64>>>>,
    mix: Rc<RefCell<Mix>>,
    has_failed: bool,
}

impl Scene {
    fn new(machine: Machine, mix: &Rc<RefCell<Mix>>) -> Self {
        let Machine { capacity, config, vocab_size, .. } = machine;
        let mut fake = FakeExecutor::new(capacity, vocab_size);
        if let Some(step) = machine.fault {
            fake = fake.with_fault(step, Fault::Error);
        }
        let (seeds, mix) = (Rc::default(), Rc::clone(mix));
        let watched =
            Watched { fake, config, last_step: 0, seeds: Rc::clone(&seeds), mix: Rc::clone(&mix) };
        let engine = EngineCore::new(config, watched).unwrap();
        Self { machine, engine, tickets: Vec::new(), seeds, mix, has_failed: false }
    }

    fn count(&self, what: &'static str) {
        count(&self.mix, what, 1);
    }

    fn apply(&mut self, op: &Op) {
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
                assert!(self.machine.fault.is_some(), "{error}");
                self.has_failed = true;
                let reason = FinishReason::Error(error);
                let events = self.engine.abort_all(&reason);
                events.into_iter().for_each(|event| self.note(event));
                assert!(self.tickets.iter().all(|ticket| ticket.has_ended), "one was not told");
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
        let tokens_end = ticket.num_tokens + event.tokens.len();
        let logits_end = ticket.num_logits + logits.len();
        let expected = &ticket.expected;
        assert_eq!(expected.tokens.get(ticket.num_tokens..tokens_end), Some(&event.tokens[..]));
        assert_eq!(expected.logits.get(ticket.num_logits..logits_end), Some(&logits[..]));
        ticket.num_tokens = tokens_end;
        ticket.num_logits = logits_end;
        let Some(finish) = event.finish else { return };
        ticket.has_ended = true;
        let is_cut = matches!(finish, FinishReason::Abort | FinishReason::Error(_));
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
    fn drain(&mut self) {
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
        }
        assert_eq!((stats.num_running, stats.num_waiting), (0, 0));
    }
}

#[test]
fn every_request_gets_what_it_would_get_alone_whatever_the_batch() {
    let mix = Rc::new(RefCell::new(Mix::new()));
    let scenario = (machine(), prop::collection::vec(op(), 1..300));
    runner(700)
        .run(&scenario, |(machine, ops)| {
            let mut scene = Scene::new(machine, &mix);
            for op in &ops {
                if !scene.has_failed {
                    scene.apply(op);
                }
            }
            scene.drain();
            Ok(())
        })
        .unwrap();
    let mix = mix.borrow();
    println!("seed {SEED}: {mix:#?}");
    let operations = ["add", "add in vain", "step", "abort", "abort in vain"];
    let things = [
        "preemptions",
        "ended by eos",
        "ended by a stop token",
        "ended by length",
        "ended with all logits",
        "ended by abort",
        "rows with bans",
        "prompt chunks without a sample",
        "tokens named before they were seen",
        "steps of decodes and chunks",
        "steps of several sequences",
    ];
    assert_mix(&mix, &operations, 100_000, &things, 1000);
    assert!(mix["failed steps"] >= 20 && mix["ended by an error"] >= 100);
}
