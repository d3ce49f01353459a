//! The one table of kernels, which the compiler, the launchers, the tests and the benches go by.

/// A kernel in one variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// RMSNorm.
    RmsNorm,
    /// RoPE and the K/V write.
    RopeWriteKv,
    /// `SwiGLU`'s gate.
    SiluMul,
    /// Rows of a matrix by index.
    GatherRows,
    /// Embeddings of token ids from the host or from the step before.
    EmbedTokens,
    /// The choice of the next token.
    Sample,
    /// Tokens taken out of that choice.
    BanTokens,
    /// Random parameters.
    FillRandom,
    /// bf16 parameters from other types.
    RoundToBf16,
    /// Products of one row.
    RowProduct,
    /// Products of up to 8 rows, on Hopper.
    SkinnyProduct8,
    /// Products of up to 16 rows, on Hopper.
    SkinnyProduct16,
    /// Products of up to 32 rows, on Hopper.
    SkinnyProduct32,
    /// Products of up to 64 rows, on Hopper.
    BatchProduct64,
    /// Products of up to 96 rows, on Hopper.
    BatchProduct96,
    /// Products of up to 128 rows, on Hopper.
    BatchProduct128,
    /// Products of up to 160 rows, on Hopper.
    BatchProduct160,
    /// Products of up to 192 rows, on Hopper.
    BatchProduct192,
    /// Products with a gate, on Hopper.
    GatedProduct,
    /// The same of up to 192 rows, all in one tile.
    GatedProduct192,
    /// The same of any number of rows by pairs of thread blocks.
    GatedProductPairs,
    /// Attention of one token a sequence, `head_dim` 64.
    DecodeAttention64,
    /// Attention of one token a sequence, `head_dim` 128.
    DecodeAttention128,
    /// Attention of many tokens a sequence, `head_dim` 64.
    PrefillAttention64,
    /// Attention of many tokens a sequence, `head_dim` 128.
    PrefillAttention128,
    /// The same on Hopper, `head_dim` 64.
    PrefillAttentionWgmma64,
    /// The same on Hopper, `head_dim` 128.
    PrefillAttentionWgmma128,
    /// Of few tiles, whose keys are cut into parts, `head_dim` 64.
    PrefillAttentionParts64,
    /// Of few tiles, whose keys are cut into parts, `head_dim` 128.
    PrefillAttentionParts128,
}

/// What the compiler needs to know of a kernel.
#[derive(Clone, Copy, Debug)]
pub struct KernelSpec {
    /// Which one it is.
    pub kernel: Kernel,
    /// Its name in logs, in the cache and in tables.
    pub name: &'static str,
    /// Its function in the source.
    pub function: &'static str,
    /// The source's text.
    pub source: &'static str,
    /// Macros of the variant, as the compiler takes them.
    pub defines: &'static [&'static str],
    /// Shared memory of a launch beyond what the source declares, at most what the device has.
    pub dynamic_shared_bytes: u32,
}

/// Headers that a source may include, by name.
pub const HEADERS: [(&str, &str); 7] = [
    ("common.cuh", include_str!("../../kernels/common.cuh")),
    ("hopper.cuh", include_str!("../../kernels/hopper.cuh")),
    ("mma.cuh", include_str!("../../kernels/mma.cuh")),
    ("prefill_parts.cuh", include_str!("../../kernels/prefill_parts.cuh")),
    ("prefill_wgmma.cuh", include_str!("../../kernels/prefill_wgmma.cuh")),
    ("rope.cuh", include_str!("../../kernels/rope.cuh")),
    ("shared_norm.cuh", include_str!("../../kernels/shared_norm.cuh")),
];

