//! Products of up to 32 rows on Hopper's tensor cores: `kernels/skinny_product.cu`.

use super::product::{Epilogue, FusedProduct, Product};
use super::{Arguments, Kernel, Kernels, Launch, Result, TensorMap, check};

/// Rows that a launch takes at most.
pub(super) const MAX_ROWS: usize = 32;
/// Rows of a tile whose squares are one sum, for a norm behind.
const SQUARES_ROWS: usize = 32;
/// Columns of a copy, and their bytes.
pub(super) const CHUNK: usize = 64;
const ROW_BYTES: usize = CHUNK * 2;
/// Weight rows of a warpgroup, and warpgroups.
const GROUP_ROWS: usize = 64;
const NUM_GROUPS: usize = 2;
const NUM_THREADS: u32 = 384;
/// Floats of a token's row in the staging memory.
const STAGED: usize = 68;
/// Bytes of weights that a stage holds at most, and stages.
const MAX_STAGE_BYTES: usize = 32 << 10;
const MAX_STAGES: usize = 16;
const MIN_STAGES: usize = 4;

/// How a product is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tiling {
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
        let tiles_each = out_features.div_ceil(num_multiprocessors * NUM_GROUPS * GROUP_ROWS);
        let tile_rows = out_features.div_ceil(num_multiprocessors * tiles_each);
        let tile_rows = tile_rows.next_multiple_of(16);
        let staging_bytes = (NUM_GROUPS * STAGED + 1) * num_tokens * size_of::<f32>();
        let fixed = 1024 + staging_bytes + MAX_STAGES * 16 + 8;
        let ring_bytes = max_shared_bytes.saturating_sub(fixed);
        let stage_bytes = |chunks: usize| chunks * (tile_rows + num_tokens) * ROW_BYTES;
        // Large stages, but enough of them that copies and products do not wait for each other;
        // an even number of chunks, which two warpgroups may share.
        let fits = |&chunks: &usize| {
            chunks * tile_rows * ROW_BYTES <= MAX_STAGE_BYTES
                && ring_bytes / stage_bytes(chunks) >= MIN_STAGES
        };
        let chunks_per_step = [8, 4].into_iter().find(fits).unwrap_or(2);
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

    /// Sums of squares that a product with a norm behind it leaves of a row.
    pub(super) fn num_squares(&self, out_features: usize) -> usize {
        out_features.div_ceil(self.tile_rows) * self.tile_rows.div_ceil(SQUARES_ROWS)
    }
}

impl Kernels {
    pub(super) fn skinny_tiling(&self, num_rows: usize, out_features: usize) -> Tiling {
        let device = self.device();
        let num_multiprocessors = device.num_multiprocessors();
        let max_shared_bytes = device.max_shared_bytes();
        Tiling::new(out_features, variant(num_rows).1, num_multiprocessors, max_shared_bytes)
    }

    /// Enqueues a product of up to 32 rows; `in_features` is a multiple of 64, `out_features` with a
    /// gate one of 16.
    ///
    /// # Safety
    /// As of [`fused_product`](Self::fused_product).
    pub unsafe fn skinny_product(&self, launch: &FusedProduct) -> Result<()> {
        let Product { num_rows, out_features, in_features, epilogue } = launch.product;
        let is_gated = epilogue == Epilogue::Gated;
        let max_rows = if self.device().is_hopper() { MAX_ROWS } else { 0 };
        check((1..=max_rows).contains(&num_rows), "num_rows", "1 to 32, on Hopper", num_rows)?;
        check(in_features.is_multiple_of(CHUNK), "in_features", "a multiple of 64", in_features)?;
        let is_whole = out_features > 0 && (!is_gated || out_features.is_multiple_of(16));
        let range = "positive, and a multiple of 16 with a gate";
        check(is_whole, "out_features", range, out_features)?;
        let (kernel, num_tokens) = variant(num_rows);
        let Tiling { tile_rows, num_blocks, chunks_per_step, num_stages, shared_bytes } =
            self.skinny_tiling(num_rows, out_features);
        // With one, a copy would wait for every product.
        check(num_stages >= 2, "num_stages", "at least 2 for the shared memory", num_stages)?;
        let norm = self.shared_norm(launch)?;
        // By columns of a copy, so that one copy brings a step.
        let chunks = |address, num_rows, box_rows| {
            let sizes = [CHUNK, num_rows, in_features / CHUNK];
            let strides = [in_features, CHUNK, 0];
            TensorMap::with_strides(address, sizes, strides, [CHUNK, box_rows, chunks_per_step])
        };
        let input = chunks(launch.input, num_rows, num_tokens)?;
        let weight = if is_gated {
            let half = out_features / 2;
            let sizes = [CHUNK, 8, 2, half / 8, in_features / CHUNK];
            let strides = [in_features, half * in_features, 8 * in_features, CHUNK, 0];
            let copied = [CHUNK, 8, 2, tile_rows / 16, chunks_per_step];
            TensorMap::with_strides(launch.weight, sizes, strides, copied)?
        } else {
            chunks(launch.weight, out_features, tile_rows)?
        };
        let shape = Launch { shared_bytes, ..Launch::new(kernel, [num_blocks, 1], NUM_THREADS) };
        #[rustfmt::skip]
        let arguments: &Arguments<'_> = &[
            &weight, &input, &launch.out, &norm, &(num_rows as i32), &(out_features as i32),
            &(in_features as i32), &(tile_rows as i32), &(chunks_per_step as i32),
            &(num_stages as i32), &(epilogue as i32),
        ];
        // SAFETY: the maps and the tiling are those of the shape; the memory is the caller's word.
        unsafe { self.launch(&shape, arguments) }
    }
}

/// The kernel for so many rows, and the tokens that it multiplies.
fn variant(num_rows: usize) -> (Kernel, usize) {
    match num_rows {
        0..=8 => (Kernel::SkinnyProduct8, 8),
        9..=16 => (Kernel::SkinnyProduct16, 16),
        _ => (Kernel::SkinnyProduct32, 32),
    }
}

#[cfg(test)]
mod tests {
    use super::super::product::NORM_SQUARES;
    use super::*;

    /// Of an H100.
    const SHARED_BYTES: usize = 226 << 10;

    #[test]
    fn tiles_are_whole_and_the_same_for_each_multiprocessor() {
        let tiling = |out_features, num_tokens| {
            let it = Tiling::new(out_features, num_tokens, 132, SHARED_BYTES);
            assert!(it.shared_bytes <= SHARED_BYTES && it.num_stages >= MIN_STAGES, "{it:?}");
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

    #[test]
    fn every_hidden_size_has_few_enough_sums_of_squares() {
        for num_multiprocessors in [78, 114, 132] {
            for hidden_size in (8..=16_384).step_by(8) {
                let tiling = Tiling::new(hidden_size, 8, num_multiprocessors, SHARED_BYTES);
                assert!(tiling.num_squares(hidden_size) <= NORM_SQUARES, "{hidden_size}");
            }
        }
    }
}
