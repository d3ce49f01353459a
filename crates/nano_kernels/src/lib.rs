//! How the hardware does it: operators on sizes and slices, without tensors and without Python.
//!
//! [`mod@reference`] holds the one plain implementation of each operator, the oracle of the tests, and
//! what is plain in any case (a rotation, a choice), which the CPU's own operators call;
//! [`cpu`] holds what a CPU does faster in one pass than a tensor library does in several;
//! [`cuda`] holds the kernels for NVIDIA GPUs and what compiles, launches and captures them.

pub mod cpu;
pub mod cuda;
pub mod reference;
