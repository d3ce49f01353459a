//! Rows by index and embeddings: `kernels/gather.cu`.

use super::{Arguments, Kernel, Kernels, Launch, Result, check};

/// Rows of a bf16 matrix; addresses on the device.
#[derive(Clone, Copy, Debug)]
pub struct Gather {
    /// `[num_rows, row_size]` bf16, written.
    pub out: u64,
    /// `[num_source_rows, row_size]` bf16.
    pub source: u64,
    /// Rows written.
    pub num_rows: usize,
    /// Rows to choose from: an index at or over it gives zeros.
    pub num_source_rows: usize,
    /// A multiple of 8.
    pub row_size: usize,
}

/// Which embedding each row gets; addresses on the device.
#[derive(Clone, Copy, Debug)]
pub struct TokenIds {
    /// `[num_rows]` u32: a token id, or a row of `sampled`.
    pub token: u64,
    /// `[num_rows]` u32: 1 where `token` is a row of `sampled`.
    pub from_sampled: u64,
    /// `[num_sampled]` u32: the ids that the step before chose.
    pub sampled: u64,
}

impl Kernels {
    /// Enqueues `out[i] = source[index[i]]`, with `index: [num_rows]` u32.
    ///
    /// # Safety
    /// Every address names as much memory as its shape says, matrices 16-byte aligned, alive until
    /// the stream has come to the launch, and `out` overlaps nothing else.
    pub unsafe fn gather_rows(&self, gather: &Gather, index: u64) -> Result<()> {
        let Gather { out, source, num_rows, num_source_rows, row_size } = *gather;
        check_row(row_size)?;
        let launch = Launch::new(Kernel::GatherRows, [num_rows, 1], 256);
        let (num_source_rows, row_size) = (num_source_rows as u32, row_size as i32);
        // SAFETY: rows are whole vectors, as checked; the memory is the caller's word.
        unsafe { self.launch(&launch, &[&out, &source, &index, &num_source_rows, &row_size]) }
    }

    /// Enqueues the embeddings of tokens whose ids may still be on the device alone.
    ///
    /// # Safety
    /// As for [`gather_rows`](Self::gather_rows); rows of `sampled` are below `num_sampled`.
    pub unsafe fn embed_tokens(&self, gather: &Gather, ids: &TokenIds) -> Result<()> {
        let Gather { out, source, num_rows, num_source_rows, row_size } = *gather;
        let TokenIds { token, from_sampled, sampled } = *ids;
        check_row(row_size)?;
        let launch = Launch::new(Kernel::EmbedTokens, [num_rows, 1], 256);
        let (num_source_rows, row_size) = (num_source_rows as u32, row_size as i32);
        let arguments: &Arguments<'_> =
            &[&out, &source, &token, &from_sampled, &sampled, &num_source_rows, &row_size];
        // SAFETY: rows are whole vectors, as checked; the memory is the caller's word.
        unsafe { self.launch(&launch, arguments) }
    }
}

fn check_row(row_size: usize) -> Result<()> {
    let is_whole = row_size > 0 && row_size.is_multiple_of(8);
    check(is_whole, "row_size", "a positive multiple of 8", row_size)
}
