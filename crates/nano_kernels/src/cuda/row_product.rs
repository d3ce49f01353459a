//! The product of one row, with norm, residual and gate: `kernels/row_product.cu`.

use super::product::{Epilogue, FusedProduct, Norm, Product};
use super::{Arguments, Kernel, Kernels, Launch, Result, check};

const NUM_THREADS: u32 = 512;
/// Weight rows of a warp, and bytes that a lane copies of each at a time.
const ROWS: usize = 2;
const VECTOR_BYTES: usize = 16;
/// Shared memory of compute capability 9.0 and 10.x, which has room for the longer ring.
const MANY_STAGES_BYTES: usize = 200 << 10;

impl Kernels {
    /// Whether [`row_product`](Self::row_product) has this shape on this device, which keeps the
    /// input and its norm in shared memory.
    pub(super) fn has_row_product(&self, num_rows: usize, in_features: usize) -> bool {
        let num_bytes = self.ring_bytes() + in_features * 4;
        num_rows == 1
            && in_features.is_multiple_of(8)
            && num_bytes <= self.device().max_shared_bytes()
    }

    /// The pieces of weights on their way to a thread block, as the source counts them.
    fn ring_bytes(&self) -> usize {
        let has_room = self.device().max_shared_bytes() >= MANY_STAGES_BYTES;
        let num_stages = if has_room { 10 } else { 4 };
        num_stages * ROWS * VECTOR_BYTES * NUM_THREADS as usize
    }

    /// Enqueues a product of one row, `in_features` of which, a multiple of 8, fit shared memory.
    ///
    /// # Safety
    /// As of [`fused_product`](Self::fused_product).
    pub unsafe fn row_product(&self, launch: &FusedProduct) -> Result<()> {
        let FusedProduct { product, out, input, weight, norm } = *launch;
        let Product { num_rows, out_features, in_features, epilogue } = product;
        check(num_rows == 1, "num_rows", "1 for row_product", num_rows)?;
        let ok = self.has_row_product(1, in_features);
        check(ok, "in_features", "a multiple of 8 that fits shared memory", in_features)?;
        let is_even = epilogue != Epilogue::Gated || out_features.is_multiple_of(2);
        check(is_even, "out_features", "even where half of them is a gate", out_features)?;
        let (norm, eps) = match norm {
            Norm::None => (0, 0.0),
            Norm::Whole { weight, eps } => (weight, eps),
            _ => return check(false, "norm", "whole and before with one row", 1),
        };
        let function = self.function(Kernel::RowProduct);
        let shared_bytes = self.ring_bytes() + in_features * if norm != 0 { 4 } else { 2 };
        let resident = function.occupancy_max_active_blocks_per_multiprocessor(
            NUM_THREADS,
            shared_bytes,
            None,
        )?;
        let num_blocks = resident.max(1) as usize * self.device().num_multiprocessors();
        let (rows, columns, epilogue) = (out_features as i32, in_features as i32, epilogue as i32);
        let grid = [num_blocks, 1];
        let launch = Launch { shared_bytes, ..Launch::new(Kernel::RowProduct, grid, NUM_THREADS) };
        let arguments: &Arguments<'_> =
            &[&out, &input, &norm, &weight, &rows, &columns, &epilogue, &eps];
        // SAFETY: the input fits the shared memory, as checked, and the kernel walks any number of
        // output features; the memory is the caller's word.
        unsafe { self.launch(&launch, arguments) }
    }
}
