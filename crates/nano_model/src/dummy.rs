//! Random weights for models without a checkpoint: normal with standard deviation 0.02, a function
//! of seed and tensor name alone, and made about as fast as memory is written.

const STANDARD_DEVIATION: f64 = 0.02;
/// Draws that all weights are drawn from, one for each value of 16 bits.
const NUM_DRAWS: u64 = 1 << 16;
/// Elements, four from each 64 random bits, whose bits follow from the number of their chunk.
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

    /// Writes elements from the one of number `start` on, from the [draws](Self::draws) as elements.
    pub fn fill<T: Copy>(&self, start: usize, elements: &mut [T], draws: &[T]) {
        let draws = &draws[..NUM_DRAWS as usize];
        let mut bits = 0;
        for (index, element) in (start..).zip(elements) {
            let at = index % 4;
            if at == 0 || index == start {
                let chunk = hash(self.seed ^ (index / CHUNK) as u64);
                bits = hash(chunk.wrapping_add((index % CHUNK / 4) as u64)) >> (16 * at);
            }
            *element = draws[(bits & 0xFFFF) as usize];
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
        let mut values = vec![0.0; num_elements];
        weights.tensor(name).fill(0, &mut values, &weights.draws);
        values
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
    fn a_part_is_that_of_the_whole() {
        let weights = DummyWeights::new(3);
        let values = floats(&weights, "a", CHUNK + 20);
        for (start, len) in [(0, 1), (1, 2), (3, 9), (6, 5), (CHUNK - 2, 7)] {
            let mut part = vec![0.0; len];
            weights.tensor("a").fill(start, &mut part, &weights.draws);
            assert!(part == values[start..start + len], "{start} {len}");
        }
    }

    #[test]
    fn they_are_the_same_from_version_to_version() {
        let values = floats(&DummyWeights::new(3), "a", 600_001);
        let bits = |index: usize| values[index].to_bits();
        let first = [0x3bca_0c6f, 0xbc93_0ec6, 0xbbc7_617a, 0x3c6e_b578, 0x3cff_692c];
        assert_eq!([0, 1, 2, 3, 4].map(bits), first);
        let later = [0xbc96_8ffc, 0xbc4d_36a0, 0x3ce1_b292, 0x3a1f_d79d];
        assert_eq!([CHUNK - 1, CHUNK, CHUNK + 5, 600_000].map(bits), later);
        let mix = |sum, (index, value): (usize, &f32)| {
            hash(sum ^ u64::from(value.to_bits()) ^ index as u64)
        };
        assert_eq!(values.iter().enumerate().fold(0, mix), 0x0906_b02b_5a98_92c8);
    }
}
