//! Paged attention: `kernels/decode_attention.cu`, `prefill_attention.cu` and
//! `prefill_attention_wgmma.cu`.

use std::f32::consts::LOG2_E;

use cudarc::driver::DeviceRepr;

use super::kernels::shape_of;
use super::spec::Kernel;
use super::tensor_map::TensorMap;
use super::{Device, DeviceBuffer, Kernels, Result, check};

/// Query rows of half a prefill kernel's thread block: tokens times heads of a group.
const HALF_ROWS: usize = 64;
/// Threads of a block: of the kernels for any device, and of that for Hopper.
const NUM_THREADS: u32 = 128;
const WGMMA_THREADS: u32 = 384;
/// Columns of a copied box.
const COLUMNS: usize = 64;
/// A window over every length, with room for positions beside it in an i32.
const NO_WINDOW: u32 = 1 << 30;
/// Query heads that can share a key and value head.
const MAX_GROUP: usize = 8;
const MAX_HEAD_DIM: usize = 128;
/// Parts that a prefill tile's keys are cut into at most.
const MAX_SPLITS: usize = 32;

/// What both kinds of attention read; addresses on the device.
#[derive(Clone, Copy, Debug)]
pub struct AttentionInput {
    /// One layer, `[num_blocks, k | v, num_kv_heads, 16, head_dim]` bf16.
    pub cache: u64,
    /// `[num_sequences, max_blocks]` i32.
    pub block_table: u64,
    /// Blocks of a row of the table.
    pub max_blocks: usize,
    /// The heads.
    pub heads: Heads,
    /// Positions that a token sees, its own included; `None` is all.
    pub window: Option<u32>,
}

/// Sequences of one new token each; addresses on the device.
#[derive(Clone, Copy, Debug)]
pub struct DecodeRows {
    /// `[num_sequences, num_heads + 2 * num_kv_heads, head_dim]` bf16, none of it rotated.
    pub qkv: u64,
    /// `[max_position, 2, head_dim / 2]` f32: cosines, then sines.
    pub cos_sin: u64,
    /// `[num_sequences]` i32, the new token counted, read when the launch runs; a length of 0
    /// writes nothing to the cache and gives zeros.
    pub length: u64,
    /// Rows.
    pub num_sequences: usize,
}

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

/// The heads of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads: at most 8 query heads each.
    pub num_kv_heads: usize,
    /// 64 or 128.
    pub head_dim: usize,
}

impl Heads {
    fn group(self) -> usize {
        self.num_heads / self.num_kv_heads.max(1)
    }

    /// The variant for this head size, after a check of everything that a kernel takes for granted.
    fn choose(self, dim_64: Kernel, dim_128: Kernel) -> Result<Kernel> {
        let (group, is_whole) = (self.group(), self.group() * self.num_kv_heads == self.num_heads);
        let range = "1 to 8 whole groups of num_kv_heads";
        check((1..=MAX_GROUP).contains(&group) && is_whole, "num_heads", range, self.num_heads)?;
        check(matches!(self.head_dim, 64 | 128), "head_dim", "64 or 128", self.head_dim)?;
        Ok(if self.head_dim == 64 { dim_64 } else { dim_128 })
    }

    /// From scores to exponents of two.
    fn scale(self) -> f32 {
        LOG2_E / (self.head_dim as f32).sqrt()
    }
}

fn window_or_all(window: Option<u32>) -> i32 {
    window.unwrap_or(NO_WINDOW).clamp(1, NO_WINDOW) as i32
}

/// Scratch memory of decode attention for launches of up to `max_sequences`, and the number of
/// splits of each, which is a part of the launch shape and so of the sums' order.
#[derive(Debug)]
pub struct DecodePlan {
    heads: Heads,
    max_sequences: usize,
    num_multiprocessors: usize,
    partial: DeviceBuffer,
    partial_ml: DeviceBuffer,
    arrived: DeviceBuffer,
}

impl DecodePlan {
    /// Allocates for launches of 1 to `max_sequences`.
    pub fn new(device: &Device, heads: Heads, max_sequences: usize) -> Result<Self> {
        heads.choose(Kernel::DecodeAttention64, Kernel::DecodeAttention128)?;
        let num_multiprocessors = device.num_multiprocessors() as usize;
        let splits = |n| n * num_splits(n * heads.num_kv_heads, num_multiprocessors);
        let max_splits = (1..=max_sequences).map(splits).max().unwrap_or(1);
        let max_parts = max_splits * heads.num_heads;
        let arrived = device.allocate(max_sequences * heads.num_kv_heads * size_of::<u32>())?;
        arrived.fill(0)?;
        Ok(Self {
            heads,
            max_sequences,
            num_multiprocessors,
            partial: device.allocate(max_parts * heads.head_dim * size_of::<f32>())?,
            partial_ml: device.allocate(max_parts * 2 * size_of::<f32>())?,
            arrived,
        })
    }
}

