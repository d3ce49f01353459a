//! Loading onto a GPU.

use nano_core::executor::Capacity;
use nano_kernels::cuda::compile::Compiler;
use nano_kernels::cuda::spec::KERNELS;
use nano_kernels::cuda::{Device, Error as CudaError, Gemm, Kernels};

use super::{CacheMemory, CacheRoom, ModelInfo, ModelOptions, Source, gib, load_decoder};
use crate::backend::Dtype;
use crate::backend::cuda::{BLOCK_SIZE, CudaBackend, StepLimits, check_shapes};
use crate::config::{DecoderSpec, ModelConfig};
use crate::error::{Error, Result};
use crate::executor::cuda::{CudaExecutor, MAX_STEPS_IN_FLIGHT};

/// Kept from the cache for what comes after it: a step's inputs, the graphs, the driver's own.
const HEADROOM_BYTES: u64 = 512 << 20;
/// What one side of a launch's grid can have.
const MAX_ROWS: u32 = 65_535;

/// The GPU of this number, once it is known to be able to run the model as asked: a context takes
/// time and memory.
pub(super) fn open(ordinal: usize, spec: &DecoderSpec, options: &ModelOptions) -> Result<Device> {
    check_options(options)?;
    check_shapes(spec)?;
    Ok(Device::new(ordinal)?)
}

/// Who has a GPU expects `device="auto"` to take it.
pub(super) fn tell_passed_over(reason: &Error) {
    if Device::is_present() {
        tracing::warn!("the model runs on the CPU, not on the GPU: {reason}");
    } else {
        tracing::info!("the model runs on the CPU: {reason}");
    }
}

fn check_options(options: &ModelOptions) -> Result<()> {
    let bad = |name, range: String, value: String| Err(Error::BadOption { name, range, value });
    if options.dtype == Some(Dtype::Float32) {
        let range = "auto or bfloat16 on a CUDA device".to_owned();
        return bad("dtype", range, Dtype::Float32.name().to_owned());
    }
    if options.block_size != BLOCK_SIZE {
        let range = format!("{BLOCK_SIZE} on a CUDA device");
        return bad("block_size", range, options.block_size.to_string());
    }
    let limits = options.limits(true);
    for (name, value) in [
        ("max_num_seqs", limits.max_num_seqs),
        ("max_num_batched_tokens", limits.max_num_batched_tokens),
    ] {
        if value > MAX_ROWS {
            let range = format!("at most {MAX_ROWS} on a CUDA device");
            return bad(name, range, value.to_string());
        }
    }
    Ok(())
}

/// Loads the model of `config` onto the `device` that [`open`] gave for it.
pub(super) fn load(
    config: ModelConfig,
    options: &ModelOptions,
    device: &Device,
) -> Result<(CudaExecutor, ModelInfo)> {
    let spec = config.spec.clone();
    let source = Source::open(&config, options)?;
    let element_bytes = Dtype::BFloat16.num_bytes() as u64;
    let weight_bytes = spec.num_parameters() as u64 * element_bytes;
    let free = device.memory()?.free_bytes as u64;
    if weight_bytes > free {
        let (needed_bytes, free_bytes) = (weight_bytes as usize, free as usize);
        let error = CudaError::OutOfMemory { needed_bytes, free_bytes }.into();
        let hint = "take a smaller model, device=\"cpu\", or free the memory of other programs";
        return Err(explained(error, "the weights", hint));
    }

    let compiler = Compiler::new(Compiler::default_cache_dir())?;
    let kernels = Kernels::load(device, &compiler, &KERNELS)?;
    let gemm = Gemm::new(device, compiler.cache_dir(), options.deterministic)?;
    let scheduler = options.limits(true);
    let limits = StepLimits {
        max_tokens: scheduler.max_num_batched_tokens as usize,
        max_sequences: scheduler.max_num_seqs as usize,
    };
    let hint = "lower max_num_batched_tokens or max_num_seqs";
    let mut backend = CudaBackend::new(spec.clone(), kernels, gemm, limits, options.deterministic)
        .map_err(|error| explained(error, "the largest step", hint))?;
    let model = load_decoder(&spec, &source, &mut backend).map_err(|error| {
        explained(error, "a weight", "free the memory of other programs, or take device=\"cpu\"")
    })?;
    backend.tune(&model, &product_sizes(limits.max_tokens))?;
    device.synchronize()?;

    let memory = device.memory()?;
    let used = memory.total_bytes - memory.free_bytes;
    let budget = (memory.total_bytes as f64 * options.gpu_memory_utilization) as u64;
    let free = (memory.free_bytes as u64).saturating_sub(HEADROOM_BYTES);
    let budget = budget.saturating_sub(used as u64).min(free);
    let cache_memory = CacheMemory {
        bytes: budget,
        unasked_bytes: budget,
        unasked_sequences: limits.max_sequences as u64,
        hint: "raise gpu_memory_utilization, or lower max_num_batched_tokens",
    };
    let room = CacheRoom::new(&config, options, element_bytes, &cache_memory)?;
    let hint = "lower num_blocks, kv_cache_gib or gpu_memory_utilization";
    backend
        .make_room(room.num_blocks, room.max_model_len)
        .map_err(|error| explained(error, "the KV cache", hint))?;
    let capacity = Capacity {
        num_blocks: room.num_blocks,
        block_size: BLOCK_SIZE,
        max_steps_in_flight: MAX_STEPS_IN_FLIGHT,
    };
    let executor = CudaExecutor::new(backend, model, capacity)
        .map_err(|error| explained(error, "a graph", "lower gpu_memory_utilization"))?;
    let dtype = Dtype::BFloat16;
    let info = room.info(config, options, dtype, device.name()?, scheduler, weight_bytes);
    Ok((executor, info))
}

/// Rows whose products are timed: every graph's, and prompts' up to the largest step. Those that
/// share an algorithm go by the most rows among them, so the largest come first.
fn product_sizes(largest: usize) -> Vec<usize> {
    let all = [1, 2, 4].into_iter().chain((8..256).step_by(8));
    let all = all.chain((8..).map(|power| 1 << power));
    let mut sizes: Vec<usize> = all.take_while(|&size| size < largest).collect();
    sizes.push(largest);
    sizes.reverse();
    sizes
}

/// Says which part of the model found too little memory, and what helps.
fn explained(error: Error, what: &'static str, hint: &'static str) -> Error {
    let Error::Cuda(CudaError::OutOfMemory { needed_bytes, free_bytes }) = error else {
        return error;
    };
    let (needed_gib, free_gib) = (gib(needed_bytes as u64), gib(free_bytes as u64));
    Error::GpuMemory { what, needed_gib, free_gib, hint }
}
