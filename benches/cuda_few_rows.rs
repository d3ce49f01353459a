//! Products of one row and of few, with the norms around them as in a step.

use nano_kernels::cuda::Result;
use nano_kernels::cuda::row_product::{Epilogue, RowProduct};
use nano_kernels::cuda::skinny::{NormBefore, NormBehind, SQUARES_BYTES, SkinnyProduct};

use super::{Bench, num_sets};

const EPS: f32 = 1e-5;

impl Bench {
    /// One row with the norm before it; several with their part of the norm before them or, of
    /// `output` and `down`, which add to the residual, of the one behind.
    pub(crate) fn few_rows(
        &self,
        name: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<()> {
        let weight_len = out_features * in_features;
        let sets = num_sets(weight_len * 2);
        let weights = self.values(weight_len, sets)?;
        let (input, norm) =
            (self.values(32 * in_features, 1)?, self.values(in_features.max(out_features), 1)?);
        let (out, scaled) =
            (self.values(32 * out_features, 1)?, self.device().allocate(32 * out_features * 2)?);
        let squares = self.device().allocate(SQUARES_BYTES)?;
        squares.fill(0x3c)?; // small positive numbers
        let weight = |launch: usize| weights.address() + (launch % sets * weight_len * 2) as u64;
        let adds = matches!(name, "output" | "down");
        for num_rows in [1, 4, 16, 32] {
            let kernel = if num_rows == 1 { "row_product" } else { "skinny_product" };
            if num_rows > 1 && !self.kernels.has_skinny_product(num_rows, in_features) {
                continue;
            }
            let bytes = (weight_len + num_rows * (in_features + out_features)) * 2;
            let flops = 2.0 * (num_rows * weight_len) as f64;
            self.report(&format!("{kernel} {name}, {num_rows} rows"), bytes, flops, |i| {
                let (out, input, weight) = (out.address(), input.address(), weight(i));
                let row = RowProduct {
                    out,
                    input,
                    norm: Some(norm.address()),
                    weight,
                    out_features,
                    in_features,
                    epilogue: Epilogue::Bf16,
                    eps: EPS,
                };
                let before = NormBefore { squares: squares.address(), eps: EPS };
                let behind = NormBehind {
                    weight: norm.address(),
                    scaled: scaled.address(),
                    squares: squares.address(),
                };
                let rows = SkinnyProduct {
                    out,
                    input,
                    weight,
                    num_rows,
                    out_features,
                    in_features,
                    epilogue: if adds { Epilogue::AddBf16 } else { Epilogue::Bf16 },
                    norm_before: (!adds).then_some(before),
                    norm_behind: adds.then_some(behind),
                };
                // SAFETY: every buffer was allocated above with the size of its shape.
                unsafe {
                    if num_rows == 1 {
                        self.kernels.row_product(&row)
                    } else {
                        self.kernels.skinny_product(&rows)
                    }
                }
            })?;
        }
        Ok(())
    }
}
