//! What runs in the next step.
//!
//! There is no prefill phase and no decode phase. Each sequence has `num_computed_tokens` and
//! `num_tokens`, and a step gives each sequence some of the tokens between the two, oldest
//! sequence first, within `max_num_batched_tokens` and `max_num_seqs`. Chunked prefill, decoding
//! and the way back after a preemption are all this one rule. Whoever sets `max_itl` lowers the
//! budget of prompts where a step also decodes: see [`Pace`].
//!
//! The scheduler sees token ids and block numbers only. It is called by
//! [`EngineCore`](crate::EngineCore) alone.

mod pace;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::executor::Capacity;
use crate::ids::{RequestId, SequenceId};
use crate::kv_cache::KvCacheManager;
use crate::request::Request;
use crate::sequence::Sequence;

pub use pace::Pace;

use crate::step::{
    FinishReason, LogitRows, RowAnswer, SampledRow, ScheduleOutput, ScheduledSequence, TokenEvent,
    TokenSource,
};

/// The limits of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Sequences that run at the same time.
    pub max_num_seqs: u32,
    /// Tokens of one step, over all sequences. May be smaller than `max_num_seqs`.
    pub max_num_batched_tokens: u32,
    /// The time between two tokens of a running stream that prompts shall leave; `None` gives
    /// them the whole step.
    pub max_itl: Option<Duration>,
}

impl SchedulerConfig {
    /// Checks each limit.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] names the first one that is 0.
    pub fn validate(&self) -> Result<()> {
        let (name, range) = if self.max_num_seqs == 0 {
            ("max_num_seqs", "at least 1")
        } else if self.max_num_batched_tokens == 0 {
            ("max_num_batched_tokens", "at least 1")
        } else if self.max_itl == Some(Duration::ZERO) {
            ("max_itl_ms", "above 0")
        } else {
            return Ok(());
        };
        Err(Error::InvalidConfig { name, range, value: "0".to_owned() })
    }
}

/// A view of the scheduler's load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// Sequences that hold blocks.
    pub num_running: u32,
    /// Sequences that hold none.
    pub num_waiting: u32,
    /// Blocks that nobody holds.
    pub num_free_blocks: u32,
    /// Preemptions since the start.
    pub num_preemptions: u64,
}

/// Decides what runs next and keeps the books of every sequence.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    pace: Option<Pace>,
    /// Prompt tokens that the step being scheduled may take.
    prompt_budget: u32,
    cache: KvCacheManager,
    /// Ascending by id, that is by arrival, and each older than every one in `waiting`: whoever
    /// joins was the oldest there, and whoever is preempted was the newest here. All hold blocks.
    running: Vec<Sequence>,
    /// Ascending by id. None holds a block.
    waiting: VecDeque<Sequence>,
    next_sequence: u64,
    step: u64,
    num_preemptions: u64,
}

