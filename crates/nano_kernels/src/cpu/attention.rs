//! Attention of single rows to the blocks of the KV cache, read in place.

use std::num::NonZero;
use std::ops::Range;
use std::thread;

use super::{Element, sum_of};

/// Keys whose weights are worked out at once; a block may be longer or shorter.
const MAX_KEYS: usize = 64;
/// Elements of keys and values below which a second thread costs more than it saves.
const MIN_ELEMENTS_PER_THREAD: usize = 1 << 20;

/// The shape of one layer's cache, `[num_blocks, k | v, num_kv_heads, block_size, head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Heads of keys and values.
    pub num_kv_heads: usize,
    /// Token slots of a block.
    pub block_size: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl KvShape {
    /// Elements of a block.
    pub fn block_len(&self) -> usize {
        2 * self.num_kv_heads * self.strip_len()
    }

    /// Elements of one head's keys or values in a block.
    pub fn strip_len(&self) -> usize {
        self.block_size * self.head_dim
    }

    /// Where one head's keys (`part` 0) or values (`part` 1) of a block start.
    #[inline]
    pub fn strip(&self, block: usize, part: usize, kv_head: usize) -> usize {
        ((block * 2 + part) * self.num_kv_heads + kv_head) * self.strip_len()
    }
}

/// One row and what it attends to.
#[derive(Clone, Copy, Debug)]
pub struct SingleRow<'a> {
    /// Its number among the rows of the step.
    pub row: usize,
    /// The block of position `p` is entry `p / block_size`.
    pub block_table: &'a [u32],
    /// The first position that it sees.
    pub first: usize,
    /// One past the last position that it sees.
    pub end: usize,
}

/// Rows that attend, and what they read.
#[derive(Clone, Copy, Debug)]
pub struct RowAttention<'a, E> {
    /// The rows, ascending.
    pub rows: &'a [SingleRow<'a>],
    /// `[num_rows, num_heads, head_dim]`, rotated.
    pub query: &'a [E],
    /// Heads of queries.
    pub num_heads: usize,
    /// One layer's cache.
    pub cache: &'a [E],
    /// Its shape.
    pub shape: KvShape,
    /// Threads at most.
    pub num_threads: NonZero<usize>,
}

/// [`paged_attention`](crate::reference::attention::paged_attention) of the given rows, written
/// into `output: [num_rows, num_heads, head_dim]`; other rows of it are left alone.
pub fn attend_rows<E: Element>(input: &RowAttention<'_, E>, output: &mut [E]) {
    let &RowAttention { rows, query, num_heads, cache, shape, num_threads } = input;
    let group_len = num_heads / shape.num_kv_heads * shape.head_dim;
    let width = num_heads * shape.head_dim;
    let mut work = Vec::with_capacity(rows.len() * shape.num_kv_heads);
    let mut outputs = output.chunks_exact_mut(width).enumerate();
    for single in rows {
        let Some((row, output)) = outputs.find(|(row, _)| *row == single.row) else { break };
        let query = query[row * width..][..width].chunks_exact(group_len);
        let heads = query.zip(output.chunks_exact_mut(group_len)).enumerate();
        let work_of = |(kv_head, (query, output))| Work { single, kv_head, query, output };
        work.extend(heads.map(work_of));
    }
    let num_keys: usize = rows.iter().map(|row| row.end - row.first).sum();
    let num_elements = num_keys * 2 * shape.num_kv_heads * shape.head_dim;
    let num_threads = num_threads.get().min(num_elements / MIN_ELEMENTS_PER_THREAD).max(1);
    let run = |work: &mut [Work<'_, E>]| {
        let mut head = Head::new(group_len, shape);
        for Work { single, kv_head, query, output } in work {
            head.attend(single, *kv_head, query, cache, output);
        }
    };
    let part_len = work.len().div_ceil(num_threads).max(1);
    thread::scope(|scope| {
        let mut parts = work.chunks_mut(part_len);
        let own = parts.next();
        for part in parts {
            scope.spawn(|| run(part));
        }
        own.into_iter().for_each(run);
    });
}

/// One head of keys and values of one row.
struct Work<'a, E> {
    single: &'a SingleRow<'a>,
    kv_head: usize,
    /// `[group, head_dim]`.
    query: &'a [E],
    output: &'a mut [E],
}

