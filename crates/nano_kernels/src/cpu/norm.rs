//! Root-mean-square normalisation.

use super::LANES;
use super::isa::{Isa, Kernel, mul_add};

/// [`rms_norm`](crate::reference::norm::rms_norm) of one row: `row, weight, output: [hidden_size]`.
pub fn rms_norm(isa: Isa, row: &[f32], weight: &[f32], eps: f32, output: &mut [f32]) {
    isa.run(RmsNorm { row, weight, eps, output });
}

struct RmsNorm<'a> {
    row: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    output: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
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
        let scale = (square / self.row.len() as f32 + self.eps).sqrt().recip();
        for ((output, x), weight) in self.output.iter_mut().zip(self.row).zip(self.weight) {
            *output = x * scale * weight;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;

    #[test]
    fn a_row_is_that_of_the_reference() {
        for size in [1, 15, 16, 37, 1024] {
            let value = |index: usize| ((index * 37 + 11) % 101) as f32 / 17.0 - 3.0;
            let row: Vec<f32> = (0..size).map(value).collect();
            let weight: Vec<f32> = (0..size).map(|index| value(index + 5)).collect();
            let expected = reference::norm::rms_norm(&row, &weight, 1e-5);
            for isa in Isa::available() {
                let mut output = vec![0.0; size];
                rms_norm(isa, &row, &weight, 1e-5, &mut output);
                for (ours, expected) in output.iter().zip(&expected) {
                    assert!((ours - expected).abs() <= 1e-5 * expected.abs().max(1.0));
                }
            }
        }
    }
}
