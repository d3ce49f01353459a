//! All kernels, loaded on one device.
//!
//! The launchers are methods of [`Kernels`], one file an operator. Addresses are `u64` of the
//! device; a launcher checks shapes, and its caller answers for the memory behind them.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys::{self, CUfunction_attribute};
use cudarc::driver::{CudaFunction, DeviceRepr, LaunchConfig};
use cudarc::nvrtc::Ptx;

use super::attention::PrefillScratch;
use super::compile::{Compiler, Cubin};
use super::spec::{KERNELS, Kernel, KernelSpec};
use super::{Device, Result};

/// Thread blocks of a cluster.
const MAX_CLUSTER: usize = 4;

/// Every kernel of the table, ready to launch.
#[derive(Debug)]
pub struct Kernels {
    device: Device,
    functions: Vec<CudaFunction>,
    /// Clusters of so many thread blocks, each with a multiprocessor for itself, that run at once.
    max_clusters: [usize; MAX_CLUSTER + 1],
    prefill_scratch: PrefillScratch,
}

impl Kernels {
    /// Compiles or reads from the cache, and loads, every kernel for `device`.
    pub fn load(device: &Device, compiler: &Compiler) -> Result<Self> {
        Self::load_from(&KERNELS, device, compiler)
    }

    /// The same from a table of other variants, each launched as the one in its place.
    pub fn load_from(
        specs: &[KernelSpec; KERNELS.len()],
        device: &Device,
        compiler: &Compiler,
    ) -> Result<Self> {
        let functions = specs.iter().map(|spec| {
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
        let functions = functions.collect::<Result<Vec<_>>>()?;
        let mut max_clusters = [0; MAX_CLUSTER + 1];
        if device.is_hopper() {
            for (size, count) in max_clusters.iter_mut().enumerate().skip(1) {
                *count = count_clusters(&functions, size as u32)?;
            }
        }
        let prefill_scratch = PrefillScratch::new(device)?;
        Ok(Self { functions, max_clusters, prefill_scratch, device: device.clone() })
    }

    /// The device that they are loaded on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// A launch of `kernel`, to be given its arguments.
    pub(super) fn launch(&self, kernel: Kernel) -> Launch<'_> {
        Launch {
            device: &self.device,
            function: self.function(kernel),
            arguments: Vec::new(),
            begins_early: self.device.overlaps_kernels(),
            cluster: 1,
        }
    }

    /// How many thread blocks of a cluster may share a tile, if there are so many: as many as leave
    /// all clusters running at once.
    pub(super) fn blocks_of_tile(&self, num_tiles: usize) -> usize {
        (1..=MAX_CLUSTER).rev().find(|&size| num_tiles <= self.max_clusters[size]).unwrap_or(1)
    }

    pub(super) fn prefill_scratch(&self) -> &PrefillScratch {
        &self.prefill_scratch
    }

    pub(super) fn function(&self, kernel: Kernel) -> &CudaFunction {
        &self.functions[kernel as usize]
    }
}

/// A launch in the making.
///
/// Where the device can, a kernel begins while the one before it ends: it does what needs nothing
/// of that one, and then calls `wait_for_previous`. So every kernel of the table calls it.
pub(super) struct Launch<'a> {
    device: &'a Device,
    function: &'a CudaFunction,
    arguments: Vec<*mut c_void>,
    begins_early: bool,
    cluster: u32,
}

impl<'a> Launch<'a> {
    /// The next argument, in the order of the source; it is read by `launch`.
    pub(super) fn arg<T: DeviceRepr>(&mut self, value: &'a T) -> &mut Self {
        self.arguments.push(ptr::from_ref(value).cast_mut().cast());
        self
    }

    /// Begins when the kernel in front has ended. Blocks that come before lie where there is room
    /// for them by then: a kernel with a block or two a multiprocessor would lie unevenly.
    pub(super) fn in_turn(&mut self) -> &mut Self {
        self.begins_early = false;
        self
    }

    /// In clusters of so many thread blocks, where the source does not say it.
    pub(super) fn in_clusters(&mut self, num_blocks: u32) -> &mut Self {
        self.cluster = num_blocks;
        self
    }

    /// Enqueues it.
    ///
    /// # Safety
    /// The arguments are the kernel's by number and type, and hold what it asks for.
    pub(super) unsafe fn launch(&mut self, shape: LaunchConfig) -> Result<()> {
        self.device.context().bind_to_thread()?;
        // SAFETY: all zeros are a value of this plain structure.
        let mut overlap: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        overlap.id =
            sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        overlap.value.programmaticStreamSerializationAllowed = 1;
        let mut attributes = Vec::with_capacity(2);
        attributes.extend(self.begins_early.then_some(overlap));
        attributes.extend((self.cluster > 1).then(|| cluster_of(self.cluster)));
        let config = sys::CUlaunchConfig {
            gridDimX: shape.grid_dim.0,
            gridDimY: shape.grid_dim.1,
            gridDimZ: shape.grid_dim.2,
            blockDimX: shape.block_dim.0,
            blockDimY: shape.block_dim.1,
            blockDimZ: shape.block_dim.2,
            sharedMemBytes: shape.shared_mem_bytes,
            hStream: self.device.stream().cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        // SAFETY: the configuration and the arguments outlive the call, which copies them; the
        // rest is the caller's word.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                self.function.cu_function(),
                self.arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        }
        .result()?;
        Ok(())
    }
}

fn cluster_of(num_blocks: u32) -> sys::CUlaunchAttribute {
    // SAFETY: all zeros are a value of this plain structure.
    let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim.x = num_blocks;
    attribute.value.clusterDim.y = 1;
    attribute.value.clusterDim.z = 1;
    attribute
}

/// Clusters of `num_blocks` thread blocks that fill a multiprocessor each: a device's groups of
/// multiprocessors differ in size.
fn count_clusters(functions: &[CudaFunction], num_blocks: u32) -> Result<usize> {
    let kernel = Kernel::BatchProduct64;
    let (mut attribute, mut num_clusters) = (cluster_of(num_blocks), 0);
    let config = sys::CUlaunchConfig {
        gridDimX: num_blocks,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: 384,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: KERNELS[kernel as usize].dynamic_shared_bytes,
        hStream: ptr::null_mut(),
        attrs: &raw mut attribute,
        numAttrs: 1,
    };
    let function = functions[kernel as usize].cu_function();
    // SAFETY: the function is loaded, and both structures outlive the call.
    unsafe {
        sys::cuOccupancyMaxActiveClusters(&raw mut num_clusters, function, &raw const config)
    }
    .result()?;
    Ok(num_clusters as usize)
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