/// The queries of a group over their one head of keys and values, with a running softmax.
///
/// # Source
/// Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.
struct Head {
    shape: KvShape,
    /// `[group, head_dim]`, scaled.
    query: Vec<f32>,
    /// `[group, head_dim]`.
    sum: Vec<f32>,
    /// The largest score so far and the sum of weights relative to it, for each query.
    largest: Vec<f32>,
    total: Vec<f32>,
    /// `[head_dim]` of the key or value at hand.
    element: Vec<f32>,
    /// `[group, MAX_KEYS]`.
    weights: Vec<f32>,
}

impl Head {
    fn new(group_len: usize, shape: KvShape) -> Self {
        let group = group_len / shape.head_dim;
        Self {
            shape,
            query: vec![0.0; group_len],
            sum: vec![0.0; group_len],
            largest: vec![0.0; group],
            total: vec![0.0; group],
            element: vec![0.0; shape.head_dim],
            weights: vec![0.0; group * MAX_KEYS],
        }
    }

    #[inline]
    fn attend<E: Element>(
        &mut self,
        row: &SingleRow<'_>,
        kv_head: usize,
        query: &[E],
        cache: &[E],
        output: &mut [E],
    ) {
        let KvShape { block_size, head_dim, .. } = self.shape;
        let scale = (head_dim as f32).sqrt().recip();
        self.query.iter_mut().zip(query).for_each(|(own, q)| *own = q.widen() * scale);
        self.sum.fill(0.0);
        self.largest.fill(f32::NEG_INFINITY);
        self.total.fill(0.0);
        let mut position = row.first;
        while position < row.end {
            let offset = position % block_size;
            let len = (block_size - offset).min(row.end - position).min(MAX_KEYS);
            let block = row.block_table[position / block_size] as usize;
            let part = |part| {
                let start = self.shape.strip(block, part, kv_head) + offset * head_dim;
                &cache[start..start + len * head_dim]
            };
            let (keys, values) = (part(0), part(1));
            self.add(keys, values, 0..len);
            position += len;
        }
        let rows = self.sum.chunks_exact(head_dim).zip(&self.total);
        for ((sum, total), output) in rows.zip(output.chunks_exact_mut(head_dim)) {
            let scale = total.recip();
            output.iter_mut().zip(sum).for_each(|(output, sum)| *output = E::narrow(sum * scale));
        }
    }

    #[inline]
    fn add<E: Element>(&mut self, keys: &[E], values: &[E], range: Range<usize>) {
        let head_dim = self.shape.head_dim;
        for (key, index) in keys.chunks_exact(head_dim).zip(range.clone()) {
            self.element.iter_mut().zip(key).for_each(|(wide, key)| *wide = key.widen());
            for (head, query) in self.query.chunks_exact(head_dim).enumerate() {
                let score = sum_of(query, &self.element, |query, key| query * key);
                self.weights[head * MAX_KEYS + index] = score;
            }
        }
        let rows = self.weights.chunks_exact_mut(MAX_KEYS).zip(self.sum.chunks_exact_mut(head_dim));
        for (head, (weights, sum)) in rows.enumerate() {
            let weights = &mut weights[range.clone()];
            let largest = weights.iter().copied().fold(self.largest[head], f32::max);
            if largest > self.largest[head] {
                let shrink = exp(self.largest[head] - largest);
                self.largest[head] = largest;
                self.total[head] *= shrink;
                for sum in sum.iter_mut() {
                    *sum *= shrink;
                }
            }
            for weight in weights.iter_mut() {
                *weight = exp(*weight - largest);
            }
            self.total[head] += weights.iter().sum::<f32>();
        }
        for (value, index) in values.chunks_exact(head_dim).zip(range) {
            self.element.iter_mut().zip(value).for_each(|(wide, value)| *wide = value.widen());
            for (head, sum) in self.sum.chunks_exact_mut(head_dim).enumerate() {
                let weight = self.weights[head * MAX_KEYS + index];
                let elements = sum.iter_mut().zip(&self.element);
                elements.for_each(|(sum, value)| *sum += weight * value);
            }
        }
    }
}