impl Scheduler {
    /// A scheduler for an executor of the given capacity.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] if a limit or `max_itl` is 0.
    pub fn new(config: SchedulerConfig, capacity: Capacity) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            config,
            pace: config.max_itl.map(|target| Pace::new(target, config.max_num_batched_tokens)),
            prompt_budget: config.max_num_batched_tokens,
            cache: KvCacheManager::new(capacity.num_blocks, capacity.block_size),
            running: Vec::new(),
            waiting: VecDeque::new(),
            next_sequence: 0,
            step: 0,
            num_preemptions: 0,
        })
    }

    /// Queues a request behind all others.
    pub fn add(&mut self, request: Request) {
        let id = SequenceId(self.next_sequence);
        self.next_sequence += 1;
        self.waiting.push_back(Sequence::new(id, request));
    }

    /// Drops a request and frees its blocks; `None` if it has ended already.
    pub fn abort(&mut self, request: RequestId) -> Option<TokenEvent> {
        let is_it = |sequence: &Sequence| sequence.request.id == request;
        let sequence = match self.running.iter().position(is_it) {
            Some(index) => self.running.remove(index),
            None => self.waiting.remove(self.waiting.iter().position(is_it)?)?,
        };
        self.cache.free(sequence.block_table, sequence.last_step);
        let finish = Some(FinishReason::Abort);
        Some(TokenEvent { request, token: None, logits: None, finish })
    }

    /// Whether no request is left.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// The present load.
    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats {
            num_running: self.running.len() as u32,
            num_waiting: self.waiting.len() as u32,
            num_free_blocks: self.cache.allocator().num_free(),
            num_preemptions: self.num_preemptions,
        }
    }

    /// The next step; empty when nothing can run before a step in flight is collected.
    ///
    /// Blocks are allocated here. When they run out, the newest running sequence loses its blocks
    /// and waits to be computed again, so the oldest always goes on.
    pub fn schedule(&mut self) -> ScheduleOutput {
        let mut step = ScheduleOutput { step: self.step + 1, ..ScheduleOutput::default() };
        // A stream whose next token is in flight waits for it, too: it counts as one that decodes.
        self.prompt_budget = match &self.pace {
            Some(pace) if self.running.iter().any(Sequence::is_decoding) => {
                pace.num_prompt_tokens()
            }
            _ => self.config.max_num_batched_tokens,
        };
        let everyone_has_room = self.schedule_running(&mut step);
        if everyone_has_room {
            self.admit_waiting(&mut step);
        }
        if !step.sequences.is_empty() {
            self.step = step.step;
        }
        step
    }

    /// Learns how long `step` took, for the next one's length.
    pub fn observe(&mut self, step: &ScheduleOutput, duration: Duration) {
        let has_both = (1..step.num_tokens).contains(&step.num_prompt_tokens);
        if let Some(pace) = self.pace.as_mut().filter(|_| has_both) {
            pace.observe(step.num_prompt_tokens, duration);
        }
    }

    /// Gives the running sequences their tokens; returns false if blocks ran out on the way.
    fn schedule_running(&mut self, step: &mut ScheduleOutput) -> bool {
        let mut index = 0;
        while index < self.running.len() {
            let num_tokens = self.num_tokens_for(&self.running[index], step);
            if num_tokens > 0 {
                if !self.make_room(index, num_tokens, step) {
                    return false;
                }
                push_scheduled(step, &mut self.running[index], num_tokens);
            }
            index += 1;
        }
        step.num_preempted == 0
    }

    /// Allocates blocks for the next `num_tokens` tokens of the running sequence at `index`, at
    /// the cost of newer ones; false if it has to wait or was itself the newest.
    fn make_room(&mut self, index: usize, num_tokens: u32, step: &mut ScheduleOutput) -> bool {
        loop {
            let sequence = &mut self.running[index];
            let target = sequence.num_computed_tokens + num_tokens;
            if self.cache.allocate(&mut sequence.block_table, target) {
                return true;
            }
            // Blocks of earlier victims come back when the steps in flight are collected: to
            // preempt yet another sequence would be to pay twice.
            let missing = self.cache.num_missing(&sequence.block_table, target);
            if self.cache.allocator().num_free() + self.cache.num_pending() >= missing {
                return false;
            }
            self.preempt_newest(step);
            if index == self.running.len() {
                return false;
            }
        }
    }

    fn preempt_newest(&mut self, step: &mut ScheduleOutput) {
        let Some(mut sequence) = self.running.pop() else { return };
        let blocks = sequence.preempt();
        self.cache.free(blocks, sequence.last_step);
        self.waiting.push_front(sequence);
        step.num_preempted += 1;
        self.num_preemptions += 1;
    }

    /// Lets waiting sequences join, in the order of arrival, while there is room for them.
    fn admit_waiting(&mut self, step: &mut ScheduleOutput) {
        while self.running.len() < self.config.max_num_seqs as usize {
            let Some(sequence) = self.waiting.front() else { return };
            // A preempted sequence needs its last token on the host before it starts over.
            let num_tokens = self.num_tokens_for(sequence, step);
            if num_tokens == 0 || sequence.num_in_flight_tokens > 0 {
                return;
            }
            let Some(mut sequence) = self.waiting.pop_front() else { return };
            if !self.cache.allocate(&mut sequence.block_table, num_tokens) {
                self.waiting.push_front(sequence);
                return;
            }
            push_scheduled(step, &mut sequence, num_tokens);
            self.running.push(sequence);
        }
    }

    /// Tokens of `sequence` that this step can take.
    fn num_tokens_for(&self, sequence: &Sequence, step: &ScheduleOutput) -> u32 {
        // A token in flight can be named only by the step right after the one that samples it.
        if sequence.num_in_flight_tokens > 0 && sequence.last_step != self.step {
            return 0;
        }
        let mut budget = self.config.max_num_batched_tokens - step.num_tokens;
        if !sequence.is_decoding() {
            budget = budget.min(self.prompt_budget - step.num_prompt_tokens);
        }
        sequence.num_uncomputed_tokens().min(budget)
    }

    /// Takes the results of `step`, the oldest one in flight: appends tokens, ends sequences,
    /// frees blocks.
    ///
    /// # Errors
    /// [`Error::ExecutorFailed`] if the rows are not those that the step asked for. No request has
    /// changed then: each one is still there to be told.
    pub fn update(
        &mut self,
        step: &ScheduleOutput,
        rows: Vec<SampledRow>,
    ) -> Result<Vec<TokenEvent>> {
        self.cache.step_collected(step.step);
        let asked = step.sequences.iter().filter(|s| s.logit_rows != LogitRows::None);
        let num_rows = rows.len();
        let is_complete = num_rows == asked.clone().count()
            && asked.clone().zip(&rows).all(|(asked, row)| asked.is_answered_by(row));
        if !is_complete {
            let message = format!("its {num_rows} rows are not those that the step asked for");
            return Err(Error::ExecutorFailed { message });
        }
        let answers = asked.zip(rows);
        Ok(answers.filter_map(|(asked, row)| self.update_sequence(asked, row)).collect())
    }

    /// `None` if the sequence has ended meanwhile: its row was computed in vain.
    fn update_sequence(
        &mut self,
        scheduled: &ScheduledSequence,
        row: SampledRow,
    ) -> Option<TokenEvent> {
        let id = scheduled.sequence;
        let running = self.running.binary_search_by_key(&id, |sequence| sequence.id);
        let waiting = self.waiting.binary_search_by_key(&id, |sequence| sequence.id);
        let sequence = match (running, waiting) {
            (Ok(index), _) => &mut self.running[index],
            (_, Ok(index)) => &mut self.waiting[index],
            _ => return None,
        };
        let mut event =
            TokenEvent { request: sequence.request.id, token: None, logits: None, finish: None };
        match row.answer {
            RowAnswer::Token(token) => {
                event.token = Some(token);
                event.finish = sequence.append(token);
            }
            RowAnswer::Logits(rows) => {
                (event.logits, event.finish) = deliver_logits(sequence, scheduled, rows);
            }
            RowAnswer::Error(error) => event.finish = Some(FinishReason::Error(error)),
        }
        if event.finish.is_some() {
            let sequence = match running {
                Ok(index) => self.running.remove(index),
                Err(_) => self.waiting.remove(waiting.ok()?)?,
            };
            self.cache.free(sequence.block_table, sequence.last_step);
        }
        Some(event)
    }

    /// Checks the books: blocks against tables, queues against their order and limits.
    ///
    /// # Panics
    /// If something does not hold. For tests.
    pub fn check_invariants(&self) {
        let everyone = || self.running.iter().chain(&self.waiting);
        self.cache.check_invariants(everyone().map(|sequence| &sequence.block_table));
        assert!(everyone().is_sorted_by_key(|sequence| sequence.id), "out of order");
        assert!(self.running.len() <= self.config.max_num_seqs as usize, "too many run");
        for sequence in &self.waiting {
            assert!(sequence.block_table.is_empty(), "a waiting sequence holds blocks");
            assert_eq!(sequence.num_computed_tokens, 0, "a waiting sequence is computed");
        }
        for sequence in &self.running {
            let computed = sequence.num_computed_tokens;
            assert!(computed <= sequence.num_tokens(), "computed past its tokens");
            let missing = self.cache.num_missing(&sequence.block_table, computed);
            assert_eq!(missing, 0, "computed tokens without a block");
        }
        if self.is_idle() && self.cache.num_pending() == 0 {
            let allocator = self.cache.allocator();
            assert_eq!(allocator.num_free(), allocator.num_blocks(), "blocks are lost");
        }
    }
}

