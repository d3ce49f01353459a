//! Rotation of queries and keys, and the writing of keys and values into the cache.

use super::attention::KvShape;
use super::element::Element;
use super::pool::Pool;
use super::shared::SharedMut;

/// Rows below which a second thread costs more than it saves.
const MIN_PARALLEL_ROWS: usize = 16;
/// Rows of one task.
const ROWS_PER_TASK: usize = 8;

/// The rows of a step and what happens to them.
#[derive(Clone, Copy, Debug)]
pub struct RopeRows<'a> {
    /// `[num_rows, num_heads + 2 * num_kv_heads, head_dim]`: queries, keys, values.
    pub qkv: &'a [f32],
    /// Heads of queries.
    pub num_heads: usize,
    /// `[num_rows, head_dim / 2]`.
    pub cos: &'a [f32],
    /// `[num_rows, head_dim / 2]`.
    pub sin: &'a [f32],
    /// Where each row's keys and values go, `block * block_size + offset`, no two the same:
    /// `[num_rows]`.
    pub slots: &'a [u32],
}

/// Rotates queries into `query: [num_rows, num_heads, head_dim]` and keys into the cache of a
/// layer (see [`KvShape`]), where values go as they are.
pub fn rope_write_kv<E: Element>(
    pool: &mut Pool,
    rows: &RopeRows<'_>,
    shape: KvShape,
    cache: &mut [E::Word],
    query: &mut [f32],
) {
    let num_rows = rows.slots.len();
    let (cache, query) = (SharedMut::new(cache), SharedMut::new(query));
    let per_task = if num_rows < MIN_PARALLEL_ROWS { num_rows.max(1) } else { ROWS_PER_TASK };
    pool.run(num_rows.div_ceil(per_task), &|task| {
        let mut rotated = vec![0.0; shape.head_dim];
        for row in task * per_task..num_rows.min((task + 1) * per_task) {
            rotate_row::<E>(rows, row, shape, &cache, &query, &mut rotated);
        }
    });
}

fn rotate_row<E: Element>(
    rows: &RopeRows<'_>,
    row: usize,
    shape: KvShape,
    cache: &SharedMut<'_, E::Word>,
    query: &SharedMut<'_, f32>,
    rotated: &mut [f32],
) {
    let KvShape { num_kv_heads, block_size, head_dim } = shape;
    let (query_size, kv_size) = (rows.num_heads * head_dim, num_kv_heads * head_dim);
    let half = head_dim / 2;
    let (cos, sin) = (&rows.cos[row * half..][..half], &rows.sin[row * half..][..half]);
    let width = query_size + 2 * kv_size;
    let (queries, kv) = rows.qkv[row * width..][..width].split_at(query_size);
    // SAFETY: a row's queries are one task's.
    let output = unsafe { query.slice(row * query_size, query_size) };
    let heads = queries.chunks_exact(head_dim).zip(output.chunks_exact_mut(head_dim));
    heads.for_each(|(head, output)| rotate(head, cos, sin, output));

    let slot = rows.slots[row] as usize;
    let (block, offset) = (slot / block_size, slot % block_size);
    let num_words = shape.num_words::<E>();
    let heads = kv.chunks_exact(head_dim).zip(kv[kv_size..].chunks_exact(head_dim));
    for (kv_head, (key, value)) in heads.take(num_kv_heads).enumerate() {
        rotate(key, cos, sin, rotated);
        let start = shape.strip::<E>(block, 0, kv_head) + offset;
        for (word, elements) in rotated.chunks_exact(E::PER_WORD).enumerate() {
            // SAFETY: no two rows have the same slot.
            let slot = unsafe { cache.slice(start + word * block_size, 1) };
            slot[0] = E::word_of(elements);
        }
        // SAFETY: no two rows have the same slot.
        let slot = unsafe {
            cache.slice(shape.strip::<E>(block, 1, kv_head) + offset * num_words, num_words)
        };
        for (word, slot) in slot.iter_mut().enumerate() {
            *slot = E::word_of(&[value[word], value[(num_words + word) % head_dim]]);
        }
    }
}

/// As [`reference::rope::rotate`](crate::reference::rope::rotate).
#[inline]
fn rotate(head: &[f32], cos: &[f32], sin: &[f32], output: &mut [f32]) {
    let half = cos.len();
    let (first, second) = head.split_at(half);
    let (first_out, second_out) = output.split_at_mut(half);
    for index in 0..half {
        let (x, y) = (first[index], second[index]);
        first_out[index] = x * cos[index] - y * sin[index];
        second_out[index] = y * cos[index] + x * sin[index];
    }
}
