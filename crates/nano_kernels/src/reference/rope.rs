//! Rotary position embedding.

/// Rotates one head by its position's angles.
///
/// Element `i` and element `i + head_dim / 2` are a pair, as in Hugging Face's checkpoints, whose
/// query and key projections are permuted for it.
///
/// # Shapes
/// `head: [head_dim]`, `cos, sin: [head_dim / 2]`.
///
/// # Source
/// Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.
pub fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = head.len() / 2;
    let (first, second) = head.split_at_mut(half);
    let angles = cos.iter().zip(sin);
    for ((x, y), (cos, sin)) in first.iter_mut().zip(second).zip(angles) {
        (*x, *y) = (*x * cos - *y * sin, *y * cos + *x * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::float_cmp, reason = "products with 0 and 1 are exact")]
    fn a_quarter_turn_swaps_the_pair() {
        let mut head = [1.0, 2.0, 3.0, 4.0];
        rotate(&mut head, &[0.0, 1.0], &[1.0, 0.0]);
        assert_eq!(head, [-3.0, 2.0, 1.0, 4.0]);
    }
}
