//! Products of 2 to 32 rows, which share the norms between them.

use nano_kernels::cuda::row_product::Epilogue;
use nano_kernels::cuda::skinny::{NormBefore, NormBehind, SkinnyProduct};

use super::{CudaBackend, CudaHidden, CudaWeight};
use crate::error::Result;

impl CudaBackend {
    /// Whether products of these rows and this weight are `skinny_product`'s.
    pub(super) fn is_skinny(&self, num_rows: usize, weight: &CudaWeight) -> bool {
        !self.is_deterministic && self.kernels.has_skinny_product(num_rows, weight.columns)
    }

    /// A product with the norm before it. One that adds to the residual waits: it begins the norm
    /// that comes next, of which it is not told yet.
    pub(super) fn skinny_product(
        &mut self,
        out: u64,
        input: CudaHidden,
        norm: Option<&CudaWeight>,
        weight: &CudaWeight,
        epilogue: Epilogue,
    ) -> Result<CudaHidden> {
        let mut from = input.address;
        let mut norm_before = None;
        if let Some(norm) = norm {
            let (scaled, squares) =
                (self.activations.normed.address(), self.activations.squares.address());
            match &mut self.waiting {
                Some(it)
                    if it.out == input.address
                        && (it.num_rows, it.out_features) == (input.num_rows, weight.columns) =>
                {
                    let weight = norm.buffer.address();
                    it.norm_behind = Some(NormBehind { weight, scaled, squares });
                    norm_before = Some(NormBefore { squares, eps: self.spec.rms_norm_eps });
                    from = scaled;
                }
                _ => from = self.norm(input, norm)?.address,
            }
        }
        self.launch_waiting()?;
        self.waiting = Some(SkinnyProduct {
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

    /// Enqueues the product that waits: before whatever reads or writes the residual.
    pub(super) fn launch_waiting(&mut self) -> Result<()> {
        if let Some(product) = self.waiting.take() {
            // SAFETY: as in `norm`; weights were written long before any step.
            unsafe { self.kernels.skinny_product(&product) }?;
        }
        Ok(())
    }
}
