//! Products of a step's rows with a parameter matrix.
//!
//! A decode step reads every parameter once, so it is as quick as memory gives them; from about 14
//! rows on arithmetic is the limit. A tile holds the sums of up to [`MAX_TILE_ROWS`] rows with two
//! panels in registers while it walks down the inputs. A sum has one lane and adds its inputs in
//! their order, so a row has the same result in any batch.

pub(super) mod tile;

use std::ops::Range;

use super::LANES;
use super::element::Element;
use super::exp::silu;
use super::isa::{Isa, Kernel};
use super::matrix::PackedMatrix;
use super::pool::Pool;
use super::shared::SharedMut;
use tile::{Ahead, Sums, TileRows, run_tile};

/// Rows whose sums with two panels, one word of each panel and one input fit into 32 registers.
pub(super) const MAX_TILE_ROWS: usize = 12;
/// Tiles that share each read of parameters.
const MAX_TILES: usize = 4;
/// Words of a panel that are read at once: with those of its neighbour a first cache.
const BLOCK_WORDS: usize = 256;
/// Numbers of rows at which blocks pay: fewer wait for memory alone, whose stream the processor
/// sees by itself; more wait for arithmetic alone.
const BLOCK_ROWS: Range<usize> = 6..MAX_TILES * MAX_TILE_ROWS + 1;
/// Bytes of parameters that one task reads, at least: claiming it costs nothing beside that.
const MIN_TASK_BYTES: usize = 1 << 16;
/// Tasks for each thread, so that one that is held up is waited for briefly.
const TASKS_PER_THREAD: usize = 8;

/// The rows of a step in the order in which tiles read them: `[num_tiles, num_words, tile_rows]`.
#[derive(Debug, Default)]
pub struct PackedRows<E: Element> {
    words: Vec<E::Word>,
    num_rows: usize,
    num_words: usize,
}

/// The tiles of `num_rows`: as few as can be, as even as can be.
pub(super) fn tiles(num_rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let num_tiles = num_rows.div_ceil(MAX_TILE_ROWS);
    let bound = move |tile: usize| tile * num_rows / num_tiles.max(1);
    (0..num_tiles).map(move |tile| (bound(tile), bound(tile + 1) - bound(tile)))
}

impl<E: Element> PackedRows<E> {
    /// Takes over `num_rows` rows of `columns`; `read` writes one of them, `(row, elements)`.
    pub fn pack(
        &mut self,
        pool: &mut Pool,
        isa: Isa,
        num_rows: usize,
        columns: usize,
        read: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        self.num_rows = num_rows;
        self.num_words = columns.div_ceil(E::PER_WORD);
        let num_words = self.num_words;
        self.words.resize(num_rows * num_words, E::Word::default());
        let tiles: Vec<(usize, usize)> = tiles(num_rows).collect();
        let words = SharedMut::new(&mut self.words);
        pool.run(tiles.len(), &|task| {
            let (first, tile_rows) = tiles[task];
            // SAFETY: a tile is one task's.
            let tile = unsafe { words.slice(first * num_words, tile_rows * num_words) };
            let mut row = vec![0.0; num_words * E::PER_WORD];
            let mut words = vec![E::Word::default(); num_words];
            for index in 0..tile_rows {
                read(first + index, &mut row[..columns]);
                isa.run(Narrow::<E> { row: &row, words: &mut words });
                let places = tile.iter_mut().skip(index).step_by(tile_rows);
                places.zip(&words).for_each(|(place, word)| *place = *word);
            }
        });
    }

    fn tile(&self, first: usize, tile_rows: usize) -> &[E::Word] {
        &self.words[first * self.num_words..][..tile_rows * self.num_words]
    }
}

struct Narrow<'a, E: Element> {
    row: &'a [f32],
    words: &'a mut [E::Word],
}

impl<E: Element> Kernel for Narrow<'_, E> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for (word, values) in self.words.iter_mut().zip(self.row.chunks_exact(E::PER_WORD)) {
            *word = E::word_of(values);
        }
    }
}

/// `output = rows · weightᵀ`, `[num_rows, weight.rows()]`.
pub fn product<E: Element>(
    pool: &mut Pool,
    isa: Isa,
    rows: &PackedRows<E>,
    weight: &PackedMatrix<E>,
    output: &mut [f32],
) {
    let finish = |sums: &mut Sums, outputs: &mut Outputs<'_>| {
        outputs.each(sums, |output, sum| *output = sum);
    };
    each_pair(pool, isa, rows, weight, output, finish);
}

/// `output += rows · weightᵀ`, `[num_rows, weight.rows()]`.
pub fn product_add<E: Element>(
    pool: &mut Pool,
    isa: Isa,
    rows: &PackedRows<E>,
    weight: &PackedMatrix<E>,
    output: &mut [f32],
) {
    let finish = |sums: &mut Sums, outputs: &mut Outputs<'_>| {
        outputs.each(sums, |output, sum| *output += sum);
    };
    each_pair(pool, isa, rows, weight, output, finish);
}

