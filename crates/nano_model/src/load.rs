//! From a directory and options to an executor.

use std::num::NonZero;
use std::path::Path;

use half::bf16;
use nano_core::TokenId;
use nano_core::executor::{Capacity, Executor};
use nano_kernels::cpu::Element;
use safetensors::Dtype as StoredDtype;

use crate::backend::cpu::CpuBackend;
use crate::backend::{Backend, Dtype, Values};
use crate::config::{CheckpointDtype, DecoderSpec, GenerationDefaults, ModelConfig};
use crate::decoder::{Decoder, Layer};
use crate::dummy::DummyWeights;
use crate::error::{Error, Result};
use crate::executor::CpuExecutor;
use crate::weights::WeightMap;

/// The KV cache holds this many sequences of full length, if memory allows and nobody says more.
const DEFAULT_FULL_SEQUENCES: u64 = 16;
/// The largest KV cache that nobody asked for.
const DEFAULT_MOST_CACHE_BYTES: u64 = 4 << 30;
/// More threads than a machine has cores.
const MAX_THREADS: usize = 4096;

/// The data type of weights, activations and cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DtypeChoice {
    /// The checkpoint's; bfloat16 for a half-precision one.
    Auto,
    /// IEEE single precision.
    Float32,
    /// Brain floating point.
    BFloat16,
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadFormat {
    /// The directory's safetensors.
    Auto,
    /// Random numbers of the config's shapes, normal with standard deviation 0.02.
    Dummy,
}

/// How a model is loaded.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// The data type.
    pub dtype: DtypeChoice,
    /// Where weights come from.
    pub load_format: LoadFormat,
    /// Token slots of a KV cache block.
    pub block_size: u32,
    /// Blocks of the KV cache; wins over `kv_cache_bytes`.
    pub num_blocks: Option<u32>,
    /// Size of the KV cache.
    pub kv_cache_bytes: Option<u64>,
    /// Threads of an operator.
    pub num_threads: Option<usize>,
    /// The seed of dummy weights.
    pub seed: u64,
    /// Tokens of prompt and output together; `None` is the config's limit, lowered to what the
    /// cache can hold.
    pub max_model_len: Option<u32>,
}

/// Facts about a loaded model.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// Token ids are below this.
    pub vocab_size: u32,
    /// Tokens of prompt and output together.
    pub max_model_len: u32,
    /// The end-of-sequence tokens.
    pub eos_token_ids: Vec<TokenId>,
    /// The sampling defaults.
    pub generation: GenerationDefaults,
    /// "float32" or "bfloat16".
    pub dtype: &'static str,
    /// Bytes of all parameters.
    pub weight_bytes: u64,
    /// Blocks of the KV cache.
    pub num_blocks: u32,
    /// Bytes of the KV cache.
    pub kv_cache_bytes: u64,
}

/// Loads the model in `dir`.
///
/// # Errors
/// The first thing about the directory or the options that does not hold.
pub fn load(dir: &Path, options: &ModelOptions) -> Result<(Box<dyn Executor>, ModelInfo)> {
    if let Some(num_threads) = options.num_threads.filter(|it| !(1..=MAX_THREADS).contains(it)) {
        let (range, value) = (format!("in [1, {MAX_THREADS}]"), num_threads.to_string());
        return Err(Error::BadOption { name: "num_threads", range, value });
    }
    let asked = options.num_threads.and_then(NonZero::new);
    let num_threads = asked
        .unwrap_or_else(|| std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN));
    let checkpoint = Checkpoint::open(dir, options)?;
    match checkpoint.dtype {
        Dtype::Float32 => load_cpu::<f32>(checkpoint, dir, options, num_threads),
        Dtype::BFloat16 => load_cpu::<bf16>(checkpoint, dir, options, num_threads),
    }
}

fn load_cpu<E: Element>(
    checkpoint: Checkpoint,
    dir: &Path,
    options: &ModelOptions,
    num_threads: NonZero<usize>,
) -> Result<(Box<dyn Executor>, ModelInfo)> {
    let (backend, model, info) =
        checkpoint.load(dir, options, |spec, _, num_blocks, block_size| {
            CpuBackend::<E>::new(spec, num_blocks, block_size, num_threads)
        })?;
    let capacity = Capacity {
        num_blocks: info.num_blocks,
        block_size: options.block_size,
        max_steps_in_flight: 1,
    };
    let executor = CpuExecutor::new(backend, model, capacity, info.vocab_size as usize);
    Ok((Box::new(executor), info))
}

