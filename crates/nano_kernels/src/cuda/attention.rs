//! Paged attention: `kernels/decode_attention.cu`, `prefill_attention.cu` and
//! `prefill_attention_wgmma.cu`.

use std::cmp::Reverse;
use std::f32::consts::LOG2_E;

use cudarc::driver::DeviceRepr;

use super::kernels::{Arguments, Launch};
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
/// Token slots of a cache block.
const BLOCK_SIZE: u32 = 16;
/// Fewer cache blocks are not worth a part of their own: one for each warp.
const MIN_BLOCKS_PER_PART: u32 = 4;
/// Sequences of a launch that decodes, whose grid has no room for more parts.
const MAX_SEQUENCES: usize = 65_535;
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
    /// Those of [`DecodePlan::parts`], read when the launch runs.
    pub parts: u64,
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

/// A part of a sequence's keys, as the kernel reads it; the default is none.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DecodePart {
    sequence: i32,
    length: i32,
    index: i32,
    num_parts: i32,
}

// SAFETY: plain numbers without padding, laid out as in the kernel's source.
unsafe impl DeviceRepr for DecodePart {}

/// Scratch memory of decode attention for launches of up to `max_sequences`, and how each cuts its
/// sequences into parts, which the order of sums depends on.
#[derive(Debug)]
pub struct DecodePlan {
    heads: Heads,
    max_sequences: usize,
    window: Option<u32>,
    /// Parts that run at the same time: two thread blocks fit on a multiprocessor at once.
    parts_at_once: usize,
    partial: DeviceBuffer,
    partial_ml: DeviceBuffer,
    arrived: DeviceBuffer,
}

impl DecodePlan {
    /// Allocates for launches of 1 to `max_sequences`, all of a window of at most `window`.
    pub fn new(
        device: &Device,
        heads: Heads,
        max_sequences: usize,
        window: Option<u32>,
    ) -> Result<Self> {
        heads.choose(Kernel::DecodeAttention64, Kernel::DecodeAttention128)?;
        let parts_at_once = 2 * device.num_multiprocessors() / heads.num_kv_heads;
        let num_rows = num_parts(max_sequences, parts_at_once) * heads.num_heads;
        let arrived = device.allocate(max_sequences * heads.num_kv_heads * size_of::<u32>())?;
        arrived.fill(0)?;
        Ok(Self {
            heads,
            max_sequences,
            window,
            parts_at_once,
            partial: device.allocate(num_rows * heads.head_dim * size_of::<f32>())?,
            partial_ml: device.allocate(num_rows * 2 * size_of::<f32>())?,
            arrived,
        })
    }

    /// The parts of a launch for `num_sequences`, always as many for as many. A sequence has the
    /// length given, its new token counted; one of length 0, or beyond the lengths, is a padding
    /// row: it gets zeros, and nothing of it is written to the cache.
    pub fn parts(&self, lengths: &[u32], num_sequences: usize) -> Vec<DecodePart> {
        decode_parts(lengths, num_sequences, self.window, self.parts_at_once)
    }
}

/// As many as run at once, and enough for a long sequence among many short ones not to be the last
/// to end.
fn num_parts(num_sequences: usize, parts_at_once: usize) -> usize {
    let enough = parts_at_once.max(num_sequences + num_sequences / 2);
    if num_sequences == 0 { 0 } else { enough.min(MAX_SEQUENCES) }
}

/// Cuts sequences so that the largest part is as small as the number of parts allows. Those come
/// first: others fill the time that they take.
fn decode_parts(
    lengths: &[u32],
    num_sequences: usize,
    window: Option<u32>,
    parts_at_once: usize,
) -> Vec<DecodePart> {
    let max_parts = num_parts(num_sequences, parts_at_once);
    let length_of = |sequence: usize| lengths.get(sequence).copied().unwrap_or(0);
    let num_blocks: Vec<u32> = (0..num_sequences)
        .map(|it| length_of(it).min(window.unwrap_or(u32::MAX)).div_ceil(BLOCK_SIZE).max(1))
        .collect();
    let fits = |blocks: u32| {
        num_blocks.iter().map(|it| it.div_ceil(blocks) as usize).sum::<usize>() <= max_parts
    };
    let (mut blocks, mut most) =
        (MIN_BLOCKS_PER_PART, num_blocks.iter().copied().max().unwrap_or(1));
    while blocks < most {
        let middle = blocks.midpoint(most);
        if fits(middle) { most = middle } else { blocks = middle + 1 }
    }
    let mut order: Vec<usize> = (0..num_sequences).collect();
    order.sort_by_key(|&it| Reverse(num_blocks[it].div_ceil(num_blocks[it].div_ceil(blocks))));
    let mut parts = Vec::with_capacity(max_parts);
    for sequence in order {
        let num_parts = num_blocks[sequence].div_ceil(blocks) as i32;
        let (sequence, length) = (sequence as i32, length_of(sequence) as i32);
        parts.extend((0..num_parts).map(|index| DecodePart { sequence, length, index, num_parts }));
    }
    parts.resize(max_parts, DecodePart::default());
    parts
}

