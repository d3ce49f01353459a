//! All kernels, loaded on one device.
//!
//! The launchers are methods of [`Kernels`], one file an operator. Addresses are `u64` of the
//! device; a launcher checks shapes, and its caller answers for the memory behind them.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys::{self, CUfunction_attribute};
use cudarc::driver::{CudaFunction, DeviceRepr};
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
    pub(super) prefill_scratch: PrefillScratch,
}

impl Kernels {
    /// Compiles or reads from the cache, and loads, every kernel for `device`: those of [`KERNELS`],
    /// or of a table with other variants in their places.
    pub fn load(
        device: &Device,
        compiler: &Compiler,
        specs: &[KernelSpec; KERNELS.len()],
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
                *count = count_clusters(&functions, size)?;
            }
        }
        let prefill_scratch = PrefillScratch::new(device)?;
        Ok(Self { functions, max_clusters, prefill_scratch, device: device.clone() })
    }

    /// The device that they are loaded on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Enqueues a launch; one without thread blocks is none.
    ///
    /// # Safety
    /// The arguments are the kernel's by number and type, and hold what it asks for.
    pub(super) unsafe fn launch(&self, launch: &Launch, arguments: &Arguments<'_>) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        self.device.context().bind_to_thread()?;
        let overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let begins_early = self.device.overlaps_kernels && !launch.in_turn;
        let mut attributes = Vec::with_capacity(2);
        attributes.extend(begins_early.then_some(overlap));
        attributes.extend((launch.cluster > 1).then(|| cluster_of(launch.cluster)));
        let config = launch.config(self.device.stream().cu_stream(), &mut attributes);
        let addresses = arguments.iter().map(|&it| ptr::from_ref(it).cast::<c_void>().cast_mut());
        let mut addresses: Vec<_> = addresses.collect();
        // SAFETY: the configuration and the arguments outlive the call, which copies them; the
        // rest is the caller's word.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                self.function(launch.kernel).cu_function(),
                addresses.as_mut_ptr(),
                ptr::null_mut(),
            )
        }
        .result()?;
        Ok(())
    }

    /// How many thread blocks of a cluster may share a tile, if there are so many: as many as leave
    /// all clusters running at once.
    pub(super) fn blocks_of_tile(&self, num_tiles: usize) -> usize {
        (1..=MAX_CLUSTER).rev().find(|&size| num_tiles <= self.max_clusters[size]).unwrap_or(1)
    }

    pub(super) fn function(&self, kernel: Kernel) -> &CudaFunction {
        &self.functions[kernel as usize]
    }
}

/// The arguments of a launch, in the order of the source.
pub(super) type Arguments<'a> = [&'a dyn DeviceRepr];

/// The shape of a launch.
///
/// Where the device can, a kernel begins while the one before it ends: it does what needs nothing
/// of that one, and then calls `wait_for_previous`. So every kernel of the table calls it.
#[derive(Clone, Copy)]
pub(super) struct Launch {
    pub(super) kernel: Kernel,
    pub(super) grid: [usize; 2],
    pub(super) num_threads: u32,
    pub(super) shared_bytes: usize,
    /// Thread blocks of a cluster, where the source does not say it.
    pub(super) cluster: usize,
    /// Begins when the kernel in front has ended. Blocks that come before lie where there is room
    /// for them by then: a kernel with a block or two a multiprocessor would lie unevenly.
    pub(super) in_turn: bool,
}

impl Launch {
    /// With the shared memory of the table.
    pub(super) fn new(kernel: Kernel, grid: [usize; 2], num_threads: u32) -> Self {
        let shared_bytes = KERNELS[kernel as usize].dynamic_shared_bytes;
        Self { kernel, grid, num_threads, shared_bytes, cluster: 1, in_turn: false }
    }

    /// As the driver takes it, which reads the attributes through a pointer.
    fn config(
        &self,
        stream: sys::CUstream,
        attributes: &mut [sys::CUlaunchAttribute],
    ) -> sys::CUlaunchConfig {
        sys::CUlaunchConfig {
            gridDimX: self.grid[0] as u32,
            gridDimY: self.grid[1] as u32,
            gridDimZ: 1,
            blockDimX: self.num_threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared_bytes as u32,
            hStream: stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        }
    }
}

/// In clusters of so many thread blocks.
fn cluster_of(num_blocks: usize) -> sys::CUlaunchAttribute {
    let size = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: num_blocks as u32, y: 1, z: 1 };
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { clusterDim: size },
    }
}

/// Clusters of `num_blocks` thread blocks that fill a multiprocessor each: a device's groups of
/// multiprocessors differ in size.
fn count_clusters(functions: &[CudaFunction], num_blocks: usize) -> Result<usize> {
    let launch = Launch::new(Kernel::BatchProduct64, [num_blocks, 1], 384);
    let mut attributes = [cluster_of(num_blocks)];
    let config = launch.config(ptr::null_mut(), &mut attributes);
    let function = functions[launch.kernel as usize].cu_function();
    let mut num_clusters = 0;
    // SAFETY: the function is loaded, and all that is pointed to outlives the call.
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
