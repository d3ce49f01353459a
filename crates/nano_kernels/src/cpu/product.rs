//! Products of a step's rows with a parameter matrix.
//!
//! A decode step reads every parameter once, so it is as quick as memory gives them; from 8 to 14
//! rows on arithmetic is the limit. A tile holds the sums of up to `MAX_TILE_ROWS` rows with two
//! panels in registers while it walks down the inputs. A sum has one lane and adds its inputs in
//! their order, so a row has the same result in any batch.

#[cfg(target_arch = "x86_64")]
mod avx512;
pub(super) mod tile;

use std::marker::PhantomData;
use std::ops::Range;

use super::LANES;
use super::element::Element;
use super::exp::silu;
use super::isa::{Isa, Kernel};
use super::matrix::PackedMatrix;
use super::matrix::coded::{CODED, PLAIN};
use super::norm::{Norm, Scale};
use super::pool::Pool;
use super::shared::SharedMut;
use tile::{Ahead, Decoded, Sums, TileRows, run_first_tile, run_only_tile, run_tile};

/// Rows whose sums with two panels, one word of each panel and one input fit into 32 registers.
pub(super) const MAX_TILE_ROWS: usize = 12;
/// Tiles that share each read of parameters.
const MAX_TILES: usize = 4;
/// Words of a panel that are read at once: those of two panels are a third to half of a first cache.
const BLOCK_WORDS: usize = 128;
/// Numbers of rows at which blocks of plain words pay: fewer wait for memory alone, whose stream the
/// processor sees by itself; more wait for arithmetic alone. Codes of more than one tile are decoded
/// block by block anyway.
const BLOCK_ROWS: Range<usize> = 6..MAX_TILES * MAX_TILE_ROWS + 1;
/// Words that are packed at once, in memory of a fixed size.
const PACK_WORDS: usize = 256;
/// Tasks for each thread, each time half of what is left: long ones first, since memory is read
/// best in one go, and short ones last, so that a thread that is held up is waited for briefly.
const ROUNDS: usize = 4;

/// The rows of a step in the order in which tiles read them: `[num_tiles, num_words, tile_rows]`.
#[derive(Debug, Default)]
pub struct PackedRows<E: Element> {
    words: Vec<u32>,
    /// See [`tiles`].
    tiles: Vec<(usize, usize)>,
    num_rows: usize,
    columns: usize,
    num_words: usize,
    element: PhantomData<E>,
}

/// What becomes of the sums of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// They are the output.
    Write,
    /// They are added to it.
    Add,
}

/// The tiles of `num_rows`, `(first_row, num_rows)`: as few as can be, as even as can be.
pub(super) fn tiles(num_rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let num_tiles = num_rows.div_ceil(MAX_TILE_ROWS);
    let bound = move |tile: usize| tile * num_rows / num_tiles.max(1);
    (0..num_tiles).map(move |tile| (bound(tile), bound(tile + 1) - bound(tile)))
}

impl<E: Element> PackedRows<E> {
    /// Takes over `rows: [num_rows, columns]`, normed first if there is a norm.
    ///
    /// # Panics
    /// If the sizes do not match.
    pub fn pack(&mut self, pool: &mut Pool, rows: &[f32], columns: usize, norm: Option<Norm<'_>>) {
        assert!(rows.len().is_multiple_of(columns), "whole rows");
        (self.num_rows, self.columns) = (rows.len() / columns, columns);
        self.num_words = columns.div_ceil(E::PER_WORD);
        self.words.resize(self.num_rows * self.num_words, 0);
        let (isa, num_rows, num_words) = (pool.isa(), self.num_rows, self.num_words);
        self.tiles.clear();
        self.tiles.extend(tiles(num_rows));
        let (tiles, words) = (&self.tiles, SharedMut::new(&mut self.words));
        pool.run(tiles.len(), &|task| {
            let (first, tile_rows) = tiles[task];
            // SAFETY: a tile is one task's.
            let tile = unsafe { words.slice(first * num_words, tile_rows * num_words) };
            let rows = &rows[first * columns..][..tile_rows * columns];
            pack_tile::<E>(isa, rows, columns, norm, tile);
        });
    }

