//! A parameter matrix in the order in which products read it.
//!
//! Outputs lie in panels of `LANES`, the lanes of the widest vector. A panel holds, for each word
//! of the inputs in turn, that word of its `LANES` outputs: a product reads it from end to end,
//! and a vector holds the same inputs of neighbouring outputs. What is missing in the last panel
//! and the last word is zero.

use std::ops::Range;

use super::LANES;
use super::element::Element;
use super::memory::Memory;
use super::pool::Pool;

/// `[num_panels, num_words, LANES]` words of a matrix `[rows, columns]`.
#[derive(Debug)]
pub struct PackedMatrix<E: Element> {
    words: Memory<E::Word>,
    rows: usize,
    columns: usize,
    is_gated: bool,
}

impl<E: Element> PackedMatrix<E> {
    /// Zeros. A gated matrix has two halves, gate and up, whose panels take turns: a gate's sums are
    /// ready with those of its up.
    ///
    /// # Errors
    /// The system's, if it has no memory of that size.
    pub fn zeroed(rows: usize, columns: usize, is_gated: bool) -> std::io::Result<Self> {
        let num_parts = 1 + usize::from(is_gated);
        let num_panels = num_parts * (rows / num_parts).div_ceil(LANES);
        let len = num_panels * LANES * columns.div_ceil(E::PER_WORD);
        Ok(Self { words: Memory::zeroed(len)?, rows, columns, is_gated })
    }

    /// Whether it is made of gate and up.
    pub fn is_gated(&self) -> bool {
        self.is_gated
    }

    /// The rows of a panel, which are neighbours.
    fn rows_of(&self, panel: usize) -> Range<usize> {
        let (num_parts, part) = if self.is_gated { (2, panel % 2) } else { (1, 0) };
        let (part_rows, first) = (self.rows / num_parts, panel / num_parts * LANES);
        part * part_rows + first..part * part_rows + part_rows.min(first + LANES)
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Words of an output.
    pub fn num_words(&self) -> usize {
        self.columns.div_ceil(E::PER_WORD)
    }

    /// Panels of outputs.
    pub fn num_panels(&self) -> usize {
        self.words.as_slice().len() / (self.num_words() * LANES).max(1)
    }

    /// One panel, `[num_words, LANES]`.
    #[inline]
    pub fn panel(&self, panel: usize) -> &[E::Word] {
        let len = self.num_words() * LANES;
        &self.words.as_slice()[panel * len..][..len]
    }

    /// Writes all rows; `read` gives one of them, `(row, elements)`.
    pub fn write(&mut self, pool: &mut Pool, read: impl Fn(usize, &mut [E]) + Sync) {
        let (num_words, columns) = (self.num_words(), self.columns);
        let rows: Vec<Range<usize>> =
            (0..self.num_panels()).map(|panel| self.rows_of(panel)).collect();
        let panels = self.words.as_mut_slice().chunks_exact_mut((num_words * LANES).max(1));
        pool.each(&mut panels.collect::<Vec<_>>(), |panel, words| {
            let mut elements = vec![E::narrow(0.0); num_words * E::PER_WORD];
            for (lane, row) in rows[panel].clone().enumerate() {
                read(row, &mut elements[..columns]);
                let lanes = words.iter_mut().skip(lane).step_by(LANES);
                for (word, elements) in lanes.zip(elements.chunks_exact(E::PER_WORD)) {
                    *word = E::word(elements);
                }
            }
        });
    }

    /// Copies one row: an embedding is read like this.
    ///
    /// # Panics
    /// If the matrix is gated.
    pub fn row(&self, row: usize, output: &mut [f32]) {
        assert!(!self.is_gated, "rows in their order");
        let lanes = self.panel(row / LANES).iter().skip(row % LANES).step_by(LANES);
        for (word, elements) in lanes.zip(output.chunks_mut(E::PER_WORD)) {
            for (index, element) in elements.iter_mut().enumerate() {
                *element = E::of_word(*word, index).widen();
            }
        }
    }
}
