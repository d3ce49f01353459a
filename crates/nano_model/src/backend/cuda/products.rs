//! Products and the norms before them, which products of few rows share.

use nano_kernels::cuda::gemm::{Output, Product};
use nano_kernels::cuda::norm::RmsNorm;
use nano_kernels::cuda::product::{Epilogue, FusedProduct, NormBefore, NormBehind, ProductKernel};

use super::{CudaBackend, CudaHidden, CudaWeight};
use crate::error::Result;

impl CudaBackend {
    /// A product with the norm before it.
    pub(super) fn product(
        &mut self,
        out: u64,
        input: CudaHidden,
        norm: Option<&CudaWeight>,
        weight: &CudaWeight,
        output: Output,
    ) -> Result<CudaHidden> {
        if let Some(kernel) = self.product_kernel(input.num_rows, weight, output.into()) {
            return self.fused_product(kernel, out, input, norm, weight, output.into());
        }
        self.launch_waiting()?;
        let input = norm.map_or(Ok(input), |norm| self.norm(input, norm))?;
        let product = Product {
            num_rows: input.num_rows,
            out_features: weight.rows,
            in_features: weight.columns,
            output,
        };
        // SAFETY: as in `norm`; weights were written long before any step.
        unsafe { self.gemm.product(&product, out, input.address, weight.buffer.address()) }?;
        Ok(CudaHidden { address: out, ..input })
    }

    /// The kernel of a product, or `None` where it is cuBLASLt's: where every row must be computed
    /// alike it always is.
    pub(super) fn product_kernel(
        &self,
        num_rows: usize,
        weight: &CudaWeight,
        epilogue: Epilogue,
    ) -> Option<ProductKernel> {
        if self.is_deterministic {
            return None;
        }
        self.kernels.product_kernel(num_rows, weight.rows, weight.columns, epilogue)
    }

    /// A product by a kernel of ours. One that adds to the residual waits: it begins the norm that
    /// comes next, of which it is not told yet.
    pub(super) fn fused_product(
        &mut self,
        kernel: ProductKernel,
        out: u64,
        input: CudaHidden,
        norm: Option<&CudaWeight>,
        weight: &CudaWeight,
        epilogue: Epilogue,
    ) -> Result<CudaHidden> {
        let (from, norm_before) = match norm {
            None => (input.address, NormBefore::None),
            Some(norm) if kernel == ProductKernel::Row => {
                let (weight, eps) = (norm.buffer.address(), self.spec.rms_norm_eps);
                (input.address, NormBefore::Whole { weight, eps })
            }
            Some(norm) => self.shared_norm(input, norm)?,
        };
        self.launch_waiting()?;
        self.waiting = Some(FusedProduct {
            out,
            input: from,
            weight: weight.buffer.address(),
            num_rows: input.num_rows,
            out_features: weight.rows,
            in_features: weight.columns,
            epilogue,
            norm_before,
            norm_behind: None,
        });
        if epilogue != Epilogue::AddBf16 {
            self.launch_waiting()?;
        }
        Ok(CudaHidden { address: out, ..input })
    }

    /// The norm of several rows: begun by the product that waits, where its kernel can.
    fn shared_norm(&mut self, input: CudaHidden, norm: &CudaWeight) -> Result<(u64, NormBefore)> {
        let (scaled, squares) =
            (self.activations.normed.address(), self.activations.squares.address());
        if let Some(it) = &mut self.waiting
            && it.out == input.address
            && (it.num_rows, it.out_features) == (input.num_rows, norm.columns)
            && let Some(num_squares) = self.kernels.num_squares(it)
        {
            let weight = norm.buffer.address();
            it.norm_behind = Some(NormBehind { weight, scaled, squares });
            let eps = self.spec.rms_norm_eps;
            return Ok((scaled, NormBefore::Begun { squares, num_squares, eps }));
        }
        Ok((self.norm(input, norm)?.address, NormBefore::None))
    }

    /// A norm by its own kernel.
    fn norm(&mut self, hidden: CudaHidden, norm: &CudaWeight) -> Result<CudaHidden> {
        self.launch_waiting()?;
        let out = self.activations.normed.address();
        let launch = RmsNorm {
            out,
            input: hidden.address,
            weight: norm.buffer.address(),
            num_tokens: hidden.num_rows,
            hidden_size: self.spec.hidden_size,
            eps: self.spec.rms_norm_eps,
        };
        // SAFETY: activations have rows for the largest step and live as long as this value; the
        // weight outlives the step by the executor's order of drops.
        unsafe { self.kernels.rms_norm(&launch) }?;
        Ok(CudaHidden { address: out, ..hidden })
    }

    /// Enqueues the product that waits: before whatever reads or writes the residual.
    pub(super) fn launch_waiting(&mut self) -> Result<()> {
        if let Some(product) = self.waiting.take() {
            // SAFETY: as in `norm`; weights were written long before any step.
            unsafe { self.kernels.fused_product(&product) }?;
        }
        Ok(())
    }
}
