//! Each CUDA kernel's time beside the floor that memory or arithmetic sets; skips without a GPU.
//!
//! A case is captured a number of times into one graph over rotating data larger than the L2
//! cache; the median of its replays, by the host's clock, is divided by the number of launches.
//! An argument names the kind of kernels to time: elements, products, gated, sampling, decode or
//! prefill.

#![allow(clippy::print_stdout, reason = "a bench prints its table")]

mod cuda_fused_products;
mod cuda_products;
mod cuda_timing;

use half::bf16;
use nano_kernels::cuda::attention::{
    AttentionInput, DecodePlan, DecodeRows, Heads, PrefillRows, PrefillTile, prefill_tiles,
};
use nano_kernels::cuda::compile::Compiler;
use nano_kernels::cuda::gather::{Gather, TokenIds};
use nano_kernels::cuda::norm::RmsNorm;
use nano_kernels::cuda::product::Epilogue;
use nano_kernels::cuda::rope::RopeWriteKv;
use nano_kernels::cuda::sampling::{RowSampling, Sample};
use nano_kernels::cuda::spec::KERNELS;
use nano_kernels::cuda::weights::NUM_DRAWS;
use nano_kernels::cuda::{Device, DeviceBuffer, Kernels, Result};
use nano_kernels::reference::sampling::Sampling;

use cuda_timing::{LAUNCHES, Timing, Work};

const HEADS: Heads = Heads { num_heads: 32, num_kv_heads: 8, head_dim: 128 };
const HIDDEN: usize = 4096;
const INTERMEDIATE: usize = 14_336;
const VOCAB: usize = 32_000;
/// Bytes that the rotating sets of a case span at least.
const ROTATION_BYTES: usize = 512 << 20;

struct Bench {
    kernels: Kernels,
    timing: Timing,
}

fn main() -> Result<()> {
    let loaded = Device::new(0).and_then(|device| {
        Kernels::load(&device, &Compiler::new(Compiler::default_cache_dir())?, &KERNELS)
    });
    let kernels = match loaded {
        Ok(kernels) => kernels,
        Err(error) => {
            println!("skipped: {error}");
            return Ok(());
        }
    };
    let mut bench = Bench { kernels, timing: Timing::new() };
    bench.timing.bytes_per_second = bench.copy_bandwidth()?;
    let device = bench.kernels.device();
    println!(
        "{}, {} multiprocessors; copy {:.2} TB/s; 32 query heads, 8 K/V heads of 128, hidden 4096",
        device.name()?,
        device.num_multiprocessors(),
        bench.timing.bytes_per_second / 1e12
    );
    println!("| kernel | MB | GFLOP | floor µs | measured µs | share |");
    println!("|---|---|---|---|---|---|");
    let kind = std::env::args().nth(1).filter(|kind| !kind.starts_with('-'));
    let wants = |it: &str| kind.as_deref().is_none_or(|kind| kind == it);
    for num_tokens in [1, 64, 256, 2048].into_iter().filter(|_| wants("elements")) {
        bench.norm(num_tokens)?;
        bench.rope(num_tokens)?;
        bench.gate(num_tokens)?;
        bench.gather(num_tokens)?;
    }
    for (name, out_features, in_features, epilogue) in [
        ("qkv", 6144, HIDDEN, Epilogue::Bf16),
        ("output", HIDDEN, HIDDEN, Epilogue::AddBf16),
        ("gate_up", 2 * INTERMEDIATE, HIDDEN, Epilogue::Gated),
        ("down", HIDDEN, INTERMEDIATE, Epilogue::AddBf16),
        ("lm_head", VOCAB, HIDDEN, Epilogue::F32),
    ]
    .into_iter()
    .filter(|_| wants("products"))
    {
        bench.fused_products(name, out_features, in_features, epilogue)?;
        // `gated_products` times those with a gate.
        if epilogue != Epilogue::Gated {
            bench.cublaslt_products(name, out_features, in_features, epilogue)?;
        }
    }
    if wants("gated") {
        bench.gated_products(&[
            4, 16, 32, 48, 64, 128, 144, 160, 192, 224, 256, 384, 512, 1024, 2048, 8192,
        ])?;
    }
    if wants("sampling") {
        bench.ban(1024)?;
    }
    if wants("elements") {
        bench.weights(VOCAB * HIDDEN)?;
    }
    for num_rows in [1, 64, 256].into_iter().filter(|_| wants("sampling")) {
        for (name, temperature, top_p) in
            [("greedy", 0.0, 1.0), ("hot", 0.6, 1.0), ("top_p", 0.6, 0.9)]
        {
            bench.sample(num_rows, name, temperature, top_p)?;
        }
    }
    for (num_sequences, length) in [
        (1, 512),
        (1, 8192),
        (1, 32_768),
        (16, 576),
        (64, 512),
        (64, 2048),
        (256, 512),
        (256, 1024),
    ]
    .into_iter()
    .filter(|_| wants("decode"))
    {
        bench.decode(&format!("{num_sequences} x {length}"), &vec![length; num_sequences])?;
    }
    for num_sequences in [16, 64, 256].into_iter().filter(|_| wants("decode")) {
        bench.uneven_decodes(num_sequences)?;
    }
    for (num_sequences, num_tokens, prefix) in [
        (1, 512, 0),
        (16, 512, 0),
        (1, 2048, 0),
        (8, 2048, 0),
        (2, 8192, 0),
        (4, 512, 4096),
        (1, 16, 4096),
        (1, 64, 4096),
        (1, 256, 4096),
    ]
    .into_iter()
    .filter(|_| wants("prefill"))
    {
        bench.prefill(num_sequences, num_tokens, prefix)?;
    }
    Ok(())
}

