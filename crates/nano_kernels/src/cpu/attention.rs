//! Attention over the blocks of the KV cache: decoding rows and the rows of a prefill alike.
//!
//! A tile of rows and the query heads of one group share each read of their head's keys and values,
//! `NUM_KEYS` positions at a time, under a running softmax. Positions are cut at multiples of
//! `NUM_KEYS`, and those that a row may not see weigh exactly 0, so a row's result has the same
//! bits whatever rows are beside it and however the cache is cut into blocks.
//!
//! # Source
//! Milakov and Gimelshein, Online normalizer calculation for softmax, 2018; Dao et al.,
//! `FlashAttention`, 2022; Kwon et al., `PagedAttention`, 2023.

mod head;

use std::marker::PhantomData;
use std::ops::Range;

use super::element::Element;
use super::pool::Pool;
use super::shared::SharedMut;
use head::Head;

/// Positions whose scores are worked out at once.
const NUM_KEYS: usize = 32;
/// Queries of a tile, unless one row has more.
const MAX_QUERIES: usize = 48;
/// Scores below which a second thread costs more than it saves.
const MIN_PARALLEL_SCORES: usize = 1 << 10;

/// The shape of one layer's cache, `[num_blocks, k | v, num_kv_heads, strip]`.
///
/// A strip is one head's keys or values in a block, in words (see [`Element`]) as products read
/// them. Keys: `[num_words, block_size]`, so that neighbours are the same elements of neighbouring
/// tokens. Values: `[block_size, num_words]`, where word `i` of two elements holds those at `i` and
/// at `num_words + i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Heads of keys and values.
    pub num_kv_heads: usize,
    /// Token slots of a block.
    pub block_size: usize,
    /// Elements of a head, an even number.
    pub head_dim: usize,
}

impl KvShape {
    /// Words of a head.
    #[inline]
    pub fn num_words<E: Element>(&self) -> usize {
        self.head_dim / E::PER_WORD
    }

    /// Words of a block.
    pub fn block_len<E: Element>(&self) -> usize {
        2 * self.num_kv_heads * self.block_size * self.num_words::<E>()
    }

    /// Where one head's keys (`part` 0) or values (`part` 1) of a block start.
    #[inline]
    pub fn strip<E: Element>(&self, block: usize, part: usize, kv_head: usize) -> usize {
        let strip_len = self.block_size * self.num_words::<E>();
        ((block * 2 + part) * self.num_kv_heads + kv_head) * strip_len
    }
}

/// Rows of one sequence that attend together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Its first row among the rows of the step.
    pub first_row: usize,
    /// At least 1.
    pub num_rows: usize,
    /// The position of the first row.
    pub first_position: usize,
    /// Where the sequence's block table is among those of the step; the block of position `p` is
    /// entry `p / block_size`.
    pub block_table: Range<usize>,
}

/// Cuts the rows of a sequence into tiles for a model with `group` query heads to each head of keys.
pub fn tiles(rows: &Tile, group: usize) -> impl Iterator<Item = Tile> {
    let most = (MAX_QUERIES / group).max(1);
    (0..rows.num_rows).step_by(most).map(move |first| Tile {
        first_row: rows.first_row + first,
        num_rows: most.min(rows.num_rows - first),
        first_position: rows.first_position + first,
        block_table: rows.block_table.clone(),
    })
}

/// What attends to what.
#[derive(Clone, Copy, Debug)]
pub struct AttentionInput<'a> {
    /// Each row of the step is in one of them; in the order of their rows.
    pub tiles: &'a [Tile],
    /// Those of all sequences of the step.
    pub block_tables: &'a [u32],
    /// `[num_rows, num_heads, head_dim]`, rotated.
    pub query: &'a [f32],
    /// Heads of queries.
    pub num_heads: usize,
    /// One layer's cache.
    pub cache: &'a [u32],
    /// Its shape.
    pub shape: KvShape,
    /// The positions that a row sees, itself included; all, if `None`.
    pub window: Option<usize>,
}

/// The memory of each of an operator's tasks, kept for the next time.
#[derive(Debug, Default)]
pub struct Scratch(Vec<Head>);

/// The attention of each row to itself and everything before it, or to the last `window` of these
/// positions, written into `output: [num_rows, num_heads, head_dim]`.
///
/// # Panics
/// If the tiles are not in the order of their rows, or name what is not there.
pub fn paged_attention<E: Element>(
    pool: &mut Pool,
    input: &AttentionInput<'_>,
    scratch: &mut Scratch,
    output: &mut [f32],
) {
    let is_before = |tile: &Tile, next: &Tile| tile.first_row + tile.num_rows <= next.first_row;
    assert!(input.tiles.is_sorted_by(is_before), "no row is in two tiles");
    let num_items = input.tiles.len() * input.shape.num_kv_heads;
    let scores = |tile: &Tile| tile.num_rows * (tile.first_position + tile.num_rows);
    let num_scores = input.tiles.iter().map(scores).sum::<usize>() * input.num_heads;
    let num_tasks =
        if num_scores < MIN_PARALLEL_SCORES { 1 } else { num_items.min(8 * pool.num_threads()) };
    let heads = &mut scratch.0;
    heads.resize_with(num_tasks.max(heads.len()), Head::default);
    let (isa, output) = (pool.isa(), SharedMut::new(output));
    pool.each(&mut heads[..num_tasks], |task, head| {
        head.make_room::<E>(input);
        for item in (task..num_items).step_by(num_tasks) {
            let (tile, kv_head) =
                (&input.tiles[item / input.shape.num_kv_heads], item % input.shape.num_kv_heads);
            let element = PhantomData::<E>;
            isa.run(head::Attend { isa, head, input, tile, kv_head, output: &output, element });
        }
    });
}
