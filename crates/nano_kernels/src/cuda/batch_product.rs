//! Products of a batch that decodes on Hopper's tensor cores: `kernels/batch_product.cu`.

use super::gemm::{Output, Product};
use super::kernels::shape_of;
use super::spec::Kernel;
use super::tensor_map::TensorMap;
use super::{Kernels, Result, check};

/// Rows that a launch takes at most.
pub(super) const MAX_ROWS: usize = 192;
/// Weight rows of a tile, and columns of a copy.
const TILE_ROWS: usize = 128;
const CHUNK: usize = 64;
const NUM_THREADS: u32 = 384;
/// Fewer steps of a copy are not cut: some thread block might have none.
const MIN_STEPS: usize = 16;

/// What becomes of a product, as the kernel counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Epilogue {
    Bf16,
    AddBf16,
    F32,
    Gated,
}

impl Kernels {
    /// Whether [`batch_product`](Self::batch_product) has this shape on this device.
    pub fn has_batch_product(
        &self,
        num_rows: usize,
        out_features: usize,
        in_features: usize,
    ) -> bool {
        let is_whole = out_features.is_multiple_of(8) && in_features.is_multiple_of(8);
        self.device().is_hopper() && is_whole && num_rows <= MAX_ROWS
    }

    /// Enqueues a product.
    ///
    /// # Safety
    /// Every address names as much memory as the shape says, 16-byte aligned, alive until the
    /// stream has come to the launch; the output overlaps nothing else, and nothing that is still
    /// in the stream writes the weight.
    pub unsafe fn batch_product(
        &self,
        product: &Product,
        out: u64,
        input: u64,
        weight: u64,
    ) -> Result<()> {
        let Product { num_rows, out_features, in_features, output } = *product;
        let ok = self.has_batch_product(num_rows, out_features, in_features);
        check(ok, "num_rows", "few enough for batch_product, on Hopper", num_rows)?;
        if num_rows == 0 || out_features == 0 {
            return Ok(());
        }
        let epilogue = match output {
            Output::Bf16 => Epilogue::Bf16,
            Output::AddBf16 => Epilogue::AddBf16,
            Output::F32 => Epilogue::F32,
        };
        let weight = TensorMap::new(weight, [in_features, out_features], [CHUNK, TILE_ROWS])?;
        let num_tiles = out_features.div_ceil(TILE_ROWS);
        let shape = [num_rows, out_features, in_features];
        // SAFETY: the caller's word.
        unsafe { self.launch_batch(shape, num_tiles, epilogue, out, input, &weight) }
    }

    /// `out = silu(input gateᵀ) * (input upᵀ)`, of `[num_rows, intermediate_size, in_features]`.
    pub(super) unsafe fn launch_gated_batch(
        &self,
        shape: [usize; 3],
        out: u64,
        input: u64,
        weight: u64,
    ) -> Result<()> {
        let [_, width, in_features] = shape;
        // Eight rows of the gate, eight of up, and so on.
        let weight = TensorMap::with_strides(
            weight,
            [in_features, 8, 2, width / 8],
            [in_features, width * in_features, 8 * in_features, 0],
            [CHUNK, 8, 2, TILE_ROWS / 16],
        )?;
        let num_tiles = width.div_ceil(TILE_ROWS / 2);
        // SAFETY: the caller's word.
        unsafe { self.launch_batch(shape, num_tiles, Epilogue::Gated, out, input, &weight) }
    }

    unsafe fn launch_batch(
        &self,
        [num_rows, width, in_features]: [usize; 3],
        num_tiles: usize,
        epilogue: Epilogue,
        out: u64,
        input: u64,
        weight: &TensorMap,
    ) -> Result<()> {
        let kernel = match num_rows {
            0..=64 => Kernel::BatchProduct64,
            65..=96 => Kernel::BatchProduct96,
            97..=128 => Kernel::BatchProduct128,
            129..=160 => Kernel::BatchProduct160,
            _ => Kernel::BatchProduct192,
        };
        let num_steps = in_features.div_ceil(CHUNK);
        let (cluster, num_blocks) = match epilogue {
            Epilogue::F32 | Epilogue::Gated => {
                (1, num_tiles.min(self.device().num_multiprocessors() as usize))
            }
            _ if num_steps < MIN_STEPS => (1, num_tiles),
            _ => {
                let cluster = self.blocks_of_tile(num_tiles);
                (cluster, num_tiles * cluster)
            }
        };
        let input = TensorMap::new(input, [in_features, num_rows], [CHUNK, num_rows])?;
        let (rows, width, num_tiles) = (num_rows as i32, width as i32, num_tiles as i32);
        let (num_steps, epilogue) = (num_steps as i32, epilogue as i32);
        let mut launch = self.launch(kernel);
        launch.in_clusters(cluster as u32);
        launch.arg(weight).arg(&input).arg(&out).arg(&rows).arg(&width).arg(&num_tiles);
        launch.arg(&num_steps).arg(&epilogue);
        // SAFETY: the maps and the grid are those of the shape; the memory is the caller's word.
        unsafe { launch.launch(shape_of(kernel, (num_blocks as u32, 1, 1), NUM_THREADS)) }
    }
}
