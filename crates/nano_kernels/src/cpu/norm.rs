//! Root-mean-square normalisation, applied while rows are packed.

use super::LANES;
use super::isa::mul_add;

/// How rows are normed: `row * weight / sqrt(mean(row²) + eps)`.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// `[hidden_size]`.
    pub weight: &'a [f32],
    /// What is added to the mean of squares.
    pub eps: f32,
}

impl Norm<'_> {
    /// What all elements of a row are multiplied by, beside their weights.
    #[inline(always)]
    pub(super) fn scale<const FMA: bool>(&self, row: &[f32]) -> f32 {
        let mut lanes = [0.0_f32; LANES];
        let (chunks, rest) = row.as_chunks::<LANES>();
        for chunk in chunks {
            for lane in 0..LANES {
                lanes[lane] = mul_add::<FMA>(chunk[lane], chunk[lane], lanes[lane]);
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane = mul_add::<FMA>(*x, *x, *lane);
        }
        let square: f32 = lanes.iter().sum();
        (square / row.len() as f32 + self.eps).sqrt().recip()
    }
}
