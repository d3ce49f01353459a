//! Loading into the memory of the host.

use std::num::NonZero;
use std::sync::Arc;
use std::thread;

use half::bf16;
use nano_core::executor::{Capacity, Executor};
use nano_kernels::cpu::isa::{ISA_VARIABLE, Isa};
use nano_kernels::cpu::{Element, Pool};

use super::{
    CacheMemory, CacheRoom, ModelInfo, ModelOptions, Source, available_bytes, gib, load_decoder,
};
use crate::backend::Dtype;
use crate::backend::cpu::CpuBackend;
use crate::config::{CheckpointDtype, ModelConfig};
use crate::error::{Error, Result};
use crate::executor::CpuExecutor;

/// Loads the model of `config` for the CPU.
pub(super) fn load(
    config: ModelConfig,
    options: &ModelOptions,
) -> Result<(Box<dyn Executor>, ModelInfo)> {
    let isa = Isa::asked().map_err(|value| {
        let range = "avx512, avx2 or portable".to_owned();
        Error::BadOption { name: ISA_VARIABLE, range, value }
    })?;
    let source = Source::open(&config, options)?;
    let num_threads = options.num_threads.and_then(NonZero::new);
    let num_threads = num_threads.or_else(|| thread::available_parallelism().ok());
    let pool = Pool::new(num_threads.unwrap_or(NonZero::<usize>::MIN), isa);
    let unasked = match (config.dtype, &source) {
        (None, Source::Checkpoint(map)) => map.dtype(),
        (named, _) => named,
    };
    if (options.dtype, unasked) == (None, Some(CheckpointDtype::Float16)) {
        tracing::warn!(
            "the checkpoint's float16 is rounded to bfloat16; dtype=\"float32\" keeps all of it"
        );
    }
    match (options.dtype, unasked) {
        (Some(Dtype::Float32), _) | (None, Some(CheckpointDtype::Float32)) => {
            load_as::<f32>(config, &source, Dtype::Float32, options, pool)
        }
        _ => load_as::<bf16>(config, &source, Dtype::BFloat16, options, pool),
    }
}

fn load_as<E: Element>(
    config: ModelConfig,
    source: &Source,
    dtype: Dtype,
    options: &ModelOptions,
    pool: Pool,
) -> Result<(Box<dyn Executor>, ModelInfo)> {
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
    let (num_blocks, block_size) = (room.num_blocks, options.block_size);
    let mut backend = CpuBackend::<E>::new(config.spec.clone(), num_blocks, block_size, pool)?;
    let mut model = load_decoder(&config.spec, source, &mut backend)?;
    let vocab_size = config.spec.vocab_size;
    let (device, limits) = ("cpu".to_owned(), options.limits(false));
    let info = room.info(config, options, dtype, device, limits, backend.weight_bytes());
    model.stop = Arc::clone(&info.stop);
    let capacity = Capacity { num_blocks, block_size, max_steps_in_flight: 1 };
    let executor = CpuExecutor::new(backend, model, capacity, vocab_size);
    Ok((Box::new(executor), info))
}
