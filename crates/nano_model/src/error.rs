//! Everything that can be wrong with a model directory, and with a step.

use std::path::PathBuf;

use nano_kernels::cuda::Error as CudaError;

/// The result of `nano_model`.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a model cannot be loaded or run; every message names the file, tensor, limit and value.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such directory, or it holds no model.
    #[error("{} {reason}", .path.display())]
    NoModel {
        /// What was given.
        path: PathBuf,
        /// What is missing, and what to do about it.
        reason: String,
    },
    /// A file cannot be read or is not what it should be.
    #[error("{}: {reason}", .path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A field of `config.json` is missing or has a value that cannot be run.
    #[error("config.json: {field} {reason}")]
    BadConfig {
        /// The field.
        field: String,
        /// What is wrong with its value.
        reason: String,
    },
    /// An architecture that nobody has written a parser for.
    #[error(
        "config.json: architecture {architecture:?} is not supported: MistralForCausalLM and \
         MinistralForCausalLM are"
    )]
    UnknownArchitecture {
        /// What the config says.
        architecture: String,
    },
    /// A tensor is not in the checkpoint.
    #[error("tensor {name} is missing from the checkpoint in {}", .dir.display())]
    MissingTensor {
        /// Its name.
        name: String,
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// A tensor has another shape than the config says.
    #[error("tensor {name} has shape {found:?}, but config.json makes it {expected:?}")]
    TensorShape {
        /// Its name.
        name: String,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape that the config asks for.
        expected: Vec<usize>,
    },
    /// A tensor has a data type that is not read.
    #[error("tensor {name} has dtype {dtype}: F32, F16 and BF16 are supported")]
    TensorDtype {
        /// Its name.
        name: String,
        /// The type in the file.
        dtype: String,
    },
    /// The checkpoint has more layers than the config says, or a parameter that a layer has not.
    #[error(
        "tensor {name} is no part of the model that config.json describes, whose num_hidden_layers \
         is {num_layers}: without it the model would be another one"
    )]
    UnexpectedTensor {
        /// The tensor's name.
        name: String,
        /// Layers are numbered below this.
        num_layers: usize,
    },
    /// An option does not fit the model or the machine.
    #[error("{name} must be {range}, got {value}")]
    BadOption {
        /// The option as the user spells it.
        name: &'static str,
        /// The values that it may take.
        range: String,
        /// What was given.
        value: String,
    },
    /// The system has no memory for a part of the model.
    #[error("no memory for {what}: {reason}")]
    NoMemory {
        /// The part.
        what: &'static str,
        /// What the system says.
        reason: String,
    },
    /// The GPU or its libraries failed.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The GPU has too little memory for the model.
    #[error(
        "{needed_gib:.2} GiB of GPU memory are needed for {what}, but {free_gib:.2} GiB are free: \
         {hint}"
    )]
    GpuMemory {
        /// The part of the model.
        what: &'static str,
        /// What it takes.
        needed_gib: f64,
        /// What is left.
        free_gib: f64,
        /// The option that helps.
        hint: &'static str,
    },
    /// A step was ended by [`ModelInfo::stop`](crate::ModelInfo::stop).
    #[error("the step was stopped")]
    Stopped,
}

impl Error {
    /// A stable word for HTTP, metrics and Python.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoModel { .. } => "model_missing",
            Self::BadFile { .. } => "model_file_invalid",
            Self::BadConfig { .. } => "model_config_invalid",
            Self::UnknownArchitecture { .. } => "model_architecture_unknown",
            Self::MissingTensor { .. } => "tensor_missing",
            Self::TensorShape { .. } => "tensor_misshapen",
            Self::TensorDtype { .. } => "tensor_dtype_unsupported",
            Self::UnexpectedTensor { .. } => "tensor_unexpected",
            Self::BadOption { .. } => "invalid_config",
            Self::NoMemory { .. } => "out_of_memory",
            Self::Cuda(CudaError::NoDevice(_)) => "no_cuda_device",
            Self::Cuda(_) => "cuda_failed",
            Self::GpuMemory { .. } => "gpu_out_of_memory",
            Self::Stopped => "engine_closed",
        }
    }
}