/// `e^x` for `x <= 0` within 2 units in the last place of float32, 0 below -87, in operations that
/// become vector instructions: 2 to a whole power, times a polynomial for the rest.
#[inline]
fn exp(x: f32) -> f32 {
    // Adding it rounds to a whole number, which is then in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    // NaN stays NaN: it is not below any bound.
    let bounded = if x < -87.0 { -87.0 } else { x };
    let shifted = bounded * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    // ln 2 in two parts, so that the product with the first is exact.
    let rest = bounded - whole * 0.693_359_4 - whole * -2.121_944_4e-4;
    let mut polynomial = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5, 1.0, 1.0]
    {
        polynomial = polynomial * rest + coefficient;
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3F80_0000));
    if x < -87.0 { 0.0 } else { polynomial * power }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::reference::attention::{PagedCache, paged_attention};

    fn value(index: usize) -> f32 {
        ((index * 7919 + 13) % 1009) as f32 / 300.0 - 1.7
    }

    /// Sequences of some lengths over scattered blocks, against the reference.
    fn check<E: Element>(shape: KvShape, group: usize, window: Option<usize>, bound: f32) {
        let KvShape { num_kv_heads, block_size, head_dim } = shape;
        let lengths = [1, 2, block_size, block_size + 1, 5 * block_size - 1, 150];
        let num_heads = num_kv_heads * group;
        let num_blocks = lengths.iter().map(|len| len.div_ceil(block_size)).sum::<usize>();
        let cache: Vec<E> =
            (0..num_blocks * shape.block_len()).map(|index| E::narrow(value(index))).collect();
        let width = num_heads * head_dim;
        let query: Vec<E> =
            (0..lengths.len() * width).map(|index| E::narrow(value(index + 3))).collect();
        // A prime above their number: every block comes once, in no order.
        let mut scattered = (0..num_blocks).map(|index| (index * 7919 % num_blocks) as u32);
        let tables = lengths
            .map(|len| scattered.by_ref().take(len.div_ceil(block_size)).collect::<Vec<u32>>());
        let rows: Vec<SingleRow<'_>> = lengths
            .iter()
            .zip(&tables)
            .enumerate()
            .map(|(row, (&end, block_table))| {
                let first = window.map_or(0, |window| end.saturating_sub(window));
                SingleRow { row, block_table, first, end }
            })
            .collect();
        let mut output = vec![E::narrow(0.0); query.len()];
        let num_threads = NonZero::new(2).unwrap();
        let (rows, query, cache) = (&rows[..], &query[..], &cache[..]);
        let input = RowAttention { rows, query, num_heads, cache, shape, num_threads };
        attend_rows(&input, &mut output);
        let wide = |elements: &[E]| elements.iter().map(|it| it.widen()).collect::<Vec<f32>>();
        let (cache, query, output) = (wide(cache), wide(query), wide(&output));
        let cache = PagedCache { data: &cache, block_size, num_kv_heads, head_dim };
        for row in rows {
            let query = &query[row.row * width..][..width];
            let expected = paged_attention(query, cache, row.block_table, row.end - 1, window);
            for (ours, expected) in output[row.row * width..].iter().zip(&expected) {
                assert!((ours - expected).abs() < bound, "{shape:?} {window:?} {ours} {expected}");
            }
        }
    }

    #[test]
    fn rows_are_those_of_the_reference() {
        for (num_kv_heads, group, head_dim) in [(1, 1, 2), (2, 3, 32), (1, 4, 80), (3, 1, 18)] {
            for block_size in [1, 4, 16, 100] {
                let shape = KvShape { num_kv_heads, block_size, head_dim };
                for window in [None, Some(1), Some(7), Some(400)] {
                    check::<f32>(shape, group, window, 1e-5);
                    check::<bf16>(shape, group, window, 1e-2);
                }
            }
        }
    }

    #[test]
    fn many_threads_give_the_same_bits() {
        let shape = KvShape { num_kv_heads: 4, block_size: 16, head_dim: 64 };
        let cache: Vec<f32> = (0..300 * shape.block_len()).map(value).collect();
        let query: Vec<f32> = (0..3 * 512).map(value).collect();
        let table: Vec<u32> = (0..300).rev().collect();
        let row = |row, end| SingleRow { row, block_table: &table, first: 0, end };
        let rows = [row(0, 4800), row(1, 33), row(2, 4799)];
        let run = |num_threads| {
            let mut output = vec![0.0; query.len()];
            let num_threads = NonZero::new(num_threads).unwrap();
            let (rows, query, cache) = (&rows[..], &query[..], &cache[..]);
            let input = RowAttention { rows, query, num_heads: 8, cache, shape, num_threads };
            attend_rows(&input, &mut output);
            output.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(5));
    }

    #[test]
    fn the_exponential_is_near_that_of_the_standard_library() {
        for step in 0..200_000 {
            let x = -90.0 * step as f32 / 200_000.0;
            let (ours, theirs) = (exp(x), x.exp());
            assert!((ours - theirs).abs() <= 3e-7 * theirs + 2e-38, "{x}: {ours} {theirs}");
        }
        assert_eq!((exp(0.0), exp(f32::NEG_INFINITY)), (1.0, 0.0));
        assert!(exp(f32::NAN).is_nan());
    }
}
