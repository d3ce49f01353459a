//! One step as flat arrays, the form that operators read.

use std::ops::Range;

use nano_core::TokenId;
use nano_core::step::{LogitRows, ScheduleOutput, ScheduledSequence, TokenSource};

/// The part of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchSequence {
    /// Its first row in the batch.
    pub first_row: usize,
    /// Its rows.
    pub num_rows: usize,
    /// The position of its first row; everything before it is in the cache.
    pub first_position: usize,
    /// Where the blocks of its positions are among [`Batch::block_ids`].
    pub block_table: Range<usize>,
}

impl BatchSequence {
    /// Positions that its last row sees.
    pub fn context_len(&self) -> usize {
        self.first_position + self.num_rows
    }
}

/// The rows of logits that a sequence has in its step.
pub fn num_logit_rows(scheduled: &ScheduledSequence) -> u32 {
    match scheduled.logit_rows {
        LogitRows::None => 0,
        LogitRows::Last => 1,
        LogitRows::All => scheduled.num_scheduled_tokens,
    }
}

/// A flattened batch. Row `i` is one token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// `[num_tokens]`.
    pub token_ids: Vec<u32>,
    /// The rows whose token is the one given for a sequence of the step before.
    pub previous_rows: Vec<u32>,
    /// The position of each token in its sequence: `[num_tokens]`.
    pub positions: Vec<u32>,
    /// Where each token's keys and values go, `block * block_size + offset`: `[num_tokens]`.
    pub slot_mapping: Vec<u32>,
    /// The sequences, in the order of their rows.
    pub sequences: Vec<BatchSequence>,
    /// The blocks of all sequences.
    pub block_ids: Vec<u32>,
    /// The rows that need logits, ascending.
    pub logit_rows: Vec<u32>,
}

impl Batch {
    /// Flattens a step, its sequences in the given order. `previous` holds the token that each sequence
    /// of the step before sampled.
    pub fn ordered(
        step: &ScheduleOutput,
        order: impl IntoIterator<Item = usize>,
        block_size: u32,
        previous: &[TokenId],
    ) -> Self {
        let mut batch = Self::default();
        batch.refill(step, order, block_size, previous);
        batch
    }

    /// As [`ordered`](Self::ordered), in the memory of the batch before.
    pub fn refill(
        &mut self,
        step: &ScheduleOutput,
        order: impl IntoIterator<Item = usize>,
        block_size: u32,
        previous: &[TokenId],
    ) {
        let Self { token_ids, previous_rows, positions, slot_mapping, .. } = self;
        let of_rows = [token_ids, previous_rows, positions, slot_mapping];
        of_rows.into_iter().chain([&mut self.block_ids, &mut self.logit_rows]).for_each(Vec::clear);
        self.sequences.clear();
        for index in order {
            self.push(step, &step.sequences[index], block_size, previous);
        }
    }

    fn push(
        &mut self,
        step: &ScheduleOutput,
        scheduled: &ScheduledSequence,
        block_size: u32,
        previous: &[TokenId],
    ) {
        let table = &scheduled.block_table;
        let blocks = &step.block_ids[table.start as usize..table.end as usize];
        let first_row = self.token_ids.len();
        match &scheduled.tokens {
            TokenSource::Host(range) => {
                let tokens = &step.token_ids[range.start as usize..range.end as usize];
                self.token_ids.extend(tokens.iter().map(|token| token.0));
            }
            TokenSource::PreviousStep { row } => {
                self.previous_rows.push(first_row as u32);
                self.token_ids.push(previous[*row as usize].0);
            }
        }
        for position in scheduled.num_computed_tokens..scheduled.context_len() {
            let block = blocks[(position / block_size) as usize].0;
            self.positions.push(position);
            self.slot_mapping.push(block * block_size + position % block_size);
        }
        let num_rows = scheduled.num_scheduled_tokens;
        let end_row = first_row as u32 + num_rows;
        self.logit_rows.extend(end_row - num_logit_rows(scheduled)..end_row);
        let first_block = self.block_ids.len();
        self.block_ids.extend(blocks.iter().map(|block| block.0));
        self.sequences.push(BatchSequence {
            first_row,
            num_rows: num_rows as usize,
            first_position: scheduled.num_computed_tokens as usize,
            block_table: first_block..self.block_ids.len(),
        });
    }
}
