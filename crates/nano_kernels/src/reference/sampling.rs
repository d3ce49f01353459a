//! The choice of the next token, defined once for every device.
//!
//! 1. Thresholds: `top_k` keeps the k largest logits (all that equal the k-th); `top_p` keeps,
//!    of these, the smallest set whose probability at the temperature reaches p (all that equal
//!    its last); `min_p` keeps, of these, what reaches that share of the largest probability.
//! 2. The choice is the argmax of `(logit - largest) / temperature + gumbel` over what is kept, which
//!    samples from its softmax. The lowest token id wins a tie.
//!
//! The noise is a function of seed, position and token id, so neither the batch nor the order of
//! evaluation plays a part, and no logits need to be sorted. Temperature 0 is the argmax.

use std::cmp::Ordering;

use crate::reference::philox::philox_4x32_10;

/// How one token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 for the argmax.
    pub temperature: f32,
    /// The number of tokens kept; `None` keeps all.
    pub top_k: Option<u32>,
    /// The probability kept; 1 keeps all.
    pub top_p: f32,
    /// The least share of the largest probability; 0 keeps all.
    pub min_p: f32,
    /// The key of the noise.
    pub seed: u64,
    /// The index in its sequence that the token will have.
    pub position: u32,
    /// Which of a request's `n` sequences this is.
    pub index: u32,
}

/// The token chosen from `logits: [vocab_size]`, `None` if none of them is a finite number.
///
/// A logit that is NaN or negative infinity is never chosen.
pub fn sample(logits: &[f32], sampling: &Sampling) -> Option<u32> {
    if sampling.temperature == 0.0 {
        return argmax(logits.iter().copied());
    }
    let mut choice = Choice::new(logits, sampling, &mut Vec::new())?;
    for (four, logits) in logits.chunks(4).enumerate() {
        let noise = uniforms(sampling, four as u32);
        for (token, (&logit, uniform)) in (4 * four..).zip(logits.iter().zip(noise)) {
            choice.offer(token as u32, logit, uniform);
        }
    }
    choice.chosen
}

/// The best token among those offered, in the order of their ids.
#[derive(Debug)]
pub(crate) struct Choice {
    temperature: f32,
    least: f32,
    largest: f32,
    best: f32,
    /// A sum that some token has, and the noise below which none has it.
    bound: f32,
    least_uniform: f32,
    pub(crate) chosen: Option<u32>,
}

impl Choice {
    /// `None` if no logit can be chosen; `kept` is memory for [`threshold`].
    pub(crate) fn new(logits: &[f32], sampling: &Sampling, kept: &mut Vec<f32>) -> Option<Self> {
        let first = argmax(logits.iter().copied())?;
        let mut choice = Self {
            temperature: sampling.temperature,
            least: threshold(logits, sampling, kept),
            largest: logits[first as usize],
            best: f32::NEG_INFINITY,
            bound: f32::NEG_INFINITY,
            least_uniform: 0.0,
            chosen: None,
        };
        choice.raise(gumbel(sampling, first));
        Some(choice)
    }

    /// Whether a token is kept and could win with the most noise there is: if not, as with most
    /// tokens of a model that is sure, nobody has to know its noise.
    #[inline(always)]
    pub(crate) fn can_win(&self, logit: f32) -> bool {
        (logit >= self.least) & (self.scaled(logit) + MAX_GUMBEL >= self.bound)
    }

    /// The same of a token whose noise is known; most need no logarithm.
    #[inline(always)]
    pub(crate) fn can_win_with(&self, logit: f32, uniform: f32) -> bool {
        self.can_win(logit) && uniform >= self.least_uniform
    }

    /// `uniform` is the token's noise.
    #[inline(always)]
    pub(crate) fn offer(&mut self, token: u32, logit: f32, uniform: f32) {
        if !self.can_win_with(logit, uniform) {
            return;
        }
        let sum = self.scaled(logit) + gumbel_of(uniform);
        if sum > self.best {
            self.best = sum;
            self.chosen = Some(token);
            self.raise(sum);
        }
    }

