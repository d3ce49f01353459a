//! Products of up to 32 rows on Hopper's tensor cores: `kernels/skinny_product.cu`.

use cudarc::driver::LaunchConfig;

use super::gemm::{Output, Product};
use super::kernels::shape;
use super::spec::Kernel;
use super::tensor_map::TensorMap;
use super::{Kernels, Result, check};

/// Rows that a launch takes at most.
pub const MAX_ROWS: usize = 32;
/// Columns of a copy, and their bytes.
const CHUNK: usize = 64;
const ROW_BYTES: usize = CHUNK * 2;
/// Weight rows of a warpgroup, and threads.
const GROUP_ROWS: usize = 64;
const GROUP_THREADS: u32 = 128;
/// Floats of a token's row in the staging memory.
const STAGED: usize = 68;
/// Bytes of weights that a stage holds at most, and stages.
const MAX_STAGE_BYTES: usize = 32 << 10;
const MAX_STAGES: usize = 16;
const MIN_STAGES: usize = 4;
/// Shared memory of a thread block: no slower than with all there is, and the blocks of the small
/// kernels between two products have room beside it.
const MAX_SHARED_BYTES: usize = 200 << 10;

/// What becomes of a product, as the kernel counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SkinnyEpilogue {
    Bf16,
    AddBf16,
    F32,
    Gated,
}

/// How a product is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tiling {
    tile_rows: usize,
    num_blocks: usize,
    chunks_per_step: usize,
    num_stages: usize,
    shared_bytes: usize,
}

impl Tiling {
    /// Whole tiles, equally many for each multiprocessor, in stages that fill shared memory.
    fn new(
        out_features: usize,
        num_tokens: usize,
        num_multiprocessors: usize,
        max_shared_bytes: usize,
    ) -> Self {
        let tiles_each = out_features.div_ceil(num_multiprocessors * 2 * GROUP_ROWS);
        let tile_rows = out_features.div_ceil(num_multiprocessors * tiles_each);
        let tile_rows = tile_rows.next_multiple_of(16);
        let num_groups = tile_rows.div_ceil(GROUP_ROWS);
        let fixed = 1024 + num_groups * num_tokens * STAGED * 4 + MAX_STAGES * 16;
        let ring_bytes = max_shared_bytes.saturating_sub(fixed);
        let stage_bytes = |chunks: usize| chunks * (tile_rows + num_tokens) * ROW_BYTES;
        // Large stages, but enough of them that copies and products do not wait for each other.
        let fits = |&chunks: &usize| {
            chunks * tile_rows * ROW_BYTES <= MAX_STAGE_BYTES
                && ring_bytes / stage_bytes(chunks) >= MIN_STAGES
        };
        let chunks_per_step = [8, 4, 2].into_iter().find(fits).unwrap_or(1);
        let stage_bytes = stage_bytes(chunks_per_step);
        let num_stages = (ring_bytes / stage_bytes).min(MAX_STAGES);
        Self {
            tile_rows,
            num_blocks: out_features.div_ceil(tile_rows).div_ceil(tiles_each),
            chunks_per_step,
            num_stages,
            shared_bytes: fixed + num_stages * stage_bytes,
        }
    }
}

impl Kernels {
    /// Whether [`skinny_product`](Self::skinny_product) has this shape on this device.
    pub fn has_skinny_product(&self, num_rows: usize, in_features: usize) -> bool {
        self.device().is_hopper() && num_rows <= MAX_ROWS && in_features.is_multiple_of(8)
    }

    /// Enqueues a product.
    ///
    /// # Safety
    /// Every address names as much memory as the shape says, 16-byte aligned, alive until the
    /// stream has come to the launch; the output overlaps nothing else, and nothing that is still
    /// in the stream writes the weight.
    pub unsafe fn skinny_product(
        &self,
        product: &Product,
        out: u64,
        input: u64,
        weight: u64,
    ) -> Result<()> {
        let Product { num_rows, out_features, in_features, output } = *product;
        let epilogue = match output {
            Output::Bf16 => SkinnyEpilogue::Bf16,
            Output::AddBf16 => SkinnyEpilogue::AddBf16,
            Output::F32 => SkinnyEpilogue::F32,
        };
        let shape = [num_rows, out_features, in_features];
        // SAFETY: the caller's word.
        unsafe { self.launch_skinny(shape, epilogue, out, input, weight) }
    }

