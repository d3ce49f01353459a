//! The scheduler's state of a request.

use crate::ids::{SequenceId, TokenId};
use crate::kv_cache::BlockTable;
use crate::request::Request;
use crate::step::FinishReason;

/// Tokens, counters and blocks of one request.
///
/// Of its `num_tokens` tokens the first `num_computed_tokens` have keys and values in the cache,
/// or will have once the steps in flight end. Scheduling is nothing but letting the second number
/// catch up with the first.
#[derive(Debug)]
pub struct Sequence {
    pub(crate) id: SequenceId,
    /// What is asked for, its prompt moved to `tokens`.
    pub(crate) request: Request,
    /// Prompt and output, as far as the host has seen them.
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) prompt_len: u32,
    pub(crate) num_computed_tokens: u32,
    /// Sampled tokens that the host has not seen.
    pub(crate) num_in_flight_tokens: u32,
    /// The last step that names the sequence's blocks; it samples the newest token in flight, if any is.
    pub(crate) last_step: u64,
    /// The sequence's index in that step.
    pub(crate) last_row: u32,
    pub(crate) block_table: BlockTable,
    /// For a request of logits: how many rows were delivered.
    pub(crate) num_logit_rows: u32,
}

impl Sequence {
    /// The state of a request that has not run yet.
    pub fn new(id: SequenceId, mut request: Request) -> Self {
        let tokens = std::mem::take(&mut request.prompt);
        Self {
            id,
            request,
            prompt_len: tokens.len() as u32,
            tokens,
            num_computed_tokens: 0,
            num_in_flight_tokens: 0,
            last_step: 0,
            last_row: 0,
            block_table: BlockTable::new(),
            num_logit_rows: 0,
        }
    }

    /// Tokens of prompt and output, those in flight included.
    pub fn num_tokens(&self) -> u32 {
        self.tokens.len() as u32 + self.num_in_flight_tokens
    }

    /// Generated tokens, those in flight included.
    pub fn num_output_tokens(&self) -> u32 {
        self.num_tokens() - self.prompt_len
    }

    /// Tokens that may run now: `[num_computed_tokens, num_tokens)`, unless the last of them is
    /// the last token of the sequence, which needs no keys and values.
    pub fn num_uncomputed_tokens(&self) -> u32 {
        if !self.request.wants_logits && self.num_output_tokens() >= self.request.max_tokens {
            return 0;
        }
        self.num_tokens() - self.num_computed_tokens
    }

    /// Whether all that may run is the newest token, and that one was generated.
    pub fn is_decoding(&self) -> bool {
        self.num_output_tokens() > 0 && self.num_uncomputed_tokens() == 1
    }

    /// Whether an end-of-sequence or stop token may not be chosen as the next token.
    pub fn is_before_min_tokens(&self) -> bool {
        self.num_output_tokens() < self.request.params.min_tokens
    }

    /// Appends a token that was in flight; returns the reason if it is the last one.
    pub fn append(&mut self, token: TokenId) -> Option<FinishReason> {
        self.num_in_flight_tokens -= 1;
        self.tokens.push(token);
        if self.request.eos_token_ids.contains(&token) {
            return Some(FinishReason::Stop(None));
        }
        if self.request.params.stop_token_ids.contains(&token) {
            return Some(FinishReason::Stop(Some(token)));
        }
        (self.tokens.len() as u32 - self.prompt_len >= self.request.max_tokens)
            .then_some(FinishReason::Length)
    }

