//! Parameters of bfloat16 in 12 bits each, without loss.
//!
//! A decode step is as quick as memory gives the parameters, and of their 16 bits the exponent's 8
//! say little: 16 neighbouring exponents cover all but about one normally distributed parameter in
//! ten thousand. So four vectors of words become three: two of signs and mantissas, one of 4 bits
//! of exponent above a base that the matrix has. The rest is listed as [`Patch`]es, which a product
//! adds behind its sums. What is read back is the parameter, bit by bit.
//!
//! # Source
//! Zhang et al., 70 % Size, 100 % Accuracy (`DFloat11`), 2025, which codes exponents by Huffman's
//! method; a code of one length costs more bits and decodes in a few vector instructions.

use crate::cpu::LANES;
use crate::cpu::element::Element;
use crate::cpu::isa::Isa;

/// Vectors of words that are coded together.
pub const PLAIN: usize = 4;
/// Vectors that they become.
pub const CODED: usize = 3;
/// Exponents that have a code.
const NUM_EXPONENTS: u32 = 16;
/// What a decoded exponent is `NUM_EXPONENTS` numbers from, all of them normal.
pub(in crate::cpu) const DECODED_BASE: u32 = 0x70;
/// Rows whose exponents are counted to choose a base.
const NUM_SAMPLES: usize = 256;
/// Of so many parameters no more than one may lack a code.
const MIN_PER_PATCH: usize = 512;

/// How a matrix is coded.
#[derive(Debug)]
pub struct Code {
    /// The biased exponent whose code is 0.
    base: u32,
    /// By panels.
    patches: Vec<Patch>,
    /// Where the patches of a panel start, and where the last ones end.
    starts: Vec<u32>,
}

/// A parameter without a code, in whose place the number of base and code 0 is stored.
#[derive(Clone, Copy, Debug)]
pub struct Patch {
    /// Of the panel.
    pub(super) lane: u32,
    pub(super) column: u32,
    pub(super) value: f32,
}

impl Code {
    /// A code for a matrix, if its exponents are close enough and the processor takes less time to
    /// decode than memory to read.
    pub(super) fn fitting<E: Element>(
        isa: Isa,
        rows: usize,
        columns: usize,
        read: &impl Fn(usize, &mut [E]),
    ) -> Option<Self> {
        let is_whole = columns > 0 && columns.is_multiple_of(PLAIN * E::PER_WORD);
        if !E::HAS_CODE || !isa.has_bf16_products() || !is_whole {
            return None;
        }
        let mut counts = [0_u32; 256];
        let mut elements = vec![E::narrow(0.0); columns];
        for row in (0..rows).step_by(rows.div_ceil(NUM_SAMPLES).max(1)) {
            read(row, &mut elements);
            for element in &elements {
                counts[exponent(*element) as usize] += 1;
            }
        }
        let covered =
            |base: u32| counts[base as usize..][..NUM_EXPONENTS as usize].iter().sum::<u32>();
        // From 1: what has exponent 0 is no normal number.
        let base = (1..256 - NUM_EXPONENTS).max_by_key(|&base| covered(base))?;
        let total: u32 = counts.iter().sum();
        is_worth_it((total - covered(base)) as usize, total as usize).then(|| Self {
            base,
            patches: Vec::new(),
            starts: Vec::new(),
        })
    }

    /// Vectors of a panel.
    pub(super) fn num_vectors(code: Option<&Self>, num_words: usize) -> usize {
        if code.is_some() { num_words / PLAIN * CODED } else { num_words }
    }

    pub(super) fn base(&self) -> u32 {
        self.base
    }

    pub(super) fn set_patches(&mut self, panels: impl Iterator<Item = Vec<Patch>>) {
        self.starts.push(0);
        for patches in panels {
            self.patches.extend(patches);
            self.starts.push(self.patches.len() as u32);
        }
    }

    /// Whether few enough parameters of a matrix of that size lack a code: a sample may not tell.
    pub(super) fn is_worth_it(&self, num_parameters: usize) -> bool {
        is_worth_it(self.patches.len(), num_parameters)
    }

    /// Bytes of the patches.
    pub(super) fn num_bytes(&self) -> usize {
        size_of_val(&self.patches[..]) + size_of_val(&self.starts[..])
    }

    /// Those of a panel.
    pub(in crate::cpu) fn patches(&self, panel: usize) -> &[Patch] {
        &self.patches[self.starts[panel] as usize..self.starts[panel + 1] as usize]
    }

