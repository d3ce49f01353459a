//! How many prompt tokens fit beside decodes into a step of a given length.
//!
//! It never reads a clock: the engine measures, this one draws the conclusion.

use std::time::Duration;

/// Prompt tokens of the first step that also decodes, before anything was measured.
const FIRST: u32 = 128;
/// Fewer would make a prompt wait for ever on a target that decoding alone misses.
const LEAST: u32 = 16;

/// The budget of prompt tokens for steps that also decode, corrected by what steps took.
///
/// Were a step's time `t0 + p * s` for `p` prompt tokens, then `p * target / time` would lie between
/// `p` and the number whose step lasts just as long as the target. So the budget comes closer from
/// either side with every step and passes it by no more than rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    target: Duration,
    num_prompt_tokens: u32,
    max_num_batched_tokens: u32,
}

impl Pace {
    /// Aims at steps of `target`, with at most `max_num_batched_tokens` tokens.
    pub fn new(target: Duration, max_num_batched_tokens: u32) -> Self {
        let num_prompt_tokens = FIRST.min(max_num_batched_tokens);
        Self { target, num_prompt_tokens, max_num_batched_tokens }
    }

    /// Prompt tokens that the next step may take if it also decodes, at least one.
    pub fn num_prompt_tokens(&self) -> u32 {
        self.num_prompt_tokens
    }

    /// Learns that a step of decodes and `num_prompt_tokens` prompt tokens took `duration`.
    ///
    /// A prompt's short last chunk that was quick says nothing against a larger budget, and one
    /// step moves the budget by a factor of two at most, lest a hiccup of the machine stop prompts.
    pub fn observe(&mut self, num_prompt_tokens: u32, duration: Duration) {
        let (target, duration) = (self.target.as_nanos(), duration.as_nanos().max(1));
        let scaled = u128::from(num_prompt_tokens) * target;
        let now = u128::from(self.num_prompt_tokens);
        // Rounded up where it grows: a gain below one token would otherwise never come.
        let budget = if duration > target {
            (scaled / duration).clamp(now.div_ceil(2), now)
        } else {
            scaled.div_ceil(duration).clamp(now, 2 * now)
        };
        let least = LEAST.min(self.max_num_batched_tokens);
        let budget = u32::try_from(budget).unwrap_or(u32::MAX);
        self.num_prompt_tokens = budget.clamp(least, self.max_num_batched_tokens);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    /// A step of `decoding` microseconds and another one for each prompt token.
    fn step(pace: &mut Pace, decoding: u32) {
        let num_tokens = pace.num_prompt_tokens();
        pace.observe(num_tokens, (decoding + num_tokens) * US);
    }

    /// The budgets of 60 such steps.
    fn budgets(pace: &mut Pace, decoding: u32) -> Vec<u32> {
        let next = |_| {
            step(pace, decoding);
            pace.num_prompt_tokens()
        };
        (0..60).map(next).collect()
    }

    #[test]
    fn it_starts_at_128_within_the_limit_of_a_step() {
        assert_eq!(Pace::new(US, 129).num_prompt_tokens(), 128);
        assert_eq!(Pace::new(US, 127).num_prompt_tokens(), 127);
        assert_eq!(Pace::new(US, 1).num_prompt_tokens(), 1);
    }

    #[test]
    fn it_comes_to_the_step_that_lasts_as_long_as_the_target_from_either_side() {
        for (target, expected) in [(1000, 500), (540, 40)] {
            let mut pace = Pace::new(target * US, 8192);
            let budgets = budgets(&mut pace, 500);
            assert!(budgets.is_sorted() || budgets.is_sorted_by(|a, b| a >= b), "{budgets:?}");
            let last = budgets[59];
            assert!(last.abs_diff(expected) <= 8, "{last} instead of {expected}");
        }
    }

    #[test]
    fn a_step_of_exactly_the_target_changes_nothing() {
        let mut pace = Pace::new(1000 * US, 8192);
        pace.observe(128, 1000 * US);
        assert_eq!(pace.num_prompt_tokens(), 128);
    }

    #[test]
    fn a_gain_below_one_token_is_a_whole_one_and_a_loss_rounds_down() {
        let mut pace = Pace::new(1000 * US, 8192);
        pace.observe(128, 999 * US);
        assert_eq!(pace.num_prompt_tokens(), 129);
        pace.observe(129, 1001 * US);
        assert_eq!(pace.num_prompt_tokens(), 128);
    }

    #[test]
    fn a_target_below_decoding_alone_leaves_the_least_and_recovers_when_decoding_is_cheaper() {
        let mut pace = Pace::new(1000 * US, 8192);
        assert_eq!(budgets(&mut pace, 2000)[..4], [64, 32, 16, 16]);
        assert_eq!(budgets(&mut pace, 2000)[59], 16);
        let last = budgets(&mut pace, 200)[59];
        assert!(last.abs_diff(800) <= 8, "{last}");
    }

    #[test]
    fn the_least_and_the_most_are_within_the_limit_of_a_step() {
        let mut pace = Pace::new(1000 * US, 5);
        assert!(budgets(&mut pace, 2000).iter().all(|budget| *budget == 5));
        let mut pace = Pace::new(1000 * US, 300);
        assert_eq!(budgets(&mut pace, 1)[59], 300);
    }

    #[test]
    fn a_short_chunk_that_was_quick_changes_nothing() {
        let mut pace = Pace::new(1000 * US, 8192);
        pace.observe(3, 510 * US);
        pace.observe(3, 1000 * US);
        assert_eq!(pace.num_prompt_tokens(), 128);
    }

    #[test]
    fn one_step_moves_it_by_a_factor_of_two_at_most() {
        let mut pace = Pace::new(1000 * US, u32::MAX);
        pace.observe(3, 1_000_000 * US);
        assert_eq!(pace.num_prompt_tokens(), 64);
        pace.observe(64, Duration::ZERO);
        assert_eq!(pace.num_prompt_tokens(), 128);
        for _ in 0..60 {
            pace.observe(u32::MAX, Duration::ZERO);
        }
        assert_eq!(pace.num_prompt_tokens(), u32::MAX);
    }
}