    /// Some words of a tile.
    fn tile(&self, (first, num_rows): (usize, usize), words: Range<usize>) -> TileRows<'_> {
        let start = first * self.num_words + words.start * num_rows;
        TileRows { words: &self.words[start..][..words.len() * num_rows], num_rows }
    }
}

/// Packs the rows of one tile, `[num_words, tile_rows]`. Words are spread in plain code: as a part of
/// the kernel that would become an instruction that scatters a vector, which is slow.
fn pack_tile<E: Element>(
    isa: Isa,
    rows: &[f32],
    columns: usize,
    norm: Option<Norm<'_>>,
    tile: &mut [u32],
) {
    let tile_rows = rows.len() / columns;
    let mut values = [0.0; 2 * PACK_WORDS];
    let mut words = [0; PACK_WORDS];
    for (index, row) in rows.chunks_exact(columns).enumerate() {
        let mut scale = 1.0;
        if let Some(norm) = norm {
            isa.run(Scale { row, eps: norm.eps, output: &mut scale });
        }
        let blocks = tile.chunks_mut(PACK_WORDS * tile_rows);
        for (block, (tile, row)) in blocks.zip(row.chunks(PACK_WORDS * E::PER_WORD)).enumerate() {
            let first = block * PACK_WORDS * E::PER_WORD;
            let weight = norm.map(|norm| &norm.weight[first..][..row.len()]);
            let num_words = row.len().div_ceil(E::PER_WORD);
            // The second half of the last word of an odd row.
            values[num_words * E::PER_WORD - 1] = 0.0;
            let (values, words) = (&mut values[..], &mut words[..num_words]);
            isa.run(Narrow { row, weight, scale, values, words, element: PhantomData::<E> });
            let places = tile.iter_mut().skip(index).step_by(tile_rows);
            places.zip(&*words).for_each(|(place, word)| *place = *word);
        }
    }
}

/// `row`, or `row * scale * weight`, as words.
struct Narrow<'a, E: Element> {
    row: &'a [f32],
    weight: Option<&'a [f32]>,
    scale: f32,
    values: &'a mut [f32],
    words: &'a mut [u32],
    element: PhantomData<E>,
}

impl<E: Element> Kernel for Narrow<'_, E> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        match self.weight {
            None => self.values[..self.row.len()].copy_from_slice(self.row),
            Some(weight) => {
                for ((value, x), weight) in self.values.iter_mut().zip(self.row).zip(weight) {
                    *value = x * self.scale * weight;
                }
            }
        }
        for (word, values) in self.words.iter_mut().zip(self.values.chunks_exact(E::PER_WORD)) {
            *word = E::word_of(values);
        }
    }
}

/// Makes sums of a pair of panels with rows, whose words are given, those of parameters, and writes
/// `silu(gate) * up` over the first panel's.
struct Finish<'a, E: Element> {
    weight: &'a PackedMatrix<E>,
    pair: usize,
    words: &'a [u32],
    sums: [&'a mut [[f32; LANES]]; 2],
}

impl<E: Element> Kernel for Finish<'_, E> {
    #[inline(always)]
    fn run<const FMA: bool>(mut self) {
        if let Some(code) = self.weight.code() {
            for (panel, sums) in (2 * self.pair..).zip(&mut self.sums) {
                code.correct::<E>(panel, self.words, sums);
            }
        }
        if self.weight.is_gated() {
            let [gates, ups] = self.sums;
            for (gates, ups) in gates.iter_mut().zip(ups) {
                for (gate, up) in gates.iter_mut().zip(ups) {
                    *gate = silu::<FMA>(*gate) * *up;
                }
            }
        }
    }
}