impl Kernels {
    /// Enqueues attention of one token a sequence, with its rotation and the write of its key and
    /// value into the cache. `out: [num_sequences, num_heads, head_dim]` bf16.
    ///
    /// # Safety
    /// Every address names as much memory as its shape says, 16-byte aligned, alive until the
    /// stream has come to the launch; the parts are the plan's for so many sequences, their
    /// lengths fit the table and `cos_sin`, and the table's blocks within the window are blocks of the cache, the last one of no other sequence. Launches that
    /// share a plan go through one stream. No kernel that is still in the stream writes parts,
    /// table, angles or the cache's older rows: they are read before it has ended.
    pub unsafe fn decode_attention(
        &self,
        plan: &DecodePlan,
        input: &AttentionInput,
        rows: &DecodeRows,
        out: u64,
    ) -> Result<()> {
        let DecodeRows { qkv, cos_sin, parts, num_sequences } = *rows;
        let heads = input.heads;
        let kernel = heads.choose(Kernel::DecodeAttention64, Kernel::DecodeAttention128)?;
        let name = "num_kv_heads";
        check(heads == plan.heads, name, "those of the plan, like all heads", heads.num_kv_heads)?;
        let num_parts = num_parts(num_sequences, plan.parts_at_once);
        let range = "at most the plan's max_sequences and 65535";
        let max_sequences = plan.max_sequences.min(MAX_SEQUENCES);
        check(num_sequences <= max_sequences, "num_sequences", range, num_sequences)?;
        let launch = Launch::new(kernel, [heads.num_kv_heads, num_parts], NUM_THREADS);
        #[rustfmt::skip]
        let arguments: &Arguments<'_> = &[
            &out, &plan.partial.address(), &plan.partial_ml.address(), &plan.arrived.address(), &qkv,
            &cos_sin, &input.cache, &input.block_table, &parts, &(heads.num_heads as i32),
            &(input.max_blocks as i32), &window_or_all(input.window), &heads.scale(),
        ];
        // SAFETY: heads and sequences were checked against the plan, whose scratch memory holds
        // every launch up to its limit; the rest of the memory is the caller's word.
        unsafe { self.launch(&launch, arguments) }
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
}

impl Kernels {
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
        let PrefillScratch { turns, partial, partial_ml, arrived } = self.prefill_scratch();
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
pub(super) struct PrefillScratch {
    /// Two counters of pieces of work, zero between launches.
    turns: DeviceBuffer,
    partial: DeviceBuffer,
    partial_ml: DeviceBuffer,
    arrived: DeviceBuffer,
}

impl PrefillScratch {
    pub(super) fn new(device: &Device) -> Result<Self> {
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
    sequences.sort_by_key(|it| Reverse(it.first_position + it.num_tokens));
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

    /// Of each sequence with a part, in their order: its number, and the number of its parts.
    fn counts(parts: &[DecodePart]) -> Vec<(i32, i32)> {
        let first = parts.iter().filter(|it| it.index == 0 && it.num_parts > 0);
        first.map(|it| (it.sequence, it.num_parts)).collect()
    }

    #[test]
    fn parts_cover_every_sequence_and_the_largest_is_as_small_as_can_be() {
        let parts = |lengths: &[u32], num_sequences, window| {
            let parts = decode_parts(lengths, num_sequences, window, 33);
            assert_eq!(parts.len(), 33.max(num_sequences * 3 / 2));
            let mut expected = counts(&parts).into_iter().flat_map(|(sequence, num_parts)| {
                (0..num_parts).map(move |index| (sequence, index, num_parts))
            });
            for part in parts.iter().filter(|it| it.num_parts > 0) {
                let length = lengths.get(part.sequence as usize).copied().unwrap_or(0);
                assert_eq!(part.length, length as i32);
                let found = (part.sequence, part.index, part.num_parts);
                assert_eq!(Some(found), expected.next());
            }
            assert_eq!(expected.next(), None);
            counts(&parts)
        };
        assert_eq!(parts(&[512], 1, None), [(0, 8)]);
        assert_eq!(parts(&[32_768], 1, None), [(0, 33)]);
        assert_eq!(parts(&[32_768], 1, Some(64)), [(0, 1)]);
        assert_eq!(parts(&[576; 16], 16, None), (0..16).map(|it| (it, 2)).collect::<Vec<_>>());
        assert_eq!(parts(&[576; 64], 64, None), (0..64).map(|it| (it, 1)).collect::<Vec<_>>());
        assert_eq!(parts(&[512, 1, 30_000], 4, None), [(2, 30), (0, 1), (1, 1), (3, 1)]);
        assert_eq!(parts(&[100, 2000, 300], 3, Some(160)), [(0, 2), (1, 3), (2, 3)]);
        assert_eq!(decode_parts(&[], 0, None, 33), []);
        assert_eq!(decode_parts(&[40], MAX_SEQUENCES, None, 33).len(), MAX_SEQUENCES);
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
