//! Tiles over coded panels, see [`coded`](crate::cpu::matrix::coded).
//!
//! A word's sums have one order, that of [`run_tile`](super::tile::run_tile), so a row has the same
//! bits in any batch. Sums are of decoded words, which [`Code::correct`] makes those of parameters.
//!
//! [`Code::correct`]: crate::cpu::matrix::coded::Code::correct

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m512bh, __m512i, _MM_HINT_NTA, _MM_HINT_T1, _mm_prefetch, _mm512_dpbf16_ps, _mm512_loadu_ps,
    _mm512_set1_epi32, _mm512_setzero_ps, _mm512_storeu_ps, _mm512_storeu_si512,
};

use super::tile::{Sums, TileRows};
use super::{BLOCK_WORDS, MAX_TILE_ROWS};
use crate::cpu::LANES;
use crate::cpu::element::Element;
use crate::cpu::isa::Isa;
use crate::cpu::matrix::coded::{CODED, DECODED_BASE, PLAIN};

/// Pairs of panels that few rows go over together: a sum waits for the one before it, and that of
/// one row with two panels longer than memory takes.
pub(super) const MAX_PAIRS: usize = 2;
/// Rows that are few.
pub(super) const FEW_ROWS: usize = 4;
/// Bytes ahead that are asked for while codes are decoded: the processor looks less far by itself
/// than where it has nothing but sums to work out. They are read once, so no outer cache keeps them.
const AHEAD_BYTES: usize = 3072;

/// The words of two panels in a block, decoded.
pub(in crate::cpu) type Decoded<W> = [[[W; LANES]; BLOCK_WORDS]; 2];

/// The only tile of a step over whole panels, one or more pairs of them, to each its sums.
pub(super) fn run_only_tile<E: Element>(
    isa: Isa,
    rows: TileRows<'_, E::Word>,
    pairs: &[[&[E::Word]; 2]],
    sums: &mut [Sums],
) {
    macro_rules! by_rows {
        ($($rows:literal)*) => {
            match rows.num_rows {
                $($rows => {
                    let rows = rows.words.as_chunks::<$rows>().0;
                    match (pairs, sums) {
                        ([[a, b]], [sums, ..]) => {
                            let panels = [a, b].map(|it| it.as_chunks().0);
                            E::only_tile(isa, rows, panels, sums.panels.each_mut());
                        }
                        ([[a, b], [c, d]], [first, second, ..]) => {
                            let panels = [a, b, c, d].map(|it| it.as_chunks().0);
                            let ([a, b], [c, d]) =
                                (first.panels.each_mut(), second.panels.each_mut());
                            E::only_tile(isa, rows, panels, [a, b, c, d]);
                        }
                        _ => unreachable!("a tile has 1 to 12 rows, and one or two pairs of panels")
                    }
                })*
                _ => unreachable!("a tile has 1 to 12 rows, and one or two pairs of panels")
            }
        };
    }
    by_rows!(1 2 3 4 5 6 7 8 9 10 11 12);
}

/// The first of several tiles over a block of two panels: leaves its words in `decoded`, and asks
/// for a third of the codes that come `next`.
pub(super) fn run_first_tile<E: Element>(
    isa: Isa,
    rows: TileRows<'_, E::Word>,
    panels: [&[E::Word]; 2],
    next: [&[E::Word]; 2],
    is_more: bool,
    sums: &mut Sums,
    decoded: &mut Decoded<E::Word>,
) {
    macro_rules! by_rows {
        ($($rows:literal)*) => {
            match rows.num_rows {
                $($rows => {
                    let rows = rows.words.as_chunks::<$rows>().0;
                    if !is_more {
                        sums.panels.iter_mut().for_each(|sums| sums[..$rows].fill([0.0; LANES]));
                    }
                    let panels = panels.map(|it| it.as_chunks().0);
                    E::first_tile(isa, rows, panels, next, &mut sums.panels, decoded);
                })*
                _ => unreachable!("a tile has 1 to 12 rows, and one or two pairs of panels")
            }
        };
    }
    by_rows!(1 2 3 4 5 6 7 8 9 10 11 12);
}

/// [`decode`](crate::cpu::matrix::coded::decode).
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
fn decode_avx512(codes: &[[u32; LANES]; CODED]) -> [__m512i; PLAIN] {
    use std::arch::x86_64::{
        _mm512_and_si512, _mm512_loadu_si512, _mm512_or_si512, _mm512_set1_epi32,
        _mm512_slli_epi32, _mm512_srli_epi32, _mm512_ternarylogic_epi32,
    };
    /// Bits of `a` where the mask is set, else of `b`.
    const CHOOSE: i32 = 0xCA;
    let all = |bits: u32| _mm512_set1_epi32(bits.cast_signed());
    let (signs, field) = (all(0x8000_8000), all(0x7F80_7F80));
    let (low, base) = (all(0x0780_0780), all((DECODED_BASE << 7) * 0x0001_0001));
    // SAFETY: an array of 16 words is 512 bits.
    let [first, second, exponents] =
        codes.each_ref().map(|codes| unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) });
    let word = |sign, mantissa, exponent| {
        let rest = _mm512_ternarylogic_epi32::<CHOOSE>(signs, sign, mantissa);
        let exponent = _mm512_or_si512(_mm512_and_si512(exponent, low), base);
        _mm512_ternarylogic_epi32::<CHOOSE>(field, exponent, rest)
    };
    [
        word(_mm512_slli_epi32::<8>(first), first, _mm512_slli_epi32::<7>(exponents)),
        word(first, _mm512_srli_epi32::<8>(first), _mm512_slli_epi32::<3>(exponents)),
        word(_mm512_slli_epi32::<8>(second), second, _mm512_srli_epi32::<1>(exponents)),
        word(second, _mm512_srli_epi32::<8>(second), _mm512_srli_epi32::<5>(exponents)),
    ]
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn pairs(words: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits, of which any are a value.
    unsafe { std::mem::transmute(words) }
}

