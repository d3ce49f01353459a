//! What is plain on any device, in float32: a rotation, and the choice of a token, which GPUs repeat to
//! the bit.

pub mod philox;
pub mod rope;
pub mod sampling;
