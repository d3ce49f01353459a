//! `SwiGLU`'s gate within the product in front of it, on Hopper, for many rows:
//! `kernels/gated_product.cu`.

use super::product::{Epilogue, FusedProduct, Product};
use super::{Arguments, Kernel, Kernels, Launch, Result, TensorMap, check};

/// Rows and output columns of a tile, and columns of a copy.
const TOKENS: usize = 128;
const TALL_TOKENS: usize = 192;
const FEATURES: usize = 112;
const CHUNK: usize = 64;

impl Kernels {
    /// Enqueues a product with a gate; its width and `in_features` are multiples of 8.
    ///
    /// # Safety
    /// As of [`fused_product`](Self::fused_product).
    pub unsafe fn gated_product(&self, launch: &FusedProduct) -> Result<()> {
        let Product { num_rows, out_features, in_features, epilogue } = launch.product;
        let (is_hopper, width) = (self.device().is_hopper(), out_features / 2);
        check(epilogue == Epilogue::Gated, "epilogue", "a gate", epilogue as usize)?;
        check(is_hopper && num_rows > 0, "num_rows", "positive, on Hopper", num_rows)?;
        check(out_features.is_multiple_of(16), "out_features", "a multiple of 16", out_features)?;
        check(in_features.is_multiple_of(8), "in_features", "a multiple of 8", in_features)?;
        let row_tiles = num_rows.div_ceil(TOKENS);
        let is_tall = row_tiles == 2 && num_rows <= TALL_TOKENS;
        // Pairs read less, but an odd row tile costs them another one, and few rows are bound by
        // memory anyway.
        let is_paired = row_tiles > 12 || (row_tiles > 2 && row_tiles % 2 == 0);
        let (kernel, row_tiles, cluster, num_threads) = match (is_tall, is_paired) {
            (true, _) => (Kernel::GatedProduct192, 1, 1, 512),
            (_, true) => (Kernel::GatedProductPairs, row_tiles, 2, 384),
            _ => (Kernel::GatedProduct, row_tiles, 1, 384),
        };
        // Of one height: a copy that reaches far behind the input's end is slow.
        let tile_rows = num_rows.div_ceil(row_tiles.next_multiple_of(cluster)).next_multiple_of(8);
        let num_tiles = num_rows.div_ceil(tile_rows * cluster) * width.div_ceil(FEATURES);
        let num_clusters = num_tiles.min(self.device().num_multiprocessors() / cluster);
        let weight = TensorMap::new(launch.weight, [in_features, out_features], [CHUNK, FEATURES])?;
        let input = TensorMap::new(launch.input, [in_features, num_rows], [CHUNK, tile_rows])?;
        let norm = self.shared_norm(launch)?;
        let shape = Launch::new(kernel, [num_clusters * cluster, 1], num_threads);
        let (rows, tile_rows) = (num_rows as i32, tile_rows as i32);
        let (width, columns) = (width as i32, in_features as i32);
        let arguments: &Arguments<'_> =
            &[&weight, &input, &launch.out, &norm, &rows, &tile_rows, &width, &columns];
        // SAFETY: the maps and the grid are those of the shape; the memory is the caller's word.
        unsafe { self.launch(&shape, arguments) }
    }
}