/// Adds the next `num_tokens` tokens of `sequence`, whose blocks are allocated, to `step`.
fn push_scheduled(step: &mut ScheduleOutput, sequence: &mut Sequence, num_tokens: u32) {
    let row = step.sequences.len() as u32;
    let first = sequence.num_computed_tokens;
    let end = first + num_tokens;
    let reaches_end = end == sequence.num_tokens();
    let tokens = if sequence.num_in_flight_tokens > 0 {
        TokenSource::PreviousStep { row: sequence.last_row }
    } else {
        TokenSource::Host(extend_range(
            &mut step.token_ids,
            &sequence.tokens[first as usize..end as usize],
        ))
    };
    let logit_rows = match (sequence.request.wants_logits, reaches_end) {
        (true, _) => LogitRows::All,
        (false, true) => LogitRows::Last,
        (false, false) => LogitRows::None,
    };
    let is_banned = logit_rows == LogitRows::Last && sequence.is_before_min_tokens();
    step.sequences.push(ScheduledSequence {
        sequence: sequence.id,
        tokens,
        num_computed_tokens: first,
        num_scheduled_tokens: num_tokens,
        block_table: extend_range(&mut step.block_ids, &sequence.block_table),
        logit_rows,
        banned: is_banned.then(|| Arc::clone(&sequence.request.banned_before_min_tokens)),
        params: Arc::clone(&sequence.request.params),
        seed: sequence.request.seed,
    });
    step.num_tokens += num_tokens;
    if !sequence.is_decoding() {
        step.num_prompt_tokens += num_tokens;
    }
    sequence.num_computed_tokens = end;
    (sequence.last_step, sequence.last_row) = (step.step, row);
    if logit_rows == LogitRows::Last {
        sequence.num_in_flight_tokens += 1;
    }
}