/// `output = rows · weightᵀ`, or added to it: `[num_rows, weight.width()]`. With a gated matrix the
/// sums are `silu(gate) * up`.
///
/// # Panics
/// If the sizes do not match.
pub fn product<E: Element>(
    pool: &mut Pool,
    rows: &PackedRows<E>,
    weight: &PackedMatrix<E>,
    store: Store,
    output: &mut [f32],
) {
    let sizes = (rows.num_rows * weight.width(), rows.columns);
    assert_eq!((output.len(), weight.columns()), sizes);
    let has_blocks = weight.code().is_some() || BLOCK_ROWS.contains(&rows.num_rows);
    let output = SharedMut::new(output);
    let product = Product { isa: pool.isa(), rows, weight, has_blocks, store, output };
    let num_threads = pool.num_threads();
    pool.run(ROUNDS * num_threads, &|task| {
        let pairs = task_pairs(task, num_threads, weight.num_pairs());
        if weight.code().is_some() && rows.tiles.len() == 1 {
            let mut sums = Sums::default();
            pairs.for_each(|pair| product.only_tile(pair, &mut sums));
        } else {
            let mut sums = std::array::from_fn(|_| Sums::default());
            let mut decoded = [[[0; LANES]; BLOCK_WORDS]; 2];
            pairs.for_each(|pair| product.tiles(pair, &mut sums, &mut decoded));
        }
    });
}

/// What is asked of [`product`].
struct Product<'a, E: Element> {
    isa: Isa,
    rows: &'a PackedRows<E>,
    weight: &'a PackedMatrix<E>,
    /// Whether panels are read block by block, and the next one is asked for.
    has_blocks: bool,
    store: Store,
    output: SharedMut<'a, f32>,
}