/// As many splits as fill the device: two thread blocks fit on a multiprocessor at once.
fn num_splits(num_pairs: usize, num_multiprocessors: usize) -> usize {
    (2 * num_multiprocessors / num_pairs.max(1)).max(1)
}

impl Kernels {
    /// Enqueues attention of one token a sequence, with its rotation and the write of its key and
    /// value into the cache. `out: [num_sequences, num_heads, head_dim]` bf16.
    ///
    /// # Safety
    /// Every address names as much memory as its shape says, 16-byte aligned, alive until the
    /// stream has come to the launch; lengths fit the table and `cos_sin`, and the table's blocks
    /// within the window are blocks of the cache, the last one of no other sequence. Launches that
    /// share a plan go through one stream. No kernel that is still in the stream writes lengths,
    /// table, angles or the cache's older rows: they are read before it has ended.
    pub unsafe fn decode_attention(
        &self,
        plan: &DecodePlan,
        input: &AttentionInput,
        rows: &DecodeRows,
        out: u64,
    ) -> Result<()> {
        let DecodeRows { qkv, cos_sin, length, num_sequences } = *rows;
        let heads = input.heads;
        let kernel = heads.choose(Kernel::DecodeAttention64, Kernel::DecodeAttention128)?;
        let name = "num_kv_heads";
        check(heads == plan.heads, name, "those of the plan, like all heads", heads.num_kv_heads)?;
        let range = "at most the plan's max_sequences and 65535";
        let max_sequences = plan.max_sequences.min(65_535);
        check(num_sequences <= max_sequences, "num_sequences", range, num_sequences)?;
        if num_sequences == 0 {
            return Ok(());
        }
        let splits = num_splits(num_sequences * heads.num_kv_heads, plan.num_multiprocessors);
        let grid = (splits as u32, heads.num_kv_heads as u32, num_sequences as u32);
        let scratch = (plan.partial.address(), plan.partial_ml.address(), plan.arrived.address());
        let (num_heads, max_blocks) = (heads.num_heads as i32, input.max_blocks as i32);
        let (window, scale) = (window_or_all(input.window), heads.scale());
        let mut launch = self.launch(kernel);
        launch.arg(&out).arg(&scratch.0).arg(&scratch.1).arg(&scratch.2).arg(&qkv).arg(&cos_sin);
        launch.arg(&input.cache).arg(&input.block_table).arg(&length).arg(&num_heads);
        launch.arg(&max_blocks).arg(&window).arg(&scale);
        // SAFETY: heads and sequences were checked against the plan, whose scratch memory holds
        // every launch up to its limit; the rest of the memory is the caller's word.
        unsafe { launch.launch(shape_of(kernel, grid, NUM_THREADS)) }
    }

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
        if num_tiles == 0 {
            return Ok(());
        }
        check(num_tiles <= 65_535, "num_tiles", "at most 65535", num_tiles)?;
        let grid = (heads.num_kv_heads as u32, num_tiles as u32, 1);
        let (num_heads, max_blocks) = (heads.num_heads as i32, input.max_blocks as i32);
        let (window, scale) = (window_or_all(input.window), heads.scale());
        let mut launch = self.launch(kernel);
        // Blocks that come before lie where there is room for them by then: unevenly.
        launch.in_turn();
        launch.arg(&out).arg(&query).arg(&input.cache).arg(&input.block_table).arg(&tiles);
        launch.arg(&num_heads).arg(&max_blocks).arg(&window).arg(&scale);
        // SAFETY: the heads were checked; the memory is the caller's word.
        unsafe { launch.launch(shape_of(kernel, grid, NUM_THREADS)) }
    }
}

impl Kernels {
    /// Whether [`prefill_attention_wgmma`](Self::prefill_attention_wgmma) runs on this device.
    pub fn has_prefill_attention_wgmma(&self) -> bool {
        self.device().is_hopper()
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
        let num_splits = (num_multiprocessors as usize / num_pairs).clamp(1, MAX_SPLITS);
        let kernel = if num_splits > 1 {
            heads.choose(Kernel::PrefillAttentionParts64, Kernel::PrefillAttentionParts128)?
        } else {
            heads.choose(Kernel::PrefillAttentionWgmma64, Kernel::PrefillAttentionWgmma128)?
        };
        if num_tiles == 0 || num_tokens == 0 {
            return Ok(());
        }
        let range = "those of Hopper, which alone has this kernel";
        let ok = self.has_prefill_attention_wgmma();
        check(ok, "num_multiprocessors", range, num_multiprocessors as usize)?;
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
        let PrefillScratch { turns, partial, partial_ml, arrived } = self.prefill_scratch();
        let (turns, arrived) = (turns.address(), arrived.address());
        let (partial, partial_ml) = (partial.address(), partial_ml.address());
        let num_blocks = num_multiprocessors.min((num_pairs * num_splits) as u32);
        let num_splits = num_splits as i32;
        let (num_tiles, max_blocks) = (num_tiles as i32, input.max_blocks as i32);
        let (num_heads, num_kv_heads) = (num_heads as i32, num_kv_heads as i32);
        let (window, scale) = (window_or_all(input.window), heads.scale());
        let mut launch = self.launch(kernel);
        launch.arg(&query).arg(&cache).arg(&out).arg(&input.block_table).arg(&tiles).arg(&turns);
        launch.arg(&partial).arg(&partial_ml).arg(&arrived).arg(&num_tiles).arg(&num_splits);
        launch.arg(&num_heads).arg(&num_kv_heads).arg(&max_blocks).arg(&window).arg(&scale);
        // SAFETY: the heads were checked; the memory is the caller's word.
        unsafe { launch.launch(shape_of(kernel, (num_blocks, 1, 1), WGMMA_THREADS)) }
    }
}

