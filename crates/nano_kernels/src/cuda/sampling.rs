//! The choice of the next token: `kernels/sample.cu`.

use cudarc::driver::DeviceRepr;

use super::{Arguments, Kernel, Kernels, Launch, Result, check};
use crate::reference::sampling::Sampling;

/// What the kernel writes where no token can be chosen.
pub const NO_TOKEN: u32 = u32::MAX;

/// How one row's token is chosen, as the kernel reads it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowSampling {
    temperature: f32,
    top_p: f32,
    min_p_margin: f32,
    top_k: u32,
    seed: u64,
    position: u32,
    index: u32,
}

// SAFETY: plain numbers without padding, laid out as in the kernel's source.
unsafe impl DeviceRepr for RowSampling {}

const _: () = assert!(size_of::<RowSampling>() == 32);

impl From<&Sampling> for RowSampling {
    fn from(sampling: &Sampling) -> Self {
        Self {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            // Worked out here, so that the bound is the CPU's to the last bit; -infinity for 0.
            min_p_margin: if sampling.min_p > 0.0 {
                sampling.min_p.ln() * sampling.temperature
            } else {
                f32::NEG_INFINITY
            },
            top_k: sampling.top_k.unwrap_or(0),
            seed: sampling.seed,
            position: sampling.position,
            index: sampling.index,
        }
    }
}

/// One launch; addresses on the device.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// `[num_rows]` u32, written: token ids, or [`NO_TOKEN`].
    pub chosen: u64,
    /// The same in the host's memory: a copy behind the kernel would take as long as the kernel.
    pub answer: u64,
    /// `[num_rows, vocab_size]` f32.
    pub logits: u64,
    /// `[num_rows]` [`RowSampling`].
    pub rows: u64,
    /// Rows.
    pub num_rows: usize,
    /// Logits of a row.
    pub vocab_size: usize,
}

impl Kernels {
    /// Enqueues the choice of one token a row, as
    /// [`sample`](crate::reference::sampling::sample) makes it.
    ///
    /// # Safety
    /// Every address names as much memory as its shape says, naturally aligned, alive until the
    /// stream has come to the launch, and what is written overlaps nothing else.
    pub unsafe fn sample(&self, launch: &Sample) -> Result<()> {
        let Sample { chosen, answer, logits, rows, num_rows, vocab_size } = *launch;
        let is_i32 = i32::try_from(vocab_size).is_ok();
        check(vocab_size > 0 && is_i32, "vocab_size", "positive and below 2^31", vocab_size)?;
        let launch = Launch::new(Kernel::Sample, [num_rows, 1], 1024);
        // SAFETY: the kernel walks rows of any checked size; the memory is the caller's word.
        unsafe { self.launch(&launch, &[&chosen, &answer, &logits, &rows, &(vocab_size as i32)]) }
    }

    /// Enqueues `logits[row, token] = -infinity` for each of `banned: [num_banned, 2]` u32, a row
    /// and a token; one outside the vocabulary is ignored.
    ///
    /// # Safety
    /// As for [`sample`](Self::sample); rows are those of `logits`.
    pub unsafe fn ban_tokens(
        &self,
        logits: u64,
        banned: u64,
        num_banned: usize,
        vocab_size: usize,
    ) -> Result<()> {
        let launch = Launch::new(Kernel::BanTokens, [num_banned.div_ceil(256), 1], 256);
        let arguments: &Arguments<'_> =
            &[&logits, &banned, &(num_banned as i32), &(vocab_size as u32)];
        // SAFETY: the grid covers the pairs; the memory is the caller's word.
        unsafe { self.launch(&launch, arguments) }
    }
}
