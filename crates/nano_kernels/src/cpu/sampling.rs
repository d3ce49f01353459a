//! The choice of the next token.

use super::LANES;
use super::isa::{Isa, Kernel};
use crate::reference::sampling::{Choice, Sampling, argmax, uniforms};

/// [`sample`](crate::reference::sampling::sample): the same token, its noise made in vectors. `kept`
/// is memory for the logits that thresholds keep.
pub fn sample(isa: Isa, logits: &[f32], sampling: &Sampling, kept: &mut Vec<f32>) -> Option<u32> {
    if sampling.temperature == 0.0 {
        return argmax(logits.iter().copied());
    }
    let mut choice = Choice::new(logits, sampling, kept)?;
    isa.run(Offer { logits, sampling, choice: &mut choice });
    choice.chosen
}

struct Offer<'a> {
    logits: &'a [f32],
    sampling: &'a Sampling,
    choice: &'a mut Choice,
}

impl Kernel for Offer<'_> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        // A chunk without a token that can win needs no noise, a part without one no scalar code.
        let Self { logits, sampling, choice } = self;
        for (chunk, logits) in logits.chunks(4 * LANES).enumerate() {
            if !logits.iter().fold(false, |any, &logit| any | choice.can_win(logit)) {
                continue;
            }
            let first = (chunk * LANES) as u32;
            let mut noise = [[0.0; 4]; LANES];
            for (lane, noise) in noise.iter_mut().enumerate() {
                *noise = uniforms(sampling, first + lane as u32);
            }
            let parts = logits.chunks(LANES).zip(noise.as_flattened().chunks(LANES));
            for (part, (logits, noise)) in parts.enumerate() {
                let both = || logits.iter().zip(noise);
                if both().fold(false, |any, (&it, &noise)| any | choice.can_win_with(it, noise)) {
                    let token = 4 * first + (part * LANES) as u32;
                    for (token, (&logit, &uniform)) in (token..).zip(both()) {
                        choice.offer(token, logit, uniform);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;

    #[test]
    fn the_token_is_that_of_the_reference() {
        let mut kept = Vec::new();
        for isa in Isa::available() {
            for seed in 0..300 {
                let len = 1 + seed as usize * 7 % 500;
                let logit = |token: usize| ((token * 7919 + seed as usize) % 101) as f32 / 9.0;
                let mut logits: Vec<f32> = (0..len).map(logit).collect();
                logits[len / 2] = f32::NAN;
                let sampling = Sampling {
                    temperature: [0.0, 0.3, 1.0, 5.0][seed as usize % 4],
                    top_k: [None, Some(3)][seed as usize % 2],
                    top_p: [1.0, 0.9, 1.0][seed as usize % 3],
                    min_p: 0.0,
                    seed,
                    position: 3,
                    index: 0,
                };
                let expected = reference::sampling::sample(&logits, &sampling);
                assert_eq!(sample(isa, &logits, &sampling, &mut kept), expected);
            }
        }
    }
}