/// `output = silu(gate) * up`, `[num_rows, weight.rows() / 2]`, of a matrix that was made by
/// [`PackedMatrix::gated`].
///
/// # Panics
/// If it was made otherwise.
pub fn gated_product<E: Element>(
    pool: &mut Pool,
    isa: Isa,
    rows: &PackedRows<E>,
    weight: &PackedMatrix<E>,
    output: &mut [f32],
) {
    assert!(weight.is_gated(), "a matrix made of gate and up");
    each_pair(pool, isa, rows, weight, output, |sums, outputs| {
        isa.run(Gate { sums, tile_rows: outputs.num_rows });
        outputs.each(sums, |output, sum| *output = sum);
    });
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

/// Where the sums of a tile go.
struct Outputs<'a> {
    output: &'a SharedMut<'a, f32>,
    width: usize,
    first_row: usize,
    num_rows: usize,
    /// The first of the outputs, and how many the panels have.
    column: usize,
    num_columns: usize,
}

impl Outputs<'_> {
    #[inline]
    fn each(&mut self, sums: &Sums, write: impl Fn(&mut f32, f32)) {
        for (panel, sums) in sums.panels.iter().enumerate() {
            let done = panel * LANES;
            let len = LANES.min(self.num_columns.saturating_sub(done));
            if len == 0 {
                break;
            }
            for (row, sums) in sums.iter().take(self.num_rows).enumerate() {
                let start = (self.first_row + row) * self.width + self.column + done;
                // SAFETY: the columns of a pair of panels are one task's.
                let output = unsafe { self.output.slice(start, len) };
                if let Ok(output) = <&mut [f32; LANES]>::try_from(&mut *output) {
                    output.iter_mut().zip(sums).for_each(|(output, sum)| write(output, *sum));
                } else {
                    output.iter_mut().zip(sums).for_each(|(output, sum)| write(output, *sum));
                }
            }
        }
    }
}

/// Sums of all rows with each pair of neighbouring panels, handed to `finish` tile by tile.
///
/// A block of a pair's words stays in the first cache while a few tiles go over it, and meanwhile
/// they ask for the next one: between them the processor sees no stream to read ahead in.
fn each_pair<E: Element>(
    pool: &mut Pool,
    isa: Isa,
    rows: &PackedRows<E>,
    weight: &PackedMatrix<E>,
    output: &mut [f32],
    finish: impl Fn(&mut Sums, &mut Outputs<'_>) + Sync,
) {
    let (num_panels, num_words) = (weight.num_panels(), weight.num_words());
    let (width, pair_columns) =
        if weight.is_gated() { (weight.rows() / 2, LANES) } else { (weight.rows(), 2 * LANES) };
    assert_eq!((output.len(), num_words), (rows.num_rows * width, rows.num_words));
    let output = SharedMut::new(output);
    let num_pairs = num_panels.div_ceil(2);
    let pair_bytes = 2 * num_words * LANES * size_of::<E::Word>();
    let least = MIN_TASK_BYTES.div_ceil(pair_bytes.max(1));
    let per_task = (num_pairs / (TASKS_PER_THREAD * pool.num_threads())).max(least);
    let num_tiles = rows.num_rows.div_ceil(MAX_TILE_ROWS);
    let has_blocks = BLOCK_ROWS.contains(&rows.num_rows);
    let block_words = if has_blocks { BLOCK_WORDS } else { num_words.max(1) };
    let block = |pair: usize, start: usize| {
        [2 * pair, 2 * pair + 1].map(|panel| {
            let panel = weight.panel(panel.min(num_panels - 1));
            &panel[start * LANES..num_words.min(start + block_words) * LANES]
        })
    };
    pool.run(num_pairs.div_ceil(per_task), &|task| {
        let mut sums: [Sums; MAX_TILES] = std::array::from_fn(|_| Sums::default());
        for pair in task * per_task..num_pairs.min((task + 1) * per_task) {
            for first_tile in (0..num_tiles).step_by(MAX_TILES) {
                let tiles = || tiles(rows.num_rows).skip(first_tile).take(MAX_TILES);
                for start in (0..num_words).step_by(block_words) {
                    let panels = block(pair, start);
                    let next = if start + block_words < num_words {
                        block(pair, start + block_words)
                    } else {
                        block((pair + 1).min(num_pairs - 1), 0)
                    };
                    let num_turns = MAX_TILES.min(num_tiles - first_tile);
                    for (turn, ((first, num_rows), sums)) in tiles().zip(&mut sums).enumerate() {
                        let words = &rows.tile(first, num_rows)[start * num_rows..];
                        let words = &words[..panels[0].len() / LANES * num_rows];
                        let ahead = has_blocks.then_some(Ahead { panels: next, num_turns, turn });
                        let rows = TileRows { words, num_rows };
                        run_tile::<E>(isa, rows, panels, ahead, start > 0, sums);
                    }
                }
                for ((first_row, num_rows), sums) in tiles().zip(&mut sums) {
                    let column = pair * pair_columns;
                    let num_columns = pair_columns.min(width - column);
                    let output = &output;
                    finish(
                        sums,
                        &mut Outputs { output, width, first_row, num_rows, column, num_columns },
                    );
                }
            }
        }
    });
}

#[cfg(test)]
mod tests;
