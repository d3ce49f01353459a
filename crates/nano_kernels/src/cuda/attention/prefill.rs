//! Attention of many tokens a sequence: `kernels/prefill_attention.cu` and
//! `prefill_attention_wgmma.cu`.

use std::cmp::Reverse;

use cudarc::driver::DeviceRepr;

use super::{AttentionInput, Heads, MAX_GROUP, NUM_THREADS, window_or_all};
use crate::cuda::{
    Arguments, Device, DeviceBuffer, Kernel, Kernels, Launch, Result, TensorMap, check,
};

/// Query rows of half a thread block: tokens times heads of a group.
const HALF_ROWS: usize = 64;
/// Threads of a block of the kernel for Hopper.
const WGMMA_THREADS: u32 = 384;
/// Columns of a copied box.
const COLUMNS: usize = 64;
const MAX_HEAD_DIM: usize = 128;
/// Parts that a tile's keys are cut into at most.
const MAX_SPLITS: usize = 32;

/// Tokens cut into tiles; addresses on the device.
#[derive(Clone, Copy, Debug)]
pub struct PrefillRows {
    /// `[num_tokens, num_heads, head_dim]` bf16, rotated.
    pub query: u64,
    /// `[num_tiles]` [`PrefillTile`] of [`prefill_tiles`].
    pub tiles: u64,
    /// Tiles.
    pub num_tiles: usize,
    /// Rows of the query.
    pub num_tokens: usize,
}

impl Kernels {
    /// Enqueues causal attention of many tokens a sequence. `out` is shaped as the query.
    ///
    /// # Safety
    /// Every address names as much memory as its shape says, 16-byte aligned, alive until the
    /// stream has come to the launch; the tiles' tokens are rows of the query, and their
    /// positions fit the table, whose blocks within the window are blocks of the cache.
    pub unsafe fn prefill_attention(
        &self,
        input: &AttentionInput,
        rows: &PrefillRows,
        out: u64,
    ) -> Result<()> {
        let PrefillRows { query, tiles, num_tiles, .. } = *rows;
        let heads = input.heads;
        let kernel = heads.choose(Kernel::PrefillAttention64, Kernel::PrefillAttention128)?;
        check(num_tiles <= 65_535, "num_tiles", "at most 65535", num_tiles)?;
        let grid = [heads.num_kv_heads, num_tiles];
        let launch = Launch { in_turn: true, ..Launch::new(kernel, grid, NUM_THREADS) };
        #[rustfmt::skip]
        let arguments: &Arguments<'_> = &[
            &out, &query, &input.cache, &input.block_table, &tiles, &(heads.num_heads as i32),
            &(input.max_blocks as i32), &window_or_all(input.window), &heads.scale(),
        ];
        // SAFETY: the heads were checked; the memory is the caller's word.
        unsafe { self.launch(&launch, arguments) }
    }

    /// As [`prefill_attention`](Self::prefill_attention), at twice the speed on Hopper; a token's
    /// last bits depend on how its sequence was cut into steps, and on what shares its step.
    ///
    /// # Safety
    /// As there, and launches go through one stream.
    pub unsafe fn prefill_attention_wgmma(
        &self,
        input: &AttentionInput,
        rows: &PrefillRows,
        out: u64,
    ) -> Result<()> {
        let PrefillRows { query, tiles, num_tiles, num_tokens } = *rows;
        let heads = input.heads;
        // Parts of a tile wait for each other, so each has a multiprocessor.
        let num_pairs = (num_tiles * heads.num_kv_heads).max(1);
        let num_multiprocessors = self.device().num_multiprocessors();
        let num_splits = (num_multiprocessors / num_pairs).clamp(1, MAX_SPLITS);
        let kernel = if num_splits > 1 {
            heads.choose(Kernel::PrefillAttentionParts64, Kernel::PrefillAttentionParts128)?
        } else {
            heads.choose(Kernel::PrefillAttentionWgmma64, Kernel::PrefillAttentionWgmma128)?
        };
        if num_tiles == 0 || num_tokens == 0 {
            return Ok(());
        }
        let range = "those of Hopper, which alone has this kernel";
        check(self.device().is_hopper(), "num_multiprocessors", range, num_multiprocessors)?;
        check(num_tiles <= 1 << 20, "num_tiles", "at most 1048576", num_tiles)?;
        let Heads { num_heads, num_kv_heads, head_dim } = heads;
        let group = heads.group();
        let query = TensorMap::new(
            query,
            [head_dim, num_heads, num_tokens],
            [COLUMNS, group, HALF_ROWS / group],
        )?;
        // Boxes of a head's rows of a block: eight of one half, eight of the other, and so on. Block
        // tables keep within the cache, so its end need not be known here.
        let halves = head_dim / COLUMNS;
        let cache = TensorMap::with_strides(
            input.cache,
            [COLUMNS, 8, halves, i32::MAX as usize / 8],
            [head_dim, COLUMNS, 8 * head_dim, 0],
            [COLUMNS, 8, halves, 2],
        )?;
        let PrefillScratch { turns, partial, partial_ml, arrived } = &self.prefill_scratch;
        let num_blocks = num_multiprocessors.min(num_pairs * num_splits);
        let launch = Launch::new(kernel, [num_blocks, 1], WGMMA_THREADS);
        #[rustfmt::skip]
        let arguments: &Arguments<'_> = &[
            &query, &cache, &out, &input.block_table, &tiles, &turns.address(), &partial.address(),
            &partial_ml.address(), &arrived.address(), &(num_tiles as i32), &(num_splits as i32),
            &(num_heads as i32), &(num_kv_heads as i32), &(input.max_blocks as i32),
            &window_or_all(input.window), &heads.scale(),
        ];
        // SAFETY: the heads were checked; the memory is the caller's word.
        unsafe { self.launch(&launch, arguments) }
    }
}

