//! The data types that a CPU computes from.

use half::bf16;

use super::LANES;
use super::isa::{Isa, mul_add};
use super::matrix::coded::{self, CODED, PLAIN, Step};
use super::memory::AnyBits;
use super::product::MAX_TILE_ROWS;
use super::product::coded::Decoded;
use super::product::tile::Ahead;
#[cfg(target_arch = "x86_64")]
use super::product::{
    coded::{first_tile_avx512, only_tile_avx512},
    tile::tile_avx512,
};

/// Something stored that is computed in float32.
pub trait Element: AnyBits {
    /// What one lane of a product takes at once: a few elements side by side.
    type Word: AnyBits;
    /// Elements of a word.
    const PER_WORD: usize;

    /// Exact.
    fn widen(self) -> f32;

    /// To the nearest, ties to even.
    fn narrow(value: f32) -> Self;

    /// The first `PER_WORD` elements, side by side.
    fn word(elements: &[Self]) -> Self::Word;

    /// The first `PER_WORD` values, narrowed.
    fn word_of(values: &[f32]) -> Self::Word;

    /// The element at `index` of a word.
    fn of_word(word: Self::Word, index: usize) -> Self;

    /// `sum` and the products of two words' elements, in their order.
    fn dot<const FMA: bool>(sum: f32, a: Self::Word, b: Self::Word) -> f32;

    /// Adds the sums of a tile by an instruction made for the type; `false` if there is none.
    fn tile<const ROWS: usize>(
        _isa: Isa,
        _rows: &[[Self::Word; ROWS]],
        _panels: [&[[Self::Word; LANES]]; 2],
        _ahead: Option<Ahead<'_, Self::Word>>,
        _sums: &mut [[[f32; LANES]; MAX_TILE_ROWS]; 2],
    ) -> bool {
        false
    }

    /// Whether parameters of the type can be coded, see [`coded`].
    const HAS_CODE: bool = false;

    /// Codes of four vectors; `base` is the exponent whose code is 0.
    fn encode(_four: &[[Self::Word; LANES]; PLAIN], _base: u32) -> [[Self::Word; LANES]; CODED] {
        unreachable!("a type without a code")
    }

    /// What a lane's are codes of, but for a power of two.
    fn decode(_codes: [Self::Word; CODED]) -> [Self::Word; PLAIN] {
        unreachable!("a type without a code")
    }

    /// As [`tile`](Self::tile), over a whole coded pair of panels.
    fn only_tile<const ROWS: usize>(
        _isa: Isa,
        _rows: &[[Self::Word; ROWS]],
        _pair: &[Step<Self::Word>],
        _sums: &mut [[[f32; LANES]; MAX_TILE_ROWS]; 2],
    ) {
        unreachable!("a type without a code")
    }

    /// As [`tile`](Self::tile), over a coded block, whose words it keeps.
    fn first_tile<const ROWS: usize>(
        _isa: Isa,
        _rows: &[[Self::Word; ROWS]],
        _block: &[Step<Self::Word>],
        _next: &[Self::Word],
        _sums: &mut [[[f32; LANES]; MAX_TILE_ROWS]; 2],
        _decoded: &mut Decoded<Self::Word>,
    ) {
        unreachable!("a type without a code")
    }
}

impl Element for f32 {
    type Word = f32;
    const PER_WORD: usize = 1;

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn word(elements: &[Self]) -> f32 {
        elements[0]
    }

    #[inline(always)]
    fn word_of(values: &[f32]) -> f32 {
        values[0]
    }

    #[inline(always)]
    fn of_word(word: f32, _index: usize) -> Self {
        word
    }

    #[inline(always)]
    fn dot<const FMA: bool>(sum: f32, a: f32, b: f32) -> f32 {
        mul_add::<FMA>(a, b, sum)
    }
}

/// Not by `half`'s conversions, whose branches keep loops from becoming vector instructions.
impl Element for bf16 {
    /// The first element is the lower half.
    type Word = u32;
    const PER_WORD: usize = 2;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = (bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16) as u16;
        let quiet_nan = (bits >> 16) as u16 | 0x0040;
        Self::from_bits(if value.is_nan() { quiet_nan } else { rounded })
    }

    #[inline(always)]
    fn word(elements: &[Self]) -> u32 {
        u32::from(elements[1].to_bits()) << 16 | u32::from(elements[0].to_bits())
    }

    #[inline(always)]
    fn word_of(values: &[f32]) -> u32 {
        Self::word(&[Self::narrow(values[0]), Self::narrow(values[1])])
    }

    #[inline(always)]
    fn of_word(word: u32, index: usize) -> Self {
        Self::from_bits((word >> (16 * index)) as u16)
    }

    #[inline(always)]
    fn dot<const FMA: bool>(sum: f32, a: u32, b: u32) -> f32 {
        let wide = |word: u32| [f32::from_bits(word << 16), f32::from_bits(word & 0xFFFF_0000)];
        let (a, b) = (wide(a), wide(b));
        mul_add::<FMA>(a[1], b[1], mul_add::<FMA>(a[0], b[0], sum))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn tile<const ROWS: usize>(
        isa: Isa,
        rows: &[[u32; ROWS]],
        panels: [&[[u32; LANES]]; 2],
        ahead: Option<Ahead<'_, u32>>,
        sums: &mut [[[f32; LANES]; MAX_TILE_ROWS]; 2],
    ) -> bool {
        let has_it = isa.has_bf16_products();
        if has_it {
            // SAFETY: the processor has the instruction, see `Isa`.
            unsafe { tile_avx512(rows, panels, ahead, sums) };
        }
        has_it
    }

    const HAS_CODE: bool = true;

    #[inline(always)]
    fn encode(four: &[[u32; LANES]; PLAIN], base: u32) -> [[u32; LANES]; CODED] {
        coded::encode(four, base)
    }

    fn decode(codes: [u32; CODED]) -> [u32; PLAIN] {
        coded::decode(codes)
    }

    #[cfg(target_arch = "x86_64")]
    fn only_tile<const ROWS: usize>(
        isa: Isa,
        rows: &[[u32; ROWS]],
        pair: &[Step<u32>],
        sums: &mut [[[f32; LANES]; MAX_TILE_ROWS]; 2],
    ) {
        assert!(isa.has_bf16_products(), "codes are for processors that multiply them");
        // SAFETY: the processor has the instructions, see `Isa`.
        unsafe { only_tile_avx512(rows, pair, sums) };
    }

    #[cfg(target_arch = "x86_64")]
    fn first_tile<const ROWS: usize>(
        isa: Isa,
        rows: &[[u32; ROWS]],
        block: &[Step<u32>],
        next: &[u32],
        sums: &mut [[[f32; LANES]; MAX_TILE_ROWS]; 2],
        decoded: &mut Decoded<u32>,
    ) {
        assert!(isa.has_bf16_products(), "codes are for processors that multiply them");
        // SAFETY: as above.
        unsafe { first_tile_avx512(rows, block, next, sums, decoded) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bfloat16_rounds_as_half_does() {
        let mut bits = 0_u32;
        loop {
            let value = f32::from_bits(bits);
            let (ours, theirs) = (<bf16 as Element>::narrow(value), bf16::from_f32(value));
            assert_eq!(ours.to_bits(), theirs.to_bits(), "{bits:#x}");
            assert_eq!(ours.widen().to_bits(), theirs.to_f32().to_bits(), "{bits:#x}");
            match bits.checked_add(4093) {
                Some(next) => bits = next,
                None => break,
            }
        }
    }
}
