//! The one table of kernels, which the compiler, the launchers, the tests and the benches go by.

/// What the compiler needs to know of a kernel.
#[derive(Clone, Copy, Debug)]
pub struct KernelSpec {
    /// Its name in logs, in the cache and in tables.
    pub name: &'static str,
    /// Its function in the source.
    pub function: &'static str,
    /// The source's text.
    pub source: &'static str,
    /// Macros of the variant, as the compiler takes them.
    pub defines: &'static [&'static str],
    /// Shared memory of a launch beyond what the source declares, at most what the device has.
    pub dynamic_shared_bytes: usize,
}

/// Headers that a source may include, by name.
pub const HEADERS: [(&str, &str); 8] = [
    ("common.cuh", include_str!("../../kernels/common.cuh")),
    ("hopper.cuh", include_str!("../../kernels/hopper.cuh")),
    ("mma.cuh", include_str!("../../kernels/mma.cuh")),
    ("prefill_parts.cuh", include_str!("../../kernels/prefill_parts.cuh")),
    ("prefill_wgmma.cuh", include_str!("../../kernels/prefill_wgmma.cuh")),
    ("rope.cuh", include_str!("../../kernels/rope.cuh")),
    ("shared_norm.cuh", include_str!("../../kernels/shared_norm.cuh")),
    ("wgmma.cuh", include_str!("../../kernels/wgmma.cuh")),
];

/// The text of a source, which is named like its function unless it has several.
macro_rules! source {
    ($function:ident) => {
        include_str!(concat!("../../kernels/", stringify!($function), ".cu"))
    };
    ($function:ident, $source:literal) => {
        include_str!(concat!("../../kernels/", $source))
    };
}