const RMS_NORM: &str = include_str!("../../kernels/rms_norm.cu");
const ROPE_WRITE_KV: &str = include_str!("../../kernels/rope_write_kv.cu");
const SILU_MUL: &str = include_str!("../../kernels/silu_mul.cu");
const GATHER: &str = include_str!("../../kernels/gather.cu");
const SAMPLE: &str = include_str!("../../kernels/sample.cu");
const SKINNY_PRODUCT: &str = include_str!("../../kernels/skinny_product.cu");
const BATCH_PRODUCT: &str = include_str!("../../kernels/batch_product.cu");
const ROW_PRODUCT: &str = include_str!("../../kernels/row_product.cu");
const GATED_PRODUCT: &str = include_str!("../../kernels/gated_product.cu");
const WEIGHTS: &str = include_str!("../../kernels/weights.cu");
const DECODE_ATTENTION: &str = include_str!("../../kernels/decode_attention.cu");
const PREFILL_ATTENTION: &str = include_str!("../../kernels/prefill_attention.cu");
const PREFILL_ATTENTION_WGMMA: &str = include_str!("../../kernels/prefill_attention_wgmma.cu");

const HEAD_DIM_64: &[&str] = &["-DHEAD_DIM=64"];
const HEAD_DIM_128: &[&str] = &["-DHEAD_DIM=128"];
const WHOLE_64: &[&str] = &["-DHEAD_DIM=64", "-DIN_PARTS=0"];
const WHOLE_128: &[&str] = &["-DHEAD_DIM=128", "-DIN_PARTS=0"];
const PARTS_64: &[&str] = &["-DHEAD_DIM=64", "-DIN_PARTS=1"];
const PARTS_128: &[&str] = &["-DHEAD_DIM=128", "-DIN_PARTS=1"];

/// Every kernel, in the order of [`Kernel`].
#[rustfmt::skip]
pub const KERNELS: [KernelSpec; 29] = [
    plain(Kernel::RmsNorm, "rms_norm", RMS_NORM),
    plain(Kernel::RopeWriteKv, "rope_write_kv", ROPE_WRITE_KV),
    plain(Kernel::SiluMul, "silu_mul", SILU_MUL),
    plain(Kernel::GatherRows, "gather_rows", GATHER),
    plain(Kernel::EmbedTokens, "embed_tokens", GATHER),
    plain(Kernel::Sample, "sample", SAMPLE),
    plain(Kernel::BanTokens, "ban_tokens", SAMPLE),
    plain(Kernel::FillRandom, "fill_random", WEIGHTS),
    plain(Kernel::RoundToBf16, "round_to_bf16", WEIGHTS),
    product(Kernel::RowProduct, "row_product", ROW_PRODUCT),
    skinny(Kernel::SkinnyProduct8, "skinny_product_8", &["-DNUM_TOKENS=8"]),
    skinny(Kernel::SkinnyProduct16, "skinny_product_16", &["-DNUM_TOKENS=16"]),
    skinny(Kernel::SkinnyProduct32, "skinny_product_32", &["-DNUM_TOKENS=32"]),
    batch(Kernel::BatchProduct64, "batch_product_64", &["-DNUM_TOKENS=64"], 64),
    batch(Kernel::BatchProduct96, "batch_product_96", &["-DNUM_TOKENS=96"], 96),
    batch(Kernel::BatchProduct128, "batch_product_128", &["-DNUM_TOKENS=128"], 128),
    batch(Kernel::BatchProduct160, "batch_product_160", &["-DNUM_TOKENS=160"], 160),
    batch(Kernel::BatchProduct192, "batch_product_192", &["-DNUM_TOKENS=192"], 192),
    gated(Kernel::GatedProduct, "gated_product", &["-DCLUSTER=1", "-DTOKENS=128"], 128, 5),
    gated(Kernel::GatedProduct192, "gated_product_192", &["-DCLUSTER=1", "-DTOKENS=192"], 192, 4),
    gated(Kernel::GatedProductPairs, "gated_product_pairs", &["-DCLUSTER=2", "-DTOKENS=128"], 128, 5),
    decode(Kernel::DecodeAttention64, "decode_attention_64", HEAD_DIM_64, 64),
    decode(Kernel::DecodeAttention128, "decode_attention_128", HEAD_DIM_128, 128),
    prefill(Kernel::PrefillAttention64, "prefill_attention_64", HEAD_DIM_64, 64, 64),
    prefill(Kernel::PrefillAttention128, "prefill_attention_128", HEAD_DIM_128, 128, 32),
    wgmma(Kernel::PrefillAttentionWgmma64, "prefill_attention_wgmma_64", WHOLE_64, 64, 4),
    wgmma(Kernel::PrefillAttentionWgmma128, "prefill_attention_wgmma_128", WHOLE_128, 128, 2),
    wgmma(Kernel::PrefillAttentionParts64, "prefill_attention_parts_64", PARTS_64, 64, 4),
    wgmma(Kernel::PrefillAttentionParts128, "prefill_attention_parts_128", PARTS_128, 128, 2),
];

