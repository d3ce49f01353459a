//! The matrix product of a linear layer.

/// `weight · row`.
///
/// # Shapes
/// `row: [in_features]`, `weight: [out_features, in_features]`, as checkpoints store it; the result
/// is `[out_features]`.
pub fn product(row: &[f32], weight: &[f32]) -> Vec<f32> {
    let dot = |weights: &[f32]| row.iter().zip(weights).map(|(x, weight)| x * weight).sum();
    weight.chunks_exact(row.len()).map(dot).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_row_is_an_output() {
        assert_eq!(product(&[1.0, 2.0], &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]), [1.0, 2.0, 3.0]);
    }
}