impl<E: Element> Product<'_, E> {
    /// The outputs of a coded pair of panels for rows that are one tile.
    fn only_tile(&self, pair: usize, sums: &mut Sums) {
        let tile = (0, self.rows.num_rows);
        let rows = self.rows.tile(tile, 0..self.rows.num_words);
        run_only_tile(self.isa, rows, self.weight.pair(pair), sums);
        self.finish(pair, tile, sums);
    }

    /// The outputs of a pair of panels. A block of the pair stays in the first cache while a few
    /// tiles go over it, and meanwhile they ask for the next one: between them the processor sees no
    /// stream to read ahead in.
    fn tiles(&self, pair: usize, sums: &mut [Sums; MAX_TILES], decoded: &mut Decoded) {
        let num_words = self.rows.num_words;
        let block_words = if self.has_blocks { BLOCK_WORDS } else { num_words.max(1) };
        for tiles in self.rows.tiles.chunks(MAX_TILES) {
            for ([first, second], (_, num_rows)) in sums.iter_mut().zip(tiles) {
                first[..*num_rows].fill([0.0; LANES]);
                second[..*num_rows].fill([0.0; LANES]);
            }
            for start in (0..num_words).step_by(block_words) {
                let words = start..num_words.min(start + block_words);
                self.block(pair, words, tiles, sums, decoded);
            }
            tiles.iter().zip(&mut *sums).for_each(|(tile, sums)| self.finish(pair, *tile, sums));
        }
    }

    /// Where the block behind one lies, if it is not the last.
    fn next(&self, pair: usize, words: &Range<usize>) -> (usize, Range<usize>) {
        let num_words = self.rows.num_words;
        let behind = words.end..num_words.min(words.end + words.len());
        let last = self.weight.num_pairs() - 1;
        if behind.is_empty() { (last.min(pair + 1), 0..words.len()) } else { (pair, behind) }
    }

    /// Adds a block of a pair to the sums of a few tiles. Of codes, the first tile decodes for the others.
    fn block(
        &self,
        pair: usize,
        words: Range<usize>,
        tiles: &[(usize, usize)],
        sums: &mut [Sums],
        decoded: &mut Decoded,
    ) {
        let (next_pair, next_words) = self.next(pair, &words);
        let mut tiles = tiles.iter().zip(sums);
        let (panels, next) = if self.weight.code().is_some() {
            let place = |word: usize| 2 * LANES * (word / PLAIN * CODED);
            let codes = |pair: usize, words: Range<usize>| {
                &self.weight.pair(pair)[place(words.start)..place(words.end)]
            };
            let (block, next) = (codes(pair, words.clone()), codes(next_pair, next_words));
            if let Some((tile, sums)) = tiles.next() {
                let rows = self.rows.tile(*tile, words.clone());
                run_first_tile(self.isa, rows, block, next, sums, decoded);
            }
            let panels = decoded.each_ref().map(|panel| panel[..words.len()].as_flattened());
            // The first tile has asked for a third. The others ask in half of their steps for the rest,
            // and in the other half for it again and for what lies behind: with 16 rows that is 15 %
            // quicker than asking once in all steps.
            let rest = &next[next.len() / 3..];
            (panels, rest.split_at(rest.len() / 2).into())
        } else {
            let panels = |pair: usize, words: Range<usize>| {
                let panels = self.weight.pair(pair).split_at(self.rows.num_words * LANES);
                <[_; 2]>::from(panels).map(|panel| &panel[words.start * LANES..words.end * LANES])
            };
            (panels(pair, words.clone()), panels(next_pair, next_words))
        };
        let num_turns = tiles.len();
        for (turn, (tile, sums)) in tiles.enumerate() {
            let ahead = self.has_blocks.then_some(Ahead { panels: next, num_turns, turn });
            run_tile::<E>(self.isa, self.rows.tile(*tile, words.clone()), panels, ahead, sums);
        }
    }

    /// Sums of a pair's panels, ready, become output.
    fn finish(&self, pair: usize, tile: (usize, usize), sums: &mut Sums) {
        let TileRows { words, num_rows } = self.rows.tile(tile, 0..self.rows.num_words);
        let of_rows = sums.each_mut().map(|sums| &mut sums[..num_rows]);
        self.isa.run(Finish { weight: self.weight, pair, words, sums: of_rows });
        let pair_columns = if self.weight.is_gated() { LANES } else { 2 * LANES };
        let width = self.weight.width();
        let columns = pair * pair_columns..width.min((pair + 1) * pair_columns);
        for row in 0..num_rows {
            for (sums, first) in sums.iter().zip(columns.clone().step_by(LANES)) {
                let len = LANES.min(columns.end - first);
                let place = (tile.0 + row) * width + first;
                // SAFETY: the columns of a pair of panels are one task's.
                let output = unsafe { self.output.slice(place, len) };
                store_sums(self.store, &sums[row], output);
            }
        }
    }
}

/// The pairs of panels of a task.
fn task_pairs(task: usize, num_threads: usize, num_pairs: usize) -> Range<usize> {
    let (round, thread) = (task / num_threads, task % num_threads);
    let taken =
        |rounds: usize| if rounds < ROUNDS { num_pairs - (num_pairs >> rounds) } else { num_pairs };
    let (start, len) = (taken(round), taken(round + 1) - taken(round));
    start + len * thread / num_threads..start + len * (thread + 1) / num_threads
}

#[inline]
fn store_sums(store: Store, sums: &[f32; LANES], output: &mut [f32]) {
    let each = |output: &mut [f32]| match store {
        Store::Write => output.copy_from_slice(&sums[..output.len()]),
        Store::Add => output.iter_mut().zip(sums).for_each(|(output, sum)| *output += sum),
    };
    // One vector, but for the last panel.
    match <&mut [f32; LANES]>::try_from(&mut *output) {
        Ok(output) => each(output),
        Err(_) => each(output),
    }
}
