//! The exponential function, in operations that become vector instructions.

use super::isa::mul_add;

/// `e^x` for `x <= 0` within 2 units in the last place of float32, 0 below -87: 2 to a whole
/// power, times a polynomial for the rest.
#[inline(always)]
pub(super) fn exp<const FMA: bool>(x: f32) -> f32 {
    // Adding it rounds to a whole number, which is then in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    // NaN stays NaN: it is not below any bound.
    let bounded = if x < -87.0 { -87.0 } else { x };
    let shifted = mul_add::<FMA>(bounded, std::f32::consts::LOG2_E, ROUND);
    let whole = shifted - ROUND;
    // ln 2 in two parts, so that the product with the first is exact.
    let rest = mul_add::<FMA>(whole, 2.121_944_4e-4, mul_add::<FMA>(whole, -0.693_359_4, bounded));
    let mut polynomial = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5, 1.0, 1.0]
    {
        polynomial = mul_add::<FMA>(polynomial, rest, coefficient);
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3F80_0000));
    if x < -87.0 { 0.0 } else { polynomial * power }
}

/// `x / (1 + e^-x)`, without an overflow on either side.
#[inline(always)]
pub(super) fn silu<const FMA: bool>(x: f32) -> f32 {
    let power = exp::<FMA>(-x.abs());
    (if x < 0.0 { x * power } else { x }) / (1.0 + power)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_near_that_of_the_standard_library() {
        for step in 0..200_000 {
            let x = -90.0 * step as f32 / 200_000.0;
            let theirs = x.exp();
            for ours in [exp::<false>(x), exp::<true>(x)] {
                assert!((ours - theirs).abs() <= 3e-7 * theirs + 2e-38, "{x}: {ours} {theirs}");
            }
        }
        assert!(exp::<false>(f32::NEG_INFINITY) == 0.0 && exp::<false>(f32::NAN).is_nan());
    }

    #[test]
    fn silu_is_that_of_the_reference() {
        for step in -2000..2000 {
            let x = step as f32 * 0.1;
            let expected = (f64::from(x) / (1.0 + (-f64::from(x)).exp())) as f32;
            assert!((silu::<false>(x) - expected).abs() <= 1e-6 * expected.abs() + 1e-35, "{x}");
        }
        assert!(silu::<true>(f32::NAN).is_nan());
    }
}
