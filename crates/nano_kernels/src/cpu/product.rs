//! Products of a step's rows with a parameter matrix.
//!
//! A decode step reads every parameter once, so it is as quick as memory gives them; from about 14
//! rows on arithmetic is the limit. A tile holds the sums of up to `MAX_TILE_ROWS` rows with two
//! panels in registers while it walks down the inputs. A sum has one lane and adds its inputs in
//! their order, so a row has the same result in any batch.

pub(super) mod coded;
pub(super) mod tile;

use std::ops::Range;

use super::LANES;
use super::element::Element;
use super::exp::silu;
use super::isa::{Isa, Kernel};
use super::matrix::PackedMatrix;
use super::matrix::coded::{CODED, Code, PLAIN};
use super::norm::Norm;
use super::pool::Pool;
use super::shared::SharedMut;
use coded::{run_first_tile, run_only_tile};
use tile::{Ahead, Sums, TileRows, run_tile};

/// Rows whose sums with two panels, one word of each panel and one input fit into 32 registers.
pub(super) const MAX_TILE_ROWS: usize = 12;
/// Tiles that share each read of parameters.
const MAX_TILES: usize = 4;
/// Words of a panel that are read at once: with those of its neighbour half a first cache.
const BLOCK_WORDS: usize = 128;
/// Numbers of rows at which blocks pay: fewer wait for memory alone, whose stream the processor
/// sees by itself; more wait for arithmetic alone.
const BLOCK_ROWS: Range<usize> = 6..MAX_TILES * MAX_TILE_ROWS + 1;
/// Words that are packed at once, in memory of a fixed size.
const PACK_WORDS: usize = 256;
/// Tasks for each thread, each time half of what is left: long ones first, since memory is read
/// best in one go, and short ones last, so that a thread that is held up is waited for briefly.
const ROUNDS: usize = 4;

/// The rows of a step in the order in which tiles read them: `[num_tiles, num_words, tile_rows]`.
#[derive(Debug, Default)]
pub struct PackedRows<E: Element> {
    words: Vec<E::Word>,
    num_rows: usize,
    num_words: usize,
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
    pub fn pack(&mut self, pool: &mut Pool, rows: &[f32], columns: usize, norm: Option<Norm<'_>>) {
        self.num_rows = rows.len() / columns;
        self.num_words = columns.div_ceil(E::PER_WORD);
        self.words.resize(self.num_rows * self.num_words, E::Word::default());
        let (isa, num_rows, num_words) = (pool.isa(), self.num_rows, self.num_words);
        let words = SharedMut::new(&mut self.words);
        pool.run(num_rows.div_ceil(MAX_TILE_ROWS), &|task| {
            for (first, tile_rows) in tiles(num_rows).skip(task).take(1) {
                // SAFETY: a tile is one task's.
                let tile = unsafe { words.slice(first * num_words, tile_rows * num_words) };
                let rows = &rows[first * columns..][..tile_rows * columns];
                pack_tile::<E>(isa, rows, columns, norm, tile);
            }
        });
    }

    fn tile(&self, first: usize, tile_rows: usize) -> &[E::Word] {
        &self.words[first * self.num_words..][..tile_rows * self.num_words]
    }
}

/// Packs the rows of one tile, `[num_words, tile_rows]`. Words are spread in plain code: as a part of
/// the kernel that would become an instruction that scatters a vector, which is slow.
fn pack_tile<E: Element>(
    isa: Isa,
    rows: &[f32],
    columns: usize,
    norm: Option<Norm<'_>>,
    tile: &mut [E::Word],
) {
    let tile_rows = rows.len() / columns;
    let mut values = [0.0; 2 * PACK_WORDS];
    let mut words = [E::Word::default(); PACK_WORDS];
    for (index, row) in rows.chunks_exact(columns).enumerate() {
        let mut scale = 1.0;
        if let Some(norm) = norm {
            isa.run(Scale { row, norm, output: &mut scale });
        }
        let blocks = tile.chunks_mut(PACK_WORDS * tile_rows);
        for (block, (tile, row)) in blocks.zip(row.chunks(PACK_WORDS * E::PER_WORD)).enumerate() {
            let first = block * PACK_WORDS * E::PER_WORD;
            let weight = norm.map(|norm| &norm.weight[first..][..row.len()]);
            let num_words = row.len().div_ceil(E::PER_WORD);
            // The second half of the last word of an odd row.
            values[num_words * E::PER_WORD - 1] = 0.0;
            let (values, words) = (&mut values[..], &mut words[..num_words]);
            isa.run(Narrow::<E> { row, weight, scale, values, words });
            let places = tile.iter_mut().skip(index).step_by(tile_rows);
            places.zip(&*words).for_each(|(place, word)| *place = *word);
        }
    }
}

struct Scale<'a> {
    row: &'a [f32],
    norm: Norm<'a>,
    output: &'a mut f32,
}

impl Kernel for Scale<'_> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        *self.output = self.norm.scale::<FMA>(self.row);
    }
}

/// `row`, or `row * scale * weight`, as words.
struct Narrow<'a, E: Element> {
    row: &'a [f32],
    weight: Option<&'a [f32]>,
    scale: f32,
    values: &'a mut [f32],
    words: &'a mut [E::Word],
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

/// See [`Code::correct`].
struct Correct<'a, E: Element> {
    code: &'a Code,
    panel: usize,
    words: &'a [E::Word],
    sums: &'a mut [[f32; LANES]],
}

impl<E: Element> Kernel for Correct<'_, E> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        self.code.correct::<E>(self.panel, self.words, self.sums);
    }
}

/// Writes `silu(gate) * up` over the sums of the first panel.
struct Gate<'a> {
    sums: &'a mut Sums,
    tile_rows: usize,
}

