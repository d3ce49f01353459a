//! `SwiGLU`'s gate: `kernels/silu_mul.cu`.

use super::{Kernel, Kernels, Launch, Result, check};

impl Kernels {
    /// Enqueues `out = silu(gate) * up`: `out: [num_tokens, intermediate_size]` bf16 from
    /// `gate_up: [num_tokens, 2 * intermediate_size]` bf16, the gate first; at most 65535 rows, and a
    /// size that is a multiple of 8.
    ///
    /// # Safety
    /// Both addresses name as much memory as their shapes say, 16-byte aligned, alive until the
    /// stream has come to the launch, and do not overlap.
    pub unsafe fn silu_mul(
        &self,
        out: u64,
        gate_up: u64,
        num_tokens: usize,
        intermediate_size: usize,
    ) -> Result<()> {
        let is_whole = intermediate_size > 0 && intermediate_size.is_multiple_of(8);
        check(is_whole, "intermediate_size", "a positive multiple of 8", intermediate_size)?;
        check(num_tokens <= 65_535, "num_tokens", "at most 65535", num_tokens)?;
        let grid = [(intermediate_size / 8).div_ceil(256), num_tokens];
        let launch = Launch::new(Kernel::SiluMul, grid, 256);
        // SAFETY: rows are whole vectors and the grid covers them, as checked; the memory is the
        // caller's word.
        unsafe { self.launch(&launch, &[&out, &gate_up, &(intermediate_size as i32)]) }
    }
}
