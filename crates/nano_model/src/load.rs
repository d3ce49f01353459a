//! From a directory and options to an executor.

mod cpu;
mod cuda;
mod memory;

pub use memory::available_bytes;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use nano_core::executor::Executor;
use nano_core::{RequestLimits, SchedulerConfig};
use nano_kernels::cuda::Error as CudaError;

use crate::backend::{Backend, Dtype, Values};
use crate::config::{DecoderSpec, GenerationDefaults, ModelConfig};
use crate::decoder::{Decoder, Layer};
use crate::dummy::DummyWeights;
use crate::error::{Error, Result};
use crate::weights::WeightMap;

/// More threads than a machine has cores.
const MAX_THREADS: usize = 1024;
const MAX_BLOCK_SIZE: u32 = 1 << 16;

/// Where a model runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU if there is one that can run the model as asked, else the CPU. One that has too
    /// little memory free is an error: the CPU instead would be slower many times over.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

/// How a model is loaded.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// Where the model runs.
    pub device: DeviceChoice,
    /// The share of a GPU's memory that may be used, by whomever.
    pub gpu_memory_utilization: f64,
    /// Whether a sequence's bits depend on nothing but itself, on a GPU and at some cost.
    pub deterministic: bool,
    /// Sequences that run at the same time.
    pub max_num_seqs: u32,
    /// Tokens of one step; `None` is 2,048 on the CPU and 8,192 on a GPU.
    pub max_num_batched_tokens: Option<u32>,
    /// The time between a running stream's tokens that prompts shall leave.
    pub max_itl: Option<Duration>,
    /// The data type of weights and cache; `None` is bfloat16 on a GPU, and on the CPU the
    /// checkpoint's, bfloat16 for a half-precision one.
    pub dtype: Option<Dtype>,
    /// Whether weights are random numbers of the config's shapes, normal with standard deviation
    /// 0.02, and not the directory's.
    pub dummy_weights: bool,
    /// Token slots of a KV cache block; on a GPU 16 only.
    pub block_size: u32,
    /// Blocks of the KV cache; wins over `kv_cache_bytes`.
    pub num_blocks: Option<u32>,
    /// Size of the KV cache.
    pub kv_cache_bytes: Option<u64>,
    /// Threads of an operator on the CPU, at most 1,024.
    pub num_threads: Option<usize>,
    /// The seed of dummy weights, and what those of unseeded requests derive from.
    pub seed: u64,
    /// Tokens of prompt and output together; `None` is the config's limit, lowered to what the
    /// cache can hold.
    pub max_model_len: Option<u32>,
}

impl ModelOptions {
    /// The largest step, whose memory a GPU takes at the start. A prompt keeps a CPU as busy with
    /// 2,048 tokens as with more, and the activations of more would be a good part of the memory
    /// that a small model needs.
    pub fn limits(&self, is_gpu: bool) -> SchedulerConfig {
        let unasked = if is_gpu { 8192 } else { 2048 };
        SchedulerConfig {
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens.unwrap_or(unasked),
            max_itl: self.max_itl,
        }
    }
}

/// Facts about a loaded model.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// What a request may ask for.
    pub request_limits: RequestLimits,
    /// The largest step.
    pub step_limits: SchedulerConfig,
    /// The sampling defaults.
    pub generation: GenerationDefaults,
    /// "cpu", or the name of the GPU.
    pub device: String,
    /// "float32" or "bfloat16".
    pub dtype: &'static str,
    /// What the parameters take in memory: less than their data type's bytes, where they are stored
    /// in fewer bits without loss.
    pub weight_bytes: u64,
    /// Set, it ends a step on the CPU, with an error, before its next layer or its logits.
    pub stop: Arc<AtomicBool>,
}

/// Loads the model of `config`, from whose directory the weights come.
///
/// # Errors
/// The first thing about the directory or the options that does not hold.
pub fn load(config: ModelConfig, options: &ModelOptions) -> Result<(Box<dyn Executor>, ModelInfo)> {
    check(&config, options)?;
    let device = match options.device {
        DeviceChoice::Cpu => None,
        DeviceChoice::Cuda(ordinal) => Some(cuda::open(ordinal, &config.spec, options)?),
        DeviceChoice::Auto => {
            cuda::open(0, &config.spec, options).inspect_err(cuda::tell_passed_over).ok()
        }
    };
    if let Some(device) = device {
        match cuda::load(config.clone(), options, &device) {
            Ok((executor, info)) => return Ok((Box::new(executor), info)),
            // A driver without the libraries beside it.
            Err(Error::Cuda(reason @ (CudaError::NoCompiler(_) | CudaError::Library(_))))
                if options.device == DeviceChoice::Auto =>
            {
                tracing::warn!("the model runs on the CPU: {reason}");
            }
            Err(error) => return Err(error),
        }
    }
    cpu::load(config, options)
}