type Defines = &'static [&'static str];

const fn plain(kernel: Kernel, name: &'static str, source: &'static str) -> KernelSpec {
    let function = name;
    KernelSpec { kernel, name, function, source, defines: &[], dynamic_shared_bytes: 0 }
}

/// As much shared memory as the device has.
const fn product(kernel: Kernel, name: &'static str, source: &'static str) -> KernelSpec {
    KernelSpec { dynamic_shared_bytes: u32::MAX, ..plain(kernel, name, source) }
}

const fn skinny(kernel: Kernel, name: &'static str, defines: Defines) -> KernelSpec {
    let spec = product(kernel, "skinny_product", SKINNY_PRODUCT);
    KernelSpec { name, defines, ..spec }
}

/// Stages of 128 rows of the weight and `num_tokens` of the input in 200 KB.
const fn batch(
    kernel: Kernel,
    name: &'static str,
    defines: Defines,
    num_tokens: u32,
) -> KernelSpec {
    let stage_bytes = (128 + num_tokens) * 64 * 2;
    let dynamic_shared_bytes = 1024 + (200 << 10) / stage_bytes * stage_bytes;
    let spec = plain(kernel, "batch_product", BATCH_PRODUCT);
    KernelSpec { name, defines, dynamic_shared_bytes, ..spec }
}

/// `num_stages` of `num_tokens` rows of the input and 112 of gate and up each.
const fn gated(
    kernel: Kernel,
    name: &'static str,
    defines: Defines,
    num_tokens: u32,
    num_stages: u32,
) -> KernelSpec {
    let dynamic_shared_bytes = 1024 + num_stages * (num_tokens + 2 * 112) * 64 * 2;
    let spec = plain(kernel, "gated_product", GATED_PRODUCT);
    KernelSpec { name, defines, dynamic_shared_bytes, ..spec }
}

/// 4 warps with 3 stages each of a block's keys and values.
const fn decode(kernel: Kernel, name: &'static str, defines: Defines, head_dim: u32) -> KernelSpec {
    let dynamic_shared_bytes = 4 * 3 * 2 * 16 * head_dim * 2;
    let spec = plain(kernel, "decode_attention", DECODE_ATTENTION);
    KernelSpec { name, defines, dynamic_shared_bytes, ..spec }
}

/// 128 query rows, and 2 stages of `num_keys` keys and values.
const fn prefill(
    kernel: Kernel,
    name: &'static str,
    defines: Defines,
    head_dim: u32,
    num_keys: u32,
) -> KernelSpec {
    let dynamic_shared_bytes = (128 + 2 * 2 * num_keys) * head_dim * 2;
    let spec = plain(kernel, "prefill_attention", PREFILL_ATTENTION);
    KernelSpec { name, defines, dynamic_shared_bytes, ..spec }
}

/// 128 query rows, and `num_stages` of 128 keys and values.
const fn wgmma(
    kernel: Kernel,
    name: &'static str,
    defines: Defines,
    head_dim: u32,
    num_stages: u32,
) -> KernelSpec {
    let dynamic_shared_bytes = 1024 + (128 + num_stages * 2 * 128) * head_dim * 2;
    let spec = plain(kernel, "prefill_attention_wgmma", PREFILL_ATTENTION_WGMMA);
    KernelSpec { name, defines, dynamic_shared_bytes, ..spec }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_kernels() {
        for (index, spec) in KERNELS.iter().enumerate() {
            assert_eq!(spec.kernel as usize, index, "{}", spec.name);
        }
    }
}
