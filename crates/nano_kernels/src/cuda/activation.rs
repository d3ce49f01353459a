//! `SwiGLU`'s gate: `kernels/silu_mul.cu`.

use super::kernels::Launch;
use super::spec::Kernel;
use super::{Kernels, Result, check};

/// One launch; addresses of bf16 memory on the device.
#[derive(Clone, Copy, Debug)]
pub struct SiluMul {
    /// `[num_tokens, intermediate_size]`, written.
    pub out: u64,
    /// `[num_tokens, 2 * intermediate_size]`, the gate first.
    pub gate_up: u64,
    /// Rows, at most 65535.
    pub num_tokens: usize,
    /// A multiple of 8.
    pub intermediate_size: usize,
}

impl Kernels {
    /// Enqueues `out = silu(gate) * up`.
    ///
    /// # Safety
    /// Both addresses name as much memory as their shapes say, 16-byte aligned, alive until the
    /// stream has come to the launch, and do not overlap.
    pub unsafe fn silu_mul(&self, launch: &SiluMul) -> Result<()> {
        let SiluMul { out, gate_up, num_tokens, intermediate_size } = *launch;
        check(
            intermediate_size > 0 && intermediate_size.is_multiple_of(8),
            "intermediate_size",
            "a positive multiple of 8",
            intermediate_size,
        )?;
        check(num_tokens <= 65_535, "num_tokens", "at most 65535", num_tokens)?;
        let grid = [(intermediate_size / 8).div_ceil(256), num_tokens];
        let launch = Launch::new(Kernel::SiluMul, grid, 256);
        // SAFETY: rows are whole vectors and the grid covers them, as checked; the memory is the
        // caller's word.
        unsafe { self.launch(&launch, &[&out, &gate_up, &(intermediate_size as i32)]) }
    }
}
