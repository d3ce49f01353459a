//! Root-mean-square normalisation.

use super::{Element, sum_of};

/// [`rms_norm`](crate::reference::norm::rms_norm) of every row.
///
/// # Shapes
/// `rows, output: [num_rows, hidden_size]`, `weight: [hidden_size]`.
pub fn rms_norm<E: Element>(rows: &[E], weight: &[E], eps: f32, output: &mut [E]) {
    let size = weight.len();
    for (row, output) in rows.chunks_exact(size).zip(output.chunks_exact_mut(size)) {
        let square = sum_of(row, row, |a, b| a.widen() * b.widen());
        let scale = (square / size as f32 + eps).sqrt().recip();
        for ((output, x), weight) in output.iter_mut().zip(row).zip(weight) {
            *output = E::narrow(x.widen() * scale * weight.widen());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;

    #[test]
    fn every_row_is_that_of_the_reference() {
        for size in [1, 15, 16, 37, 1024] {
            let value = |index: usize| ((index * 37 + 11) % 101) as f32 / 17.0 - 3.0;
            let rows: Vec<f32> = (0..3 * size).map(value).collect();
            let weight: Vec<f32> = (0..size).map(|index| value(index + 5)).collect();
            let mut output = vec![0.0; rows.len()];
            rms_norm(&rows, &weight, 1e-5, &mut output);
            for (row, output) in rows.chunks(size).zip(output.chunks(size)) {
                let expected = reference::norm::rms_norm(row, &weight, 1e-5);
                for (ours, expected) in output.iter().zip(expected) {
                    assert!((ours - expected).abs() <= 1e-5 * expected.abs().max(1.0));
                }
            }
        }
    }
}
