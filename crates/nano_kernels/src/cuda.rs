//! The kernels of an NVIDIA GPU: device, run-time compilation, launchers and graphs.
//!
//! The driver and NVRTC are loaded at run time, so the same binary runs where there is neither;
//! [`device::Device::new`] then says what is missing. Launchers only enqueue on the device's one
//! stream: nothing here waits except `synchronize`, `upload`, `download` and a buffer's drop.

pub mod activation;
pub mod attention;
pub mod batch_product;
pub mod compile;
pub mod device;
pub mod gated_product;
pub mod gather;
pub mod gemm;
pub mod graph;
pub mod kernels;
pub mod norm;
pub mod product;
pub mod rope;
pub mod row_product;
pub mod sampling;
pub mod skinny;
pub mod spec;
mod tensor_map;
pub mod weights;

pub use device::{Device, DeviceBuffer, Event, PinnedBuffer};
pub use gemm::Gemm;
pub use graph::Graph;
pub use kernels::Kernels;

use cudarc::cublaslt::result::CublasError;
use cudarc::driver::DriverError;
// What the launchers name.
use kernels::{Arguments, Launch};
use spec::Kernel;
use tensor_map::TensorMap;

/// The result of `nano_kernels::cuda`.
pub type Result<T> = std::result::Result<T, Error>;

/// Why the GPU could not do it.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This machine has no usable GPU; the CPU can do the work.
    #[error("no CUDA device: {0}")]
    NoDevice(String),
    /// NVRTC cannot be loaded or does not work.
    #[error("no CUDA compiler: {0}")]
    NoCompiler(String),
    /// A kernel's source was refused.
    #[error("kernel {kernel} does not compile for {architecture}: {log}")]
    Compile {
        /// The kernel's name in the table of specs.
        kernel: String,
        /// As NVRTC spells it.
        architecture: String,
        /// What NVRTC said.
        log: String,
    },
    /// The device has too little memory.
    #[error("{needed_bytes} bytes of GPU memory are needed, but {free_bytes} are free")]
    OutOfMemory {
        /// What was asked for.
        needed_bytes: usize,
        /// What the device had.
        free_bytes: usize,
    },
    /// A call of the driver failed; after a failed kernel, every later call does.
    #[error("CUDA error: {0}")]
    Driver(String),
    /// cuBLASLt cannot be loaded, or a call of it failed.
    #[error("cuBLASLt: {0}")]
    Library(String),
    /// A kernel was asked for a shape that it does not have.
    #[error("{name} must be {range}, got {value}")]
    Shape {
        /// The argument.
        name: &'static str,
        /// What it may be.
        range: &'static str,
        /// What it was.
        value: usize,
    },
}

impl From<DriverError> for Error {
    fn from(error: DriverError) -> Self {
        let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
        Self::Driver(text.unwrap_or_else(|_| format!("{:?}", error.0)))
    }
}

impl From<CublasError> for Error {
    fn from(error: CublasError) -> Self {
        Self::Library(format!("{error}"))
    }
}

/// Refuses a shape that a kernel does not have.
fn check(ok: bool, name: &'static str, range: &'static str, value: usize) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::Shape { name, range, value }) }
}
