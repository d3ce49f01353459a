//! Tiles over coded panels, see [`coded`](crate::cpu::matrix::coded).
//!
//! A word's sums have one order, that of [`run_tile`](super::tile::run_tile), so a row has the same
//! bits in any batch. Sums are of decoded words, which [`Code::correct`] makes those of parameters.
//!
//! [`Code::correct`]: crate::cpu::matrix::coded::Code::correct

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _MM_HINT_NTA, _MM_HINT_T1, _mm_prefetch, _mm512_dpbf16_ps,
    _mm512_loadu_ps, _mm512_set1_epi32, _mm512_setzero_ps, _mm512_storeu_ps, _mm512_storeu_si512,
};

use super::tile::{Sums, TileRows, by_rows};
use super::{BLOCK_WORDS, MAX_TILE_ROWS};
use crate::cpu::LANES;
use crate::cpu::element::Element;
use crate::cpu::isa::Isa;
use crate::cpu::matrix::coded::{BASES, CODED, PART_BITS, PARTS, PLAIN, SPARE, Step, steps};

/// Bytes ahead that are asked for while codes are decoded: the processor looks less far by itself
/// than where it has nothing but sums to work out. They are read once, so no outer cache keeps them.
const AHEAD_BYTES: usize = 6144;

/// The words of two panels in a block, decoded.
pub(in crate::cpu) type Decoded<W> = [[[W; LANES]; BLOCK_WORDS]; 2];

/// The only tile of a step over a whole pair of panels.
pub(super) fn run_only_tile<E: Element>(
    isa: Isa,
    rows: TileRows<'_, E::Word>,
    pair: &[E::Word],
    sums: &mut Sums,
) {
    by_rows!(rows, words => E::only_tile(isa, words, steps(pair), &mut sums.panels));
}

/// The first of several tiles over a block of a pair of panels: leaves its words in `decoded`, and
/// asks for a third of the codes that come `next`.
pub(super) fn run_first_tile<E: Element>(
    isa: Isa,
    rows: TileRows<'_, E::Word>,
    block: &[E::Word],
    next: &[E::Word],
    is_more: bool,
    sums: &mut Sums,
    decoded: &mut Decoded<E::Word>,
) {
    if !is_more {
        sums.panels.iter_mut().for_each(|sums| sums[..rows.num_rows].fill([0.0; LANES]));
    }
    by_rows!(rows, words => {
        E::first_tile(isa, words, steps(block), next, &mut sums.panels, decoded);
    });
}

/// [`decode`](crate::cpu::matrix::coded::decode).
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
fn decode_avx512(codes: &[[u32; LANES]; CODED]) -> [__m512i; PLAIN] {
    use std::arch::x86_64::{_mm512_loadu_si512, _mm512_ror_epi32, _mm512_ternarylogic_epi32};
    /// Bits of `a` where the mask is set, else of `b`.
    const CHOOSE: i32 = 0xCA;
    const SHIFT: i32 = PART_BITS.cast_signed();
    let all = |bits: u32| _mm512_set1_epi32(bits.cast_signed());
    let choose = |mask, a, b| _mm512_ternarylogic_epi32::<CHOOSE>(all(mask), a, b);
    // SAFETY: an array of 16 words is 512 bits.
    let [a, b, c] =
        codes.each_ref().map(|codes| unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) });
    let part = choose(PARTS[0], _mm512_ror_epi32::<SHIFT>(a), _mm512_ror_epi32::<{ 2 * SHIFT }>(b));
    let d = choose(PARTS[2], _mm512_ror_epi32::<{ 3 * SHIFT }>(c), part);
    [a, b, c, d].map(|it| choose(SPARE, all(BASES), it))
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
pub(in crate::cpu) fn only_tile_avx512<const ROWS: usize>(
    rows: &[[u32; ROWS]],
    pair: &[Step<u32>],
    sums: &mut [[[f32; LANES]; MAX_TILE_ROWS]; 2],
) {
    let mut own = [[_mm512_setzero_ps(); ROWS]; 2];
    for (rows, codes) in rows.as_chunks::<PLAIN>().0.iter().zip(pair) {
        for line in codes.as_flattened() {
            // Advice: an address that is not there does no harm.
            _mm_prefetch::<_MM_HINT_NTA>(line.as_ptr().wrapping_byte_add(AHEAD_BYTES).cast());
        }
        add_four(rows, &[decode_avx512(&codes[0]), decode_avx512(&codes[1])], &mut own);
    }
    for (sums, own) in sums.iter_mut().zip(own) {
        for (sums, own) in sums.iter_mut().zip(own) {
            // SAFETY: an array of 16 sums is 512 bits.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), own) };
        }
    }
}

/// Adds the products of four words.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn add_four<const ROWS: usize>(
    rows: &[[u32; ROWS]; PLAIN],
    words: &[[__m512i; PLAIN]; 2],
    sums: &mut [[__m512; ROWS]; 2],
) {
    for word in 0..PLAIN {
        for row in 0..ROWS {
            let row_word = pairs(_mm512_set1_epi32(rows[word][row].cast_signed()));
            for (sums, words) in sums.iter_mut().zip(words) {
                sums[row] = _mm512_dpbf16_ps(sums[row], row_word, pairs(words[word]));
            }
        }
    }
}

/// [`run_first_tile`], likewise.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(in crate::cpu) fn first_tile_avx512<const ROWS: usize>(
    rows: &[[u32; ROWS]],
    block: &[Step<u32>],
    next: &[u32],
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
    let [first, second] = decoded.each_mut().map(|words| words.as_chunks_mut::<PLAIN>().0);
    let fours = rows.as_chunks::<PLAIN>().0.iter().zip(first).zip(second).zip(block);
    for (step, (((rows, first), second), codes)) in fours.enumerate() {
        for line in 0..2 {
            let next = next.as_ptr().wrapping_add((2 * step + line) * LANES);
            // Advice, as above.
            _mm_prefetch::<_MM_HINT_T1>(next.cast());
        }
        let words = [decode_avx512(&codes[0]), decode_avx512(&codes[1])];
        for (decoded, words) in [first, second].into_iter().zip(words) {
            for (decoded, words) in decoded.iter_mut().zip(words) {
                // SAFETY: an array of 16 words is 512 bits.
                unsafe { _mm512_storeu_si512(decoded.as_mut_ptr().cast(), words) };
            }
        }
        add_four(rows, &words, &mut own);
    }
    for (sums, own) in sums.iter_mut().zip(own) {
        for (sums, own) in sums.iter_mut().zip(own) {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), own) };
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::cpu::matrix::coded::{decode, encode};

    #[test]
    fn vectors_are_decoded_as_lanes_are() {
        if !Isa::available().into_iter().any(Isa::has_bf16_products) {
            println!("skipped: the processor multiplies no bfloat16");
            return;
        }
        let word = |index: usize| (index as u32 + 1).wrapping_mul(0x9E37_79B9) & 0xBFFF_BFFF;
        for round in 0..500 {
            let at = |vector: usize, lane: usize| word((round * PLAIN + vector) * LANES + lane);
            let four = std::array::from_fn(|vector| std::array::from_fn(|lane| at(vector, lane)));
            let codes = encode(&four, 0x60);
            // SAFETY: the processor has the instructions.
            let found: [[u32; LANES]; PLAIN] =
                unsafe { std::mem::transmute(decode_avx512(&codes)) };
            for lane in 0..LANES {
                let expected = decode(codes.map(|codes| codes[lane]));
                assert_eq!(found.map(|words| words[lane]), expected, "{round} {lane}");
            }
        }
    }
}
