//! The product of one row, with norm, residual and gate: `kernels/row_product.cu`.

use cudarc::driver::LaunchConfig;

use super::kernels::shape;
use super::spec::Kernel;
use super::{Kernels, Result, check};

const NUM_THREADS: u32 = 512;
/// Weight rows of a warp, and bytes that a lane copies of each at a time.
const ROWS: usize = 2;
const VECTOR_BYTES: usize = 16;
/// Shared memory of compute capability 9.0 and 10.x, which has room for the longer ring.
const MANY_STAGES_BYTES: usize = 200 << 10;

/// What becomes of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// Written in bf16.
    Bf16,
    /// Added to what is there in bf16, rounded once.
    AddBf16,
    /// Written in f32.
    F32,
    /// `silu(first half) * second half` of the features, written in bf16.
    Gated,
}

/// One launch; addresses on the device.
#[derive(Clone, Copy, Debug)]
pub struct RowProduct {
    /// `[out_features]`, written; half as wide if gated.
    pub out: u64,
    /// `[in_features]` bf16.
    pub input: u64,
    /// `[in_features]` bf16: the input is normalised first.
    pub norm: Option<u64>,
    /// `[out_features, in_features]` bf16.
    pub weight: u64,
    /// Rows of the weight; even if gated.
    pub out_features: usize,
    /// A multiple of 8.
    pub in_features: usize,
    /// What becomes of it.
    pub epilogue: Epilogue,
    /// Added to the mean square by the norm.
    pub eps: f32,
}

impl Kernels {
    /// Whether [`row_product`](Self::row_product) has this shape on this device, which keeps the
    /// input and its norm in shared memory.
    pub fn has_row_product(&self, num_rows: usize, in_features: usize) -> bool {
        let num_bytes = self.ring_bytes() + in_features * 4;
        num_rows == 1
            && in_features.is_multiple_of(8)
            && num_bytes <= self.device().max_shared_bytes() as usize
    }

    /// The pieces of weights on their way to a thread block, as the source counts them.
    fn ring_bytes(&self) -> usize {
        let has_room = self.device().max_shared_bytes() as usize >= MANY_STAGES_BYTES;
        let num_stages = if has_room { 10 } else { 4 };
        num_stages * ROWS * VECTOR_BYTES * NUM_THREADS as usize
    }

    /// Enqueues a product.
    ///
    /// # Safety
    /// Every address names as much memory as its shape says, 16-byte aligned, alive until the
    /// stream has come to the launch; the output overlaps nothing else, and nothing that is still
    /// in the stream writes the weight.
    pub unsafe fn row_product(&self, launch: &RowProduct) -> Result<()> {
        let RowProduct { out, input, norm, weight, out_features, in_features, .. } = *launch;
        let ok = self.has_row_product(1, in_features);
        check(ok, "in_features", "a multiple of 8 that fits shared memory", in_features)?;
        let is_even = launch.epilogue != Epilogue::Gated || out_features.is_multiple_of(2);
        check(is_even, "out_features", "even where half of them is a gate", out_features)?;
        if out_features == 0 {
            return Ok(());
        }
        let function = self.function(Kernel::RowProduct);
        let shared_mem_bytes =
            (self.ring_bytes() + in_features * if norm.is_some() { 4 } else { 2 }) as u32;
        let resident = function.occupancy_max_active_blocks_per_multiprocessor(
            NUM_THREADS,
            shared_mem_bytes as usize,
            None,
        )?;
        let num_blocks = resident.max(1) * self.device().num_multiprocessors();
        let norm = norm.unwrap_or(0);
        let (rows, columns) = (out_features as i32, in_features as i32);
        let (epilogue, eps) = (launch.epilogue as i32, launch.eps);
        let mut launch = self.launch(Kernel::RowProduct);
        launch.arg(&out).arg(&input).arg(&norm).arg(&weight).arg(&rows);
        launch.arg(&columns).arg(&epilogue).arg(&eps);
        let config = LaunchConfig { shared_mem_bytes, ..shape((num_blocks, 1, 1), NUM_THREADS) };
        // SAFETY: the input fits the shared memory, as checked, and the kernel walks any number of
        // output features; the memory is the caller's word.
        unsafe { launch.launch(config) }
    }
}