/// Appends `items` to `all` and returns where they went.
fn extend_range<T: Copy>(all: &mut Vec<T>, items: &[T]) -> std::ops::Range<u32> {
    let start = all.len() as u32;
    all.extend_from_slice(items);
    start..all.len() as u32
}

/// The rows of logits that were not delivered before a preemption, and whether they are the last.
fn deliver_logits(
    sequence: &mut Sequence,
    scheduled: &ScheduledSequence,
    mut rows: Vec<f32>,
) -> (Option<Vec<f32>>, Option<FinishReason>) {
    let row_len = rows.len() / scheduled.num_scheduled_tokens as usize;
    let first = scheduled.num_computed_tokens;
    let known = sequence.num_logit_rows.saturating_sub(first).min(scheduled.num_scheduled_tokens);
    rows.drain(..known as usize * row_len);
    sequence.num_logit_rows = sequence.num_logit_rows.max(scheduled.context_len());
    let is_last = sequence.num_logit_rows == sequence.prompt_len;
    (Some(rows), is_last.then_some(FinishReason::Length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::TokenId;
    use crate::request::{RequestKind, RequestLimits};

    /// Request 0 runs with both of its tokens computed, request 1 waits.
    fn scheduler() -> Scheduler {
        let limits = RequestLimits {
            vocab_size: 10,
            max_model_len: 10,
            num_blocks: 4,
            block_size: 1,
            eos_token_ids: Arc::from([]),
            seed: 0,
        };
        let config = SchedulerConfig { max_num_seqs: 1, max_num_batched_tokens: 8, max_itl: None };
        let capacity = Capacity { num_blocks: 4, block_size: 1, max_steps_in_flight: 1 };
        let mut scheduler = Scheduler::new(config, capacity).unwrap();
        for id in (0..2).map(RequestId) {
            let prompt = vec![TokenId(1); 2];
            scheduler.add(Request::new(id, prompt, RequestKind::Logits, &limits).unwrap());
        }
        scheduler.schedule();
        scheduler.check_invariants();
        scheduler
    }

    #[test]
    #[should_panic(expected = "too many run")]
    fn the_check_sees_a_sequence_too_many() {
        let mut scheduler = scheduler();
        scheduler.running.extend(scheduler.waiting.pop_front());
        scheduler.check_invariants();
    }

    #[test]
    #[should_panic(expected = "out of order")]
    fn the_check_sees_a_queue_out_of_order() {
        let mut scheduler = scheduler();
        scheduler.waiting.extend(scheduler.running.pop());
        scheduler.check_invariants();
    }

    #[test]
    #[should_panic(expected = "a waiting sequence holds blocks")]
    fn the_check_sees_a_waiting_sequence_with_blocks() {
        let mut scheduler = scheduler();
        scheduler.waiting[0].block_table = std::mem::take(&mut scheduler.running[0].block_table);
        scheduler.check_invariants();
    }

    #[test]
    #[should_panic(expected = "computed past its tokens")]
    fn the_check_sees_a_token_computed_that_does_not_exist() {
        let mut scheduler = scheduler();
        scheduler.running[0].num_computed_tokens = 3;
        scheduler.check_invariants();
    }
}
