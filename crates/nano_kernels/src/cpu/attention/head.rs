//! The queries of one tile over their one head of keys and values.

use std::marker::PhantomData;
use std::ops::Range;

use super::{AttentionInput, MAX_QUERIES, NUM_KEYS, Tile};
use crate::cpu::LANES;
use crate::cpu::element::Element;
use crate::cpu::exp::exp;
use crate::cpu::isa::{Isa, Kernel, mul_add, prefetch};
use crate::cpu::product::tile::{Sums, TileRows, run_tile};
use crate::cpu::product::tiles;
use crate::cpu::shared::SharedMut;

/// Queries whose sums of values are kept in registers together.
const QUERIES_AT_ONCE: usize = 4;

/// Scratch memory of one task.
#[derive(Debug, Default)]
pub(super) struct Head {
    /// The queries as products read them, `[num_tiles, num_words, tile_rows]`.
    query: Vec<u32>,
    /// `[2, num_words, LANES]`.
    keys: Vec<u32>,
    /// `[NUM_KEYS, num_words]`.
    values: Vec<u32>,
    /// `[num_queries, head_dim]`.
    sums: Vec<f32>,
    /// `[num_queries, NUM_KEYS]`: scores, then weights.
    weights: Vec<[f32; NUM_KEYS]>,
    /// The largest score so far and the sum of weights relative to it, for each query.
    running: Vec<(f32, f32)>,
}

impl Head {
    /// Makes it large enough.
    pub(super) fn make_room<E: Element>(&mut self, input: &AttentionInput<'_>) {
        let shape = input.shape;
        let num_queries = MAX_QUERIES.max(input.num_heads / shape.num_kv_heads);
        let num_words = shape.num_words::<E>();
        let whole = num_queries.next_multiple_of(QUERIES_AT_ONCE);
        self.query.resize(num_queries * num_words, 0);
        self.keys.resize(2 * LANES * num_words, 0);
        self.values.resize(NUM_KEYS * num_words, 0);
        self.sums.resize(whole * shape.head_dim, 0.0);
        self.weights.resize(whole, [0.0; NUM_KEYS]);
        self.running.resize(num_queries, (f32::NEG_INFINITY, 0.0));
    }
}

pub(super) struct Attend<'a, 'b, E: Element> {
    pub(super) isa: Isa,
    pub(super) head: &'a mut Head,
    pub(super) input: &'a AttentionInput<'a>,
    pub(super) tile: &'a Tile,
    pub(super) kv_head: usize,
    pub(super) output: &'a SharedMut<'b, f32>,
    pub(super) element: PhantomData<E>,
}

impl<E: Element> Kernel for Attend<'_, '_, E> {
    #[inline(always)]
    fn run<const FMA: bool>(mut self) {
        let &AttentionInput { shape, window, .. } = self.input;
        self.pack_query();
        let end = self.tile.first_position + self.tile.num_rows;
        let first =
            window.map_or(0, |window| (self.tile.first_position + 1).saturating_sub(window));
        for start in (first / NUM_KEYS * NUM_KEYS..end).step_by(NUM_KEYS) {
            // Of the lanes outside, no row sees anything: what lies there may be no number.
            let lanes = first.max(start) - start..end.min(start + NUM_KEYS) - start;
            self.read(start, lanes.clone());
            self.ask_for(start + NUM_KEYS..end.min(start + 2 * NUM_KEYS));
            self.score();
            self.weigh::<FMA>(start);
            self.add_values::<FMA>(lanes);
        }
        let queries = self.head.sums.chunks_exact(shape.head_dim).zip(&self.head.running);
        for (query, (sums, (_, total))) in queries.take(self.num_queries()).enumerate() {
            let scale = total.recip();
            // SAFETY: a tile's rows and a group's heads are one item's.
            let output = unsafe { self.output.slice(self.offset(query), shape.head_dim) };
            output.iter_mut().zip(sums).for_each(|(output, sum)| *output = sum * scale);
        }
    }
}

impl<E: Element> Attend<'_, '_, E> {
    #[inline(always)]
    fn group(&self) -> usize {
        self.input.num_heads / self.input.shape.num_kv_heads
    }

    #[inline(always)]
    fn num_queries(&self) -> usize {
        self.tile.num_rows * self.group()
    }

    /// Where a query of the tile, one of `[num_rows, group]`, is among those of the step.
    #[inline(always)]
    fn offset(&self, query: usize) -> usize {
        let row = self.tile.first_row + query / self.group();
        let head = self.kv_head * self.group() + query % self.group();
        (row * self.input.num_heads + head) * self.input.shape.head_dim
    }