    /// The same of `[num_rows, out_features, in_features]`; a gate makes the output half as wide.
    pub(super) unsafe fn launch_skinny(
        &self,
        [num_rows, out_features, in_features]: [usize; 3],
        epilogue: SkinnyEpilogue,
        out: u64,
        input: u64,
        weight: u64,
    ) -> Result<()> {
        let ok = self.has_skinny_product(num_rows, in_features);
        check(ok, "num_rows", "few enough for skinny_product, on Hopper", num_rows)?;
        if num_rows == 0 || out_features == 0 {
            return Ok(());
        }
        let (kernel, num_tokens) = match num_rows {
            0..=8 => (Kernel::SkinnyProduct8, 8),
            9..=16 => (Kernel::SkinnyProduct16, 16),
            _ => (Kernel::SkinnyProduct32, 32),
        };
        let device = self.device();
        let (num_multiprocessors, max_bytes) =
            (device.num_multiprocessors() as usize, device.max_shared_bytes() as usize);
        let max_bytes = max_bytes.min(MAX_SHARED_BYTES);
        let tiling = Tiling::new(out_features, num_tokens, num_multiprocessors, max_bytes);
        // With one, a warpgroup would wait for what it has not let go of.
        let num_stages = tiling.num_stages;
        check(num_stages >= 2, "num_stages", "at least 2 for the shared memory", num_stages)?;
        let is_gated = epilogue == SkinnyEpilogue::Gated;
        let box_rows = if is_gated { tiling.tile_rows / 2 } else { tiling.tile_rows };
        let weight = TensorMap::new(weight, [in_features, out_features], [CHUNK, box_rows])?;
        let input = TensorMap::new(input, [in_features, num_rows], [CHUNK, num_tokens])?;
        let num_steps = in_features.div_ceil(CHUNK * tiling.chunks_per_step) as i32;
        let epilogue = epilogue as i32;
        let (rows, features, tile_rows) =
            (num_rows as i32, out_features as i32, tiling.tile_rows as i32);
        let (chunks, num_stages) = (tiling.chunks_per_step as i32, tiling.num_stages as i32);
        let mut launch = self.launch(kernel);
        launch.arg(&weight).arg(&input).arg(&out).arg(&rows).arg(&features).arg(&num_steps);
        launch.arg(&tile_rows).arg(&chunks).arg(&num_stages).arg(&epilogue);
        let num_groups = tiling.tile_rows.div_ceil(GROUP_ROWS) as u32;
        let config = LaunchConfig {
            shared_mem_bytes: tiling.shared_bytes as u32,
            ..shape((tiling.num_blocks as u32, 1, 1), num_groups * GROUP_THREADS + 32)
        };
        // SAFETY: the maps and the tiling are those of the shape; the memory is the caller's word.
        unsafe { launch.launch(config) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_whole_and_the_same_for_each_multiprocessor() {
        let tiling = |out_features, num_tokens| {
            let it = Tiling::new(out_features, num_tokens, 132, MAX_SHARED_BYTES);
            assert!(it.shared_bytes <= MAX_SHARED_BYTES && it.num_stages >= MIN_STAGES, "{it:?}");
            (it.tile_rows, it.num_blocks, it.chunks_per_step)
        };
        assert_eq!(tiling(6144, 8), (48, 128, 4));
        assert_eq!(tiling(4096, 16), (32, 128, 8));
        assert_eq!(tiling(28_672, 8), (112, 128, 2));
        assert_eq!(tiling(32_000, 8), (128, 125, 2));
        assert_eq!(tiling(97, 8), (16, 7, 8));
        for num_tokens in [8, 16, 32] {
            for out_features in (1..40_000).step_by(37) {
                tiling(out_features, num_tokens);
            }
        }
    }
}
