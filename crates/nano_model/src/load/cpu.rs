//! Loading into the memory of the host.

use std::num::NonZero;
use std::path::Path;
use std::thread;

use half::bf16;
use nano_core::executor::{Capacity, Executor};
use nano_kernels::cpu::isa::{ISA_VARIABLE, Isa};
use nano_kernels::cpu::{Element, Pool};

use super::memory::available_bytes;
use super::{
    CacheMemory, CacheRoom, LoadFormat, ModelInfo, ModelOptions, Source, checkpoint_dtype, dtype,
    gib, load_decoder,
};
use crate::backend::cpu::CpuBackend;
use crate::backend::{Backend, Dtype};
use crate::config::{DecoderSpec, ModelConfig};
use crate::decoder::Decoder;
use crate::dummy::DummyWeights;
use crate::error::{Error, Result};
use crate::executor::CpuExecutor;
use crate::weights::WeightMap;

/// Loads the model in `dir` for the CPU.
pub(super) fn load(dir: &Path, options: &ModelOptions) -> Result<(Box<dyn Executor>, ModelInfo)> {
    let isa = Isa::asked().map_err(|value| {
        let range = "avx512, avx2 or portable".to_owned();
        Error::BadOption { name: ISA_VARIABLE, range, value }
    })?;
    let checkpoint = Checkpoint::open(dir, options)?;
    let num_threads = options.num_threads.and_then(NonZero::new);
    let num_threads = num_threads.or_else(|| thread::available_parallelism().ok());
    let pool = Pool::new(num_threads.unwrap_or(NonZero::<usize>::MIN), isa);
    match checkpoint.dtype {
        Dtype::Float32 => load_as::<f32>(checkpoint, options, pool),
        Dtype::BFloat16 => load_as::<bf16>(checkpoint, options, pool),
    }
}

fn load_as<E: Element>(
    checkpoint: Checkpoint,
    options: &ModelOptions,
    pool: Pool,
) -> Result<(Box<dyn Executor>, ModelInfo)> {
    let (backend, model, info) = checkpoint.load(options, |spec, _, num_blocks, block_size| {
        CpuBackend::<E>::new(spec, num_blocks, block_size, pool)
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
/// As [`load`](super::load).
pub fn load_on<B: Backend>(
    dir: &Path,
    options: &ModelOptions,
    make: impl FnOnce(DecoderSpec, Dtype, u32, u32) -> Result<B>,
) -> Result<(B, Decoder<B>, ModelInfo)> {
    Checkpoint::open(dir, options)?.load(options, make)
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
        options: &ModelOptions,
        make: impl FnOnce(DecoderSpec, Dtype, u32, u32) -> Result<B>,
    ) -> Result<(B, Decoder<B>, ModelInfo)> {
        let Self { config, map, dtype } = self;
        let element_bytes = dtype.num_bytes() as u64;
        // At most: what can be coded takes a quarter less.
        let weight_bytes = config.spec.num_parameters() as u64 * element_bytes;
        let available = available_bytes();
        let Some(free) = available.checked_sub(weight_bytes) else {
            let (needed, available) = (gib(weight_bytes), gib(available));
            let reason = format!("{needed:.2} GiB are needed, {available:.2} GiB are free");
            return Err(Error::NoMemory { what: "the weights", reason });
        };
        let memory = CacheMemory {
            bytes: free,
            // A block takes memory when it is first written, and the one freed last comes first: a
            // cache that is never full takes what it needed at its fullest.
            unasked_bytes: free / 2,
            unasked_sequences: options.max_num_seqs.into(),
            hint: "free the memory of other programs",
        };
        let room = CacheRoom::new(&config, options, element_bytes, &memory)?;
        let spec = config.spec.clone();
        let mut backend = make(spec.clone(), dtype, room.num_blocks, options.block_size)?;
        let dummy = DummyWeights::new(options.seed);
        let source = map.as_ref().map_or(Source::Dummy(&dummy), Source::Checkpoint);
        let model = load_decoder(&spec, source, &mut backend)?;
        let (device, limits) = ("cpu".to_owned(), options.limits(false));
        let info = room.info(config, dtype, device, limits, backend.packed_bytes());
        Ok((backend, model, info))
    }
}
