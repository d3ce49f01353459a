//! The data types that a CPU computes from.

use half::bf16;

/// Something stored that is computed in float32.
pub trait Element: Copy + Send + Sync + 'static {
    /// Exact.
    fn widen(self) -> f32;

    /// To the nearest, ties to even.
    fn narrow(value: f32) -> Self;
}

impl Element for f32 {
    #[inline]
    fn widen(self) -> f32 {
        self
    }

    #[inline]
    fn narrow(value: f32) -> Self {
        value
    }
}

/// Not by `half`'s conversions, whose branches keep loops from becoming vector instructions.
impl Element for bf16 {
    #[inline]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline]
    fn narrow(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = (bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16) as u16;
        let quiet_nan = (bits >> 16) as u16 | 0x0040;
        Self::from_bits(if value.is_nan() { quiet_nan } else { rounded })
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