/// What does not hold wherever the model runs.
fn check(config: &ModelConfig, options: &ModelOptions) -> Result<()> {
    let bad =
        |name, range, value: usize| Err(Error::BadOption { name, range, value: value.to_string() });
    if let Some(num_threads) = options.num_threads.filter(|it| !(1..=MAX_THREADS).contains(it)) {
        return bad("num_threads", format!("in [1, {MAX_THREADS}]"), num_threads);
    }
    let longest = config.max_position_embeddings;
    if let Some(len) = options.max_model_len.filter(|len| *len > longest) {
        let range = format!("at most the model's max_position_embeddings {longest}");
        return bad("max_model_len", range, len as usize);
    }
    let block_size = options.block_size;
    if !(1..=MAX_BLOCK_SIZE).contains(&block_size) {
        return bad("block_size", format!("in [1, {MAX_BLOCK_SIZE}]"), block_size as usize);
    }
    Ok(())
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// The memory that a KV cache may have.
struct CacheMemory {
    bytes: u64,
    /// How much of it is taken if nobody says a size: so many bytes, at most for so many sequences
    /// of full length.
    unasked_bytes: u64,
    unasked_sequences: u64,
    /// What gives more of it.
    hint: &'static str,
}

/// The size of the KV cache and what it lets a sequence be.
struct CacheRoom {
    num_blocks: u32,
    max_model_len: u32,
    bytes: u64,
}

impl CacheRoom {
    fn new(
        config: &ModelConfig,
        options: &ModelOptions,
        element_bytes: u64,
        memory: &CacheMemory,
    ) -> Result<Self> {
        let longest = config.max_position_embeddings;
        let len = u64::from(options.max_model_len.unwrap_or(longest));
        let block_size = u64::from(options.block_size);
        // Each of a config's sizes is bounded, their product is not.
        let token_bytes = config.spec.kv_elements_per_token() as u128 * u128::from(element_bytes);
        let block_bytes = u64::try_from(token_bytes * u128::from(block_size)).ok();
        let block_bytes = block_bytes.filter(|bytes| *bytes < 1 << 40).ok_or_else(|| {
            let reason = format!("make a KV cache block of {token_bytes} bytes a token");
            Error::BadConfig { field: "its sizes".to_owned(), reason }
        })?;
        let free = memory.bytes;
        // A slot's number has 32 bits, and a busy engine writes the whole cache.
        let most = (u64::from(u32::MAX) / block_size).min(free / block_bytes);
        let is_free = format!("{:.1} GiB of memory are free ({})", gib(free), memory.hint);
        let num_blocks = match (options.num_blocks, options.kv_cache_bytes) {
            (Some(num_blocks), _) => u64::from(num_blocks),
            (None, Some(bytes)) => bytes / block_bytes,
            (None, None) => {
                let full = len.div_ceil(block_size) * memory.unasked_sequences;
                full.min(memory.unasked_bytes / block_bytes).min(most).max(1)
            }
        };
        if num_blocks == 0 || num_blocks > most {
            let block_gib = gib(block_bytes);
            return Err(match (options.num_blocks, options.kv_cache_bytes) {
                (Some(value), _) => {
                    let range = format!("from 1 to {most} blocks of {block_gib:.6} GiB: {is_free}");
                    Error::BadOption { name: "num_blocks", range, value: value.to_string() }
                }
                (None, Some(bytes)) => {
                    let range = format!(
                        "from {block_gib:.9} to {:.9} (1 to {most} blocks): {is_free}",
                        gib(most * block_bytes)
                    );
                    let value = format!("{:.9} ({num_blocks} blocks)", gib(bytes));
                    Error::BadOption { name: "kv_cache_gib", range, value }
                }
                (None, None) => {
                    let reason = format!("one block takes {block_gib:.6} GiB, but {is_free}");
                    Error::NoMemory { what: "the KV cache", reason }
                }
            });
        }
        let room = (num_blocks * block_size).min(u64::from(u32::MAX)) as u32;
        let max_model_len = options.max_model_len.unwrap_or(longest.min(room));
        if options.max_model_len.is_none() && room < longest {
            tracing::warn!(
                "max_model_len is lowered from {longest} to the KV cache's {room} tokens"
            );
        }
        Ok(Self { num_blocks: num_blocks as u32, max_model_len, bytes: num_blocks * block_bytes })
    }

    /// The facts about a model with this cache.
    fn info(
        &self,
        config: ModelConfig,
        options: &ModelOptions,
        dtype: Dtype,
        device: String,
        step_limits: SchedulerConfig,
        weight_bytes: u64,
    ) -> ModelInfo {
        tracing::info!(
            "loaded {} on {device} in {}: weights {:.2} GiB, KV cache {:.2} GiB in {} blocks, \
             max_model_len {}",
            config.dir.display(),
            dtype.name(),
            gib(weight_bytes),
            gib(self.bytes),
            self.num_blocks,
            self.max_model_len,
        );
        if !config.unsupported_generation.is_empty() {
            tracing::warn!(
                "{} asks for {}: not supported yet, requests run without",
                config.dir.join("generation_config.json").display(),
                config.unsupported_generation.join(", "),
            );
        }
        ModelInfo {
            request_limits: RequestLimits {
                vocab_size: config.spec.vocab_size as u32,
                max_model_len: self.max_model_len,
                num_blocks: self.num_blocks,
                block_size: options.block_size,
                eos_token_ids: config.eos_token_ids.into(),
                seed: options.seed,
            },
            step_limits,
            generation: config.generation,
            device,
            dtype: dtype.name(),
            weight_bytes,
            stop: Arc::default(),
        }
    }
}

/// Where parameters come from.
#[derive(Debug)]
pub enum Source {
    /// The directory's safetensors.
    Checkpoint(WeightMap),
    /// Random numbers.
    Dummy(DummyWeights),
}

impl Source {
    /// What the options ask for.
    ///
    /// # Errors
    /// As [`WeightMap::open`].
    pub fn open(config: &ModelConfig, options: &ModelOptions) -> Result<Self> {
        if options.dummy_weights {
            Ok(Self::Dummy(DummyWeights::new(options.seed)))
        } else {
            WeightMap::open(&config.dir).map(Self::Checkpoint)
        }
    }

    /// A matrix made of tensors one below the other.
    fn matrix<B: Backend>(
        &self,
        backend: &mut B,
        parts: &[(String, usize)],
        columns: usize,
    ) -> Result<B::Weight> {
        self.merged(parts, columns, |rows, values| backend.weight(rows, columns, values))
    }

    /// Gives `make` the number of rows and the values of tensors one below the other.
    fn merged<W>(
        &self,
        parts: &[(String, usize)],
        columns: usize,
        make: impl FnOnce(usize, Values<'_>) -> Result<W>,
    ) -> Result<W> {
        let rows = parts.iter().map(|(_, rows)| rows).sum();
        match self {
            Self::Checkpoint(map) => {
                let found = parts.iter().map(|(name, rows)| map.tensor(name, &[*rows, columns]));
                let found = found.collect::<Result<Vec<_>>>()?;
                let weight = make(rows, Values::Tensors(&found))?;
                for (name, _) in parts {
                    map.release(name);
                }
                Ok(weight)
            }
            Self::Dummy(dummy) => {
                // Named after its first part: one draw serves the merged matrix.
                let name = parts.first().map_or("", |(name, _)| name);
                make(rows, Values::Dummy(dummy.tensor(name)))
            }
        }
    }

    fn norm<B: Backend>(&self, backend: &mut B, name: &str, size: usize) -> Result<B::Weight> {
        let tensor = match self {
            Self::Checkpoint(map) => Some(map.tensor(name, &[size])?),
            Self::Dummy(_) => None,
        };
        backend.norm_weight(size, tensor)
    }
}

/// Loads every parameter onto a back end.
///
/// # Errors
/// Names the first tensor that is missing or is not what `spec` says, or the memory that is.
pub fn load_decoder<B: Backend>(
    spec: &DecoderSpec,
    source: &Source,
    backend: &mut B,
) -> Result<Decoder<B>> {
    if let Source::Checkpoint(map) = source {
        map.check_names(spec.layers.len())?;
    }
    let hidden = spec.hidden_size;
    let query_size = spec.num_heads * spec.head_dim;
    let kv_size = spec.num_kv_heads * spec.head_dim;
    let embedding_name = "model.embed_tokens.weight".to_owned();
    let mut layer = |index: usize| -> Result<Layer<B::Weight>> {
        let name = |part: &str| format!("model.layers.{index}.{part}.weight");
        let qkv = [
            (name("self_attn.q_proj"), query_size),
            (name("self_attn.k_proj"), kv_size),
            (name("self_attn.v_proj"), kv_size),
        ];
        let gate_up = [
            (name("mlp.gate_proj"), spec.intermediate_size),
            (name("mlp.up_proj"), spec.intermediate_size),
        ];
        Ok(Layer {
            attention_norm: source.norm(backend, &name("input_layernorm"), hidden)?,
            qkv: source.matrix(backend, &qkv, hidden)?,
            output: source.matrix(backend, &[(name("self_attn.o_proj"), hidden)], query_size)?,
            mlp_norm: source.norm(backend, &name("post_attention_layernorm"), hidden)?,
            gate_up: source.merged(&gate_up, hidden, |rows, values| {
                backend.gate_up_weight(rows, hidden, values)
            })?,
            down: source.matrix(
                backend,
                &[(name("mlp.down_proj"), hidden)],
                spec.intermediate_size,
            )?,
        })
    };
    let layers = (0..spec.layers.len()).map(&mut layer).collect::<Result<_>>()?;
    let lm_head = [("lm_head.weight".to_owned(), spec.vocab_size)];
    Ok(Decoder {
        embedding: source.matrix(backend, &[(embedding_name, spec.vocab_size)], hidden)?,
        layers,
        norm: source.norm(backend, "model.norm.weight", hidden)?,
        lm_head: if spec.tied { None } else { Some(source.matrix(backend, &lm_head, hidden)?) },
        stop: Arc::default(),
    })
}
