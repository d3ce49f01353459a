//! The innermost loop: the sums of a few rows with two panels, kept in registers.
#![cfg_attr(not(target_arch = "x86_64"), expect(unused, reason = "what AVX-512 alone does"))]

use std::marker::PhantomData;

#[cfg(target_arch = "x86_64")]
use super::avx512;
use super::{BLOCK_WORDS, MAX_TILE_ROWS};
use crate::cpu::LANES;
use crate::cpu::element::Element;
use crate::cpu::isa::{Isa, Kernel};
use crate::cpu::matrix::coded::steps;

/// For each panel and row the sums of the panel's outputs.
pub(in crate::cpu) type Sums = [[[f32; LANES]; MAX_TILE_ROWS]; 2];
/// The words of two panels in a block, decoded.
pub(super) type Decoded = [[[u32; LANES]; BLOCK_WORDS]; 2];

/// The inputs of a tile, `[num_words, num_rows]`.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct TileRows<'a> {
    pub(in crate::cpu) words: &'a [u32],
    /// From 1 to [`MAX_TILE_ROWS`].
    pub(in crate::cpu) num_rows: usize,
}

/// Evaluates an expression with the words of a tile as arrays of its number of rows, which then is a
/// constant.
macro_rules! by_rows {
    ($tile:expr, $words:ident => $body:expr) => {
        by_rows!($tile, $words => $body, 1 2 3 4 5 6 7 8 9 10 11 12)
    };
    ($tile:expr, $words:ident => $body:expr, $($rows:literal)*) => {
        match $tile.num_rows {
            $($rows => {
                let $words = $tile.words.as_chunks::<$rows>().0;
                $body
            })*
            num_rows => unreachable!("a tile of {num_rows} rows"),
        }
    };
}

/// Words of the two panels that are wanted next, asked for in turns by several tiles.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Ahead<'a> {
    pub(super) panels: [&'a [u32]; 2],
    pub(super) num_turns: usize,
    pub(super) turn: usize,
}

/// Adds sums of rows with two panels, `[num_words, LANES]`, to `sums`.
pub(in crate::cpu) fn run_tile<E: Element>(
    isa: Isa,
    rows: TileRows<'_>,
    panels: [&[u32]; 2],
    ahead: Option<Ahead<'_>>,
    sums: &mut Sums,
) {
    let panels = panels.map(|panel| panel.as_chunks::<LANES>().0);
    by_rows!(rows, words => {
        #[cfg(target_arch = "x86_64")]
        if E::has_products(isa) {
            // SAFETY: the processor has the instruction, see `Isa`.
            return unsafe { avx512::tile(words, panels, ahead, sums) };
        }
        isa.run(Plain::<E, _> { rows: words, panels, sums, element: PhantomData });
    });
}

/// The sums of the only tile of a step with a whole coded pair of panels, written over `sums`. They are of
/// decoded words: [`Code::correct`](crate::cpu::matrix::coded::Code::correct) makes them those of
/// parameters.
pub(super) fn run_only_tile(isa: Isa, rows: TileRows<'_>, pair: &[u32], sums: &mut Sums) {
    assert!(isa.has_bf16_products(), "codes are for processors that multiply them");
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the processor has the instructions, see `Isa`.
    by_rows!(rows, words => unsafe { avx512::only_tile(words, steps(pair), sums) });
}

/// As [`run_only_tile`], added by the first of several tiles over a block of a pair: leaves the block's
/// words in `decoded`, and asks for a third of the codes that come `next`.
pub(super) fn run_first_tile(
    isa: Isa,
    rows: TileRows<'_>,
    block: &[u32],
    next: &[u32],
    sums: &mut Sums,
    decoded: &mut Decoded,
) {
    assert!(isa.has_bf16_products(), "codes are for processors that multiply them");
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above.
    by_rows!(rows, words => unsafe { avx512::first_tile(words, steps(block), next, sums, decoded) });
}

/// For any set of instructions.
struct Plain<'a, E: Element, const ROWS: usize> {
    rows: &'a [[u32; ROWS]],
    panels: [&'a [[u32; LANES]]; 2],
    sums: &'a mut Sums,
    element: PhantomData<E>,
}

impl<E: Element, const ROWS: usize> Kernel for Plain<'_, E, ROWS> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        // The sums of more rows would not stay in registers: 16 of 8 lanes with FMA, else of 4.
        if FMA { self.rows_at_once::<FMA, 4>() } else { self.rows_at_once::<FMA, 2>() }
    }
}

impl<E: Element, const ROWS: usize> Plain<'_, E, ROWS> {
    #[inline(always)]
    fn rows_at_once<const FMA: bool, const AT_ONCE: usize>(self) {
        for (panel, sums) in self.panels.into_iter().zip(self.sums) {
            for first in (0..ROWS).step_by(AT_ONCE) {
                // Where fewer are left, the last one is worked out more than once.
                let rows: [usize; AT_ONCE] = std::array::from_fn(|at| (first + at).min(ROWS - 1));
                let mut own = rows.map(|row| sums[row]);
                for (words, row_words) in panel.iter().zip(self.rows) {
                    for (sums, row) in own.iter_mut().zip(rows) {
                        for (sum, word) in sums.iter_mut().zip(words) {
                            *sum = E::dot::<FMA>(*sum, row_words[row], *word);
                        }
                    }
                }
                for (row, own) in rows.into_iter().zip(own) {
                    sums[row] = own;
                }
            }
        }
    }
}
