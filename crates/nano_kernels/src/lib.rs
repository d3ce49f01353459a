//! How the hardware does it: operators on sizes and slices, without tensors and without Python.
//!
//! [`mod@reference`] holds the one plain implementation of each operator, the oracle of every test;
//! [`cuda`] holds the kernels for NVIDIA GPUs and what compiles, launches and captures them.

pub mod cuda;
pub mod reference;
