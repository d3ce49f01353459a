//! The one plain implementation of each operator, in float32, that those of every device are held to.
//!
//! Written to be read and believed. Matrices are row-major slices; shapes stand in the doc comments.
#![allow(dead_code, reason = "each test binary uses a part of it")]

/// `row * weight / sqrt(mean(row²) + eps)`.
///
/// # Shapes
/// `row, weight: [hidden_size]`.
///
/// # Source
/// Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
pub(crate) fn rms_norm(row: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mean_square = row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32;
    let scale = (mean_square + eps).sqrt().recip();
    row.iter().zip(weight).map(|(x, weight)| x * scale * weight).collect()
}

/// `weight · row`.
///
/// # Shapes
/// `row: [in_features]`, `weight: [out_features, in_features]`, as checkpoints store it; the result
/// is `[out_features]`.
pub(crate) fn product(row: &[f32], weight: &[f32]) -> Vec<f32> {
    let dot = |weights: &[f32]| row.iter().zip(weights).map(|(x, weight)| x * weight).sum();
    weight.chunks_exact(row.len()).map(dot).collect()
}

/// `silu(gate) * up`, element by element.
///
/// # Shapes
/// `gate_up: [2 * intermediate_size]`, the gate first; the result is `[intermediate_size]`.
///
/// # Source
/// Shazeer, GLU Variants Improve Transformer, 2020.
pub(crate) fn silu_mul(gate_up: &[f32]) -> Vec<f32> {
    let (gate, up) = gate_up.split_at(gate_up.len() / 2);
    gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
}

/// One layer's cache and how to read it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PagedCache<'a> {
    /// `[num_blocks, k | v, num_kv_heads, block_size, head_dim]`.
    pub(crate) data: &'a [f32],
    /// Token slots of a block.
    pub(crate) block_size: usize,
    /// Heads of keys and values.
    pub(crate) num_kv_heads: usize,
    /// Elements of a head.
    pub(crate) head_dim: usize,
}

impl PagedCache<'_> {
    /// Where key (`part` 0) or value (`part` 1) of a position starts in [`data`](Self::data).
    pub(crate) fn offset(
        &self,
        block_table: &[u32],
        part: usize,
        kv_head: usize,
        at: usize,
    ) -> usize {
        let block = block_table[at / self.block_size] as usize;
        let row = (block * 2 + part) * self.num_kv_heads + kv_head;
        (row * self.block_size + at % self.block_size) * self.head_dim
    }

    fn row(&self, block_table: &[u32], part: usize, kv_head: usize, at: usize) -> &[f32] {
        &self.data[self.offset(block_table, part, kv_head, at)..][..self.head_dim]
    }
}

/// The attention of the token at `position` to itself and everything before it, or to the last
/// `window` of these positions.
///
/// # Shapes
/// `query: [num_heads, head_dim]`, rotated; so is the result. Query head `h` reads the keys and
/// values of head `h / (num_heads / num_kv_heads)`.
///
/// # Source
/// Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention,
/// 2023; Ainslie et al., GQA, 2023; the window: Jiang et al., Mistral 7B, 2023.
pub(crate) fn paged_attention(
    query: &[f32],
    cache: PagedCache<'_>,
    block_table: &[u32],
    position: usize,
    window: Option<usize>,
) -> Vec<f32> {
    let head_dim = cache.head_dim;
    let num_heads = query.len() / head_dim;
    let group = num_heads / cache.num_kv_heads;
    let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
    let scale = (head_dim as f32).sqrt().recip();
    let mut output = vec![0.0; query.len()];
    let heads = query.chunks_exact(head_dim).zip(output.chunks_exact_mut(head_dim));
    for (head, (query, output)) in heads.enumerate() {
        let kv_head = head / group;
        let score = |at| {
            let key = cache.row(block_table, 0, kv_head, at);
            query.iter().zip(key).map(|(q, k)| q * k).sum::<f32>() * scale
        };
        let scores: Vec<f32> = (first..=position).map(score).collect();
        let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = scores.iter().map(|score| (score - largest).exp()).collect();
        let total: f32 = weights.iter().sum();
        for (at, weight) in (first..=position).zip(weights) {
            let value = cache.row(block_table, 1, kv_head, at);
            for (output, value) in output.iter_mut().zip(value) {
                *output += weight / total * value;
            }
        }
    }
    output
}
