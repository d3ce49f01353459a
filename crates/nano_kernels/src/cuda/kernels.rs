//! All kernels, loaded on one device.
//!
//! The launchers are methods of [`Kernels`], one file an operator. Addresses are `u64` of the
//! device; a launcher checks shapes, and its caller answers for the memory behind them.

use cudarc::driver::sys::CUfunction_attribute;
use cudarc::driver::{CudaFunction, LaunchConfig};
use cudarc::nvrtc::Ptx;

use super::compile::{Compiler, Cubin};
use super::spec::{KERNELS, Kernel, KernelSpec};
use super::{Device, Result};

/// Every kernel of the table, ready to launch.
#[derive(Debug)]
pub struct Kernels {
    device: Device,
    functions: Vec<CudaFunction>,
}

impl Kernels {
    /// Compiles or reads from the cache, and loads, every kernel for `device`.
    pub fn load(device: &Device, compiler: &Compiler) -> Result<Self> {
        let functions = KERNELS.iter().map(|spec| {
            let architecture = device.architecture();
            let function = load(device, spec, compiler.cubin(spec, architecture)?)
                // The cache may hold what this driver does not take: once more, from the source.
                .or_else(|_| load(device, spec, compiler.compile(spec, architecture)?))?;
            if spec.dynamic_shared_bytes > 0 {
                let attribute =
                    CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                let num_bytes = spec.dynamic_shared_bytes.min(device.max_shared_bytes());
                function.set_attribute(attribute, num_bytes as i32)?;
            }
            Ok(function)
        });
        Ok(Self { functions: functions.collect::<Result<_>>()?, device: device.clone() })
    }

    /// The device that they are loaded on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    pub(super) fn function(&self, kernel: Kernel) -> &CudaFunction {
        &self.functions[kernel as usize]
    }
}

fn load(device: &Device, spec: &KernelSpec, cubin: Cubin) -> Result<CudaFunction> {
    let module = device.context().load_module(Ptx::from_binary(cubin.image))?;
    Ok(module.load_function(spec.function)?)
}

/// A launch shape without dynamic shared memory.
pub(super) fn shape(grid: (u32, u32, u32), num_threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: grid, block_dim: (num_threads, 1, 1), shared_mem_bytes: 0 }
}

/// A launch shape of a kernel of the table, with its dynamic shared memory.
pub(super) fn shape_of(kernel: Kernel, grid: (u32, u32, u32), num_threads: u32) -> LaunchConfig {
    let shared_mem_bytes = KERNELS[kernel as usize].dynamic_shared_bytes;
    LaunchConfig { shared_mem_bytes, ..shape(grid, num_threads) }
}
