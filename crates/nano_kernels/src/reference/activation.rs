//! `SwiGLU`'s gate.

/// `silu(gate) * up`, element by element.
///
/// # Shapes
/// `gate_up: [2 * intermediate_size]`, the gate first; the result is `[intermediate_size]`.
///
/// # Source
/// Shazeer, GLU Variants Improve Transformer, 2020.
pub fn silu_mul(gate_up: &[f32]) -> Vec<f32> {
    let (gate, up) = gate_up.split_at(gate_up.len() / 2);
    gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_is_the_first_half() {
        assert_eq!(silu_mul(&[0.0, 1.0, 5.0, 2.0]), [0.0, 2.0 / (1.0 + (-1.0_f32).exp())]);
    }
}