impl Kernel for Gate<'_> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let [gates, ups] = &mut self.sums.panels;
        for (gates, ups) in gates.iter_mut().zip(ups).take(self.tile_rows) {
            for (gate, up) in gates.iter_mut().zip(ups) {
                *gate = silu::<FMA>(*gate) * *up;
            }
        }
    }
}

/// `output = rows · weightᵀ`, or added to it: `[num_rows, weight.rows()]`. With a gated matrix the
/// sums are `silu(gate) * up`: `[num_rows, weight.rows() / 2]`.
///
/// A block of a pair of panels stays in the first cache while a few tiles go over it, and meanwhile
/// they ask for the next one: between them the processor sees no stream to read ahead in.
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
    let (isa, num_pairs, num_words) = (pool.isa(), weight.num_pairs(), weight.num_words());
    let (width, pair_columns) =
        if weight.is_gated() { (weight.rows() / 2, LANES) } else { (weight.rows(), 2 * LANES) };
    assert_eq!((output.len(), num_words), (rows.num_rows * width, rows.num_words));
    let output = SharedMut::new(output);
    let num_tiles = rows.num_rows.div_ceil(MAX_TILE_ROWS);
    let is_coded = weight.code().is_some();
    let has_blocks = if is_coded { num_tiles > 1 } else { BLOCK_ROWS.contains(&rows.num_rows) };
    let block_words = if has_blocks { BLOCK_WORDS } else { num_words.max(1) };
    // The words of each panel, or the codes of both, for the inputs from `start` on.
    let block = |pair: usize, start: usize| {
        let (words, end) = (weight.pair(pair), num_words.min(start + block_words));
        if is_coded {
            let place = |word: usize| 2 * LANES * (word / PLAIN * CODED);
            [&words[place(start)..place(end)], &[]]
        } else {
            let (first, second) = words.split_at(num_words * LANES);
            [first, second].map(|panel| &panel[start * LANES..end * LANES])
        }
    };
    // Sums of a pair's panels, ready, become output.
    let finish = |pair: usize, (first_row, tile_rows): (usize, usize), sums: &mut Sums| {
        if let Some(code) = weight.code() {
            let words = rows.tile(first_row, tile_rows);
            for (panel, sums) in (2 * pair..).zip(&mut sums.panels) {
                isa.run(Correct::<E> { code, panel, words, sums: &mut sums[..tile_rows] });
            }
        }
        if weight.is_gated() {
            isa.run(Gate { sums, tile_rows });
        }
        let columns = pair * pair_columns..width.min((pair + 1) * pair_columns);
        for row in 0..tile_rows {
            for (panel, first) in columns.clone().step_by(LANES).enumerate() {
                let len = LANES.min(columns.end - first);
                // SAFETY: the columns of a pair of panels are one task's.
                let output = unsafe { output.slice((first_row + row) * width + first, len) };
                store_sums(store, &sums.panels[panel][row], output);
            }
        }
    };
    let num_threads = pool.num_threads();
    pool.run(ROUNDS * num_threads, &|task| {
        let mut sums: [Sums; MAX_TILES] = std::array::from_fn(|_| Sums::default());
        let own_pairs = task_pairs(task, num_threads, num_pairs);
        if is_coded && num_tiles == 1 {
            let num_rows = rows.num_rows;
            let tile = TileRows { words: rows.tile(0, num_rows), num_rows };
            for pair in own_pairs {
                run_only_tile::<E>(isa, tile, weight.pair(pair), &mut sums[0]);
                finish(pair, (0, num_rows), &mut sums[0]);
            }
            return;
        }
        let mut decoded = [[[E::Word::default(); LANES]; BLOCK_WORDS]; 2];
        for pair in own_pairs {
            for first_tile in (0..num_tiles).step_by(MAX_TILES) {
                let tiles = || tiles(rows.num_rows).skip(first_tile).take(MAX_TILES);
                let num_turns = MAX_TILES.min(num_tiles - first_tile);
                for start in (0..num_words).step_by(block_words) {
                    let stored = block(pair, start);
                    let len = block_words.min(num_words - start);
                    let next = if start + block_words < num_words {
                        block(pair, start + block_words)
                    } else {
                        block((pair + 1).min(num_pairs - 1), 0)
                    };
                    for (turn, ((first, num_rows), sums)) in tiles().zip(&mut sums).enumerate() {
                        let words = &rows.tile(first, num_rows)[start * num_rows..];
                        let rows = TileRows { words: &words[..len * num_rows], num_rows };
                        let is_more = start > 0;
                        if !is_coded {
                            let ahead = Ahead { panels: next, num_turns, turn };
                            let ahead = has_blocks.then_some(ahead);
                            run_tile::<E>(isa, rows, stored, ahead, is_more, sums);
                        } else if turn == 0 {
                            let ([codes, _], [next, _]) = (stored, next);
                            run_first_tile::<E>(
                                isa,
                                rows,
                                codes,
                                next,
                                is_more,
                                sums,
                                &mut decoded,
                            );
                        } else {
                            let panels = [0, 1].map(|it| decoded[it][..len].as_flattened());
                            let rest = &next[0][next[0].len() / CODED..];
                            let next = rest.split_at(rest.len() / 2).into();
                            let (num_turns, turn) = (num_turns - 1, turn - 1);
                            let ahead = Some(Ahead { panels: next, num_turns, turn });
                            run_tile::<E>(isa, rows, panels, ahead, is_more, sums);
                        }
                    }
                }
                tiles().zip(&mut sums).for_each(|(tile, sums)| finish(pair, tile, sums));
            }
        }
    });
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

#[cfg(test)]
mod tests;
