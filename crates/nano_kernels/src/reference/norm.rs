//! Root-mean-square normalisation.

/// `row * weight / sqrt(mean(row²) + eps)`.
///
/// # Shapes
/// `row, weight: [hidden_size]`.
///
/// # Source
/// Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
pub fn rms_norm(row: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mean_square = row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32;
    let scale = (mean_square + eps).sqrt().recip();
    row.iter().zip(weight).map(|(x, weight)| x * scale * weight).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_equal_values_becomes_the_weight() {
        assert_eq!(rms_norm(&[3.0, 3.0], &[0.5, 2.0], 0.0), [0.5, 2.0]);
    }
}
