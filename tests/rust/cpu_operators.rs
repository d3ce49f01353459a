//! The operators of a CPU against their oracles, for each set of instructions that the processor has.
#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod cpu_attention;
mod cpu_product;
mod oracle;

use oracle::{PagedCache, paged_attention, product, rms_norm, silu_mul};

#[test]
fn the_gate_is_the_first_half() {
    assert_eq!(silu_mul(&[0.0, 1.0, 5.0, 2.0]), [0.0, 2.0 / (1.0 + (-1.0_f32).exp())]);
}

#[test]
fn a_row_of_equal_values_becomes_the_weight() {
    assert_eq!(rms_norm(&[3.0, 3.0], &[0.5, 2.0], 0.0), [0.5, 2.0]);
}

#[test]
fn a_weight_row_is_an_output() {
    assert_eq!(product(&[1.0, 2.0], &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]), [1.0, 2.0, 3.0]);
}

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
