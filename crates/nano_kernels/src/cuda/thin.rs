//! Products of a few rows, with norm, residual and gate: `kernels/thin_product.cu`.

use cudarc::driver::{LaunchConfig, PushKernelArg};

use super::kernels::shape;
use super::spec::Kernel;
use super::{Kernels, Result, check};

/// Rows that a launch takes at most.
pub const MAX_TOKENS: usize = 4;
const NUM_THREADS: u32 = 256;

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
pub struct ThinProduct {
    /// `[num_tokens, out_features]`, written; half as wide if gated.
    pub out: u64,
    /// `[num_tokens, in_features]` bf16.
    pub input: u64,
    /// `[in_features]` bf16: the input is normalised first.
    pub norm: Option<u64>,
    /// `[out_features, in_features]` bf16.
    pub weight: u64,
    /// Rows, at most [`MAX_TOKENS`].
    pub num_tokens: usize,
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
    /// Whether [`thin_product`](Self::thin_product) has this shape on this device, which keeps the
    /// input in shared memory.
    pub fn has_thin_product(&self, num_tokens: usize, in_features: usize) -> bool {
        let bytes = num_tokens.next_power_of_two() * in_features * 2;
        num_tokens <= MAX_TOKENS
            && in_features.is_multiple_of(8)
            && bytes <= self.device().max_shared_bytes() as usize
    }

    /// Enqueues a product.
    ///
    /// # Safety
    /// Every address names as much memory as its shape says, 16-byte aligned, alive until the
    /// stream has come to the launch; the output overlaps nothing else.
    pub unsafe fn thin_product(&self, launch: &ThinProduct) -> Result<()> {
        let ThinProduct { out, input, norm, weight, num_tokens, out_features, in_features, .. } =
            *launch;
        let ok = self.has_thin_product(num_tokens, in_features);
        check(ok, "num_tokens", "few enough for thin_product", num_tokens)?;
        let is_even = launch.epilogue != Epilogue::Gated || out_features.is_multiple_of(2);
        check(is_even, "out_features", "even where half of them is a gate", out_features)?;
        if num_tokens == 0 || out_features == 0 {
            return Ok(());
        }
        let (kernel, most_tokens) = match num_tokens {
            1 => (Kernel::ThinProduct1, 1),
            2 => (Kernel::ThinProduct2, 2),
            _ => (Kernel::ThinProduct4, 4),
        };
        let function = self.function(kernel);
        let shared_mem_bytes = (most_tokens * in_features * 2) as u32;
        let resident = function.occupancy_max_active_blocks_per_multiprocessor(
            NUM_THREADS,
            shared_mem_bytes as usize,
            None,
        )?;
        let num_blocks = resident.max(1) * self.device().num_multiprocessors();
        let (norm, tokens) = (norm.unwrap_or(0), num_tokens as i32);
        let (rows, columns) = (out_features as i32, in_features as i32);
        let (epilogue, eps) = (launch.epilogue as i32, launch.eps);
        let mut builder = self.device().stream().launch_builder(function);
        builder.arg(&out).arg(&input).arg(&norm).arg(&weight).arg(&tokens).arg(&rows);
        builder.arg(&columns).arg(&epilogue).arg(&eps);
        let config = LaunchConfig { shared_mem_bytes, ..shape((num_blocks, 1, 1), NUM_THREADS) };
        // SAFETY: the input fits the shared memory, as checked, and the kernel walks any number of
        // output features; the memory is the caller's word.
        unsafe { builder.launch(config) }?;
        Ok(())
    }
}