/// Loads the model in `dir` onto the back end that `make` makes from the model's shape, the data
/// type, the number of blocks and their size.
///
/// # Errors
/// As [`load`].
pub fn load_on<B: Backend>(
    dir: &Path,
    options: &ModelOptions,
    make: impl FnOnce(DecoderSpec, Dtype, u32, u32) -> Result<B>,
) -> Result<(B, Decoder<B>, ModelInfo)> {
    Checkpoint::open(dir, options)?.load(dir, options, make)
}

/// What a directory holds.
struct Checkpoint {
    config: ModelConfig,
    /// `None` for dummy weights.
    map: Option<WeightMap>,
    dtype: Dtype,
}

impl Checkpoint {
    fn open(dir: &Path, options: &ModelOptions) -> Result<Self> {
        let config = ModelConfig::from_dir(dir)?;
        let map = match options.load_format {
            LoadFormat::Auto => Some(WeightMap::open(dir)?),
            LoadFormat::Dummy => None,
        };
        let dtype = dtype(options.dtype, config.dtype.or_else(|| checkpoint_dtype(map.as_ref()?)));
        Ok(Self { config, map, dtype })
    }

    fn load<B: Backend>(
        self,
        dir: &Path,
        options: &ModelOptions,
        make: impl FnOnce(DecoderSpec, Dtype, u32, u32) -> Result<B>,
    ) -> Result<(B, Decoder<B>, ModelInfo)> {
        let Self { config, map, dtype } = self;
        let element_bytes = dtype.num_bytes() as u64;
        let room = CacheRoom::new(&config, options, element_bytes)?;
        let spec = config.spec.clone();
        let mut backend = make(spec.clone(), dtype, room.num_blocks, options.block_size)?;
        let dummy = DummyWeights::new(options.seed);
        let source = map.as_ref().map_or(Source::Dummy(&dummy), Source::Checkpoint);
        let model = load_decoder(&spec, source, &mut backend)?;
        let info = ModelInfo {
            vocab_size: spec.vocab_size as u32,
            max_model_len: room.max_model_len,
            eos_token_ids: config.eos_token_ids,
            generation: config.generation,
            dtype: dtype.name(),
            weight_bytes: spec.num_parameters() as u64 * element_bytes,
            num_blocks: room.num_blocks,
            kv_cache_bytes: room.bytes,
        };
        tracing::info!(
            "loaded {} in {}: weights {:.2} GiB, KV cache {:.2} GiB in {} blocks of {}, \
             max_model_len {}",
            dir.display(),
            info.dtype,
            gib(info.weight_bytes),
            gib(room.bytes),
            room.num_blocks,
            options.block_size,
            room.max_model_len,
        );
        Ok((backend, model, info))
    }
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

fn dtype(choice: DtypeChoice, checkpoint: Option<CheckpointDtype>) -> Dtype {
    match (choice, checkpoint) {
        (DtypeChoice::Float32, _) | (DtypeChoice::Auto, Some(CheckpointDtype::Float32)) => {
            Dtype::Float32
        }
        (DtypeChoice::BFloat16 | DtypeChoice::Auto, _) => Dtype::BFloat16,
    }
}

fn checkpoint_dtype(map: &WeightMap) -> Option<CheckpointDtype> {
    match map.dtype()? {
        StoredDtype::F32 => Some(CheckpointDtype::Float32),
        StoredDtype::F16 => Some(CheckpointDtype::Float16),
        _ => None,
    }
}

/// The size of the KV cache and what it lets a sequence be.
struct CacheRoom {
    num_blocks: u32,
    max_model_len: u32,
    bytes: u64,
}

impl CacheRoom {
    fn new(config: &ModelConfig, options: &ModelOptions, element_bytes: u64) -> Result<Self> {
        let bad = |name, range: String, value: u64| {
            Err(Error::BadOption { name, range, value: value.to_string() })
        };
        let longest = config.max_position_embeddings;
        if let Some(len) = options.max_model_len.filter(|len| *len > longest) {
            let range = format!("at most the model's max_position_embeddings {longest}");
            return bad("max_model_len", range, len.into());
        }
        let len = u64::from(options.max_model_len.unwrap_or(longest));
        let block_size = u64::from(options.block_size);
        if block_size == 0 || block_size > 1 << 16 {
            return bad("block_size", format!("in [1, {}]", 1 << 16), block_size);
        }
        // Each of a config's sizes is bounded, their product is not.
        let token_bytes = config.spec.kv_elements_per_token() as u128 * u128::from(element_bytes);
        let block_bytes = u64::try_from(token_bytes * u128::from(block_size)).ok();
        let block_bytes = block_bytes.filter(|bytes| *bytes < 1 << 40).ok_or_else(|| {
            let reason = format!("make a KV cache block of {token_bytes} bytes a token");
            Error::BadConfig { field: "its sizes".to_owned(), reason }
        })?;
        let free =
            available_bytes().saturating_sub(config.spec.num_parameters() as u64 * element_bytes);
        let (name, num_blocks) = match (options.num_blocks, options.kv_cache_bytes) {
            (Some(num_blocks), _) => ("num_blocks", u64::from(num_blocks)),
            (None, Some(bytes)) => ("kv_cache_gib", bytes / block_bytes),
            (None, None) => {
                let full = len.div_ceil(block_size) * DEFAULT_FULL_SEQUENCES;
                let memory = (free / 4).min(DEFAULT_MOST_CACHE_BYTES);
                ("kv_cache_gib", full.min(memory / block_bytes).max(1))
            }
        };
        // A slot's number has 32 bits, and a busy engine writes the whole cache.
        let most = (u64::from(u32::MAX) / block_size).min(free / block_bytes);
        if num_blocks == 0 || num_blocks > most {
            let range = format!(
                "from 1 to {most} blocks of {:.6} GiB: {:.1} GiB of memory are free",
                gib(block_bytes),
                gib(free)
            );
            return bad(name, range, num_blocks);
        }
        let room = (num_blocks * block_size).min(u64::from(u32::MAX)) as u32;
        let max_model_len = match options.max_model_len {
            Some(len) => len,
            None => longest.min(room),
        };
        if max_model_len < longest && options.max_model_len.is_none() {
            tracing::warn!(
                "max_model_len is lowered from {longest} to the KV cache's {room} tokens"
            );
        }
        Ok(Self { num_blocks: num_blocks as u32, max_model_len, bytes: num_blocks * block_bytes })
    }
}

/// Memory that can be had without swapping; a modest guess where the system does not say.
fn available_bytes() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.map_or(4 << 30, |kib| kib << 10)
}

