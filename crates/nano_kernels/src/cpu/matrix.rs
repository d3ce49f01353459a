//! A parameter matrix in the order in which products read it.
//!
//! Outputs lie in panels of `LANES`, the lanes of the widest vector. A panel holds, for each word
//! of the inputs in turn, that word of its `LANES` outputs: a product reads it from end to end,
//! and a vector holds the same inputs of neighbouring outputs. What is missing in the last panel
//! and the last word is zero. Where it pays, vectors are stored in fewer bits, see [`coded`].

pub mod coded;

use std::ops::Range;

use super::LANES;
use super::element::Element;
use super::memory::Memory;
use super::pool::Pool;
use coded::{CODED, Code, PLAIN, Patch};

/// `[num_panels, num_words, LANES]` words of a matrix `[rows, columns]`, or their codes.
#[derive(Debug)]
pub struct PackedMatrix<E: Element> {
    words: Memory<E::Word>,
    rows: usize,
    columns: usize,
    is_gated: bool,
    code: Option<Code>,
}

impl<E: Element> PackedMatrix<E> {
    /// Takes over all rows; `read` gives one of them, `(row, elements)`. A gated matrix has two
    /// halves, gate and up, whose panels take turns: a gate's sums are ready with those of its up.
    ///
    /// # Errors
    /// The system's, if it has no memory of that size.
    pub fn pack(
        pool: &mut Pool,
        (rows, columns): (usize, usize),
        is_gated: bool,
        read: impl Fn(usize, &mut [E]) + Sync,
    ) -> std::io::Result<Self> {
        if let Some(code) = Code::fitting(pool.isa(), rows, columns, &read) {
            let coded = Self::pack_as(pool, (rows, columns), is_gated, &read, Some(code))?;
            if coded.code.as_ref().is_some_and(|code| code.is_worth_it(rows * columns)) {
                return Ok(coded);
            }
        }
        Self::pack_as(pool, (rows, columns), is_gated, &read, None)
    }

    fn pack_as(
        pool: &mut Pool,
        (rows, columns): (usize, usize),
        is_gated: bool,
        read: &(impl Fn(usize, &mut [E]) + Sync),
        mut code: Option<Code>,
    ) -> std::io::Result<Self> {
        let num_parts = 1 + usize::from(is_gated);
        let num_panels = num_parts * (rows / num_parts).div_ceil(LANES);
        let num_vectors = Code::num_vectors(code.as_ref(), columns.div_ceil(E::PER_WORD));
        let words = Memory::zeroed(num_panels * num_vectors * LANES)?;
        let mut matrix = Self { words, rows, columns, is_gated, code: None };
        let rows_of: Vec<_> = (0..num_panels).map(|panel| matrix.rows_of(panel)).collect();
        let panels = matrix.words.as_mut_slice().chunks_exact_mut((num_vectors * LANES).max(1));
        let mut panels: Vec<_> = panels.map(|panel| (panel, Vec::new())).collect();
        let base = code.as_ref().map(Code::base);
        pool.each(&mut panels, |panel, (words, patches)| {
            *patches = pack_panel(&rows_of[panel], columns, base, read, words);
        });
        if let Some(code) = &mut code {
            code.set_patches(panels.into_iter().map(|(_, patches)| patches));
        }
        Ok(Self { code, ..matrix })
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
        let num_vectors = Code::num_vectors(self.code.as_ref(), self.num_words());
        self.words.as_slice().len() / (num_vectors * LANES).max(1)
    }

    /// Bytes that a product reads.
    pub fn num_bytes(&self) -> usize {
        size_of_val(self.words.as_slice()) + self.code.as_ref().map_or(0, Code::num_bytes)
    }

    /// What says how it is stored, if not plainly.
    pub(super) fn code(&self) -> Option<&Code> {
        self.code.as_ref()
    }

    /// One panel as it is stored: `[num_words, LANES]`, or its codes.
    #[inline]
    pub fn panel(&self, panel: usize) -> &[E::Word] {
        let len = Code::num_vectors(self.code.as_ref(), self.num_words()) * LANES;
        &self.words.as_slice()[panel * len..][..len]
    }

    /// Copies one row: an embedding is read like this.
    ///
    /// # Panics
    /// If the matrix is gated.
    pub fn row(&self, row: usize, output: &mut [f32]) {
        assert!(!self.is_gated, "rows in their order");
        let (panel, lane) = (row / LANES, row % LANES);
        let vectors = self.panel(panel).as_chunks::<LANES>().0;
        let mut put = |word: usize, value: E::Word, scale: f32| {
            let elements = output[word * E::PER_WORD..].iter_mut().take(E::PER_WORD);
            for (index, element) in elements.enumerate() {
                *element = E::of_word(value, index).widen() * scale;
            }
        };
        let Some(code) = &self.code else {
            vectors.iter().enumerate().for_each(|(word, lanes)| put(word, lanes[lane], 1.0));
            return;
        };
        for (four, codes) in vectors.as_chunks::<CODED>().0.iter().enumerate() {
            for (word, lanes) in E::decode(codes).iter().enumerate() {
                put(PLAIN * four + word, lanes[lane], code.scale());
            }
        }
        for patch in code.patches(panel).iter().filter(|patch| patch.lane == lane as u32) {
            output[patch.column as usize] = patch.value;
        }
    }
}

/// Writes the words of some rows, or their codes if there is a base.
fn pack_panel<E: Element>(
    rows: &Range<usize>,
    columns: usize,
    base: Option<u32>,
    read: &(impl Fn(usize, &mut [E]) + Sync),
    words: &mut [E::Word],
) -> Vec<Patch> {
    let mut patches = Vec::new();
    let mut elements = vec![E::narrow(0.0); columns.next_multiple_of(E::PER_WORD)];
    let mut plain = Vec::new();
    if base.is_some() {
        plain.resize(columns.div_ceil(E::PER_WORD) * LANES, E::Word::default());
    }
    let target = if base.is_some() { &mut plain[..] } else { &mut *words };
    for (lane, row) in rows.clone().enumerate() {
        read(row, &mut elements[..columns]);
        if let Some(base) = base {
            coded::find_patches(lane as u32, &elements, base, &mut patches);
        }
        let lanes = target.iter_mut().skip(lane).step_by(LANES);
        for (word, elements) in lanes.zip(elements.chunks_exact(E::PER_WORD)) {
            *word = E::word(elements);
        }
    }
    if let Some(base) = base {
        let fours = plain.as_chunks::<LANES>().0.as_chunks::<PLAIN>().0;
        let codes = words.as_chunks_mut::<LANES>().0.as_chunks_mut::<CODED>().0;
        fours.iter().zip(codes).for_each(|(four, codes)| *codes = E::encode(four, base));
    }
    patches
}
