//! RMSNorm: `kernels/rms_norm.cu`.

use super::{Kernel, Kernels, Launch, Result, check};

/// 1024 threads with two vectors of 8, or 512 with four.
const MAX_HIDDEN_SIZE: usize = 16_384;
const MANY_TOKENS: usize = 1024;

/// One launch; addresses of bf16 memory on the device.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm {
    /// `[num_tokens, hidden_size]`, written.
    pub out: u64,
    /// `[num_tokens, hidden_size]`.
    pub input: u64,
    /// `[hidden_size]`.
    pub weight: u64,
    /// Rows.
    pub num_tokens: usize,
    /// A multiple of 8, up to 16384.
    pub hidden_size: usize,
    /// Added to the mean square.
    pub eps: f32,
}

impl Kernels {
    /// Enqueues `out = rms_norm(input) * weight`.
    ///
    /// # Safety
    /// Every address names as much memory as its shape says, 16-byte aligned, alive until the
    /// stream has come to the launch; what is written overlaps nothing else.
    pub unsafe fn rms_norm(&self, launch: &RmsNorm) -> Result<()> {
        let RmsNorm { out, input, weight, num_tokens, hidden_size, eps } = *launch;
        let is_held = (8..=MAX_HIDDEN_SIZE).contains(&hidden_size) && hidden_size.is_multiple_of(8);
        check(is_held, "hidden_size", "a multiple of 8 up to 16384", hidden_size)?;
        // One vector of 8 a thread gives a row the least latency, where rows are few; four give many
        // rows the most bandwidth, since fewer warps wait for each other.
        let vectors = if num_tokens < MANY_TOKENS { 1 } else { 4 };
        let num_threads = hidden_size.div_ceil(vectors * 8).next_multiple_of(32).min(1024) as u32;
        let launch = Launch::new(Kernel::RmsNorm, [num_tokens, 1], num_threads);
        // SAFETY: hidden_size was checked against what the kernel's threads hold; the memory is
        // the caller's word.
        unsafe { self.launch(&launch, &[&out, &input, &weight, &(hidden_size as i32), &eps]) }
    }
}
