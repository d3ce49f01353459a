//! Products of more rows by cuBLASLt, and gated ones beside it.

use nano_kernels::cuda::gemm::Trial;
use nano_kernels::cuda::product::{Epilogue, FusedProduct, Norm, Product};
use nano_kernels::cuda::{Gemm, Result};

use super::{Bench, HIDDEN, INTERMEDIATE, num_sets};

impl Bench {
    /// Of batches that decode.
    pub(super) fn cublaslt_products(
        &self,
        name: &str,
        out_features: usize,
        in_features: usize,
        epilogue: Epilogue,
    ) -> Result<()> {
        let weight_len = out_features * in_features;
        let sets = num_sets(weight_len * 2);
        let weights = self.values(weight_len, sets)?;
        let weight = |launch: usize| weights.address() + (launch % sets * weight_len * 2) as u64;
        let mut gemm = Gemm::new(self.device(), None, false)?;
        for num_rows in [48, 96, 128, 192] {
            let input = self.values(num_rows * in_features, 1)?;
            let out = self.device().allocate(num_rows * out_features * size_of::<f32>())?;
            out.fill(0)?;
            let (out, input) = (out.address(), input.address());
            let product = Product { num_rows, out_features, in_features, epilogue };
            let bytes = (weight_len + num_rows * (in_features + out_features)) * 2;
            let flops = 2.0 * (num_rows * weight_len) as f64;
            let weights = (0..sets).map(weight).collect();
            // SAFETY: every buffer was allocated above with the size of its shape.
            unsafe { gemm.tune(&[Trial { product, out, input, weights }]) }?;
            self.report(&format!("cuBLASLt {name}, {num_rows} rows"), bytes, flops, |i| {
                // SAFETY: every buffer was allocated above with the size of its shape.
                unsafe { gemm.product(&product, out, input, weight(i)) }
            })?;
        }
        Ok(())
    }

    /// With the gate and, of up to 192 rows, the norm in front, and beside it cuBLASLt's product and
    /// the gate behind it.
    pub(super) fn gated_products(&self, all_rows: &[usize]) -> Result<()> {
        let (out_features, in_features) = (2 * INTERMEDIATE, HIDDEN);
        let weight_len = out_features * in_features;
        let sets = num_sets(weight_len * 2);
        let weights = self.values(weight_len, sets)?;
        let weight = |launch: usize| weights.address() + (launch % sets * weight_len * 2) as u64;
        let (mut gemm, norms) = (Gemm::new(self.device(), None, false)?, self.norms()?);
        for &num_rows in all_rows {
            let input = self.values(num_rows * in_features, 1)?;
            let both = self.device().allocate(num_rows * out_features * 2)?;
            let out = self.device().allocate(num_rows * INTERMEDIATE * 2)?;
            let flops = 2.0 * (num_rows * weight_len) as f64;
            let bytes = (weight_len + num_rows * (in_features + INTERMEDIATE)) * 2;
            let (out, input, both) = (out.address(), input.address(), both.address());
            let product = Product { num_rows, out_features, in_features, epilogue: Epilogue::Bf16 };
            if self.device().is_hopper() {
                self.report(&format!("gated_product, {num_rows} rows"), bytes, flops, |i| {
                    let launch = FusedProduct {
                        product: Product { epilogue: Epilogue::Gated, ..product },
                        out,
                        input,
                        weight: weight(i),
                        norm: Norm::None,
                    };
                    // SAFETY: every buffer was allocated above with the size of its shape.
                    unsafe { self.kernels.fused_product(&self.with_norms(&norms, launch)) }
                })?;
            }
            let weights = (0..sets).map(weight).collect();
            // SAFETY: every buffer was allocated above with the size of its shape.
            unsafe { gemm.tune(&[Trial { product, out: both, input, weights }]) }?;
            let name = format!("cuBLASLt and silu_mul, {num_rows} rows");
            self.report(&name, bytes, flops, |i| {
                // SAFETY: every buffer was allocated above with the size of its shape.
                unsafe {
                    gemm.product(&product, both, input, weight(i))?;
                    self.kernels.silu_mul(out, both, num_rows, INTERMEDIATE)
                }
            })?;
        }
        Ok(())
    }
}
