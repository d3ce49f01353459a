//! How the hardware does it: operators on sizes and slices, without tensors and without Python.
//!
//! [`mod@reference`] holds what is plain in any case (a rotation, a choice), which the CPU's own
//! operators call; the oracles of all others are those of the tests, `tests/rust/oracle.rs`;
//! [`cpu`] holds what a CPU does faster in one pass than a tensor library does in several;
//! [`cuda`] holds the kernels for NVIDIA GPUs and what compiles, launches and captures them.

pub mod cpu;
pub mod cuda;
pub mod reference;
