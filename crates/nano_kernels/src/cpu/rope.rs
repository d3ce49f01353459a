//! Rotation of queries and keys, and the writing of keys and values into the cache.

use super::Element;
use super::attention::KvShape;

/// The rows of a step and what happens to them.
#[derive(Clone, Copy, Debug)]
pub struct RopeRows<'a, E> {
    /// `[num_rows, num_heads + 2 * num_kv_heads, head_dim]`: queries, keys, values.
    pub qkv: &'a [E],
    /// Heads of queries.
    pub num_heads: usize,
    /// `[num_rows, head_dim / 2]`.
    pub cos: &'a [f32],
    /// `[num_rows, head_dim / 2]`.
    pub sin: &'a [f32],
    /// Where each row's keys and values go, `block * block_size + offset`: `[num_rows]`.
    pub slots: &'a [u32],
}

/// Rotates queries into `query: [num_rows, num_heads, head_dim]` and keys into the cache of a
/// layer (see [`KvShape`]), where values go as they are.
pub fn rope_write_kv<E: Element>(
    rows: RopeRows<'_, E>,
    shape: KvShape,
    cache: &mut [E],
    query: &mut [E],
) {
    let KvShape { num_kv_heads, block_size, head_dim } = shape;
    let (query_size, kv_size) = (rows.num_heads * head_dim, num_kv_heads * head_dim);
    let half = head_dim / 2;
    let inputs = rows.qkv.chunks_exact(query_size + 2 * kv_size).zip(rows.slots);
    let angles = rows.cos.chunks_exact(half).zip(rows.sin.chunks_exact(half));
    let outputs = query.chunks_exact_mut(query_size);
    for (((input, &slot), (cos, sin)), output) in inputs.zip(angles).zip(outputs) {
        let (queries, kv) = input.split_at(query_size);
        let (keys, values) = kv.split_at(kv_size);
        let heads = queries.chunks_exact(head_dim).zip(output.chunks_exact_mut(head_dim));
        heads.for_each(|(head, output)| rotate(head, cos, sin, output));
        let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
        let heads = keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim));
        for (kv_head, (key, value)) in heads.enumerate() {
            let at = |part| shape.strip(block, part, kv_head) + offset * head_dim;
            rotate(key, cos, sin, &mut cache[at(0)..][..head_dim]);
            cache[at(1)..][..head_dim].copy_from_slice(value);
        }
    }
}

/// As [`reference::rope::rotate`](crate::reference::rope::rotate).
#[inline]
fn rotate<E: Element>(head: &[E], cos: &[f32], sin: &[f32], output: &mut [E]) {
    let half = cos.len();
    let (first, second) = head.split_at(half);
    let (first_out, second_out) = output.split_at_mut(half);
    for index in 0..half {
        let (x, y) = (first[index].widen(), second[index].widen());
        first_out[index] = E::narrow(x * cos[index] - y * sin[index]);
        second_out[index] = E::narrow(y * cos[index] + x * sin[index]);
    }
}
