//! The innermost loops by the instruction that multiplies pairs of bfloat16, over words as they are and
//! over [codes](crate::cpu::matrix::coded).
//!
//! A sum has one order in all of them, so a row has the same bits in any batch.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _MM_HINT_NTA, _MM_HINT_T1, _mm_prefetch, _mm512_dpbf16_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_ror_epi32, _mm512_set1_epi32, _mm512_setzero_ps,
    _mm512_storeu_ps, _mm512_storeu_si512, _mm512_ternarylogic_epi32,
};

use super::tile::{Ahead, Decoded, Sums};
use crate::cpu::LANES;
use crate::cpu::matrix::coded::{BASES, CODED, PART_BITS, PARTS, PLAIN, SPARE, Step};

/// Bytes ahead that are asked for while codes are decoded: the processor looks less far by itself
/// than where it has nothing but sums to work out. They are read once, so no outer cache keeps them.
const AHEAD_BYTES: usize = 6144;

/// The sums of a tile in registers, for each panel and row.
type Own<const ROWS: usize> = [[__m512; ROWS]; 2];

#[target_feature(enable = "avx512f")]
#[inline]
fn load<const ROWS: usize>(sums: &Sums) -> Own<ROWS> {
    let mut own = [[_mm512_setzero_ps(); ROWS]; 2];
    for (own, sums) in own.iter_mut().zip(sums) {
        for (own, sums) in own.iter_mut().zip(sums) {
            // SAFETY: an array of 16 sums is 512 bits.
            *own = unsafe { _mm512_loadu_ps(sums.as_ptr()) };
        }
    }
    own
}

#[target_feature(enable = "avx512f")]
#[inline]
fn store<const ROWS: usize>(own: Own<ROWS>, sums: &mut Sums) {
    for (sums, own) in sums.iter_mut().zip(own) {
        for (sums, own) in sums.iter_mut().zip(own) {
            // SAFETY: an array of 16 sums is 512 bits.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), own) };
        }
    }
}

/// Adds the products of some words of the rows and of both panels.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn add<const ROWS: usize, const WORDS: usize>(
    rows: &[[u32; ROWS]; WORDS],
    panels: &[[__m512i; WORDS]; 2],
    sums: &mut Own<ROWS>,
) {
    // SAFETY: both are 512 bits, of which any are a value.
    let pairs = |words: __m512i| unsafe { std::mem::transmute::<__m512i, __m512bh>(words) };
    for word in 0..WORDS {
        for row in 0..ROWS {
            let row_word = pairs(_mm512_set1_epi32(rows[word][row].cast_signed()));
            for (sums, words) in sums.iter_mut().zip(panels) {
                sums[row] = _mm512_dpbf16_ps(sums[row], row_word, pairs(words[word]));
            }
        }
    }
}

/// [`run_tile`](super::tile::run_tile).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) fn tile<const ROWS: usize>(
    rows: &[[u32; ROWS]],
    panels: [&[[u32; LANES]]; 2],
    ahead: Option<Ahead<'_>>,
    sums: &mut Sums,
) {
    let mut own = load(sums);
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
        let words = [first, second].map(|it| [unsafe { _mm512_loadu_si512(it.as_ptr().cast()) }]);
        add(std::array::from_ref(row_words), &words, &mut own);
    }
    store(own, sums);
}

/// [`decode`](crate::cpu::matrix::coded::decode).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
fn decode(codes: &[[u32; LANES]; CODED]) -> [__m512i; PLAIN] {
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

/// [`run_only_tile`](super::tile::run_only_tile).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) fn only_tile<const ROWS: usize>(rows: &[[u32; ROWS]], pair: &[Step], sums: &mut Sums) {
    let mut own = [[_mm512_setzero_ps(); ROWS]; 2];
    for (rows, codes) in rows.as_chunks::<PLAIN>().0.iter().zip(pair) {
        for line in codes.as_flattened() {
            // Advice: an address that is not there does no harm.
            _mm_prefetch::<_MM_HINT_NTA>(line.as_ptr().wrapping_byte_add(AHEAD_BYTES).cast());
        }
        add(rows, &[decode(&codes[0]), decode(&codes[1])], &mut own);
    }
    store(own, sums);
}

/// [`run_first_tile`](super::tile::run_first_tile).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) fn first_tile<const ROWS: usize>(
    rows: &[[u32; ROWS]],
    block: &[Step],
    next: &[u32],
    sums: &mut Sums,
    decoded: &mut Decoded,
) {
    let mut own = load(sums);
    let [first, second] = decoded.each_mut().map(|words| words.as_chunks_mut::<PLAIN>().0);
    let fours = rows.as_chunks::<PLAIN>().0.iter().zip(first).zip(second).zip(block);
    for (step, (((rows, first), second), codes)) in fours.enumerate() {
        for line in 0..2 {
            let next = next.as_ptr().wrapping_add((2 * step + line) * LANES);
            // Advice, as above.
            _mm_prefetch::<_MM_HINT_T1>(next.cast());
        }
        let words = [decode(&codes[0]), decode(&codes[1])];
        for (decoded, words) in [first, second].into_iter().zip(words) {
            for (decoded, words) in decoded.iter_mut().zip(words) {
                // SAFETY: an array of 16 words is 512 bits.
                unsafe { _mm512_storeu_si512(decoded.as_mut_ptr().cast(), words) };
            }
        }
        add(rows, &words, &mut own);
    }
    store(own, sums);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;
    use crate::cpu::matrix::coded;

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
            let codes = coded::encode(&four, 0x60);
            // SAFETY: the processor has the instructions.
            let found: [[u32; LANES]; PLAIN] = unsafe { std::mem::transmute(decode(&codes)) };
            for lane in 0..LANES {
                let expected = coded::decode(codes.map(|codes| codes[lane]));
                assert_eq!(found.map(|words| words[lane]), expected, "{round} {lane}");
            }
        }
    }
}
