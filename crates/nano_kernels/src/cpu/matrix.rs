//! A parameter matrix in the order in which products read it.
//!
//! Outputs lie in panels of `LANES`, the lanes of the widest vector. A panel holds, for each word
//! of the inputs in turn, that word of its `LANES` outputs: a vector holds the same inputs of
//! neighbouring outputs. Products take panels in pairs, from end to end. What is missing in the last
//! pair and the last word counts for nothing. Where it pays, vectors are stored in fewer bits, see [`coded`].

pub mod coded;

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::LANES;
use super::element::Element;
use super::memory::{Arena, Memory};
use super::pool::Pool;
use coded::{CODED, Code, PLAIN, Patch};

/// The words of a matrix `[rows, columns]`, `[num_pairs, 2, num_words, LANES]`, or their codes, in
/// which a pair's panels take turns: `[num_pairs, num_words / PLAIN, 2, CODED, LANES]`.
#[derive(Debug)]
pub struct PackedMatrix<E: Element> {
    words: Memory,
    rows: usize,
    columns: usize,
    is_gated: bool,
    code: Option<Code>,
    element: PhantomData<E>,
}

impl<E: Element> PackedMatrix<E> {
    /// Takes over all rows; `read` gives one of them, `(row, elements)`. A gated matrix has two
    /// halves, gate and up, whose panels are pairs: a gate's sums are ready with those of its up.
    ///
    /// # Errors
    /// The system's, if it has no memory of that size.
    ///
    /// # Panics
    /// If a gated matrix has an odd number of rows.
    pub fn pack(
        pool: &mut Pool,
        arena: &mut Arena,
        (rows, columns): (usize, usize),
        is_gated: bool,
        read: impl Fn(usize, &mut [E]) + Sync,
    ) -> std::io::Result<Self> {
        assert!(!is_gated || rows.is_multiple_of(2), "as many rows of gate as of up");
        let size = (rows, columns);
        let code = Code::fitting(pool.isa(), rows, columns, &read);
        if let Some(code) = code
            && let Some(coded) = Self::pack_as(pool, arena, size, is_gated, &read, Some(code))?
        {
            return Ok(coded);
        }
        let plain = Self::pack_as(pool, arena, size, is_gated, &read, None)?;
        Ok(plain.unwrap_or_else(|| unreachable!("only a code can have too many exceptions")))
    }

    /// `None` if more parameters lack a code than a sample had said.
    fn pack_as(
        pool: &mut Pool,
        arena: &mut Arena,
        (rows, columns): (usize, usize),
        is_gated: bool,
        read: &(impl Fn(usize, &mut [E]) + Sync),
        mut code: Option<Code>,
    ) -> std::io::Result<Option<Self>> {
        let num_pairs = if is_gated { rows / 2 } else { rows.div_ceil(2) }.div_ceil(LANES);
        let pair_len = pair_len(code.as_ref(), columns.div_ceil(E::PER_WORD));
        let mut words = arena.zeroed(num_pairs * pair_len)?;
        let pairs = words.as_mut_slice().chunks_exact_mut(pair_len.max(1));
        let mut pairs: Vec<_> = pairs.map(|pair| (pair, [Vec::new(), Vec::new()])).collect();
        let base = code.as_ref().map(Code::base);
        let num_patches = AtomicUsize::new(0);
        let is_worth_it =
            || coded::is_worth_it(num_patches.load(Ordering::Relaxed), rows * columns);
        pool.each(&mut pairs, |pair, (words, patches)| {
            for (panel, rows) in panel_rows(rows, is_gated, pair).into_iter().enumerate() {
                if is_worth_it() {
                    patches[panel] = pack_panel(rows, columns, base, read, panel, words);
                    num_patches.fetch_add(patches[panel].len(), Ordering::Relaxed);
                }
            }
        });
        if !is_worth_it() {
            arena.take_back(words);
            return Ok(None);
        }
        if let Some(code) = &mut code {
            code.set_patches(pairs.into_iter().flat_map(|(_, patches)| patches));
        }
        Ok(Some(Self { words, rows, columns, is_gated, code, element: PhantomData }))
    }

    /// Whether it is made of gate and up.
    pub fn is_gated(&self) -> bool {
        self.is_gated
    }

