//! A parameter matrix in the order in which products read it.
//!
//! Outputs lie in panels of [`LANES`], the lanes of the widest vector. A panel holds, for each word
//! of the inputs in turn, that word of its [`LANES`] outputs: a product reads it from end to end,
//! and a vector holds the same inputs of neighbouring outputs. What is missing in the last panel
//! and the last word is zero.

use super::LANES;
use super::element::Element;
use super::memory::Memory;
use super::pool::Pool;
use super::shared::SharedMut;

/// `[num_panels, num_words, LANES]` words of a matrix `[rows, columns]`.
#[derive(Debug)]
pub struct PackedMatrix<E: Element> {
    words: Memory<E::Word>,
    rows: usize,
    columns: usize,
    is_gated: bool,
}

impl<E: Element> PackedMatrix<E> {
    /// Zeros.
    ///
    /// # Errors
    /// The system's, if it has no memory of that size.
    pub fn zeroed(rows: usize, columns: usize) -> std::io::Result<Self> {
        let len = rows.div_ceil(LANES) * LANES * columns.div_ceil(E::PER_WORD);
        Ok(Self { words: Memory::zeroed(len)?, rows, columns, is_gated: false })
    }

    /// Zeros for a matrix of two halves, gate and up, whose panels take turns: a gate's sums are
    /// ready with those of its up.
    ///
    /// # Errors
    /// As [`zeroed`](Self::zeroed).
    pub fn gated(rows: usize, columns: usize) -> std::io::Result<Self> {
        let len = 2 * (rows / 2).div_ceil(LANES) * LANES * columns.div_ceil(E::PER_WORD);
        Ok(Self { words: Memory::zeroed(len)?, rows, columns, is_gated: true })
    }

    /// Whether it was made by [`gated`](Self::gated).
    pub fn is_gated(&self) -> bool {
        self.is_gated
    }

    /// Where an output is: its panel and its lane.
    fn place(&self, row: usize) -> (usize, usize) {
        let half = self.rows / 2;
        match (self.is_gated, row < half) {
            (false, _) => (row / LANES, row % LANES),
            (true, true) => (2 * (row / LANES), row % LANES),
            (true, false) => (2 * ((row - half) / LANES) + 1, (row - half) % LANES),
        }
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
        let (num_panels, num_words) = (self.num_panels(), self.num_words());
        let (rows, columns) = (self.rows, self.columns);
        // The rows of a panel are neighbours.
        let mut first_rows = vec![0; num_panels];
        for row in (0..rows).rev() {
            first_rows[self.place(row).0] = row;
        }
        let ends: Vec<usize> = (0..rows).fold(vec![0; num_panels], |mut ends, row| {
            ends[self.place(row).0] = row + 1;
            ends
        });
        let words = SharedMut::new(self.words.as_mut_slice());
        pool.run(num_panels, &|panel| {
            let mut elements = vec![E::narrow(0.0); num_words * E::PER_WORD];
            // SAFETY: a panel is one task's.
            let words = unsafe { words.slice(panel * num_words * LANES, num_words * LANES) };
            for (lane, row) in (first_rows[panel]..ends[panel]).enumerate() {
                read(row, &mut elements[..columns]);
                let lanes = words.iter_mut().skip(lane).step_by(LANES);
                for (word, elements) in lanes.zip(elements.chunks_exact(E::PER_WORD)) {
                    *word = E::word(elements);
                }
            }
        });
    }

    /// Copies one row: an embedding is read like this.
    pub fn row(&self, row: usize, output: &mut [f32]) {
        let (panel, lane) = self.place(row);
        let lanes = self.panel(panel).iter().skip(lane).step_by(LANES);
        for (word, elements) in lanes.zip(output.chunks_mut(E::PER_WORD)) {
            for (index, element) in elements.iter_mut().enumerate() {
                *element = E::of_word(*word, index).widen();
            }
        }
    }
}
