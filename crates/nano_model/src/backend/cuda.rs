//! The decoder's operators on one NVIDIA GPU, in bf16: cuBLASLt products and our own kernels.
//!
//! All memory of a step is taken at the start and used again by every step, so that operators only
//! enqueue and a captured graph stays true. There is one residual stream, which `embed` begins and
//! `product_add` adds to in place.

mod answer;
mod operators;
mod products;
mod step;

use nano_kernels::cuda::attention::{DecodePlan, Heads};
use nano_kernels::cuda::gemm::{Trial, rows_of_memory};
use nano_kernels::cuda::product::{Epilogue, FusedProduct, Product, SQUARES_BYTES};
use nano_kernels::cuda::sampling::Sample;
use nano_kernels::cuda::{Device, DeviceBuffer, Gemm, Kernels};

use crate::config::DecoderSpec;
use crate::decoder::Decoder;
use crate::error::{Error, Result};
pub use answer::Answer;
use step::StepBuffers;
pub use step::{CudaStep, StepInput};

/// Token slots of a block, which the kernels are written for.
pub const BLOCK_SIZE: u32 = 16;
const BF16_BYTES: usize = 2;

/// The largest step.
#[derive(Clone, Copy, Debug)]
pub struct StepLimits {
    /// Rows.
    pub max_tokens: usize,
    /// Sequences, and rows that are sampled.
    pub max_sequences: usize,
}

/// See the [module](self).
#[derive(Debug)]
pub struct CudaBackend {
    spec: DecoderSpec,
    heads: Heads,
    limits: StepLimits,
    is_deterministic: bool,
    /// Kernels for Hopper alone run, none of which is deterministic: one has the gate within its
    /// product, whose own output then takes no memory.
    uses_hopper: bool,
    gemm: Gemm,
    kernels: Kernels,
    decode_plan: DecodePlan,
    activations: Activations,
    /// Of the step before: `[max_tokens]` u32.
    sampled: DeviceBuffer,
    /// A product that waits for the norm behind it.
    waiting: Option<FusedProduct>,
    /// The numbers of dummy weights, while there are any to make.
    draws: Option<DeviceBuffer>,
    /// Logits on the host, of a step that keeps them.
    kept: Vec<f32>,
    room: Option<Room>,
}

/// A parameter.
#[derive(Debug)]
pub struct CudaWeight {
    buffer: DeviceBuffer,
    rows: usize,
    columns: usize,
}

impl CudaWeight {
    /// The product of so many rows with it.
    fn product(&self, num_rows: usize, epilogue: Epilogue) -> Product {
        Product { num_rows, out_features: self.rows, in_features: self.columns, epilogue }
    }
}

/// Rows of activations in one of the buffers.
#[derive(Clone, Copy, Debug)]
pub struct CudaHidden {
    address: u64,
    num_rows: usize,
}

/// What operators write: each `[max_tokens, its width]` bf16, but for the last two.
#[derive(Debug)]
struct Activations {
    residual: DeviceBuffer,
    normed: DeviceBuffer,
    qkv: DeviceBuffer,
    query: DeviceBuffer,
    context: DeviceBuffer,
    gate_up: DeviceBuffer,
    gated: DeviceBuffer,
    gathered: DeviceBuffer,
    /// `[max_sequences, vocab_size]` f32.
    logits: DeviceBuffer,
    /// Sums of squares between two products, for the norm that they share.
    squares: DeviceBuffer,
}

/// What depends on the length of sequences and the size of the cache.
#[derive(Debug)]
struct Room {
    /// `[layer, block, k | v, kv_head, block_size, head_dim]`.
    cache: DeviceBuffer,
    layer_bytes: usize,
    /// `[max_model_len, 2, head_dim / 2]` f32.
    cos_sin: DeviceBuffer,
    steps: StepBuffers,
}

