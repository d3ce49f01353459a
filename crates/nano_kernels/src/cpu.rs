//! Operators of a CPU: one pass over memory each, in plain loops that compilers turn into vector
//! instructions.
//!
//! Sums are kept in a fixed number of lanes, so a row's result has the same bits whatever else is
//! computed, and on every processor.

pub mod attention;
mod element;
pub mod norm;
pub mod rope;

pub use element::Element;

/// Lanes of a sum: enough to hide an addition's latency in registers of any width.
const LANES: usize = 16;

/// The sum over `f` of pairs of elements, in lanes.
#[inline]
fn sum_of<A: Copy, B: Copy>(a: &[A], b: &[B], f: impl Fn(A, B) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] += f(a[lane], b[lane]);
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane += f(*a, *b);
    }
    // Halves onto halves, spelled out: a loop of changing width stays a loop.
    let eight: [f32; 8] = std::array::from_fn(|lane| lanes[lane] + lanes[lane + 8]);
    let four: [f32; 4] = std::array::from_fn(|lane| eight[lane] + eight[lane + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}