/// Declares [`Kernel`] and [`KERNELS`] in one order. A row is a kernel's function and what its name
/// adds to that, its source, the macros of the variant and the dynamic shared memory.
macro_rules! kernels {
    ($($(#[$doc:meta])* $kernel:ident = $function:ident $($variant:literal)? $(in $source:literal)?,
        $defines:expr, $dynamic_shared_bytes:expr;)*) => {
        /// A kernel in one variant.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Kernel {
            $($(#[$doc])* $kernel,)*
        }

        /// Every kernel, in the order of [`Kernel`].
        pub const KERNELS: [KernelSpec; [$(Kernel::$kernel),*].len()] = [$(KernelSpec {
            name: concat!(stringify!($function) $(, $variant)?),
            function: stringify!($function),
            source: source!($function $(, $source)?),
            defines: &$defines,
            dynamic_shared_bytes: $dynamic_shared_bytes,
        }),*];
    };
}

kernels! {
    /// RMSNorm.
    RmsNorm = rms_norm, [], 0;
    /// RoPE and the K/V write.
    RopeWriteKv = rope_write_kv, [], 0;
    /// `SwiGLU`'s gate.
    SiluMul = silu_mul, [], 0;
    /// Rows of a matrix by index.
    GatherRows = gather_rows in "gather.cu", [], 0;
    /// Embeddings of token ids from the host or from the step before.
    EmbedTokens = embed_tokens in "gather.cu", [], 0;
    /// The choice of the next token.
    Sample = sample, [], 0;
    /// Tokens taken out of that choice.
    BanTokens = ban_tokens in "sample.cu", [], 0;
    /// Random parameters.
    FillRandom = fill_random in "weights.cu", [], 0;
    /// bf16 parameters from other types.
    RoundToBf16 = round_to_bf16 in "weights.cu", [], 0;
    /// Products of one row.
    RowProduct = row_product, [], ALL;
    /// Products of up to 8 rows, on Hopper.
    SkinnyProduct8 = skinny_product "_8", ["-DNUM_TOKENS=8"], ALL;
    /// Products of up to 16 rows, on Hopper.
    SkinnyProduct16 = skinny_product "_16", ["-DNUM_TOKENS=16"], ALL;
    /// Products of up to 32 rows, on Hopper.
    SkinnyProduct32 = skinny_product "_32", ["-DNUM_TOKENS=32"], ALL;
    /// Products of up to 64 rows, on Hopper.
    BatchProduct64 = batch_product "_64", ["-DNUM_TOKENS=64"], batch(64);
    /// Products of up to 96 rows, on Hopper.
    BatchProduct96 = batch_product "_96", ["-DNUM_TOKENS=96"], batch(96);
    /// Products of up to 128 rows, on Hopper.
    BatchProduct128 = batch_product "_128", ["-DNUM_TOKENS=128"], batch(128);
    /// Products of up to 160 rows, on Hopper.
    BatchProduct160 = batch_product "_160", ["-DNUM_TOKENS=160"], batch(160);
    /// Products of up to 192 rows, on Hopper.
    BatchProduct192 = batch_product "_192", ["-DNUM_TOKENS=192"], batch(192);
    /// Products with a gate, on Hopper.
    GatedProduct = gated_product, ["-DCLUSTER=1", "-DTOKENS=128"], gated(128, 5);
    /// The same of up to 192 rows, all in one tile.
    GatedProduct192 = gated_product "_192", ["-DCLUSTER=1", "-DTOKENS=192"], gated(192, 4);
    /// The same of any number of rows by pairs of thread blocks.
    GatedProductPairs = gated_product "_pairs", ["-DCLUSTER=2", "-DTOKENS=128"], gated(128, 5);
    /// Attention of one token a sequence, `head_dim` 64.
    DecodeAttention64 = decode_attention "_64", ["-DHEAD_DIM=64"], decode(64);
    /// Attention of one token a sequence, `head_dim` 128.
    DecodeAttention128 = decode_attention "_128", ["-DHEAD_DIM=128"], decode(128);
    /// Attention of many tokens a sequence, `head_dim` 64.
    PrefillAttention64 = prefill_attention "_64", ["-DHEAD_DIM=64"], prefill(64, 64);
    /// Attention of many tokens a sequence, `head_dim` 128.
    PrefillAttention128 = prefill_attention "_128", ["-DHEAD_DIM=128"], prefill(128, 32);
    /// The same on Hopper, `head_dim` 64.
    PrefillAttentionWgmma64 = prefill_attention_wgmma "_64",
        ["-DHEAD_DIM=64", "-DIN_PARTS=0"], wgmma(64, 4);
    /// The same on Hopper, `head_dim` 128.
    PrefillAttentionWgmma128 = prefill_attention_wgmma "_128",
        ["-DHEAD_DIM=128", "-DIN_PARTS=0"], wgmma(128, 2);
    /// Of few tiles, whose keys are cut into parts, `head_dim` 64.
    PrefillAttentionParts64 = prefill_attention_wgmma "_parts_64",
        ["-DHEAD_DIM=64", "-DIN_PARTS=1"], wgmma(64, 4);
    /// Of few tiles, whose keys are cut into parts, `head_dim` 128.
    PrefillAttentionParts128 = prefill_attention_wgmma "_parts_128",
        ["-DHEAD_DIM=128", "-DIN_PARTS=1"], wgmma(128, 2);
}

/// As much as the device has.
const ALL: usize = usize::MAX;

/// Stages of 128 rows of the weight and `num_tokens` of the input in 200 KB.
const fn batch(num_tokens: usize) -> usize {
    let stage_bytes = (128 + num_tokens) * 64 * 2;
    1024 + (200 << 10) / stage_bytes * stage_bytes
}

/// `num_stages` of `num_tokens` rows of the input and 112 of gate and up each.
const fn gated(num_tokens: usize, num_stages: usize) -> usize {
    1024 + num_stages * (num_tokens + 2 * 112) * 64 * 2
}

/// 4 warps with 3 stages each of a block's keys and values.
const fn decode(head_dim: usize) -> usize {
    4 * 3 * 2 * 16 * head_dim * 2
}

/// 128 query rows, and 2 stages of `num_keys` keys and values.
const fn prefill(head_dim: usize, num_keys: usize) -> usize {
    (128 + 2 * 2 * num_keys) * head_dim * 2
}

/// 128 query rows, `num_stages` of 128 keys and values, and 128 rows of the output.
const fn wgmma(head_dim: usize, num_stages: usize) -> usize {
    1024 + (128 + num_stages * 2 * 128) * head_dim * 2 + 128 * (head_dim * 2 + 16)
}