/// Scratch memory of [`Kernels::prefill_attention_wgmma`]: for as many parts of tiles as there are
/// multiprocessors, which is as many as a launch has that cuts tiles into parts.
#[derive(Debug)]
pub(in crate::cuda) struct PrefillScratch {
    /// Two counters of pieces of work, zero between launches.
    turns: DeviceBuffer,
    partial: DeviceBuffer,
    partial_ml: DeviceBuffer,
    arrived: DeviceBuffer,
}

impl PrefillScratch {
    pub(in crate::cuda) fn new(device: &Device) -> Result<Self> {
        let num_multiprocessors = device.num_multiprocessors();
        let num_parts = if device.is_hopper() { num_multiprocessors } else { 0 };
        let zeros = |len: usize| -> Result<DeviceBuffer> {
            let buffer = device.allocate(len * size_of::<u32>())?;
            buffer.fill(0)?;
            Ok(buffer)
        };
        let rows = num_parts * 2 * HALF_ROWS;
        Ok(Self {
            turns: zeros(2)?,
            partial: device.allocate(rows * MAX_HEAD_DIM * size_of::<f32>())?,
            // Of each of the four lanes that share a row.
            partial_ml: device.allocate(rows * 4 * 2 * size_of::<f32>())?,
            // A u64 for each tile and head: there are no more of them than multiprocessors.
            arrived: zeros(2 * num_multiprocessors)?,
        })
    }
}

/// A run of one sequence's new tokens, as the kernel reads it: as many as one thread block a K/V head
/// works on, or all of a sequence, to be cut. The default has none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefillTile {
    /// Its sequence's row of the block table.
    pub sequence: i32,
    /// The first token's row of the query.
    pub first_token: i32,
    /// Tokens.
    pub num_tokens: i32,
    /// The first token's position.
    pub first_position: i32,
}

// SAFETY: plain numbers without padding, laid out as in the kernel's source.
unsafe impl DeviceRepr for PrefillTile {}

/// Cuts sequences into tiles, within one and among them those with the most keys first: they take
/// longest. A sequence's tiles stay together, so that its keys are in the cache for all of them.
pub fn prefill_tiles(heads: Heads, mut sequences: Vec<PrefillTile>) -> Vec<PrefillTile> {
    let tile_tokens = 2 * (HALF_ROWS / heads.group().clamp(1, MAX_GROUP));
    let mut tiles = Vec::new();
    sequences.sort_by_key(|it| Reverse(it.first_position + it.num_tokens));
    for sequence in sequences {
        for start in (0..sequence.num_tokens).step_by(tile_tokens).rev() {
            tiles.push(PrefillTile {
                first_token: sequence.first_token + start,
                num_tokens: (sequence.num_tokens - start).min(tile_tokens as i32),
                first_position: sequence.first_position + start,
                ..sequence
            });
        }
    }
    tiles
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_token_once_and_the_longest_come_first() {
        let heads = Heads { num_heads: 12, num_kv_heads: 4, head_dim: 64 };
        let run = |sequence, first_token, num_tokens, first_position| PrefillTile {
            sequence,
            first_token,
            num_tokens,
            first_position,
        };
        let tiles = prefill_tiles(heads, vec![run(0, 0, 43, 0), run(1, 43, 2, 100)]);
        assert_eq!(tiles, [run(1, 43, 2, 100), run(0, 42, 1, 42), run(0, 0, 42, 0)]);
    }
}
