//! The seam to an operator library.
//!
//! The operators of a decoder, at the granularity where fusing pays; a back end without a fused
//! kernel composes its plain ones. Operators only enqueue, so that a captured graph of a device is
//! the forward pass run once under capture.

pub mod cpu;
pub mod cuda;

use std::fmt::Debug;

use crate::batch::Batch;
use crate::dummy::DummyTensor;
use crate::error::Result;
use crate::weights::TensorBytes;

/// The data type of weights and cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single precision.
    Float32,
    /// Brain floating point.
    BFloat16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn num_bytes(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::BFloat16 => 2,
        }
    }

    /// PyTorch's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::BFloat16 => "bfloat16",
        }
    }
}

/// Where the numbers of a parameter come from.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// Tensors of a checkpoint, each whole rows, one below the other.
    Tensors(&'a [TensorBytes<'a>]),
    /// Random ones.
    Dummy(DummyTensor<'a>),
}

/// Runs the operators of a decoder. `num_tokens` is the number of rows: the step's, and of the last
/// layer from [`logit_rows`](Self::logit_rows) on those that need logits.
pub trait Backend: Debug {
    /// Rows of activations on the device.
    type Hidden;
    /// A parameter: plain, quantised or one rank's shard; the decoder does not look inside.
    type Weight: Debug;
    /// What operators need to know about the step, on the device.
    type Step;

    /// A matrix, `[rows, columns]`. What it is made of can be dropped afterwards.
    fn weight(&mut self, rows: usize, columns: usize, values: Values<'_>) -> Result<Self::Weight>;

    /// The matrix of [`norm_gated_product`](Self::norm_gated_product): gate, and up below it.
    fn gate_up_weight(
        &mut self,
        rows: usize,
        columns: usize,
        values: Values<'_>,
    ) -> Result<Self::Weight> {
        self.weight(rows, columns, values)
    }

    /// The weight of a norm, `[size]`; ones, if there is no tensor.
    fn norm_weight(&mut self, size: usize, values: Option<TensorBytes<'_>>)
    -> Result<Self::Weight>;

    /// Uploads a step.
    fn prepare(&mut self, batch: &Batch) -> Result<Self::Step>;

    /// Rows of the embedding: `[num_tokens, hidden_size]`.
    fn embed(&mut self, table: &Self::Weight, step: &Self::Step) -> Result<Self::Hidden>;

    /// RMSNorm, then a product: `[num_tokens, hidden_size] -> [num_tokens, out_features]`.
    fn norm_product(
        &mut self,
        hidden: &Self::Hidden,
        norm: &Self::Weight,
        weight: &Self::Weight,
    ) -> Result<Self::Hidden>;

    /// Splits `qkv`, rotates queries and keys, writes keys and values of `layer` by slot, and
    /// returns the queries `[num_tokens, num_heads, head_dim]`.
    fn rope_write_kv(
        &mut self,
        layer: usize,
        qkv: Self::Hidden,
        step: &Self::Step,
    ) -> Result<Self::Hidden>;

    /// Attention of the queries to the keys and values of `layer`, read by block table:
    /// `[num_tokens, num_heads * head_dim]`.
    fn paged_attention(
        &mut self,
        layer: usize,
        query: Self::Hidden,
        step: &Self::Step,
    ) -> Result<Self::Hidden>;

    /// A product, added to the residual stream.
    fn product_add(
        &mut self,
        input: &Self::Hidden,
        weight: &Self::Weight,
        residual: Self::Hidden,
    ) -> Result<Self::Hidden>;

    /// RMSNorm, the merged product to gate and up, and `silu(gate) * up`:
    /// `[num_tokens, intermediate_size]`.
    fn norm_gated_product(
        &mut self,
        hidden: &Self::Hidden,
        norm: &Self::Weight,
        gate_up: &Self::Weight,
    ) -> Result<Self::Hidden>;

    /// The rows that need logits, of the last layer's attention and of the residual stream.
    fn logit_rows(
        &mut self,
        context: Self::Hidden,
        residual: Self::Hidden,
        step: &Self::Step,
    ) -> Result<(Self::Hidden, Self::Hidden)>;

    /// RMSNorm and the output projection, in float32: `[num_logit_rows, vocab_size]`.
    fn logits(
        &mut self,
        hidden: &Self::Hidden,
        norm: &Self::Weight,
        weight: &Self::Weight,
        _step: &Self::Step,
    ) -> Result<Self::Hidden> {
        self.norm_product(hidden, norm, weight)
    }

    /// Waits for logits and puts them, `[num_logit_rows * vocab_size]`, over `host`.
    fn to_host(&mut self, logits: Self::Hidden, host: &mut Vec<f32>) -> Result<()>;
}
