//! Paged attention: what its kernels share, for [one token a sequence](DecodePlan) and for
//! [many](prefill_tiles).

mod decode;
mod prefill;

use std::f32::consts::LOG2_E;

pub use decode::{DecodePart, DecodePlan, DecodeRows};
pub(super) use prefill::PrefillScratch;
pub use prefill::{PrefillRows, PrefillTile, prefill_tiles};

use super::{Kernel, Result, check};

/// Threads of a block, but for the kernel for Hopper.
const NUM_THREADS: u32 = 128;
/// A window over every length, with room for positions beside it in an i32.
const NO_WINDOW: u32 = 1 << 30;
/// Query heads that can share a key and value head.
const MAX_GROUP: usize = 8;

/// What both kinds of attention read; addresses on the device.
#[derive(Clone, Copy, Debug)]
pub struct AttentionInput {
    /// One layer, `[num_blocks, k | v, num_kv_heads, 16, head_dim]` bf16.
    pub cache: u64,
    /// `[num_sequences, max_blocks]` i32.
    pub block_table: u64,
    /// Blocks of a row of the table.
    pub max_blocks: usize,
    /// The heads.
    pub heads: Heads,
    /// Positions that a token sees, its own included; `None` is all.
    pub window: Option<u32>,
}

/// The heads of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads: at most 8 query heads each.
    pub num_kv_heads: usize,
    /// 64 or 128.
    pub head_dim: usize,
}

impl Heads {
    fn group(self) -> usize {
        self.num_heads / self.num_kv_heads.max(1)
    }

    /// The variant for this head size, after a check of everything that a kernel takes for granted.
    fn choose(self, dim_64: Kernel, dim_128: Kernel) -> Result<Kernel> {
        let (group, is_whole) = (self.group(), self.group() * self.num_kv_heads == self.num_heads);
        let range = "1 to 8 whole groups of num_kv_heads";
        check((1..=MAX_GROUP).contains(&group) && is_whole, "num_heads", range, self.num_heads)?;
        check(matches!(self.head_dim, 64 | 128), "head_dim", "64 or 128", self.head_dim)?;
        Ok(if self.head_dim == 64 { dim_64 } else { dim_128 })
    }

    /// From scores to exponents of two.
    fn scale(self) -> f32 {
        LOG2_E / (self.head_dim as f32).sqrt()
    }
}

fn window_or_all(window: Option<u32>) -> i32 {
    window.unwrap_or(NO_WINDOW).clamp(1, NO_WINDOW) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_that_no_kernel_has_are_refused() {
        let choose = |num_heads, num_kv_heads, head_dim| {
            Heads { num_heads, num_kv_heads, head_dim }
                .choose(Kernel::DecodeAttention64, Kernel::DecodeAttention128)
        };
        assert_eq!(choose(24, 8, 64).unwrap(), Kernel::DecodeAttention64);
        for (num_heads, num_kv_heads, head_dim) in
            [(9, 1, 64), (7, 2, 64), (0, 1, 64), (4, 0, 64), (4, 1, 96), (1, 2, 128)]
        {
            assert!(choose(num_heads, num_kv_heads, head_dim).is_err());
        }
    }
}