#[derive(Clone, Copy)]
enum Source<'a> {
    Checkpoint(&'a WeightMap),
    Dummy(&'a DummyWeights),
}

impl Source<'_> {
    /// A matrix made of tensors one below the other.
    fn matrix<B: Backend>(
        self,
        backend: &mut B,
        parts: &[(String, usize)],
        columns: usize,
    ) -> Result<B::Weight> {
        self.merged(parts, columns, |rows, values| backend.weight(rows, columns, values))
    }

    /// Gives `make` the number of rows and the values of tensors one below the other.
    fn merged<W>(
        self,
        parts: &[(String, usize)],
        columns: usize,
        make: impl FnOnce(usize, Values<'_>) -> Result<W>,
    ) -> Result<W> {
        let rows = parts.iter().map(|(_, rows)| rows).sum();
        match self {
            Source::Checkpoint(map) => {
                let found = parts.iter().map(|(name, rows)| map.tensor(name, &[*rows, columns]));
                let found = found.collect::<Result<Vec<_>>>()?;
                let weight = make(rows, Values::Tensors(&found))?;
                for (name, _) in parts {
                    map.release(name);
                }
                Ok(weight)
            }
            Source::Dummy(dummy) => {
                // Named after its first part: one draw serves the merged matrix.
                let name = parts.first().map_or("", |(name, _)| name);
                make(rows, Values::Dummy(dummy.tensor(name)))
            }
        }
    }

    fn norm<B: Backend>(self, backend: &mut B, name: &str, size: usize) -> Result<B::Weight> {
        let tensor = match self {
            Source::Checkpoint(map) => Some(map.tensor(name, &[size])?),
            Source::Dummy(_) => None,
        };
        backend.norm_weight(size, tensor)
    }
}

fn load_decoder<B: Backend>(
    spec: &DecoderSpec,
    source: Source<'_>,
    backend: &mut B,
) -> Result<Decoder<B>> {
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
    })
}