/// Why this model cannot run on a GPU, if it cannot.
pub fn check_shapes(spec: &DecoderSpec) -> Result<()> {
    let check = |ok: bool, field: &str, range: &str, value: usize| {
        let reason = format!("must be {range} on a CUDA device, got {value}");
        if ok { Ok(()) } else { Err(Error::BadConfig { field: field.to_owned(), reason }) }
    };
    let group = spec.num_heads / spec.num_kv_heads.max(1);
    check(matches!(spec.head_dim, 64 | 128), "head_dim", "64 or 128", spec.head_dim)?;
    let range = "at most 8 times num_key_value_heads";
    check(group <= 8, "num_attention_heads", range, spec.num_heads)?;
    let is_hidden = spec.hidden_size.is_multiple_of(8) && spec.hidden_size <= 16_384;
    check(is_hidden, "hidden_size", "a multiple of 8 up to 16384", spec.hidden_size)?;
    let is_vectors = spec.intermediate_size.is_multiple_of(8);
    check(is_vectors, "intermediate_size", "a multiple of 8", spec.intermediate_size)
}

impl CudaBackend {
    /// A back end without a cache, for [`make_room`](Self::make_room) after the weights.
    ///
    /// # Errors
    /// A shape that the kernels do not have, or too little memory.
    pub fn new(
        spec: DecoderSpec,
        kernels: Kernels,
        gemm: Gemm,
        limits: StepLimits,
        is_deterministic: bool,
    ) -> Result<Self> {
        check_shapes(&spec)?;
        let device = kernels.device();
        let heads = Heads {
            num_heads: spec.num_heads,
            num_kv_heads: spec.num_kv_heads,
            head_dim: spec.head_dim,
        };
        let query_size = spec.num_heads * spec.head_dim;
        let rows = |num_rows: usize, width: usize, element_bytes: usize| {
            device.allocate(rows_of_memory(num_rows) * width * element_bytes)
        };
        let max_sequences = rows_of_memory(limits.max_sequences);
        let widest = spec.layers.iter().map(|it| it.window.unwrap_or(u32::MAX)).max();
        let uses_hopper = device.is_hopper() && !is_deterministic;
        let tokens = |width| rows(limits.max_tokens.max(limits.max_sequences), width, BF16_BYTES);
        let activations = Activations {
            residual: tokens(spec.hidden_size)?,
            normed: tokens(spec.hidden_size)?,
            qkv: tokens(spec.qkv_size())?,
            query: tokens(query_size)?,
            context: tokens(query_size)?,
            gate_up: tokens(if uses_hopper { 0 } else { 2 * spec.intermediate_size })?,
            gated: tokens(spec.intermediate_size)?,
            gathered: tokens(spec.hidden_size)?,
            logits: rows(limits.max_sequences, spec.vocab_size, size_of::<f32>())?,
            squares: device.allocate(SQUARES_BYTES)?,
        };
        Ok(Self {
            heads,
            limits,
            is_deterministic,
            uses_hopper,
            decode_plan: DecodePlan::new(device, heads, max_sequences, widest)?,
            activations,
            sampled: rows(limits.max_tokens, 1, size_of::<u32>())?,
            waiting: None,
            draws: None,
            kept: Vec::new(),
            room: None,
            gemm,
            kernels,
            spec,
        })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        self.kernels.device()
    }

    /// What the model is.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// The largest step.
    pub fn limits(&self) -> StepLimits {
        self.limits
    }

    /// Chooses an algorithm for every shape of product that steps of so many rows have.
    pub fn tune(&mut self, model: &Decoder<Self>, num_rows: &[usize]) -> Result<()> {
        let lm_head = model.lm_head.as_ref().unwrap_or(&model.embedding);
        let Activations { residual, normed, qkv, context, gate_up, gated, logits, .. } =
            &self.activations;
        // Numbers that are not 0, which would cost less power, and stay finite when added up.
        for input in [residual, normed, context, gated] {
            input.fill(0x3c)?;
        }
        let mut trials = Vec::new();
        for &num_rows in num_rows {
            let mut add =
                |weights: Vec<&CudaWeight>, out: &DeviceBuffer, input: &DeviceBuffer, epilogue| {
                    let Some(first) = weights.first() else { return };
                    let product = first.product(num_rows, epilogue);
                    if self.product_kernel(&product).is_some() {
                        return;
                    }
                    trials.push(Trial {
                        product,
                        out: out.address(),
                        input: input.address(),
                        weights: weights.iter().map(|weight| weight.buffer.address()).collect(),
                    });
                };
            let layers = &model.layers;
            add(layers.iter().map(|it| &it.qkv).collect(), qkv, normed, Epilogue::Bf16);
            add(layers.iter().map(|it| &it.output).collect(), residual, context, Epilogue::AddBf16);
            if !self.uses_hopper {
                add(layers.iter().map(|it| &it.gate_up).collect(), gate_up, normed, Epilogue::Bf16);
            }
            add(layers.iter().map(|it| &it.down).collect(), residual, gated, Epilogue::AddBf16);
            if num_rows <= self.limits.max_sequences {
                add(vec![lm_head], logits, normed, Epilogue::F32);
            }
        }
        // SAFETY: the buffers have rows for the largest step, which `num_rows` does not exceed by
        // more than `rows_of_memory`, and the weights are the model's.
        Ok(unsafe { self.gemm.tune(&trials) }?)
    }

