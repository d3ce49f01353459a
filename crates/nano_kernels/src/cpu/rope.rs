//! Rotation of queries and keys, and the writing of keys and values into the cache.

use super::attention::KvShape;
use super::element::Element;
use super::isa::prefetch;
use super::pool::Pool;
use super::shared::SharedMut;
use crate::reference::rope::rotate;

/// Rows below which a second thread costs more than it saves.
const MIN_PARALLEL_ROWS: usize = 16;

/// The rows of a step.
#[derive(Clone, Copy, Debug)]
pub struct RopeRows<'a> {
    /// Heads of queries.
    pub num_heads: usize,
    /// `[num_rows, head_dim / 2]`.
    pub cos: &'a [f32],
    /// `[num_rows, head_dim / 2]`.
    pub sin: &'a [f32],
    /// Where each row's keys and values go, `block * block_size + offset`; if two rows go to one
    /// place, the last one stays. `[num_rows]`.
    pub slots: &'a [u32],
}

/// Rotates queries and keys of `qkv: [num_rows, num_heads + 2 * num_kv_heads, head_dim]` where they
/// are, copies queries into `query: [num_rows, num_heads, head_dim]` and writes keys and values into
/// the cache of a layer, see [`KvShape`].
///
/// # Panics
/// If a slot is outside the cache.
pub fn rope_write_kv<E: Element>(
    pool: &mut Pool,
    rows: &RopeRows<'_>,
    shape: KvShape,
    qkv: &mut [f32],
    cache: &mut [u32],
    query: &mut [f32],
) {
    let KvShape { num_kv_heads, block_size, head_dim } = shape;
    let (num_heads, num_words) = (rows.num_heads, shape.num_words::<E>());
    let (width, half) = (num_heads + 2 * num_kv_heads, head_dim / 2);
    let (qkv, cache, query) = (SharedMut::new(qkv), SharedMut::new(cache), SharedMut::new(query));
    // The strips of a row's keys and values, and the row's place in them.
    let places = |row: usize, kv_head: usize| {
        let (block, offset) =
            (rows.slots[row] as usize / block_size, rows.slots[row] as usize % block_size);
        let strip_len = block_size * num_words;
        // SAFETY: a head's part of a block is one task's, and these two are apart.
        let strip =
            |part| unsafe { cache.slice(shape.strip::<E>(block, part, kv_head), strip_len) };
        (strip(0), strip(1), offset)
    };
    // A head's part of a row and of a block is no other head's, whatever the slots.
    let rotate_row = |row: usize, kv_head: usize| {
        let angles = (&rows.cos[row * half..][..half], &rows.sin[row * half..][..half]);
        // SAFETY: a head is one task's.
        let head = |head: usize| unsafe { qkv.slice((row * width + head) * head_dim, head_dim) };
        for index in kv_head * num_heads / num_kv_heads..(kv_head + 1) * num_heads / num_kv_heads {
            let head = head(index);
            rotate(head, angles.0, angles.1);
            // SAFETY: as above.
            unsafe { query.slice((row * num_heads + index) * head_dim, head_dim) }
                .copy_from_slice(head);
        }
        let key = head(num_heads + kv_head);
        rotate(key, angles.0, angles.1);
        let value = head(num_heads + num_kv_heads + kv_head);
        let (keys, values, offset) = places(row, kv_head);
        let places = keys[offset..].iter_mut().step_by(block_size);
        for (place, elements) in places.zip(key.chunks_exact(E::PER_WORD)) {
            *place = E::word_of(elements);
        }
        for (word, place) in values[offset * num_words..][..num_words].iter_mut().enumerate() {
            *place = E::word_of(&[value[word], value[(num_words + word) % head_dim]]);
        }
    };
    let num_rows = rows.slots.len();
    let num_tasks = if num_rows < MIN_PARALLEL_ROWS { 1 } else { num_kv_heads };
    pool.run(num_tasks, &|task| {
        let heads = || (task..num_kv_heads).step_by(num_tasks);
        // A key's words lie in as many lines, and stores would wait for one after the other.
        let ask_for = |row: usize| {
            for kv_head in heads().take_while(|_| row < num_rows) {
                let (keys, values, offset) = places(row, kv_head);
                prefetch(keys);
                prefetch(&values[offset * num_words..][..num_words]);
            }
        };
        ask_for(0);
        for row in 0..num_rows {
            ask_for(row + 1);
            heads().for_each(|kv_head| rotate_row(row, kv_head));
        }
    });
}
