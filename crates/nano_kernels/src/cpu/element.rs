//! The data types that a CPU computes from.

use std::fmt::Debug;

use half::bf16;

use super::isa::{Isa, mul_add};

/// Something stored that is computed in float32.
///
/// A word is what one lane of a product takes at once: 32 bits, in which elements lie side by side, the
/// first one in the lowest.
pub trait Element: Copy + Default + Debug + Send + Sync + 'static {
    /// Elements of a word.
    const PER_WORD: usize;

    /// Its bits, and zeros above them.
    fn bits(self) -> u32;

    /// Of the lowest bits.
    fn of_bits(bits: u32) -> Self;

    /// Exact.
    fn widen(self) -> f32;

    /// To the nearest, ties to even.
    fn narrow(value: f32) -> Self;

    /// Whether the processor has an instruction for [`dot`](Self::dot).
    fn has_products(isa: Isa) -> bool;

    /// The first `PER_WORD` elements, side by side.
    #[inline(always)]
    fn word(elements: &[Self]) -> u32 {
        let bits = |index: usize| elements[index].bits() << (32 / Self::PER_WORD * index);
        (0..Self::PER_WORD).fold(0, |word, index| word | bits(index))
    }

    /// The first `PER_WORD` values, narrowed.
    #[inline(always)]
    fn word_of(values: &[f32]) -> u32 {
        let bits = |at: usize| Self::narrow(values[at]).bits() << (32 / Self::PER_WORD * at);
        (0..Self::PER_WORD).fold(0, |word, at| word | bits(at))
    }

    /// The element at `index` of a word.
    #[inline(always)]
    fn of_word(word: u32, index: usize) -> Self {
        Self::of_bits(word >> (32 / Self::PER_WORD * index))
    }

    /// `sum` and the products of two words' elements, in their order.
    fn dot<const FMA: bool>(sum: f32, a: u32, b: u32) -> f32;
}

impl Element for f32 {
    const PER_WORD: usize = 1;

    #[inline(always)]
    fn bits(self) -> u32 {
        self.to_bits()
    }

    #[inline(always)]
    fn of_bits(bits: u32) -> Self {
        Self::from_bits(bits)
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }

    fn has_products(_isa: Isa) -> bool {
        false
    }

    #[inline(always)]
    fn dot<const FMA: bool>(sum: f32, a: u32, b: u32) -> f32 {
        mul_add::<FMA>(Self::of_bits(a), Self::of_bits(b), sum)
    }
}

/// Not by `half`'s conversions, whose branches keep loops from becoming vector instructions.
impl Element for bf16 {
    const PER_WORD: usize = 2;

    #[inline(always)]
    fn bits(self) -> u32 {
        self.to_bits().into()
    }

    #[inline(always)]
    fn of_bits(bits: u32) -> Self {
        Self::from_bits(bits as u16)
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(self.bits() << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = (bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16) as u16;
        let quiet_nan = (bits >> 16) as u16 | 0x0040;
        Self::from_bits(if value.is_nan() { quiet_nan } else { rounded })
    }

    fn has_products(isa: Isa) -> bool {
        isa.has_bf16_products()
    }

    #[inline(always)]
    fn dot<const FMA: bool>(sum: f32, a: u32, b: u32) -> f32 {
        let wide = |word: u32| [f32::from_bits(word << 16), f32::from_bits(word & 0xFFFF_0000)];
        let (a, b) = (wide(a), wide(b));
        mul_add::<FMA>(a[1], b[1], mul_add::<FMA>(a[0], b[0], sum))
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
