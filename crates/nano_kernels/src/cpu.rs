//! Operators of a CPU: plain loops that compilers turn into vector instructions, compiled for each
//! set of them ([`isa`]), on one pool of threads ([`pool`]).
//!
//! Activations are float32, weights and cache of one [`Element`] type. A sum adds its terms in one
//! order whatever else is computed, so a row's result has the same bits in any batch.

pub mod attention;
mod element;
mod exp;
pub mod isa;
pub mod matrix;
pub mod memory;
pub mod norm;
pub mod pool;
pub mod product;
pub mod rope;
pub mod sampling;
mod shared;

pub use element::Element;
pub use isa::Isa;
pub use pool::Pool;

/// Lanes of the widest vector.
const LANES: usize = 16;
