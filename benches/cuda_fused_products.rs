//! Products by kernels of our own, with the norms around them as in a step.

use nano_kernels::cuda::product::{
    Epilogue, FusedProduct, Norm, Product, ProductKernel, SQUARES_BYTES,
};
use nano_kernels::cuda::{DeviceBuffer, Result};

use super::{Bench, HIDDEN, num_sets};

const EPS: f32 = 1e-5;
const MAX_ROWS: usize = 192;

/// What norms read and write.
pub(crate) struct Norms {
    weight: DeviceBuffer,
    scaled: DeviceBuffer,
    squares: DeviceBuffer,
}

impl Bench {
    pub(crate) fn norms(&self) -> Result<Norms> {
        let squares = self.device().allocate(SQUARES_BYTES)?;
        squares.fill(0x3c)?; // small positive numbers
        let scaled = self.device().allocate(MAX_ROWS * HIDDEN * 2)?;
        Ok(Norms { weight: self.values(HIDDEN, 1)?, scaled, squares })
    }

    /// One row with the norm before it; several with their part of the norm before them or, of
    /// products that add to the residual, of the one behind.
    pub(crate) fn with_norms(&self, norms: &Norms, launch: FusedProduct) -> FusedProduct {
        let (weight, squares) = (norms.weight.address(), norms.squares.address());
        let Product { num_rows, in_features, epilogue, .. } = launch.product;
        if epilogue == Epilogue::AddBf16 && num_rows > 1 {
            let norm = Norm::Behind { weight, scaled: norms.scaled.address(), squares };
            return FusedProduct { norm, ..launch };
        }
        let in_front = Product {
            num_rows,
            out_features: in_features,
            in_features: HIDDEN,
            epilogue: Epilogue::AddBf16,
        };
        let norm = match self.kernels.num_squares(&in_front) {
            _ if epilogue == Epilogue::AddBf16 => Norm::None,
            _ if num_rows == 1 => Norm::Whole { weight, eps: EPS },
            Some(num_squares) => Norm::Begun { squares, num_squares, eps: EPS },
            None => Norm::None,
        };
        FusedProduct { norm, ..launch }
    }

    pub(crate) fn fused_products(
        &self,
        name: &str,
        out_features: usize,
        in_features: usize,
        epilogue: Epilogue,
    ) -> Result<()> {
        let weight_len = out_features * in_features;
        let sets = num_sets(weight_len * 2);
        let weights = self.values(weight_len, sets)?;
        let (input, norms) = (self.values(MAX_ROWS * in_features, 1)?, self.norms()?);
        let out = self.device().allocate(MAX_ROWS * out_features * size_of::<f32>())?;
        out.fill(0)?;
        let weight = |launch: usize| weights.address() + (launch % sets * weight_len * 2) as u64;
        for num_rows in [1, 4, 16, 32, 48, 64, 96, 128, 192] {
            let product = Product { num_rows, out_features, in_features, epilogue };
            let kernel = match self.kernels.product_kernel(&product) {
                Some(ProductKernel::Row) => "row_product",
                Some(ProductKernel::Skinny) => "skinny_product",
                Some(ProductKernel::Batch) => "batch_product",
                // `gated_products` times it beside cuBLASLt.
                Some(ProductKernel::Gated) | None => continue,
            };
            let bytes = (weight_len + num_rows * (in_features + out_features)) * 2;
            let flops = 2.0 * (num_rows * weight_len) as f64;
            self.report(&format!("{kernel} {name}, {num_rows} rows"), bytes, flops, |i| {
                let launch = FusedProduct {
                    out: out.address(),
                    input: input.address(),
                    weight: weight(i),
                    product,
                    norm: Norm::None,
                };
                // SAFETY: every buffer was allocated above with the size of its shape.
                unsafe { self.kernels.fused_product(&self.with_norms(&norms, launch)) }
            })?;
        }
        Ok(())
    }
}