    /// Outputs of a product.
    pub fn width(&self) -> usize {
        if self.is_gated { self.rows / 2 } else { self.rows }
    }

    /// Inputs.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Words of an output.
    pub fn num_words(&self) -> usize {
        self.columns.div_ceil(E::PER_WORD)
    }

    /// Pairs of panels.
    pub fn num_pairs(&self) -> usize {
        self.words.as_slice().len() / pair_len(self.code.as_ref(), self.num_words()).max(1)
    }

    /// Bytes that a product reads.
    pub fn num_bytes(&self) -> usize {
        size_of_val(self.words.as_slice()) + self.code.as_ref().map_or(0, Code::num_bytes)
    }

    /// What says how it is stored, if not plainly.
    pub(super) fn code(&self) -> Option<&Code> {
        self.code.as_ref()
    }

    /// A pair of panels as it is stored: `[2, num_words, LANES]`, or its codes. Behind it lies the
    /// next one.
    #[inline]
    pub fn pair(&self, pair: usize) -> &[u32] {
        let len = pair_len(self.code.as_ref(), self.num_words());
        &self.words.as_slice()[pair * len..][..len]
    }

    /// Copies one row: an embedding is read like this.
    ///
    /// # Panics
    /// If the matrix is gated or has no such row.
    pub fn row(&self, row: usize, output: &mut [f32]) {
        assert!(!self.is_gated && row < self.rows, "rows in their order");
        let (panel, lane) = (row / LANES, row % LANES);
        let words = self.pair(panel / 2);
        let mut put = |word: usize, value: u32, scale: f32| {
            let elements = output[word * E::PER_WORD..].iter_mut().take(E::PER_WORD);
            for (index, element) in elements.enumerate() {
                *element = E::of_word(value, index).widen() * scale;
            }
        };
        let Some(code) = &self.code else {
            let words = words[panel % 2 * words.len() / 2..].as_chunks::<LANES>().0;
            let words = words.iter().take(self.num_words()).enumerate();
            words.for_each(|(word, lanes)| put(word, lanes[lane], 1.0));
            return;
        };
        for (step, pair) in coded::steps(words).iter().enumerate() {
            let codes = pair[panel % 2].map(|lanes| lanes[lane]);
            for (word, value) in coded::decode(codes).into_iter().enumerate() {
                put(PLAIN * step + word, value, code.scale());
            }
        }
        for patch in code.patches(panel).iter().filter(|patch| patch.lane == lane as u32) {
            output[patch.column as usize] = patch.value;
        }
    }
}

/// The rows of a pair's panels, those of a panel neighbours.
fn panel_rows(rows: usize, is_gated: bool, pair: usize) -> [Range<usize>; 2] {
    let panel_rows = |end: usize, first: usize| first.min(end)..end.min(first + LANES);
    if is_gated {
        let gate = panel_rows(rows / 2, pair * LANES);
        [gate.clone(), rows / 2 + gate.start..rows / 2 + gate.end]
    } else {
        [0, 1].map(|panel| panel_rows(rows, (2 * pair + panel) * LANES))
    }
}

/// Words that a pair of panels takes.
fn pair_len(code: Option<&Code>, num_words: usize) -> usize {
    2 * LANES * if code.is_some() { num_words / PLAIN * CODED } else { num_words }
}

/// Writes the words of some rows, or their codes if there is a base, as one panel of a pair.
fn pack_panel<E: Element>(
    rows: Range<usize>,
    columns: usize,
    base: Option<u32>,
    read: &(impl Fn(usize, &mut [E]) + Sync),
    panel: usize,
    pair: &mut [u32],
) -> Vec<Patch> {
    let mut patches = Vec::new();
    let mut elements = vec![E::narrow(0.0); columns.next_multiple_of(E::PER_WORD)];
    let len = columns.div_ceil(E::PER_WORD) * LANES;
    let mut plain = vec![0; if base.is_some() { len } else { 0 }];
    let target = if base.is_some() { &mut plain[..] } else { &mut pair[panel * len..][..len] };
    for (lane, row) in rows.enumerate() {
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
        for (four, step) in fours.iter().zip(coded::steps_mut(pair)) {
            step[panel] = coded::encode(four, base);
        }
    }
    patches
}