    /// Takes the memory of the cache and of whatever goes by the length of sequences.
    pub fn make_room(&mut self, num_blocks: u32, max_model_len: u32) -> Result<()> {
        self.draws = None;
        let device = self.kernels.device();
        let token_bytes = 2 * self.spec.num_kv_heads * self.spec.head_dim * BF16_BYTES;
        let layer_bytes = num_blocks as usize * BLOCK_SIZE as usize * token_bytes;
        let StepLimits { max_tokens, max_sequences } = self.limits;
        let steps = StepBuffers::new(
            device,
            &self.decode_plan,
            self.heads,
            rows_of_memory(max_tokens.max(max_sequences)),
            rows_of_memory(max_sequences),
            max_model_len.div_ceil(BLOCK_SIZE) as usize,
            self.is_deterministic,
        )?;
        let cos_sin = device.allocate_from(&self.cos_sin(max_model_len))?;
        let cache = device.allocate(layer_bytes * self.spec.layers.len())?;
        self.room = Some(Room { cache, layer_bytes, cos_sin, steps });
        Ok(())
    }

    fn cos_sin(&self, max_model_len: u32) -> Vec<f32> {
        let rope = &self.spec.rope;
        let mut table = Vec::with_capacity(max_model_len as usize * self.spec.head_dim);
        for position in 0..max_model_len {
            let angles = rope.inv_freq.iter().map(|frequency| position as f32 * frequency);
            table.extend(angles.clone().map(|angle| angle.cos() * rope.attention_factor));
            table.extend(angles.map(|angle| angle.sin() * rope.attention_factor));
        }
        table
    }

    /// Enqueues the copy of a step's inputs.
    pub fn upload(&mut self, input: &StepInput) -> Result<CudaStep> {
        self.kept.clear();
        let room = self.room.as_mut().ok_or_else(no_room)?;
        room.steps.upload(input, &self.decode_plan)
    }

    /// Enqueues the choice of a token for each sampled row of `step`, whose forward pass was the
    /// last; `banned` holds pairs of a row and a token. The choices go to `answer` as well.
    ///
    /// # Panics
    /// If `answer` is shorter.
    pub fn sample(&mut self, step: &CudaStep, banned: &[u32], answer: &mut Answer) -> Result<()> {
        assert!(step.num_sampled * 4 <= answer.chosen.num_bytes(), "the answer is too short");
        let logits = self.activations.logits.address();
        let vocab_size = self.spec.vocab_size;
        let sample = Sample {
            chosen: self.sampled.address(),
            answer: answer.chosen.address(),
            logits,
            rows: step.at.sampling,
            num_rows: step.num_sampled,
            vocab_size,
        };
        if !banned.is_empty() {
            answer.ban(self.device(), banned)?;
        }
        // SAFETY: there are no more sampled rows than rows of logits, whose buffer lives as long as
        // this value, like that of the step and of the chosen tokens. The answer is long enough, as
        // checked, waits before it is read or banned tokens are written anew, and its drop waits for
        // the device. After an error there is no next step: the engine ends.
        unsafe {
            let banned_at = answer.banned.address();
            self.kernels.ban_tokens(logits, banned_at, banned.len() / 2, vocab_size)?;
            self.kernels.sample(&sample)?;
        }
        Ok(answer.done.record()?)
    }

    /// The logits of the step that was launched last, if it keeps them.
    pub fn take_logits(&mut self) -> Vec<f32> {
        std::mem::take(&mut self.kept)
    }
}

fn no_room() -> Error {
    nano_kernels::cuda::Error::Driver("a step came before the cache".to_owned()).into()
}
