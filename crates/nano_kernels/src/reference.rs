//! The one plain implementation of each operator, in float32.
//!
//! Written to be read and believed. Matrices are row-major slices; shapes stand in the doc
//! comments. Sampling is also what the CPU executor uses.

pub mod activation;
pub mod attention;
pub mod norm;
pub mod philox;
pub mod product;
pub mod rope;
pub mod sampling;