impl Bench {
    fn device(&self) -> &Device {
        self.kernels.device()
    }

    /// Random values in [-1, 1), `num_sets` times over.
    fn values(&self, len: usize, num_sets: usize) -> Result<DeviceBuffer> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let buffer = self.device().allocate(len * num_sets * 2)?;
        let values: Vec<bf16> = (0..len)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                bf16::from_f32((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
            })
            .collect();
        for set in 0..num_sets {
            buffer.upload(set * len * 2, &values)?;
        }
        Ok(buffer)
    }

    fn report(
        &self,
        name: &str,
        bytes: usize,
        flops: f64,
        launch: impl FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        self.timing.report(self.device(), name, Work { bytes, flops }, launch)
    }

    /// Bytes read and written a second by this project's own row gather over 1 GiB.
    fn copy_bandwidth(&self) -> Result<f64> {
        let (num_rows, row_size) = (1 << 15, 1 << 14);
        let bytes = num_rows * row_size * 2;
        let source = self.values(row_size, num_rows)?;
        let out = self.device().allocate(bytes)?;
        let index = self.device().allocate_from(&(0..num_rows as u32).collect::<Vec<_>>())?;
        let gather = Gather {
            out: out.address(),
            source: source.address(),
            num_rows,
            num_source_rows: num_rows,
            row_size,
        };
        let seconds = Timing::seconds(self.device(), |_| {
            // SAFETY: every buffer was allocated above with the size of its shape.
            unsafe { self.kernels.gather_rows(&gather, index.address()) }
        })?;
        Ok(2.0 * bytes as f64 / seconds)
    }

    fn norm(&self, num_tokens: usize) -> Result<()> {
        let len = num_tokens * HIDDEN;
        let sets = num_sets(len * 2);
        let input = self.values(len, sets)?;
        let (out, weight) = (self.device().allocate(len * 2)?, self.values(HIDDEN, 1)?);
        let name = format!("rms_norm, {num_tokens} tokens");
        self.report(&name, 2 * len * 2 + HIDDEN * 2, 0.0, |i| {
            let set = (i % sets * len * 2) as u64;
            let launch = RmsNorm {
                out: out.address(),
                input: input.address() + set,
                weight: weight.address(),
                num_tokens,
                hidden_size: HIDDEN,
                eps: 1e-5,
            };
            // SAFETY: every buffer was allocated above with the size of its shape.
            unsafe { self.kernels.rms_norm(&launch) }
        })
    }

    fn rope(&self, num_tokens: usize) -> Result<()> {
        let Heads { num_heads, num_kv_heads, head_dim } = HEADS;
        let len = num_tokens * (num_heads + 2 * num_kv_heads) * head_dim;
        let sets = num_sets(len * 2);
        let qkv = self.values(len, sets)?;
        let query = self.device().allocate(num_tokens * num_heads * head_dim * 2)?;
        let num_slots = num_tokens.next_multiple_of(16);
        let cache = self.device().allocate(num_slots * 2 * num_kv_heads * head_dim * 2)?;
        let cos_sin = self.device().allocate_from(&vec![0.5_f32; num_tokens * head_dim])?;
        let index = self.device().allocate_from(&(0..num_tokens as i32).collect::<Vec<_>>())?;
        let name = format!("rope_write_kv, {num_tokens} tokens");
        self.report(&name, 2 * len * 2 + num_tokens * (head_dim * 4 + 8), 0.0, |i| {
            let launch = RopeWriteKv {
                query: query.address(),
                cache: cache.address(),
                qkv: qkv.address() + (i % sets * len * 2) as u64,
                cos_sin: cos_sin.address(),
                position: index.address(),
                slot: index.address(),
                num_tokens,
                heads: HEADS,
            };
            // SAFETY: every buffer was allocated above with the size of its shape.
            unsafe { self.kernels.rope_write_kv(&launch) }
        })
    }

    fn gate(&self, num_tokens: usize) -> Result<()> {
        let len = num_tokens * 2 * INTERMEDIATE;
        let sets = num_sets(len * 2);
        let (gate_up, out) = (self.values(len, sets)?, self.device().allocate(len)?);
        self.report(&format!("silu_mul, {num_tokens} tokens"), 3 * len, 0.0, |i| {
            let (to, from) = (out.address(), gate_up.address() + (i % sets * len * 2) as u64);
            // SAFETY: both buffers were allocated above with the size of their shapes.
            unsafe { self.kernels.silu_mul(to, from, num_tokens, INTERMEDIATE) }
        })
    }

    /// Rows by index, and embeddings of tokens that the step before chose, as in decoding.
    fn gather(&self, num_rows: usize) -> Result<()> {
        let source = self.values(HIDDEN, VOCAB)?;
        let out = self.device().allocate(num_rows * HIDDEN * 2)?;
        let indices = (0..(LAUNCHES * num_rows) as u32).map(|i| i * 7919 % VOCAB as u32);
        let index = self.device().allocate_from(&indices.collect::<Vec<_>>())?;
        let row = self.device().allocate_from(&(0..num_rows as u32).collect::<Vec<_>>())?;
        let yes = self.device().allocate_from(&vec![1_u32; num_rows])?;
        let gather = Gather {
            out: out.address(),
            source: source.address(),
            num_rows,
            num_source_rows: VOCAB,
            row_size: HIDDEN,
        };
        let bytes = 2 * num_rows * HIDDEN * 2;
        let index = |launch: usize| index.address() + (launch * num_rows * 4) as u64;
        self.report(&format!("gather_rows, {num_rows} rows"), bytes, 0.0, |i| {
            // SAFETY: every buffer was allocated above with the size of its shape.
            unsafe { self.kernels.gather_rows(&gather, index(i)) }
        })?;
        self.report(&format!("embed_tokens, {num_rows} rows"), bytes, 0.0, |i| {
            let (token, from_sampled) = (row.address(), yes.address());
            let ids = TokenIds { token, from_sampled, sampled: index(i) };
            // SAFETY: every buffer was allocated above with the size of its shape.
            unsafe { self.kernels.embed_tokens(&gather, &ids) }
        })
    }

    fn ban(&self, num_banned: usize) -> Result<()> {
        let logits = self.device().allocate(64 * VOCAB * 4)?;
        let pairs = (0..num_banned as u32).flat_map(|i| [i % 64, i * 7919 % VOCAB as u32]);
        let banned = self.device().allocate_from(&pairs.collect::<Vec<_>>())?;
        self.report(&format!("ban_tokens, {num_banned}"), num_banned * 12, 0.0, |_| {
            let (logits, banned) = (logits.address(), banned.address());
            // SAFETY: both buffers were allocated above with the size of their shapes.
            unsafe { self.kernels.ban_tokens(logits, banned, num_banned, VOCAB) }
        })
    }

    /// What is done to a weight when it is loaded.
    fn weights(&self, num_elements: usize) -> Result<()> {
        let draws = self.values(NUM_DRAWS, 1)?;
        let out = self.device().allocate(num_elements * 2)?;
        let source = self.device().allocate(num_elements * 4)?;
        source.fill(0)?;
        let (draws, out, source) = (draws.address(), out.address(), source.address());
        self.report("fill_random, a vocabulary", num_elements * 2, 0.0, |i| {
            // SAFETY: both buffers were allocated above with the size of their shapes.
            unsafe { self.kernels.fill_random(out, draws, num_elements, i as u64) }
        })?;
        self.report("round_to_bf16, a vocabulary", num_elements * 6, 0.0, |_| {
            // SAFETY: both buffers were allocated above with the size of their shapes.
            unsafe { self.kernels.round_to_bf16(out, source, num_elements, false) }
        })
    }

    fn sample(&self, num_rows: usize, name: &str, temperature: f32, top_p: f32) -> Result<()> {
        // No two alike in a row, as those of a model.
        let spread = |i: usize| (i as u32).wrapping_mul(0x9e37_79b1) as f32;
        let logits: Vec<f32> = (0..num_rows * VOCAB).map(|i| spread(i) * 2e-9).collect();
        let rows: Vec<RowSampling> = (0..num_rows as u32)
            .map(|position| Sampling {
                temperature,
                top_k: None,
                top_p,
                min_p: 0.0,
                seed: 1,
                position,
                index: 0,
            })
            .map(|sampling| RowSampling::from(&sampling))
            .collect();
        let logits = self.device().allocate_from(&logits)?;
        let rows = self.device().allocate_from(&rows)?;
        let chosen = self.device().allocate(num_rows * 4)?;
        let answer = self.device().allocate_pinned(num_rows * 4)?;
        let name = format!("sample {name}, {num_rows} rows");
        self.report(&name, num_rows * VOCAB * 4, 0.0, |_| {
            let launch = Sample {
                chosen: chosen.address(),
                answer: answer.address(),
                logits: logits.address(),
                rows: rows.address(),
                num_rows,
                vocab_size: VOCAB,
            };
            // SAFETY: every buffer was allocated above with the size of its shape.
            unsafe { self.kernels.sample(&launch) }
        })
    }

    fn uneven_decodes(&self, num_sequences: usize) -> Result<()> {
        let uneven: Vec<usize> = (0..num_sequences).map(|i| 100 + (i * 1237) % 1949).collect();
        self.decode(&format!("{num_sequences} x 100..2048"), &uneven)?;
        let mut with_long = vec![512; num_sequences];
        with_long[num_sequences / 2] = 32_768;
        self.decode(&format!("{} x 512 and 1 x 32768", num_sequences - 1), &with_long)
    }

    fn decode(&self, name: &str, lengths: &[usize]) -> Result<()> {
        let num_sequences = lengths.len();
        let batch = Batch::new(self, lengths, num_sequences)?;
        let plan = DecodePlan::new(self.device(), HEADS, num_sequences, None)?;
        let longest = lengths.iter().copied().max().unwrap_or(1);
        let on_device: Vec<u32> = lengths.iter().map(|&length| length as u32).collect();
        let parts = self.device().allocate_from(&plan.parts(&on_device, num_sequences))?;
        let cos_sin = self.device().allocate_from(&vec![0.5_f32; longest * HEADS.head_dim])?;
        let rows = DecodeRows {
            qkv: batch.rows.address(),
            cos_sin: cos_sin.address(),
            parts: parts.address(),
            num_sequences,
        };
        let keys: usize = lengths.iter().sum();
        let (bytes, flops) = (keys * KV_BYTES, keys as f64 * FLOPS_PER_KEY);
        self.report(&format!("decode_attention, {name}"), bytes, flops, |i| {
            let (input, out) = (batch.input(i), batch.out.address());
            // SAFETY: every buffer was allocated above with the size of its shape.
            unsafe { self.kernels.decode_attention(&plan, &input, &rows, out) }
        })
    }

    fn prefill(&self, num_sequences: usize, num_tokens: usize, prefix: usize) -> Result<()> {
        let lengths = vec![prefix + num_tokens; num_sequences];
        let batch = Batch::new(self, &lengths, num_sequences * num_tokens)?;
        let sequences: Vec<PrefillTile> = (0..num_sequences)
            .map(|sequence| PrefillTile {
                sequence: sequence as i32,
                first_token: (sequence * num_tokens) as i32,
                num_tokens: num_tokens as i32,
                first_position: prefix as i32,
            })
            .collect();
        let tiles = prefill_tiles(HEADS, sequences);
        let tiles_on = self.device().allocate_from(&tiles)?;
        let keys = num_sequences as f64
            * num_tokens as f64
            * (prefix as f64 + num_tokens.div_ceil(2) as f64);
        let query_bytes = num_sequences * num_tokens * HEADS.num_heads * HEADS.head_dim * 2;
        let bytes = num_sequences * (prefix + num_tokens) * KV_BYTES + 2 * query_bytes;
        let out = batch.out.address();
        let rows = PrefillRows {
            query: batch.rows.address(),
            tiles: tiles_on.address(),
            num_tiles: tiles.len(),
            num_tokens: num_sequences * num_tokens,
        };
        let name = format!("prefill_attention, {num_sequences} x {num_tokens} on {prefix}");
        self.report(&name, bytes, keys * FLOPS_PER_KEY, |i| {
            // SAFETY: every buffer was allocated above with the size of its shape.
            unsafe { self.kernels.prefill_attention(&batch.input(i), &rows, out) }
        })?;
        if !self.device().is_hopper() {
            return Ok(());
        }
        let name = format!("prefill_attention_wgmma, {num_sequences} x {num_tokens} on {prefix}");
        self.report(&name, bytes, keys * FLOPS_PER_KEY, |i| {
            // SAFETY: every buffer was allocated above with the size of its shape.
            unsafe { self.kernels.prefill_attention_wgmma(&batch.input(i), &rows, out) }
        })
    }
}

