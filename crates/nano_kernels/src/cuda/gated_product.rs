//! `SwiGLU`'s gate within the product in front of it, on Hopper: `kernels/gated_product.cu`, for few
//! rows `kernels/skinny_product.cu` and for some in between `kernels/batch_product.cu`.

use std::ops::RangeInclusive;

use super::kernels::shape_of;
use super::row_product::Epilogue;
use super::skinny::SkinnyProduct;
use super::spec::Kernel;
use super::tensor_map::TensorMap;
use super::{Kernels, Result, batch_product, check};

/// Rows and output columns of a tile, and columns of a copy.
const TOKENS: usize = 128;
const FEATURES: usize = 112;
const CHUNK: usize = 64;
const NUM_THREADS: u32 = 384;
/// Where two row tiles cost more than `kernels/batch_product.cu`, which has one as high as it takes.
const BATCH_ROWS: RangeInclusive<usize> = 129..=batch_product::MAX_ROWS;

/// One launch; addresses of bf16 memory on the device.
#[derive(Clone, Copy, Debug)]
pub struct GatedProduct {
    /// `[num_rows, intermediate_size]`, written.
    pub out: u64,
    /// `[num_rows, in_features]`.
    pub input: u64,
    /// `[2 * intermediate_size, in_features]`, the gate first.
    pub weight: u64,
    /// Rows of input and output.
    pub num_rows: usize,
    /// A multiple of 8.
    pub intermediate_size: usize,
    /// A multiple of 8.
    pub in_features: usize,
}

impl Kernels {
    /// Whether there is [`gated_product`](Self::gated_product) on this device.
    pub fn has_gated_product(&self) -> bool {
        self.device().is_hopper()
    }

    /// Enqueues `out = silu(input gateᵀ) * (input upᵀ)`, rounded once.
    ///
    /// # Safety
    /// Every address names as much memory as the shape says, 16-byte aligned, alive until the
    /// stream has come to the launch; the output overlaps nothing else, and nothing that is still
    /// in the stream writes the weight.
    pub unsafe fn gated_product(&self, launch: &GatedProduct) -> Result<()> {
        let GatedProduct { out, input, weight, num_rows, intermediate_size, in_features } = *launch;
        let is_whole = |size: usize| size > 0 && size.is_multiple_of(8);
        check(self.has_gated_product(), "num_rows", "0 where the GPU is no Hopper", num_rows)?;
        let (name, range) = ("intermediate_size", "a positive multiple of 8");
        check(is_whole(intermediate_size), name, range, intermediate_size)?;
        check(is_whole(in_features), "in_features", range, in_features)?;
        if num_rows == 0 {
            return Ok(());
        }
        let out_features = 2 * intermediate_size;
        if self.has_skinny_product(num_rows, in_features) {
            let product = SkinnyProduct {
                out,
                input,
                weight,
                num_rows,
                out_features,
                in_features,
                epilogue: Epilogue::Gated,
                norm_before: None,
                norm_behind: None,
            };
            // SAFETY: the caller's word.
            return unsafe { self.skinny_product(&product) };
        }
        if BATCH_ROWS.contains(&num_rows) {
            let shape = [num_rows, intermediate_size, in_features];
            // SAFETY: the caller's word.
            return unsafe { self.launch_gated_batch(shape, out, input, weight) };
        }
        // Pairs read less, but an odd row tile costs them another one, and few rows are bound by
        // memory anyway.
        let row_tiles = num_rows.div_ceil(TOKENS);
        let (kernel, cluster) = if row_tiles > 12 || (row_tiles > 2 && row_tiles % 2 == 0) {
            (Kernel::GatedProductPairs, 2)
        } else {
            (Kernel::GatedProduct, 1)
        };
        // Of one height: a copy that reaches far behind the input's end is slow.
        let tile_rows = num_rows.div_ceil(row_tiles.next_multiple_of(cluster)).next_multiple_of(8);
        let num_tiles =
            num_rows.div_ceil(tile_rows * cluster) * intermediate_size.div_ceil(FEATURES);
        let num_clusters = num_tiles.min(self.device().num_multiprocessors() as usize / cluster);
        let weight = TensorMap::new(weight, [in_features, out_features], [CHUNK, FEATURES])?;
        let input = TensorMap::new(input, [in_features, num_rows], [CHUNK, tile_rows])?;
        let tile_rows = tile_rows as i32;
        let (num_tokens, width) = (num_rows as i32, intermediate_size as i32);
        let num_steps = in_features.div_ceil(CHUNK) as i32;
        let mut launch = self.launch(kernel);
        launch.arg(&weight).arg(&input).arg(&out).arg(&num_tokens).arg(&tile_rows);
        launch.arg(&width).arg(&num_steps);
        let grid = ((num_clusters * cluster) as u32, 1, 1);
        // SAFETY: the maps and the grid are those of the shape; the memory is the caller's word.
        unsafe { launch.launch(shape_of(kernel, grid, NUM_THREADS)) }
    }
}
