//! Parameters made on the device: `kernels/weights.cu`.

use super::{Arguments, Kernel, Kernels, Launch, Result};

/// Draws that random parameters are drawn from, one for each value of 16 bits.
pub const NUM_DRAWS: usize = 1 << 16;
/// The largest grid: a thread goes on where the grid ends.
const MAX_BLOCKS: usize = 1 << 14;

impl Kernels {
    /// Enqueues random parameters: `out: [num_elements]` bf16 from `draws: [NUM_DRAWS]` bf16.
    ///
    /// # Safety
    /// Both addresses name as much memory as their shapes say, 8-byte aligned, alive until the
    /// stream has come to the launch, and do not overlap.
    pub unsafe fn fill_random(
        &self,
        out: u64,
        draws: u64,
        num_elements: usize,
        seed: u64,
    ) -> Result<()> {
        let num_blocks = num_elements.div_ceil(4 * 256).clamp(1, MAX_BLOCKS);
        let launch = Launch::new(Kernel::FillRandom, [num_blocks, 1], 256);
        // SAFETY: the kernel walks any number of elements; the memory is the caller's word.
        unsafe { self.launch(&launch, &[&out, &draws, &(num_elements as i64), &seed]) }
    }

    /// Enqueues `out: [num_elements]` bf16, rounded from f32, or from f16 if `is_half`.
    ///
    /// # Safety
    /// As for [`fill_random`](Self::fill_random).
    pub unsafe fn round_to_bf16(
        &self,
        out: u64,
        source: u64,
        num_elements: usize,
        is_half: bool,
    ) -> Result<()> {
        let num_blocks = num_elements.div_ceil(256).clamp(1, MAX_BLOCKS);
        let launch = Launch::new(Kernel::RoundToBf16, [num_blocks, 1], 256);
        let arguments: &Arguments<'_> =
            &[&out, &source, &(num_elements as i64), &i32::from(is_half)];
        // SAFETY: the kernel walks any number of elements; the memory is the caller's word.
        unsafe { self.launch(&launch, arguments) }
    }
}
