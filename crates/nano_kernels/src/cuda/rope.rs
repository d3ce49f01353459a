//! RoPE and the K/V write: `kernels/rope_write_kv.cu`.

use super::attention::Heads;
use super::{Arguments, Kernel, Kernels, Launch, Result, check};

const MAX_THREADS: usize = 512;

/// One launch; addresses on the device.
#[derive(Clone, Copy, Debug)]
pub struct RopeWriteKv {
    /// `[num_tokens, num_heads, head_dim]` bf16, written: rotated queries.
    pub query: u64,
    /// One layer, `[num_blocks, k | v, num_kv_heads, 16, head_dim]` bf16, written by slot.
    pub cache: u64,
    /// `[num_tokens, num_heads + 2 * num_kv_heads, head_dim]` bf16.
    pub qkv: u64,
    /// `[max_position, 2, head_dim / 2]` f32: cosines, then sines.
    pub cos_sin: u64,
    /// `[num_tokens]` i32.
    pub position: u64,
    /// `[num_tokens]` i32: `block * 16 + row`; a negative slot, of a padding row, is not written.
    pub slot: u64,
    /// Rows.
    pub num_tokens: usize,
    /// The heads, of any numbers; `head_dim` is a multiple of 16.
    pub heads: Heads,
}

impl Kernels {
    /// Enqueues the rotation of queries and keys and the write of keys and values.
    ///
    /// # Safety
    /// Every address names as much memory as its shape says, 16-byte aligned, alive until the
    /// stream has come to the launch; positions are below `max_position`, slots below
    /// `num_blocks * 16` and distinct. No kernel that is still in the stream writes positions or
    /// slots: they are read before it has ended.
    pub unsafe fn rope_write_kv(&self, launch: &RopeWriteKv) -> Result<()> {
        let RopeWriteKv { query, cache, qkv, cos_sin, position, slot, num_tokens, heads } = *launch;
        let Heads { num_heads, num_kv_heads, head_dim } = heads;
        let is_whole = head_dim > 0 && head_dim.is_multiple_of(16);
        check(is_whole, "head_dim", "a positive multiple of 16", head_dim)?;
        // Two vectors of 8 a thread as far as threads reach.
        let num_units = (num_heads + 2 * num_kv_heads) * head_dim / 16;
        let num_threads = num_units.next_multiple_of(32).min(MAX_THREADS) as u32;
        let launch = Launch::new(Kernel::RopeWriteKv, [num_tokens, 1], num_threads);
        let (heads, kv_heads, dim) = (num_heads as i32, num_kv_heads as i32, head_dim as i32);
        let arguments: &Arguments<'_> =
            &[&query, &cache, &qkv, &cos_sin, &position, &slot, &heads, &kv_heads, &dim];
        // SAFETY: the kernel walks any number of heads of whole vectors, which was checked; the
        // memory is the caller's word.
        unsafe { self.launch(&launch, arguments) }
    }
}