    /// Relative to the largest: no temperature, however small, makes the best token overflow.
    #[inline(always)]
    fn scaled(&self, logit: f32) -> f32 {
        (logit - self.largest) / self.temperature
    }

    fn raise(&mut self, sum: f32) {
        self.bound = self.bound.max(sum);
        // No logit is above the largest.
        self.least_uniform = uniform_of_gumbel(self.bound) - UNIFORM_ERROR;
    }
}

/// No noise exceeds this: -ln(-ln(1 - 2⁻²⁴)) and a little.
const MAX_GUMBEL: f32 = 16.7;
/// Far above what rounding does to `uniform -> gumbel -> uniform`.
const UNIFORM_ERROR: f32 = 4e-6;

/// The first index of the largest finite value.
pub fn argmax(values: impl Iterator<Item = f32>) -> Option<u32> {
    let mut best = None;
    let mut largest = f32::NEG_INFINITY;
    for (index, value) in values.enumerate() {
        if value > largest {
            largest = value;
            best = Some(index as u32);
        }
    }
    best.filter(|_| largest.is_finite())
}

/// The Gumbel noise of a token: `-ln(-ln(u))` in float32, where u lies strictly between 0 and 1
/// and takes 2²³ values, so that neither logarithm overflows on any device.
pub fn gumbel(sampling: &Sampling, token: u32) -> f32 {
    gumbel_of(uniforms(sampling, token / 4)[token as usize % 4])
}

/// Of the tokens `4 * four` to `4 * four + 3`, whose noise are the words of one Philox:
/// `(word >> 9 + 0.5) / 2²³`, exact in float32.
#[inline(always)]
pub(crate) fn uniforms(sampling: &Sampling, four: u32) -> [f32; 4] {
    let key = [sampling.seed as u32, (sampling.seed >> 32) as u32];
    let words = philox_4x32_10([sampling.index, sampling.position, four, 0], key);
    words.map(|word| ((word >> 9) as f32 + 0.5) / (1 << 23) as f32)
}

fn gumbel_of(uniform: f32) -> f32 {
    -(-uniform.ln()).ln()
}

fn uniform_of_gumbel(gumbel: f32) -> f32 {
    (-(-gumbel).exp()).exp()
}

/// The smallest logit that `top_k`, `top_p` and `min_p` keep; `kept` is written over.
pub fn threshold(logits: &[f32], sampling: &Sampling, kept: &mut Vec<f32>) -> f32 {
    let mut least = f32::MIN;
    let top_k = sampling.top_k.filter(|&k| (k as usize) < logits.len());
    if top_k.is_none() && sampling.top_p >= 1.0 && sampling.min_p <= 0.0 {
        return least;
    }
    kept.clear();
    kept.extend(logits.iter().copied().filter(|logit| *logit >= least));
    if let Some(k) = top_k.map(|k| k as usize).filter(|&k| k < kept.len()) {
        let (_, &mut kth, _) = kept.select_nth_unstable_by(k - 1, descending);
        least = kth;
        kept.retain(|logit| *logit >= least);
    }
    let largest = kept.iter().copied().fold(f32::MIN, f32::max);
    if sampling.top_p < 1.0 {
        least = least_of_nucleus(kept, largest, sampling);
    }
    if sampling.min_p > 0.0 {
        least = least.max(largest + sampling.min_p.ln() * sampling.temperature);
    }
    least
}