    /// Gives up all computed tokens and returns the blocks that held them: the sequence will be
    /// computed again from its start.
    pub fn preempt(&mut self) -> BlockTable {
        self.num_computed_tokens = 0;
        std::mem::take(&mut self.block_table)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::ids::{BlockId, RequestId};
    use crate::request::{RequestKind, RequestLimits};
    use crate::sampling_params::SamplingParams;

    /// A prompt of three tokens; token 9 is the model's end of sequence.
    fn sequence(kind: RequestKind) -> Sequence {
        let limits = RequestLimits {
            vocab_size: 10,
            max_model_len: 100,
            num_blocks: 100,
            block_size: 1,
            eos_token_ids: Arc::from([TokenId(9)]),
            seed: 0,
        };
        let request = Request::new(RequestId(1), vec![TokenId(4); 3], kind, &limits).unwrap();
        Sequence::new(SequenceId(2), request)
    }

    fn generate(params: SamplingParams) -> Sequence {
        sequence(RequestKind::Generate(params))
    }

    /// Has the next token sampled, as a step would.
    fn launch(sequence: &mut Sequence) {
        sequence.num_computed_tokens = sequence.num_tokens();
        sequence.num_in_flight_tokens += 1;
    }

    #[test]
    fn tokens_in_flight_count_as_tokens() {
        let mut sequence = generate(SamplingParams::default());
        assert_eq!((sequence.num_tokens(), sequence.num_output_tokens()), (3, 0));
        assert_eq!(sequence.num_uncomputed_tokens(), 3);
        launch(&mut sequence);
        assert_eq!((sequence.num_tokens(), sequence.num_output_tokens()), (4, 1));
        assert_eq!(sequence.num_uncomputed_tokens(), 1);
        assert_eq!(sequence.append(TokenId(1)), None);
        assert_eq!((sequence.num_tokens(), sequence.num_in_flight_tokens), (4, 0));
        assert_eq!(sequence.tokens, [TokenId(4), TokenId(4), TokenId(4), TokenId(1)]);
    }

    #[test]
    fn the_last_token_is_not_run() {
        let mut sequence = generate(SamplingParams { max_tokens: 2, ..SamplingParams::default() });
        launch(&mut sequence);
        assert_eq!(sequence.num_uncomputed_tokens(), 1);
        launch(&mut sequence);
        assert_eq!(sequence.num_uncomputed_tokens(), 0);
        assert_eq!(sequence.append(TokenId(1)), None);
        assert_eq!(sequence.append(TokenId(1)), Some(FinishReason::Length));
    }

    #[test]
    fn whoever_has_one_generated_token_to_run_decodes() {
        let mut sequence = generate(SamplingParams { max_tokens: 2, ..SamplingParams::default() });
        assert!(!sequence.is_decoding());
        sequence.num_computed_tokens = 2;
        assert!(!sequence.is_decoding(), "the prompt's last token");
        launch(&mut sequence);
        assert!(sequence.is_decoding(), "in flight");
        assert_eq!(sequence.append(TokenId(1)), None);
        assert!(sequence.is_decoding());
        sequence.preempt();
        assert!(!sequence.is_decoding(), "all over again");
        launch(&mut sequence);
        assert!(!sequence.is_decoding(), "the last token is not run");
    }

    #[test]
    fn every_token_of_a_logits_request_runs() {
        let mut sequence = sequence(RequestKind::Logits);
        assert_eq!(sequence.num_uncomputed_tokens(), 3);
        sequence.num_computed_tokens = 2;
        assert_eq!(sequence.num_uncomputed_tokens(), 1);
    }

    #[test]
    fn an_end_token_is_named_only_if_the_request_did() {
        let stop = SamplingParams {
            stop_token_ids: Arc::from([TokenId(5), TokenId(9)]),
            ..SamplingParams::default()
        };
        let last = |params: &SamplingParams, token| {
            let mut sequence = generate(params.clone());
            launch(&mut sequence);
            sequence.append(TokenId(token))
        };
        assert_eq!(last(&stop, 4), None);
        assert_eq!(last(&stop, 5), Some(FinishReason::Stop(Some(TokenId(5)))));
        assert_eq!(last(&stop, 9), Some(FinishReason::Stop(None)));
        let ignoring = SamplingParams { ignore_eos: true, ..stop };
        assert_eq!(last(&ignoring, 9), Some(FinishReason::Stop(Some(TokenId(9)))));
        let ignoring = SamplingParams { ignore_eos: true, ..SamplingParams::default() };
        assert_eq!(last(&ignoring, 9), None);
    }

    #[test]
    fn an_end_token_at_max_tokens_is_a_stop() {
        let mut sequence = generate(SamplingParams { max_tokens: 1, ..SamplingParams::default() });
        launch(&mut sequence);
        assert_eq!(sequence.append(TokenId(9)), Some(FinishReason::Stop(None)));
    }

    #[test]
    fn the_bans_hold_for_the_first_min_tokens_tokens() {
        let mut sequence = generate(SamplingParams { min_tokens: 2, ..SamplingParams::default() });
        for expected in [true, true, false] {
            assert_eq!(sequence.is_before_min_tokens(), expected);
            launch(&mut sequence);
        }
    }

    #[test]
    fn a_preempted_sequence_keeps_its_tokens_and_starts_over() {
        let mut sequence = generate(SamplingParams::default());
        sequence.block_table = vec![BlockId(6), BlockId(2)];
        launch(&mut sequence);
        assert_eq!(sequence.append(TokenId(1)), None);
        assert_eq!(sequence.preempt(), [BlockId(6), BlockId(2)]);
        assert!(sequence.block_table.is_empty());
        assert_eq!((sequence.num_computed_tokens, sequence.num_uncomputed_tokens()), (0, 4));
    }
}
