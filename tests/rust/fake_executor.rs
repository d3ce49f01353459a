//! An executor without a model, for tests and study of everything above the seam.
//!
//! Its cache holds one token id per slot. The next token of a sequence is a hash of all tokens
//! that its block table leads to, so a wrong table, slot or position changes the output, and
//! [`FakeExecutor::continuation`] says what the output must be.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nano_core::step::{LogitRows, RowAnswer, SampledRow, ScheduledSequence, TokenSource};
use nano_core::{BlockId, Capacity, Error, Executor, Result, ScheduleOutput, SequenceId, TokenId};

/// What goes wrong, and at which step.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// `collect` returns an error.
    Error,
    /// The step's first row that asks for logits fails.
    Row,
    /// `launch` panics.
    Panic,
    /// `collect` does not return before the flag is set.
    Stall(Arc<AtomicBool>),
}

/// A step between launch and collect.
#[derive(Debug)]
struct InFlight {
    step: ScheduleOutput,
    /// One for each scheduled sequence; of use where the step samples.
    sampled: Vec<TokenId>,
    logits: Vec<Option<Vec<f32>>>,
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct FakeExecutor {
    capacity: Capacity,
    vocab_size: u32,
    slots: Vec<TokenId>,
    in_flight: VecDeque<InFlight>,
    previous_sampled: Vec<TokenId>,
    fault: Option<(u64, Fault)>,
    step_time: Duration,
}

impl FakeExecutor {
    /// An executor whose tokens are below `vocab_size`.
    pub(crate) fn new(capacity: Capacity, vocab_size: u32) -> Self {
        Self {
            capacity,
            vocab_size,
            slots: vec![TokenId(0); (capacity.num_blocks * capacity.block_size) as usize],
            in_flight: VecDeque::new(),
            previous_sampled: Vec::new(),
            fault: None,
            step_time: Duration::ZERO,
        }
    }

    /// Lets step number `step`, counting from 1, go wrong.
    pub(crate) fn with_fault(mut self, step: u64, fault: Fault) -> Self {
        self.fault = Some((step, fault));
        self
    }

    /// Lets every `collect` take this long.
    pub(crate) fn with_step_time(mut self, step_time: Duration) -> Self {
        self.step_time = step_time;
        self
    }

    /// The `num_tokens` tokens that follow `prompt` when nothing is banned.
    pub(crate) fn continuation(
        prompt: &[TokenId],
        num_tokens: usize,
        vocab_size: u32,
    ) -> Vec<TokenId> {
        let mut tokens = prompt.to_vec();
        for _ in 0..num_tokens {
            tokens.push(next_token(tokens.iter().copied(), vocab_size));
        }
        tokens.split_off(prompt.len())
    }

    /// The logits that stand for `token`: its id, then zeros up to the vocabulary's size.
    fn logits_of(&self, token: TokenId) -> impl Iterator<Item = f32> {
        let zeros = std::iter::repeat_n(0.0, self.vocab_size as usize - 1);
        std::iter::once(token.0 as f32).chain(zeros)
    }

    fn slot(&self, step: &ScheduleOutput, scheduled: &ScheduledSequence, position: u32) -> usize {
        let block_size = self.capacity.block_size;
        let entry = scheduled.block_table.start + position / block_size;
        assert!(entry < scheduled.block_table.end, "the table does not cover {position}");
        let block = step.block_ids[entry as usize];
        (block.0 * block_size + position % block_size) as usize
    }

    fn input_tokens(&self, step: &ScheduleOutput, scheduled: &ScheduledSequence) -> Vec<TokenId> {
        let tokens = match &scheduled.tokens {
            TokenSource::Host(range) => {
                step.token_ids[range.start as usize..range.end as usize].to_vec()
            }
            TokenSource::PreviousStep { row } => vec![self.previous_sampled[*row as usize]],
        };
        assert_eq!(tokens.len(), scheduled.num_scheduled_tokens as usize, "miscounted tokens");
        tokens
    }

