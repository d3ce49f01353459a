//! Products and the norms before them, which products of few rows share.

use nano_kernels::cuda::norm::RmsNorm;
use nano_kernels::cuda::product::{Epilogue, FusedProduct, Norm, Product, ProductKernel};

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
        epilogue: Epilogue,
    ) -> Result<CudaHidden> {
        let product = weight.product(input.num_rows, epilogue);
        if let Some(kernel) = self.product_kernel(&product) {
            return self.fused_product(kernel, product, out, input, norm, weight);
        }
        self.launch_waiting()?;
        let input = norm.map_or(Ok(input), |norm| self.norm(input, norm))?;
        // SAFETY: as in `norm`; weights were written long before any step.
        unsafe { self.gemm.product(&product, out, input.address, weight.buffer.address()) }?;
        Ok(CudaHidden { address: out, ..input })
    }

    /// The kernel of a product, or `None` where it is cuBLASLt's: where every row must be computed
    /// alike it always is.
    pub(super) fn product_kernel(&self, product: &Product) -> Option<ProductKernel> {
        if self.is_deterministic { None } else { self.kernels.product_kernel(product) }
    }

    /// A product by a kernel of ours. One that adds to the residual waits: it begins the norm that
    /// comes next, of which it is not told yet.
    pub(super) fn fused_product(
        &mut self,
        kernel: ProductKernel,
        product: Product,
        out: u64,
        input: CudaHidden,
        norm: Option<&CudaWeight>,
        weight: &CudaWeight,
    ) -> Result<CudaHidden> {
        let (from, norm) = match norm {
            None => (input.address, Norm::None),
            Some(norm) if kernel == ProductKernel::Row => {
                let (weight, eps) = (norm.buffer.address(), self.spec.rms_norm_eps);
                (input.address, Norm::Whole { weight, eps })
            }
            Some(norm) => self.shared_norm(input, norm)?,
        };
        self.launch_waiting()?;
        self.waiting =
            Some(FusedProduct { product, out, input: from, weight: weight.buffer.address(), norm });
        if product.epilogue != Epilogue::AddBf16 {
            self.launch_waiting()?;
        }
        Ok(CudaHidden { address: out, ..input })
    }

    /// The norm of several rows: begun by the product that waits, where its kernel can.
    fn shared_norm(&mut self, input: CudaHidden, norm: &CudaWeight) -> Result<(u64, Norm)> {
        let (scaled, squares) =
            (self.activations.normed.address(), self.activations.squares.address());
        if let Some(it) = &mut self.waiting
            && it.out == input.address
            && matches!(it.norm, Norm::None)
            && (it.product.num_rows, it.product.out_features) == (input.num_rows, norm.columns)
            && let Some(num_squares) = self.kernels.num_squares(&it.product)
        {
            let weight = norm.buffer.address();
            it.norm = Norm::Behind { weight, scaled, squares };
            let eps = self.spec.rms_norm_eps;
            return Ok((scaled, Norm::Begun { squares, num_squares, eps }));
        }
        Ok((self.norm(input, norm)?.address, Norm::None))
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
