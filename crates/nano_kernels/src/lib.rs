//! How the hardware does it: operators on sizes and slices, without tensors and without Python.
//!
//! [`reference`] holds the one plain implementation of each operator, the oracle of every test.

pub mod reference;
