//! Random weights for models without a checkpoint: normal with standard deviation 0.02, a function
//! of seed and tensor name alone, and made about as fast as memory is written.

use std::num::NonZero;
use std::thread;

use half::bf16;

use crate::backend::Dtype;

const STANDARD_DEVIATION: f64 = 0.02;
/// Draws that all weights are drawn from, one for each value of 16 bits.
const NUM_DRAWS: u64 = 1 << 16;
/// Elements that one piece of the work fills.
const CHUNK: usize = 1 << 18;

/// A source of random tensors.
#[derive(Debug)]
pub struct DummyWeights {
    seed: u64,
    draws: Vec<f32>,
}

/// One random tensor.
#[derive(Clone, Copy, Debug)]
pub struct DummyTensor<'a> {
    weights: &'a DummyWeights,
    /// Of the weights and the tensor's name.
    seed: u64,
}

impl DummyWeights {
    /// Prepares the draws.
    pub fn new(seed: u64) -> Self {
        let uniform = |number| (hash(seed ^ hash(number)) >> 11) as f64 / (1_u64 << 53) as f64;
        let normal = |draw: u64| {
            // Box and Muller, 1958.
            let radius = (-2.0 * (1.0 - uniform(2 * draw)).ln()).sqrt();
            let angle = std::f64::consts::TAU * uniform(2 * draw + 1);
            (STANDARD_DEVIATION * radius * angle.cos()) as f32
        };
        Self { seed, draws: (0..NUM_DRAWS).map(normal).collect() }
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> DummyTensor<'_> {
        let seed = name.bytes().fold(self.seed, |seed, byte| hash(seed ^ u64::from(byte)));
        DummyTensor { weights: self, seed }
    }
}

impl DummyTensor<'_> {
    /// What every tensor of the same source is drawn from.
    pub fn draws(&self) -> &[f32] {
        &self.weights.draws
    }

    /// What decides which draws it has.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Its little-endian elements.
    pub fn bytes(&self, num_elements: usize, dtype: Dtype) -> Vec<u8> {
        match dtype {
            Dtype::Float32 => self.fill(num_elements, f32::to_le_bytes),
            Dtype::BFloat16 => self.fill(num_elements, |draw| bf16::from_f32(draw).to_le_bytes()),
        }
    }

    fn fill<const N: usize>(
        &self,
        num_elements: usize,
        encode: impl Fn(f32) -> [u8; N],
    ) -> Vec<u8> {
        let draws: Vec<[u8; N]> = self.weights.draws.iter().map(|&draw| encode(draw)).collect();
        let mut bytes = vec![0; num_elements * N];
        let mut chunks: Vec<(usize, &mut [u8])> = bytes.chunks_mut(CHUNK * N).enumerate().collect();
        let num_threads = thread::available_parallelism().map_or(1, NonZero::get);
        let share = chunks.len().div_ceil(num_threads).max(1);
        thread::scope(|scope| {
            for chunks in chunks.chunks_mut(share) {
                scope.spawn(|| {
                    for (index, chunk) in chunks {
                        fill_chunk(chunk, hash(self.seed ^ *index as u64), &draws);
                    }
                });
            }
        });
        bytes
    }
}

/// Four elements from each 64 random bits.
fn fill_chunk<const N: usize>(chunk: &mut [u8], seed: u64, draws: &[[u8; N]]) {
    for (index, four) in chunk.chunks_mut(4 * N).enumerate() {
        let mut bits = hash(seed.wrapping_add(index as u64));
        for element in four.chunks_exact_mut(N) {
            element.copy_from_slice(&draws[(bits & 0xFFFF) as usize]);
            bits >>= 16;
        }
    }
}

/// One step of `SplitMix64` (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators,
/// 2014).
fn hash(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(weights: &DummyWeights, name: &str, num_elements: usize) -> Vec<f32> {
        let bytes = weights.tensor(name).bytes(num_elements, Dtype::Float32);
        bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    #[test]
    fn they_are_normal_with_a_standard_deviation_of_0_02() {
        let values = floats(&DummyWeights::new(3), "a", 1_000_000);
        let count = values.len() as f64;
        let mean = values.iter().map(|&value| f64::from(value)).sum::<f64>() / count;
        let square = values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>() / count;
        assert!(mean.abs() < 3e-4, "{mean}");
        assert!((square.sqrt() - 0.02).abs() < 3e-4, "{}", square.sqrt());
        let within = |sigmas: f32| {
            values.iter().filter(|value| value.abs() < 0.02 * sigmas).count() as f64 / count
        };
        assert!((within(1.0) - 0.6827).abs() < 0.01, "{}", within(1.0));
        assert!((within(2.0) - 0.9545).abs() < 0.01, "{}", within(2.0));
    }

    #[test]
    fn seed_and_name_decide() {
        let weights = DummyWeights::new(3);
        let values = floats(&weights, "a", 600_001);
        assert!(values.len() == 600_001 && values == floats(&DummyWeights::new(3), "a", 600_001));
        assert!(values[..1000] != floats(&weights, "b", 1000)[..]);
        assert!(values[..1000] != floats(&DummyWeights::new(4), "a", 1000)[..]);
        // A second chunk does not repeat the first.
        assert!(values[..1000] != values[CHUNK..CHUNK + 1000]);
    }

    #[test]
    fn bfloat16_rounds_the_same_numbers() {
        let weights = DummyWeights::new(3);
        let bytes = weights.tensor("a").bytes(1000, Dtype::BFloat16);
        for (bytes, value) in bytes.as_chunks::<2>().0.iter().zip(floats(&weights, "a", 1000)) {
            assert_eq!(bf16::from_le_bytes(*bytes), bf16::from_f32(value));
        }
    }
}