    #[inline(always)]
    fn pack_query(&mut self) {
        let shape = self.input.shape;
        let num_words = shape.num_words::<E>();
        for (first, tile_rows) in tiles(self.num_queries()) {
            for index in 0..tile_rows {
                let query = &self.input.query[self.offset(first + index)..][..shape.head_dim];
                let tile = &mut self.head.query[first * num_words..][..tile_rows * num_words];
                let words = tile.iter_mut().skip(index).step_by(tile_rows);
                for (word, values) in words.zip(query.chunks_exact(E::PER_WORD)) {
                    *word = E::word_of(values);
                }
            }
        }
        self.head.sums.fill(0.0);
        self.head.running.fill((f32::NEG_INFINITY, 0.0));
    }

    /// Copies keys and values: position `start + lane` to each of the lanes.
    #[inline(always)]
    fn read(&mut self, start: usize, lanes: Range<usize>) {
        let AttentionInput { shape, cache, block_tables, .. } = self.input;
        let num_words = shape.num_words::<E>();
        let table = &block_tables[self.tile.block_table.clone()];
        let mut lane = lanes.start;
        while lane < lanes.end {
            let position = start + lane;
            let (block, offset) = (position / shape.block_size, position % shape.block_size);
            let block = table[block] as usize;
            // To the end of the block, of the panel or of the lanes.
            let len = (shape.block_size - offset).min(LANES - lane % LANES).min(lanes.end - lane);
            let keys = &cache[shape.strip::<E>(block, 0, self.kv_head)..];
            let panel =
                &mut self.head.keys[lane / LANES * LANES * num_words..][..LANES * num_words];
            let rows = panel.chunks_exact_mut(LANES).zip(keys.chunks(shape.block_size));
            if len == LANES {
                for (lanes, keys) in rows {
                    lanes.copy_from_slice(&keys[offset..offset + LANES]);
                }
            } else {
                for (lanes, keys) in rows {
                    lanes[lane % LANES..][..len].copy_from_slice(&keys[offset..offset + len]);
                }
            }
            let values = shape.strip::<E>(block, 1, self.kv_head) + offset * num_words;
            self.head.values[lane * num_words..][..len * num_words]
                .copy_from_slice(&cache[values..][..len * num_words]);
            lane += len;
        }
    }

    /// Asks for the keys and values of positions that are read next: blocks are scattered, so the
    /// processor sees no stream to read ahead in.
    #[inline(always)]
    fn ask_for(&self, positions: Range<usize>) {
        let AttentionInput { shape, cache, block_tables, .. } = self.input;
        let strip_len = shape.block_size * shape.num_words::<E>();
        let table = &block_tables[self.tile.block_table.clone()];
        let mut position = positions.start;
        while position < positions.end {
            let block = table[position / shape.block_size] as usize;
            for part in 0..2 {
                prefetch(&cache[shape.strip::<E>(block, part, self.kv_head)..][..strip_len]);
            }
            position += shape.block_size - position % shape.block_size;
        }
    }

    #[inline(always)]
    fn score(&mut self) {
        let num_words = self.input.shape.num_words::<E>();
        let (first_panel, second_panel) = self.head.keys.split_at(num_words * LANES);
        for (first, tile_rows) in tiles(self.num_queries()) {
            let query = &self.head.query[first * num_words..][..tile_rows * num_words];
            let mut sums = Sums::default();
            let rows = TileRows { words: query, num_rows: tile_rows };
            run_tile::<E>(self.isa, rows, [first_panel, second_panel], None, &mut sums);
            let [low, high] = &sums;
            let weights = self.head.weights[first..][..tile_rows].iter_mut();
            for (weights, (low, high)) in weights.zip(low.iter().zip(high)) {
                weights[..LANES].copy_from_slice(low);
                weights[LANES..].copy_from_slice(high);
            }
        }
    }