/// Scratch memory of [`Kernels::prefill_attention_wgmma`]: for as many parts of tiles as there are
/// multiprocessors, which is as many as a launch has that cuts tiles into parts.
#[derive(Debug)]
pub(super) struct PrefillScratch {
    /// Two counters of pieces of work, zero between launches.
    turns: DeviceBuffer,
    partial: DeviceBuffer,
    partial_ml: DeviceBuffer,
    arrived: DeviceBuffer,
}

impl PrefillScratch {
    pub(super) fn new(device: &Device) -> Result<Self> {
        let num_multiprocessors = device.num_multiprocessors() as usize;
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

/// New tokens of one sequence in a prefill batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillSequence {
    /// Its row of the block table.
    pub sequence: usize,
    /// Its first new token's row of the query.
    pub first_token: usize,
    /// New tokens.
    pub num_tokens: usize,
    /// The first new token's position: the length of the cached prefix.
    pub first_position: usize,
}

/// A run of tokens that one thread block a K/V head works on, as the kernel reads it; the default
/// has none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefillTile {
    sequence: i32,
    first_token: i32,
    num_tokens: i32,
    first_position: i32,
}

// SAFETY: plain numbers without padding, laid out as in the kernel's source.
unsafe impl DeviceRepr for PrefillTile {}

/// Cuts sequences into tiles, within one and among them those with the most keys first: they take
/// longest. A sequence's tiles stay together, so that its keys are in the cache for all of them.
pub fn prefill_tiles(heads: Heads, sequences: &[PrefillSequence]) -> Vec<PrefillTile> {
    let tile_tokens = 2 * (HALF_ROWS / heads.group().clamp(1, MAX_GROUP));
    let mut tiles = Vec::new();
    let mut sequences = sequences.to_vec();
    sequences.sort_by_key(|it| std::cmp::Reverse(it.first_position + it.num_tokens));
    for sequence in sequences {
        for start in (0..sequence.num_tokens).step_by(tile_tokens).rev() {
            tiles.push(PrefillTile {
                sequence: sequence.sequence as i32,
                first_token: (sequence.first_token + start) as i32,
                num_tokens: (sequence.num_tokens - start).min(tile_tokens) as i32,
                first_position: (sequence.first_position + start) as i32,
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
        let sequence = |sequence, first_token, num_tokens, first_position| PrefillSequence {
            sequence,
            first_token,
            num_tokens,
            first_position,
        };
        let tiles = prefill_tiles(heads, &[sequence(0, 0, 43, 0), sequence(1, 43, 2, 100)]);
        let plain: Vec<_> = tiles
            .iter()
            .map(|tile| (tile.sequence, tile.first_token, tile.num_tokens, tile.first_position))
            .collect();
        assert_eq!(plain, [(1, 43, 2, 100), (0, 42, 1, 42), (0, 0, 42, 0)]);
    }

    #[test]
    fn splits_fill_the_device_and_never_vanish() {
        assert_eq!(num_splits(8, 132), 33);
        assert_eq!(num_splits(512, 132), 1);
        assert_eq!(num_splits(0, 132), 264);
    }

    #[test]
    fn heads_that_no_kernel_has_are_refused() {
        let choose = |num_heads, num_kv_heads, head_dim| {
            Heads { num_heads, num_kv_heads, head_dim }
                .choose(Kernel::DecodeAttention64, Kernel::DecodeAttention128)
        };
        assert_eq!(choose(24, 8, 64).unwrap(), Kernel::DecodeAttention64);
        for (num_heads, num_kv_heads, head_dim) in
            [(9, 1, 64), (7, 2, 64), (0, 1, 64), (4, 0, 64), (4, 1, 96), (1, 2, 128)]
        {
            assert!(choose(num_heads, num_kv_heads, head_dim).is_err());
        }
    }
}