/// Bytes of one position's keys and values.
const KV_BYTES: usize = 2 * HEADS.num_kv_heads * HEADS.head_dim * 2;
/// A product with the key and one with the value, for each query head.
const FLOPS_PER_KEY: f64 = (4 * HEADS.num_heads * HEADS.head_dim) as f64;

/// Sets of data to rotate through, so that none is in the cache when its turn comes.
fn num_sets(bytes: usize) -> usize {
    ROTATION_BYTES.div_ceil(bytes).clamp(1, LAUNCHES)
}

/// Sequences with scattered blocks, over rotating caches.
struct Batch {
    caches: DeviceBuffer,
    cache_bytes: usize,
    num_sets: usize,
    /// Queries, keys and values of each token; for prefill, its first part is the queries alone.
    rows: DeviceBuffer,
    out: DeviceBuffer,
    table: DeviceBuffer,
    max_blocks: usize,
}

impl Batch {
    fn new(bench: &Bench, lengths: &[usize], num_tokens: usize) -> Result<Self> {
        let num_blocks_of = |length: &usize| length.div_ceil(16);
        let num_blocks: usize = lengths.iter().map(num_blocks_of).sum();
        let max_blocks = lengths.iter().map(num_blocks_of).max().unwrap_or(1);
        let mut order: Vec<i32> = (0..num_blocks as i32).collect();
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        for i in (1..num_blocks).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            order.swap(i, (state >> 33) as usize % (i + 1));
        }
        let mut table = vec![0_i32; lengths.len() * max_blocks];
        for (row, length) in table.chunks_mut(max_blocks).zip(lengths) {
            for block in &mut row[..length.div_ceil(16)] {
                *block = order.pop().unwrap_or(0);
            }
        }
        let cache_bytes = num_blocks * 16 * KV_BYTES;
        let num_sets = num_sets(cache_bytes);
        let query_len = num_tokens * HEADS.num_heads * HEADS.head_dim;
        let row_len = (HEADS.num_heads + 2 * HEADS.num_kv_heads) * HEADS.head_dim;
        Ok(Self {
            caches: bench.values(cache_bytes / 2, num_sets)?,
            cache_bytes,
            num_sets,
            rows: bench.values(num_tokens * row_len, 1)?,
            out: bench.device().allocate(query_len * 2)?,
            table: bench.device().allocate_from(&table)?,
            max_blocks,
        })
    }

    fn input(&self, launch: usize) -> AttentionInput {
        AttentionInput {
            cache: self.caches.address() + (launch % self.num_sets * self.cache_bytes) as u64,
            block_table: self.table.address(),
            max_blocks: self.max_blocks,
            heads: HEADS,
            window: None,
        }
    }
}
