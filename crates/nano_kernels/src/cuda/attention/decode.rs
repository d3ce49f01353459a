//! Attention of one token a sequence: `kernels/decode_attention.cu`.

use std::cmp::Reverse;

use cudarc::driver::DeviceRepr;

use super::{AttentionInput, Heads, NUM_THREADS, window_or_all};
use crate::cuda::{Arguments, Device, DeviceBuffer, Kernel, Kernels, Launch, Result, check};

/// Token slots of a cache block.
const BLOCK_SIZE: u32 = 16;
/// Fewer cache blocks are not worth a part of their own: one for each warp.
const MIN_BLOCKS_PER_PART: u32 = 4;
/// Sequences of a launch that decodes, whose grid has no room for more parts.
const MAX_SEQUENCES: usize = 65_535;

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
    /// lengths fit the table and `cos_sin`, and the table's blocks within the window are blocks of
    /// the cache, the last one of no other sequence. Launches that share a plan go through one
    /// stream. No kernel that is still in the stream writes parts, table, angles or the cache's
    /// older rows: they are read before it has ended.
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
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
