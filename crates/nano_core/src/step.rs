//! The plain data that a step is made of: what the scheduler decides, and what it reports.

use std::ops::Range;
use std::sync::Arc;

use crate::error::Error;
use crate::ids::{BlockId, RequestId, SequenceId, TokenId};
use crate::sampling_params::SamplingParams;

/// Where the tokens of a scheduled sequence come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenSource {
    /// A range of [`ScheduleOutput::token_ids`].
    Host(Range<u32>),
    /// The one token that the step launched just before samples for its sequence number `row`
    /// (an index into that step's [`ScheduleOutput::sequences`]); the host has not seen it yet.
    PreviousStep {
        /// Index into the previous step's sequences.
        row: u32,
    },
}

/// Which of a scheduled sequence's tokens need logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// None: a prefill chunk that is not the last.
    None,
    /// The last token's, from which the next one is sampled.
    Last,
    /// Every token; the logits themselves are returned and nothing is sampled.
    All,
}

/// One sequence's part of a step.
#[derive(Clone, Debug)]
pub struct ScheduledSequence {
    /// Whose tokens these are.
    pub sequence: SequenceId,
    /// The `num_scheduled_tokens` tokens to run.
    pub tokens: TokenSource,
    /// Tokens whose keys and values are in the cache already: the position of the first one run.
    pub num_computed_tokens: u32,
    /// Tokens to run, at least one.
    pub num_scheduled_tokens: u32,
    /// A range of [`ScheduleOutput::block_ids`]: the block of position `p` is its entry
    /// `p / block_size`. It covers every position up to the last scheduled one.
    pub block_table: Range<u32>,
    /// Which rows of logits are needed.
    pub logit_rows: LogitRows,
    /// What may not be chosen as the next token, if anything.
    pub banned: Option<Arc<[TokenId]>>,
    /// How the next token is chosen.
    pub params: Arc<SamplingParams>,
    /// The key of the sequence's noise.
    pub seed: u64,
}

impl ScheduledSequence {
    /// Positions known to attention after this step.
    pub fn context_len(&self) -> u32 {
        self.num_computed_tokens + self.num_scheduled_tokens
    }

    /// Whether `row` holds what was asked for.
    pub fn is_answered_by(&self, row: &SampledRow) -> bool {
        let is_complete = match (self.logit_rows, &row.answer) {
            (LogitRows::Last | LogitRows::All, RowAnswer::Error(_))
            | (LogitRows::Last, RowAnswer::Token(_)) => true,
            (LogitRows::All, RowAnswer::Logits(logits)) => {
                let num_rows = self.num_scheduled_tokens as usize;
                !logits.is_empty() && logits.len().is_multiple_of(num_rows)
            }
            _ => false,
        };
        row.sequence == self.sequence && is_complete
    }
}

/// One step: a flattened batch of prefill chunks and decodes.
#[derive(Clone, Debug, Default)]
pub struct ScheduleOutput {
    /// The step's number, counting from 1.
    pub step: u64,
    /// The sequences that take part, oldest first.
    pub sequences: Vec<ScheduledSequence>,
    /// The tokens of every [`TokenSource::Host`], one after the other.
    pub token_ids: Vec<TokenId>,
    /// The block tables, one after the other.
    pub block_ids: Vec<BlockId>,
    /// Tokens of the whole step.
    pub num_tokens: u32,
    /// Those of them that belong to prompts, or to what a preemption has to compute again; every
    /// other one is the newest token of a sequence that decodes.
    pub num_prompt_tokens: u32,
    /// Sequences that lost their blocks to make room for this step.
    pub num_preempted: u32,
}

/// What the executor hands back for one scheduled sequence that asked for logits.
#[derive(Clone, Debug)]
pub struct SampledRow {
    /// Whose row it is.
    pub sequence: SequenceId,
    /// What it holds.
    pub answer: RowAnswer,
}

/// What became of a row.
#[derive(Clone, Debug, PartialEq)]
pub enum RowAnswer {
    /// For [`LogitRows::Last`]: the sampled token.
    Token(TokenId),
    /// For [`LogitRows::All`]: `[num_scheduled_tokens, vocab_size]`.
    Logits(Vec<f32>),
    /// Why there is neither: the request ends with it, and no other does.
    Error(Error),
}

/// Why a request ended.
#[derive(Clone, Debug, PartialEq)]
pub enum FinishReason {
    /// An end-of-sequence token, or (with the token named) one of `stop_token_ids`.
    Stop(Option<TokenId>),
    /// `max_tokens` or `max_model_len` was reached, or all logits were delivered.
    Length,
    /// It was aborted.
    Abort,
    /// Its row of a step has failed.
    Error(Error),
}

/// News of one request after a step.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenEvent {
    /// Whose news it is.
    pub request: RequestId,
    /// The new token, also the one that stopped the sequence.
    pub token: Option<TokenId>,
    /// New logits of a [`RequestKind::Logits`](crate::RequestKind::Logits) request, row by row.
    pub logits: Option<Vec<f32>>,
    /// Set on the last event of a request.
    pub finish: Option<FinishReason>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scheduled(logit_rows: LogitRows) -> ScheduledSequence {
        ScheduledSequence {
            sequence: SequenceId(1),
            tokens: TokenSource::Host(0..3),
            num_computed_tokens: 4,
            num_scheduled_tokens: 3,
            block_table: 0..2,
            logit_rows,
            banned: None,
            params: Arc::default(),
            seed: 0,
        }
    }

    fn row(sequence: u64, answer: RowAnswer) -> SampledRow {
        SampledRow { sequence: SequenceId(sequence), answer }
    }

    fn logits(len: usize) -> RowAnswer {
        RowAnswer::Logits(vec![0.0; len])
    }

    const TOKEN: RowAnswer = RowAnswer::Token(TokenId(0));
    const FAILED: RowAnswer = RowAnswer::Error(Error::EmptyPrompt);

    #[test]
    fn the_context_ends_with_the_last_scheduled_token() {
        assert_eq!(scheduled(LogitRows::None).context_len(), 7);
    }

    #[test]
    fn a_sampling_row_is_answered_by_a_token_or_an_error() {
        let last = scheduled(LogitRows::Last);
        assert!(last.is_answered_by(&row(1, TOKEN)));
        assert!(last.is_answered_by(&row(1, FAILED)));
        for wrong in [row(1, logits(3)), row(2, TOKEN), row(2, FAILED)] {
            assert!(!last.is_answered_by(&wrong), "{wrong:?}");
        }
    }

    #[test]
    fn rows_of_logits_are_answered_by_whole_rows_or_an_error() {
        let all = scheduled(LogitRows::All);
        assert!(all.is_answered_by(&row(1, logits(6))));
        assert!(all.is_answered_by(&row(1, FAILED)));
        for wrong in [row(1, TOKEN), row(1, logits(0)), row(1, logits(7)), row(2, logits(6))] {
            assert!(!all.is_answered_by(&wrong), "{wrong:?}");
        }
    }

    #[test]
    fn a_chunk_without_logits_has_no_row() {
        let none = scheduled(LogitRows::None);
        for wrong in [TOKEN, logits(3), FAILED] {
            assert!(!none.is_answered_by(&row(1, wrong)));
        }
    }
}
