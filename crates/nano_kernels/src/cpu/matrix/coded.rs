//! Parameters of bfloat16 in 12 bits each, without loss.
//!
//! A decode step is as quick as memory gives the parameters, and of their 16 bits the exponent's 8
//! say little: 16 neighbouring exponents cover all but about one normally distributed parameter in
//! ten thousand. So a code keeps sign, mantissa and the lower 4 bits of an exponent that is counted
//! from a base of the matrix, each where bfloat16 has them: one instruction puts the upper bits, the
//! same for all, in their place. Where they would be, three vectors hold a fourth one's bits, at
//! distances that let three rotations gather them. Parameters without a code are listed as
//! [`Patch`]es, which a product adds behind its sums. What is read back is the parameter, bit by bit.
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
/// The decoded exponent of code 0; its lower 4 bits are those of the code.
const DECODED_BASE: u32 = 0x70;
/// Upper bits of the exponents of a decoded word, which a code lacks.
pub(in crate::cpu) const BASES: u32 = (DECODED_BASE << 7) * 0x0001_0001;
/// Where they lie: bits that a code has to spare.
pub(in crate::cpu) const SPARE: u32 = 0x7800_7800;
/// Which bits of the fourth vector's codes the three others keep in these places:
///
/// ```text
/// a code                   s....eeeemmmmmmm   sign, spare, exponent, mantissa
/// kept by the first             ####          4 bits to the left
///         by the second             ####      8
///         by the third     #            ###   12, around the end of the word
/// ```
pub(in crate::cpu) const PARTS: [u32; CODED] = [0x0780_0780, 0x0078_0078, 0x8007_8007];
/// Bits of a part in one number.
pub(in crate::cpu) const PART_BITS: u32 = 4;
/// Rows whose exponents are counted to choose a base.
const NUM_SAMPLES: usize = 256;
/// Of so many parameters no more than one may lack a code.
const MIN_PER_PATCH: usize = 512;

/// The codes of a pair of panels for `PLAIN` words of inputs.
pub(in crate::cpu) type Step = [[[u32; LANES]; CODED]; 2];

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
        if !E::has_products(isa) || !is_whole {
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

    pub(super) fn base(&self) -> u32 {
        self.base
    }

    pub(super) fn set_patches(&mut self, panels: impl Iterator<Item = Vec<Patch>>) {
        self.starts.push(0);
        for mut patches in panels {
            // Neighbours in another order are of one sum, which would wait for each of them.
            patches.sort_by_key(|patch| patch.column);
            self.patches.extend(patches);
            self.starts.push(self.patches.len() as u32);
        }
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
    /// sum is no number; where decoded words are larger than parameters, a sum near the largest number
    /// is infinite.
    #[inline(always)]
    pub(in crate::cpu) fn correct<E: Element>(
        &self,
        panel: usize,
        words: &[u32],
        sums: &mut [[f32; LANES]],
    ) {
        let (scale, hole) = (self.scale(), self.hole());
        for sum in sums.as_flattened_mut() {
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

/// The codes of a pair of panels, or of a part of it.
pub(in crate::cpu) fn steps(pair: &[u32]) -> &[Step] {
    pair.as_chunks().0.as_chunks().0.as_chunks().0
}

/// As [`steps`].
pub(super) fn steps_mut(pair: &mut [u32]) -> &mut [Step] {
    pair.as_chunks_mut().0.as_chunks_mut().0.as_chunks_mut().0
}

/// Whether so many parameters may lack a code among so many.
pub(super) fn is_worth_it(num_patches: usize, num_parameters: usize) -> bool {
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
    let short = |word: u32| short(word & 0xFFFF, base) | short(word >> 16, base) << 16;
    std::array::from_fn(|vector| {
        std::array::from_fn(|lane| {
            let part = short(four[CODED][lane]) & PARTS[vector];
            short(four[vector][lane]) | part.rotate_left(PART_BITS * (vector as u32 + 1))
        })
    })
}

/// The bits of a bfloat16 with its exponent counted from `base`; 0 if it has no code.
fn short(bits: u32, base: u32) -> u32 {
    let exponent = (bits >> 7 & 0xFF).wrapping_sub(base);
    if exponent < NUM_EXPONENTS { bits & 0x807F | exponent << 7 } else { 0 }
}

/// The words of one lane from its codes, but for a power of two.
pub(in crate::cpu) fn decode(codes: [u32; CODED]) -> [u32; PLAIN] {
    let part = |at: usize| codes[at].rotate_right(PART_BITS * (at as u32 + 1)) & PARTS[at];
    let last = (0..CODED).fold(0, |word, at| word | part(at));
    [codes[0], codes[1], codes[2], last].map(|code| code & !SPARE | BASES)
}
