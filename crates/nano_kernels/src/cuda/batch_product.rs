//! Products of a batch that decodes on Hopper's tensor cores: `kernels/batch_product.cu`.

use super::product::{Epilogue, FusedProduct, Product};
use super::{Arguments, Kernel, Kernels, Launch, Result, TensorMap, check};

/// Rows that a launch takes at most.
pub(super) const MAX_ROWS: usize = 192;
/// Weight rows of a tile, whose squares are one sum for a norm behind.
pub(super) const TILE_ROWS: usize = 128;
/// Columns of a copy.
const CHUNK: usize = 64;
const NUM_THREADS: u32 = 384;
/// Fewer steps of a copy are not cut: some thread block might have none.
const MIN_STEPS: usize = 16;

impl Kernels {
    /// Enqueues a product of up to 192 rows; its features are multiples of 8.
    ///
    /// # Safety
    /// As of [`fused_product`](Self::fused_product).
    pub unsafe fn batch_product(&self, launch: &FusedProduct) -> Result<()> {
        let Product { num_rows, out_features: width, in_features, epilogue } = launch.product;
        let max_rows = if self.device().is_hopper() { MAX_ROWS } else { 0 };
        check((1..=max_rows).contains(&num_rows), "num_rows", "1 to 192, on Hopper", num_rows)?;
        check(epilogue != Epilogue::Gated, "epilogue", "no gate", epilogue as usize)?;
        check(width.is_multiple_of(8), "out_features", "a multiple of 8", width)?;
        check(in_features.is_multiple_of(8), "in_features", "a multiple of 8", in_features)?;
        let kernel = match num_rows {
            0..=64 => Kernel::BatchProduct64,
            65..=96 => Kernel::BatchProduct96,
            97..=128 => Kernel::BatchProduct128,
            129..=160 => Kernel::BatchProduct160,
            _ => Kernel::BatchProduct192,
        };
        let weight = TensorMap::new(launch.weight, [in_features, width], [CHUNK, TILE_ROWS])?;
        let input = TensorMap::new(launch.input, [in_features, num_rows], [CHUNK, num_rows])?;
        let num_tiles = width.div_ceil(TILE_ROWS);
        let is_cut = in_features.div_ceil(CHUNK) >= MIN_STEPS;
        let (cluster, num_blocks) = if epilogue == Epilogue::F32 {
            (1, num_tiles.min(self.device().num_multiprocessors()))
        } else {
            let cluster = if is_cut { self.blocks_of_tile(num_tiles) } else { 1 };
            (cluster, num_tiles * cluster)
        };
        let norm = self.shared_norm(launch)?;
        let shape = Launch { cluster, ..Launch::new(kernel, [num_blocks, 1], NUM_THREADS) };
        let (rows, width, columns) = (num_rows as i32, width as i32, in_features as i32);
        let (num_tiles, epilogue) = (num_tiles as i32, epilogue as i32);
        let arguments: &Arguments<'_> =
            &[&weight, &input, &launch.out, &norm, &rows, &width, &columns, &num_tiles, &epilogue];
        // SAFETY: the maps and the grid are those of the shape; the memory is the caller's word.
        unsafe { self.launch(&shape, arguments) }
    }
}