    /// What decoded words are to be multiplied by.
    pub(super) fn scale(&self) -> f32 {
        f32::from_bits((self.base + 127 - DECODED_BASE) << 23)
    }

    /// What stands, scaled, where a patch belongs.
    fn hole(&self) -> f32 {
        f32::from_bits(self.base << 23)
    }

    /// Makes sums of decoded words, of rows with a panel, those of the parameters; `words` are the
    /// rows' inputs, `[num_words, num_rows]`. Where one is infinite and its parameter has a patch, the
    /// sum is no number.
    #[inline(always)]
    pub(in crate::cpu) fn correct<E: Element>(
        &self,
        panel: usize,
        words: &[E::Word],
        sums: &mut [[f32; LANES]],
    ) {
        let (scale, hole) = (self.scale(), self.hole());
        for sum in sums.iter_mut().flatten() {
            *sum *= scale;
        }
        for patch in self.patches(panel) {
            let (column, lane) = (patch.column as usize, patch.lane as usize);
            let words = &words[column / E::PER_WORD * sums.len()..][..sums.len()];
            for (sums, word) in sums.iter_mut().zip(words) {
                let input = E::of_word(*word, column % E::PER_WORD).widen();
                sums[lane] += (patch.value - hole) * input;
            }
        }
    }
}

/// Whether so many parameters may lack a code among so many.
fn is_worth_it(num_patches: usize, num_parameters: usize) -> bool {
    num_patches * MIN_PER_PATCH <= num_parameters
}

fn exponent<E: Element>(element: E) -> u32 {
    element.widen().to_bits() >> 23 & 0xFF
}

/// Adds the elements of a row that have no code.
pub(super) fn find_patches<E: Element>(
    lane: u32,
    elements: &[E],
    base: u32,
    patches: &mut Vec<Patch>,
) {
    let has_none = |it: &E| exponent(*it).wrapping_sub(base) >= NUM_EXPONENTS;
    // In pieces: to look at one is a few vector instructions, and few hold any.
    for (piece, elements) in elements.chunks(64).enumerate() {
        if elements.iter().fold(false, |any, it| any | has_none(it)) {
            let found = elements.iter().enumerate().filter(|(_, it)| has_none(it));
            patches.extend(found.map(|(at, it)| Patch {
                lane,
                column: (64 * piece + at) as u32,
                value: it.widen(),
            }));
        }
    }
}

/// Codes of pairs of bfloat16.
pub(in crate::cpu) fn encode(four: &[[u32; LANES]; PLAIN], base: u32) -> [[u32; LANES]; CODED] {
    let mut codes = [[0; LANES]; CODED];
    for lane in 0..LANES {
        for (word, lanes) in four.iter().enumerate() {
            for half in [0, 16] {
                let bits = lanes[lane] >> half & 0xFFFF;
                let exponent = (bits >> 7 & 0xFF).wrapping_sub(base);
                let has_code = u32::from(exponent < NUM_EXPONENTS);
                let rest = has_code * (bits >> 8 & 0x80 | bits & 0x7F);
                codes[word / 2][lane] |= rest << (half + 8 * (word as u32 % 2));
                codes[2][lane] |= (has_code * exponent) << (half + 4 * word as u32);
            }
        }
    }
    codes
}

/// Pairs of bfloat16 from their codes, but for a power of two.
pub(in crate::cpu) fn decode(codes: &[[u32; LANES]; CODED]) -> [[u32; LANES]; PLAIN] {
    let [first, second, exponents] = codes;
    [
        decode_word::<8, 0, 7, 0>(first, exponents),
        decode_word::<0, 8, 3, 0>(first, exponents),
        decode_word::<8, 0, 0, 1>(second, exponents),
        decode_word::<0, 8, 0, 5>(second, exponents),
    ]
}

/// By where sign, mantissa and exponent are shifted to: the sign to the left, the mantissa to the
/// right, the exponent to the left or right.
fn decode_word<const SIGN: u32, const MANTISSA: u32, const LEFT: u32, const RIGHT: u32>(
    rest: &[u32; LANES],
    exponents: &[u32; LANES],
) -> [u32; LANES] {
    let mut word = [0; LANES];
    for ((word, rest), exponent) in word.iter_mut().zip(rest).zip(exponents) {
        let (sign, mantissa) = (rest << SIGN, rest >> MANTISSA);
        let exponent = exponent << LEFT >> RIGHT;
        *word = (sign & 0x8000_8000)
            | (mantissa & 0x007F_007F)
            | (exponent & 0x0780_0780)
            | ((DECODED_BASE << 7) * 0x0001_0001);
    }
    word
}
