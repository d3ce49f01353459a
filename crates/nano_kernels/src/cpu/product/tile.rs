//! The innermost loop: the sums of a few rows with two panels, kept in registers.

use super::MAX_TILE_ROWS;
use crate::cpu::LANES;
use crate::cpu::element::Element;
use crate::cpu::isa::{Isa, Kernel};

/// For each panel and row the sums of the panel's outputs.
#[derive(Debug, Default)]
pub(in crate::cpu) struct Sums {
    pub(in crate::cpu) panels: [[[f32; LANES]; MAX_TILE_ROWS]; 2],
}

/// The inputs of a tile, `[num_words, num_rows]`.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct TileRows<'a, W> {
    pub(in crate::cpu) words: &'a [W],
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
pub(super) use by_rows;

/// Words of the two panels that are wanted next, asked for in turns by several tiles.
#[derive(Clone, Copy)]
pub struct Ahead<'a, W> {
    pub(in crate::cpu) panels: [&'a [W]; 2],
    pub(in crate::cpu) num_turns: usize,
    pub(in crate::cpu) turn: usize,
}

/// Sums of rows with two panels, `[num_words, LANES]`, added to `sums` if `is_more`, else written
/// over them.
pub(in crate::cpu) fn run_tile<E: Element>(
    isa: Isa,
    rows: TileRows<'_, E::Word>,
    panels: [&[E::Word]; 2],
    ahead: Option<Ahead<'_, E::Word>>,
    is_more: bool,
    sums: &mut Sums,
) {
    if !is_more {
        sums.panels.iter_mut().for_each(|sums| sums[..rows.num_rows].fill([0.0; LANES]));
    }
    let panels = panels.map(|panel| panel.as_chunks::<LANES>().0);
    by_rows!(rows, words => {
        if !E::tile(isa, words, panels, ahead, &mut sums.panels) {
            isa.run(Plain::<E, _> { rows: words, panels, sums });
        }
    });
}

/// For any set of instructions.
struct Plain<'a, E: Element, const ROWS: usize> {
    rows: &'a [[E::Word; ROWS]],
    panels: [&'a [[E::Word; LANES]]; 2],
    sums: &'a mut Sums,
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
        for (panel, sums) in self.panels.into_iter().zip(&mut self.sums.panels) {
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

/// As [`Plain`], by the instruction that multiplies pairs of bfloat16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(in crate::cpu) fn tile_avx512<const ROWS: usize>(
    rows: &[[u32; ROWS]],
    panels: [&[[u32; LANES]]; 2],
    ahead: Option<Ahead<'_, u32>>,
    sums: &mut [[[f32; LANES]; MAX_TILE_ROWS]; 2],
) {
    use std::arch::x86_64::{
        __m512bh, __m512i, _MM_HINT_T1, _mm_prefetch, _mm512_dpbf16_ps, _mm512_loadu_ps,
        _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps, _mm512_storeu_ps,
    };
    // SAFETY: both are 512 bits, of which any are a value.
    let pairs = |words: __m512i| unsafe { std::mem::transmute::<__m512i, __m512bh>(words) };
    let mut own = [[_mm512_setzero_ps(); ROWS]; 2];
    for (own, sums) in own.iter_mut().zip(&*sums) {
        for (own, sums) in own.iter_mut().zip(sums) {
            // SAFETY: an array of 16 sums is 512 bits.
            *own = unsafe { _mm512_loadu_ps(sums.as_ptr()) };
        }
    }
    let [next_first, next_second] = ahead.map_or([&[][..]; 2], |ahead| ahead.panels);
    let mut wait = ahead.map_or(usize::MAX, |ahead| ahead.turn);
    let num_turns = ahead.map_or(1, |ahead| ahead.num_turns);
    for (step, ((row_words, first), second)) in
        rows.iter().zip(panels[0]).zip(panels[1]).enumerate()
    {
        if wait == 0 {
            wait = num_turns;
            for next in [next_first, next_second] {
                // Advice: an address that is not there does no harm.
                _mm_prefetch::<_MM_HINT_T1>(next.as_ptr().wrapping_add(step * LANES).cast());
            }
        }
        wait -= 1;
        // SAFETY: an array of 16 words is 512 bits.
        let words =
            [first, second].map(|it| pairs(unsafe { _mm512_loadu_si512(it.as_ptr().cast()) }));
        for row in 0..ROWS {
            let row_word = pairs(_mm512_set1_epi32(row_words[row].cast_signed()));
            own[0][row] = _mm512_dpbf16_ps(own[0][row], row_word, words[0]);
            own[1][row] = _mm512_dpbf16_ps(own[1][row], row_word, words[1]);
        }
    }
    for (sums, own) in sums.iter_mut().zip(own) {
        for (sums, own) in sums.iter_mut().zip(own) {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), own) };
        }
    }
}
