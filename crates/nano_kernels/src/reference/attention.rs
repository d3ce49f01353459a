//! Attention over the blocks of the KV cache.

/// One layer's cache and how to read it.
#[derive(Clone, Copy, Debug)]
pub struct PagedCache<'a> {
    /// `[num_blocks, k | v, num_kv_heads, block_size, head_dim]`.
    pub data: &'a [f32],
    /// Token slots of a block.
    pub block_size: usize,
    /// Heads of keys and values.
    pub num_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl PagedCache<'_> {
    /// Where key (`part` 0) or value (`part` 1) of a position starts in [`data`](Self::data).
    pub fn offset(&self, block_table: &[u32], part: usize, kv_head: usize, at: usize) -> usize {
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
pub fn paged_attention(
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks of one token and one head of one element: values are 1, 2, 4 behind a table 2, 0, 1.
    const DATA: [f32; 6] = [0.0, 2.0, 0.0, 4.0, 0.0, 1.0];

    fn attend(position: usize, window: Option<usize>) -> f32 {
        let cache = PagedCache { data: &DATA, block_size: 1, num_kv_heads: 1, head_dim: 1 };
        paged_attention(&[1.0], cache, &[2, 0, 1], position, window)[0]
    }

    #[test]
    fn equal_keys_give_the_mean_of_the_values_up_to_the_position() {
        assert!((attend(0, None) - 1.0).abs() < 1e-6);
        assert!((attend(1, None) - 1.5).abs() < 1e-6);
        assert!((attend(2, None) - 7.0 / 3.0).abs() < 1e-6);
    }

    #[test]
    fn a_window_counts_the_token_itself() {
        assert!((attend(2, Some(1)) - 4.0).abs() < 1e-6);
        assert!((attend(2, Some(2)) - 3.0).abs() < 1e-6);
        assert!((attend(1, Some(5)) - 1.5).abs() < 1e-6);
    }
}