    /// A block that a step in flight names for one sequence must not be given to another.
    fn check_blocks_are_not_in_flight(&self, step: &ScheduleOutput) {
        let owners = |step: &ScheduleOutput| -> Vec<(BlockId, SequenceId)> {
            let blocks = |s: &ScheduledSequence| {
                let table = &step.block_ids[s.block_table.start as usize..][..s.block_table.len()];
                table.iter().map(|&block| (block, s.sequence)).collect::<Vec<_>>()
            };
            step.sequences.iter().flat_map(blocks).collect()
        };
        let earlier: Vec<_> = self.in_flight.iter().flat_map(|other| owners(&other.step)).collect();
        for (block, sequence) in owners(step) {
            let clash = earlier.iter().find(|(other, owner)| *other == block && *owner != sequence);
            assert!(clash.is_none(), "block {} is reused while a step in flight names it", block.0);
        }
    }

    fn fault_at(&self, step: u64) -> Option<&Fault> {
        self.fault.as_ref().filter(|(at, _)| *at == step).map(|(_, fault)| fault)
    }
}

impl Executor for FakeExecutor {
    fn capacity(&self) -> Capacity {
        self.capacity
    }

    fn launch(&mut self, step: &ScheduleOutput) -> Result<()> {
        assert!(!matches!(self.fault_at(step.step), Some(Fault::Panic)), "the fake panics");
        assert!(self.in_flight.len() < self.capacity.max_steps_in_flight as usize, "too deep");
        self.check_blocks_are_not_in_flight(step);
        let mut logits = Vec::new();
        let mut sampled = Vec::new();
        let mut num_tokens = 0;
        for scheduled in &step.sequences {
            let first = scheduled.num_computed_tokens;
            let inputs = self.input_tokens(step, scheduled);
            num_tokens += scheduled.num_scheduled_tokens;
            for (position, &token) in (first..).zip(&inputs) {
                let slot = self.slot(step, scheduled, position);
                self.slots[slot] = token;
            }
            let context =
                (0..scheduled.context_len()).map(|p| self.slots[self.slot(step, scheduled, p)]);
            let mut token = next_token(context, self.vocab_size);
            while scheduled.banned.as_ref().is_some_and(|banned| banned.contains(&token)) {
                token.0 = (token.0 + 1) % self.vocab_size;
            }
            sampled.push(token);
            let wants_logits = scheduled.logit_rows == LogitRows::All;
            logits.push(
                wants_logits.then(|| inputs.iter().flat_map(|&t| self.logits_of(t)).collect()),
            );
        }
        assert_eq!(num_tokens, step.num_tokens, "the step's tokens are miscounted");
        self.previous_sampled.clone_from(&sampled);
        self.in_flight.push_back(InFlight { step: step.clone(), sampled, logits });
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<SampledRow>> {
        let Some(InFlight { step, sampled, logits }) = self.in_flight.pop_front() else {
            return Err(Error::ExecutorFailed { message: "no step is in flight".to_owned() });
        };
        std::thread::sleep(self.step_time);
        match self.fault_at(step.step) {
            Some(Fault::Error) => {
                return Err(Error::ExecutorFailed { message: "the fake fails".to_owned() });
            }
            Some(Fault::Stall(released)) => {
                while !released.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            Some(Fault::Panic | Fault::Row) | None => {}
        }
        let rows = step.sequences.iter().zip(sampled).zip(logits);
        let rows = rows.filter(|((scheduled, _), _)| scheduled.logit_rows != LogitRows::None);
        let rows = rows.map(|((scheduled, token), logits)| SampledRow {
            sequence: scheduled.sequence,
            answer: logits.map_or(RowAnswer::Token(token), RowAnswer::Logits),
        });
        let mut rows: Vec<SampledRow> = rows.collect();
        if let (Some(Fault::Row), Some(row)) = (self.fault_at(step.step), rows.first_mut()) {
            row.answer = RowAnswer::Error(Error::LogitsNotFinite { position: 0 });
        }
        Ok(rows)
    }
}

/// FNV-1a over the token ids.
fn next_token(context: impl Iterator<Item = TokenId>, vocab_size: u32) -> TokenId {
    let hash = context.fold(0xcbf2_9ce4_8422_2325_u64, |hash, token| {
        (hash ^ u64::from(token.0)).wrapping_mul(0x0100_0000_01b3)
    });
    TokenId(((hash >> 32) % u64::from(vocab_size)) as u32)
}
