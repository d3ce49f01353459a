//! Root-mean-square normalisation, applied while rows are packed.

use super::LANES;
use super::isa::{Kernel, mul_add};

/// How rows are normed: `row * weight / sqrt(mean(row²) + eps)`.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// `[hidden_size]`.
    pub weight: &'a [f32],
    /// What is added to the mean of squares.
    pub eps: f32,
}

/// What all elements of a row are multiplied by, beside their weights.
pub(super) struct Scale<'a> {
    pub(super) row: &'a [f32],
    pub(super) eps: f32,
    pub(super) output: &'a mut f32,
}

impl Kernel for Scale<'_> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let mut lanes = [0.0_f32; LANES];
        let (chunks, rest) = self.row.as_chunks::<LANES>();
        for chunk in chunks {
            for lane in 0..LANES {
                lanes[lane] = mul_add::<FMA>(chunk[lane], chunk[lane], lanes[lane]);
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane = mul_add::<FMA>(*x, *x, *lane);
        }
        let square: f32 = lanes.iter().sum();
        *self.output = (square / self.row.len() as f32 + self.eps).sqrt().recip();
    }
}