/// The smallest logit of the smallest set whose probability reaches `top_p`: a binary search by
/// selection, linear in the number of logits.
fn least_of_nucleus(kept: &mut Vec<f32>, largest: f32, sampling: &Sampling) -> f32 {
    let inverse = f64::from(sampling.temperature).recip();
    let exponent = |logit: f32| f64::from(logit - largest) * inverse;
    let mass = |logits: &[f32]| -> f64 { logits.iter().map(|&logit| exponent(logit).exp()).sum() };
    let total = mass(kept);
    let mut wanted = total * f64::from(sampling.top_p);
    // Tokens that would not reach 1 - p if all were as likely as they: most, and never kept.
    let unlikely = ((total - wanted) / kept.len() as f64).ln();
    kept.retain(|&logit| exponent(logit) >= unlikely);
    let mut candidates = kept.as_mut_slice();
    while candidates.len() > 1 {
        let middle = candidates.len() / 2;
        candidates.select_nth_unstable_by(middle, descending);
        let (larger, smaller) = candidates.split_at_mut(middle);
        let mass = mass(larger);
        if mass >= wanted {
            candidates = larger;
        } else {
            wanted -= mass;
            candidates = smaller;
        }
    }
    candidates.first().copied().unwrap_or(f32::MIN)
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "what sorting calls")]
fn descending(a: &f32, b: &f32) -> Ordering {
    b.total_cmp(a)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLAIN: Sampling = Sampling {
        temperature: 1.0,
        top_k: None,
        top_p: 1.0,
        min_p: 0.0,
        seed: 1,
        position: 0,
        index: 0,
    };

    #[test]
    fn greedy_takes_the_lowest_id_of_the_largest_and_no_nan() {
        let greedy = Sampling { temperature: 0.0, ..PLAIN };
        assert_eq!(sample(&[f32::NAN, 2.0, 3.0, 3.0, f32::NEG_INFINITY], &greedy), Some(2));
        assert_eq!(sample(&[f32::NAN, f32::NEG_INFINITY], &greedy), None);
        assert_eq!(sample(&[], &greedy), None);
        assert_eq!(sample(&[f32::NAN, f32::NEG_INFINITY], &PLAIN), None);
    }

    #[test]
    fn an_infinite_logit_is_no_choice() {
        assert_eq!(sample(&[f32::INFINITY, 1.0], &Sampling { temperature: 0.0, ..PLAIN }), None);
    }

    #[test]
    fn a_tiny_temperature_is_greedy() {
        let cold = Sampling { temperature: 1e-44, ..PLAIN };
        assert_eq!(sample(&[1.0, 30.0, 29.9], &cold), Some(1));
    }

    #[test]
    fn a_banned_token_is_never_chosen() {
        for position in 0..1000 {
            let chosen = sample(&[5.0, f32::NEG_INFINITY, 5.0], &Sampling { position, ..PLAIN });
            assert_ne!(chosen, Some(1));
        }
    }

    #[test]
    fn the_noise_depends_on_seed_position_index_and_token() {
        let noise = gumbel(&PLAIN, 3);
        assert_eq!(noise.to_bits(), gumbel(&PLAIN, 3).to_bits());
        let others = [
            gumbel(&PLAIN, 4),
            gumbel(&Sampling { seed: 2, ..PLAIN }, 3),
            gumbel(&Sampling { seed: 1 | 1 << 32, ..PLAIN }, 3),
            gumbel(&Sampling { position: 1, ..PLAIN }, 3),
            gumbel(&Sampling { index: 1, ..PLAIN }, 3),
        ];
        assert!(others.iter().all(|other| other.to_bits() != noise.to_bits()));
    }

    /// Skipping tokens that cannot win changes no choice.
    #[test]
    fn the_choice_is_the_argmax_of_logit_over_temperature_plus_noise() {
        for position in 0..2000 {
            let spread = [0.01, 1.0, 5.0, 30.0][position as usize % 4];
            let logit =
                |token: u32| (token.wrapping_mul(2_654_435_761) >> 8) as f32 * 6e-8 * spread;
            let logits: Vec<f32> = (0..200).map(|token| logit(token + 200 * position)).collect();
            let temperature = [0.3, 1.0, 4.0][position as usize % 3];
            let sampling = Sampling { temperature, position, ..PLAIN };
            let largest = logits.iter().copied().fold(f32::MIN, f32::max);
            let sums = logits
                .iter()
                .zip(0..)
                .map(|(logit, token)| (logit - largest) / temperature + gumbel(&sampling, token));
            assert_eq!(sample(&logits, &sampling), argmax(sums));
        }
    }

    #[test]
    fn the_bound_on_noise_leaves_room_for_rounding() {
        const LAST: u32 = (1 << 23) - 1;
        for word in (0..=LAST).step_by(64).chain(LAST - 1000..=LAST) {
            let uniform = (word as f32 + 0.5) / (1 << 23) as f32;
            let noise = gumbel_of(uniform);
            let back = uniform_of_gumbel(noise);
            assert!((back - uniform).abs() < UNIFORM_ERROR / 4.0, "{uniform} {back}");
            assert!(noise < MAX_GUMBEL - 0.05, "{uniform} {noise}");
        }
    }

    /// Chi-square over 20,000 draws, 5 kinds: 13.3 is the 1 % point of 4 degrees of freedom.
    #[test]
    fn tokens_come_as_often_as_their_softmax_says() {
        let logits = [0.0_f32, 1.0, -1.0, 0.5, 2.0];
        for temperature in [0.5, 1.0, 2.0] {
            let weights = logits.map(|logit| (logit / temperature).exp());
            let total: f32 = weights.iter().sum();
            let mut counts = [0_u32; 5];
            let num_draws = 20_000;
            for position in 0..num_draws {
                let sampling = Sampling { temperature, position, ..PLAIN };
                counts[sample(&logits, &sampling).unwrap() as usize] += 1;
            }
            let chi_square: f32 = counts
                .iter()
                .zip(weights)
                .map(|(&count, weight)| {
                    let expected = num_draws as f32 * weight / total;
                    (count as f32 - expected).powi(2) / expected
                })
                .sum();
            assert!(chi_square < 13.3, "{counts:?} at {temperature}: chi-square {chi_square}");
        }
    }

    /// The definition by sorting. Returns the kept logits, descending.
    fn kept_by_sorting(logits: &[f32], sampling: &Sampling) -> Vec<f32> {
        let mut sorted = logits.to_vec();
        sorted.sort_by(descending);
        if let Some(k) = sampling.top_k {
            let kth = sorted[(k as usize).min(sorted.len()) - 1];
            sorted.retain(|logit| *logit >= kth);
        }
        let weight = |logit: f32| f64::from((logit - sorted[0]) / sampling.temperature).exp();
        let total: f64 = sorted.iter().map(|&logit| weight(logit)).sum();
        if sampling.top_p < 1.0 {
            let mut sum = 0.0;
            let last = sorted.iter().find(|&&logit| {
                sum += weight(logit);
                sum >= total * f64::from(sampling.top_p)
            });
            let last = *last.unwrap();
            let largest = sorted[0];
            sorted.retain(|logit| *logit >= last);
            assert_eq!(sorted[0].to_bits(), largest.to_bits());
        }
        let largest = sorted[0];
        let least = f64::from(sampling.min_p);
        sorted.retain(|&logit| f64::from((logit - largest) / sampling.temperature).exp() >= least);
        sorted
    }

    proptest! {
        #![proptest_config(ProptestConfig { rng_seed: proptest::test_runner::RngSeed::Fixed(7), ..ProptestConfig::with_cases(2000) })]
        /// Logits are small multiples of 1/4, so ties abound, and the bounds are not on them.
        #[test]
        fn thresholds_keep_what_sorting_keeps(
            quarters in proptest::collection::vec(-12_i32..12, 1..40),
            top_k in proptest::option::of(1_u32..45),
            top_p in prop_oneof![Just(1.0_f32), 0.013_f32..0.987],
            min_p in prop_oneof![Just(0.0_f32), 0.011_f32..0.93],
            temperature in 0.31_f32..3.0,
        ) {
            let logits: Vec<f32> = quarters.iter().map(|&quarter| quarter as f32 / 4.0).collect();
            let sampling = Sampling { temperature, top_k, top_p, min_p, ..PLAIN };
            let least = threshold(&logits, &sampling, &mut Vec::new());
            let mut kept: Vec<f32> = logits.iter().copied().filter(|&l| l >= least).collect();
            kept.sort_by(descending);
            prop_assert_eq!(kept, kept_by_sorting(&logits, &sampling));
        }
    }
}