    /// Turns scores into weights and shrinks the sums so far if a larger score came.
    #[inline(always)]
    fn weigh<const FMA: bool>(&mut self, start: usize) {
        let head_dim = self.input.shape.head_dim;
        let scale = (head_dim as f32).sqrt().recip();
        let group = self.group();
        let num_queries = self.num_queries();
        let Head { weights, running, sums, .. } = &mut *self.head;
        let queries = weights.iter_mut().zip(running).zip(sums.chunks_exact_mut(head_dim));
        for (query, ((weights, (largest, total)), sums)) in queries.take(num_queries).enumerate() {
            let position = self.tile.first_position + query / group;
            let first = self.input.window.map_or(0, |window| (position + 1).saturating_sub(window));
            let (low, high) = (first as isize - start as isize, position as isize - start as isize);
            for (lane, weight) in weights.iter_mut().enumerate() {
                let lane = lane as isize;
                *weight =
                    if lane < low || lane > high { f32::NEG_INFINITY } else { *weight * scale };
            }
            // NaN is passed on: a row that holds one is no number as a whole.
            let larger = |a: f32, b: f32| if a > b || a.is_nan() { a } else { b };
            let chunk = reduced(weights, larger);
            let now = larger(*largest, chunk);
            if now == f32::NEG_INFINITY {
                // This row sees none of them.
                weights.fill(0.0);
                continue;
            }
            if now > *largest {
                let shrink = exp::<FMA>(*largest - now);
                *total *= shrink;
                for sum in sums.iter_mut() {
                    *sum *= shrink;
                }
            }
            *largest = now;
            for weight in weights.iter_mut() {
                *weight = exp::<FMA>(*weight - now);
            }
            *total += reduced(weights, |a, b| a + b);
        }
    }

    #[inline(always)]
    fn add_values<const FMA: bool>(&mut self, lanes: Range<usize>) {
        let head_dim = self.input.shape.head_dim;
        let num_words = self.input.shape.num_words::<E>();
        let num_queries = self.num_queries();
        let Head { weights, sums, values, .. } = &mut *self.head;
        let weights = weights.chunks_exact(QUERIES_AT_ONCE);
        let queries = sums.chunks_exact_mut(QUERIES_AT_ONCE * head_dim).zip(weights);
        for (sums, weights) in queries.take(num_queries.div_ceil(QUERIES_AT_ONCE)) {
            let mut word = 0;
            while word + LANES <= num_words {
                add_words::<E, FMA, LANES>(sums, weights, values, lanes.clone(), word);
                word += LANES;
            }
            while word < num_words {
                add_words::<E, FMA, 1>(sums, weights, values, lanes.clone(), word);
                word += 1;
            }
        }
    }
}

/// All of them by `f`, in halves that are spelled out: a loop of changing width stays a loop.
#[inline(always)]
fn reduced(values: &[f32; NUM_KEYS], f: impl Fn(f32, f32) -> f32) -> f32 {
    let lanes: [f32; LANES] = std::array::from_fn(|lane| f(values[lane], values[lane + LANES]));
    let eight: [f32; 8] = std::array::from_fn(|lane| f(lanes[lane], lanes[lane + 8]));
    let four: [f32; 4] = std::array::from_fn(|lane| f(eight[lane], eight[lane + 4]));
    f(f(four[0], four[2]), f(four[1], four[3]))
}

/// Adds the elements of words `word..word + WIDTH` of all values, weighed, to the sums of a few
/// queries.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "the indices name registers")]
fn add_words<E: Element, const FMA: bool, const WIDTH: usize>(
    sums: &mut [f32],
    weights: &[[f32; NUM_KEYS]],
    values: &[u32],
    lanes: Range<usize>,
    word: usize,
) {
    let head_dim = sums.len() / QUERIES_AT_ONCE;
    let num_words = head_dim / E::PER_WORD;
    // One array for each element of a word; a type with one leaves the second alone.
    let mut own = [[[0.0_f32; WIDTH]; 2]; QUERIES_AT_ONCE];
    for (own, sums) in own.iter_mut().zip(sums.chunks_exact(head_dim)) {
        for (part, own) in own.iter_mut().enumerate().take(E::PER_WORD) {
            own.copy_from_slice(&sums[part * num_words + word..][..WIDTH]);
        }
    }
    let values = &values[word..];
    for key in lanes {
        let Some(words) = values.get(key * num_words..).and_then(<[_]>::first_chunk::<WIDTH>)
        else {
            break;
        };
        for part in 0..E::PER_WORD {
            let value: [f32; WIDTH] = std::array::from_fn(|at| E::of_word(words[at], part).widen());
            for query in 0..QUERIES_AT_ONCE {
                for at in 0..WIDTH {
                    let sum = &mut own[query][part][at];
                    *sum = mul_add::<FMA>(weights[query][key], value[at], *sum);
                }
            }
        }
    }
    for (own, sums) in own.iter().zip(sums.chunks_exact_mut(head_dim)) {
        for (part, own) in own.iter().enumerate().take(E::PER_WORD) {
            sums[part * num_words + word..][..WIDTH].copy_from_slice(own);
        }
    }
}