/// [`run_only_tile`], by the instruction that multiplies pairs of bfloat16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(in crate::cpu) fn only_tile_avx512<const ROWS: usize, const PANELS: usize>(
    rows: &[[u32; ROWS]],
    panels: [&[[u32; LANES]]; PANELS],
    sums: [&mut [[f32; LANES]; MAX_TILE_ROWS]; PANELS],
) {
    let mut own = [[_mm512_setzero_ps(); ROWS]; PANELS];
    let panel_bytes = size_of_val(panels[0]);
    for (step, rows) in rows.as_chunks::<PLAIN>().0.iter().enumerate() {
        let offset = step * CODED;
        // Behind a panel lie the others that are at hand, and then those that are next.
        let is_next = (offset * LANES * size_of::<u32>()) + AHEAD_BYTES >= panel_bytes;
        let ahead = AHEAD_BYTES + if is_next { (PANELS - 1) * panel_bytes } else { 0 };
        let mut words = [[_mm512_set1_epi32(0); PLAIN]; PANELS];
        for panel in 0..PANELS {
            let Some(codes) = panels[panel][offset..].first_chunk::<CODED>() else { break };
            for line in codes {
                // Advice: an address that is not there does no harm.
                _mm_prefetch::<_MM_HINT_NTA>(line.as_ptr().wrapping_byte_add(ahead).cast());
            }
            words[panel] = decode_avx512(codes);
        }
        for word in 0..PLAIN {
            for row in 0..ROWS {
                let row_word = pairs(_mm512_set1_epi32(rows[word][row].cast_signed()));
                for panel in 0..PANELS {
                    let words = pairs(words[panel][word]);
                    own[panel][row] = _mm512_dpbf16_ps(own[panel][row], row_word, words);
                }
            }
        }
    }
    for (sums, own) in sums.into_iter().zip(own) {
        for (sums, own) in sums.iter_mut().zip(own) {
            // SAFETY: an array of 16 sums is 512 bits.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), own) };
        }
    }
}

/// [`run_first_tile`], likewise.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(in crate::cpu) fn first_tile_avx512<const ROWS: usize>(
    rows: &[[u32; ROWS]],
    panels: [&[[u32; LANES]]; 2],
    next: [&[u32]; 2],
    sums: &mut [[[f32; LANES]; MAX_TILE_ROWS]; 2],
    decoded: &mut Decoded<u32>,
) {
    let mut own = [[_mm512_setzero_ps(); ROWS]; 2];
    for (own, sums) in own.iter_mut().zip(&*sums) {
        for (own, sums) in own.iter_mut().zip(sums) {
            // SAFETY: an array of 16 sums is 512 bits.
            *own = unsafe { _mm512_loadu_ps(sums.as_ptr()) };
        }
    }
    let [first, second] = panels.map(|panel| panel.as_chunks::<CODED>().0);
    let [first_decoded, second_decoded] =
        decoded.each_mut().map(|words| words.as_chunks_mut::<PLAIN>().0);
    let fours = rows.as_chunks::<PLAIN>().0.iter().zip(first_decoded).zip(second_decoded);
    for (step, (((rows, first_decoded), second_decoded), (first, second))) in
        fours.zip(first.iter().zip(second)).enumerate()
    {
        for next in next {
            // Advice, as above.
            _mm_prefetch::<_MM_HINT_T1>(next.as_ptr().wrapping_add(step * LANES).cast());
        }
        let words = [decode_avx512(first), decode_avx512(second)];
        for (decoded, words) in [first_decoded, second_decoded].into_iter().zip(words) {
            for (decoded, words) in decoded.iter_mut().zip(words) {
                // SAFETY: an array of 16 words is 512 bits.
                unsafe { _mm512_storeu_si512(decoded.as_mut_ptr().cast(), words) };
            }
        }
        for word in 0..PLAIN {
            for row in 0..ROWS {
                let row_word = pairs(_mm512_set1_epi32(rows[word][row].cast_signed()));
                own[0][row] = _mm512_dpbf16_ps(own[0][row], row_word, pairs(words[0][word]));
                own[1][row] = _mm512_dpbf16_ps(own[1][row], row_word, pairs(words[1][word]));
            }
        }
    }
    for (sums, own) in sums.iter_mut().zip(own) {
        for (sums, own) in sums.iter_mut().zip(own) {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), own) };
        }
    }
}
