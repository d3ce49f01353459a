//! The CPU's attention over a cache in scattered blocks.

use std::num::NonZero;
use std::ops::Range;

use half::bf16;
use nano_kernels::cpu::attention::{
    AttentionInput, KvShape, Scratch, Tile, paged_attention, tiles,
};
use nano_kernels::cpu::rope::{RopeRows, rope_write_kv};
use nano_kernels::cpu::{Element, Isa, Pool};

use crate::oracle::{self, PagedCache};

fn value(index: usize) -> f32 {
    ((index * 7919 + 13) % 1009) as f32 / 300.0 - 1.7
}

fn pool(num_threads: usize, isa: Isa) -> Pool {
    Pool::new(NonZero::new(num_threads).unwrap(), isa)
}

/// Sequences over scattered blocks: `(positions in the cache before, rows)` of each.
struct Scene {
    shape: KvShape,
    group: usize,
    window: Option<usize>,
    sequences: Vec<(usize, usize)>,
}

/// Attention of all rows of the sequences, tile by tile, in the given order of blocks.
struct Outcome {
    found: Vec<f32>,
    expected: Vec<f32>,
}

impl Scene {
    fn run<E: Element>(&self, pool: &mut Pool) -> Outcome {
        let KvShape { num_kv_heads, block_size, head_dim } = self.shape;
        let num_heads = num_kv_heads * self.group;
        let ends: Vec<usize> = self.sequences.iter().map(|(before, rows)| before + rows).collect();
        let lens: Vec<usize> = ends.iter().map(|end| end.div_ceil(block_size)).collect();
        let num_blocks: usize = lens.iter().sum();
        // A prime above their number: every block comes once, in no order.
        let block_tables: Vec<u32> =
            (0..num_blocks).map(|index| (index * 7919 % num_blocks) as u32).collect();
        // Keys and values of every position are written by the rows of one long step.
        let mut slots = Vec::new();
        let mut tables = Vec::new();
        for (&end, &len) in ends.iter().zip(&lens) {
            let first = tables.last().map_or(0, |range: &Range<usize>| range.end);
            tables.push(first..first + len);
            let table = &block_tables[first..first + len];
            slots.extend((0..end).map(|position| {
                table[position / block_size] * block_size as u32 + (position % block_size) as u32
            }));
        }
        let width = (num_heads + 2 * num_kv_heads) * head_dim;
        let narrowed = |value: f32| E::narrow(value).widen();
        let qkv: Vec<f32> = (0..slots.len() * width).map(|it| narrowed(value(it))).collect();
        let rows = RopeRows {
            num_heads,
            cos: &vec![1.0; slots.len() * head_dim / 2],
            sin: &vec![0.0; slots.len() * head_dim / 2],
            slots: &slots,
        };
        let mut cache = vec![0; num_blocks * self.shape.block_len::<E>()];
        let mut all = vec![0.0; slots.len() * num_heads * head_dim];
        rope_write_kv::<E>(pool, &rows, self.shape, &mut qkv.clone(), &mut cache, &mut all);

        let (mut query, mut all_tiles, mut expected) = (Vec::new(), Vec::new(), Vec::new());
        let plain = plain_cache(&qkv, &slots, self.shape, num_heads, num_blocks);
        let plain = PagedCache { data: &plain, block_size, num_kv_heads, head_dim };
        let (mut start, mut first_row) = (0, 0);
        for (&(before, num_rows), table) in self.sequences.iter().zip(&tables) {
            for position in before..before + num_rows {
                let row = &all[(start + position) * num_heads * head_dim..][..num_heads * head_dim];
                let table = &block_tables[table.clone()];
                let window = self.window;
                expected.extend(oracle::paged_attention(row, plain, table, position, window));
                query.extend_from_slice(row);
            }
            let rows =
                Tile { first_row, num_rows, first_position: before, block_table: table.clone() };
            all_tiles.extend(tiles(&rows, self.group));
            start += before + num_rows;
            first_row += num_rows;
        }
        let input = AttentionInput {
            tiles: &all_tiles,
            block_tables: &block_tables,
            query: &query,
            num_heads,
            cache: &cache,
            shape: self.shape,
            window: self.window,
        };
        let mut found = vec![f32::NAN; query.len()];
        paged_attention::<E>(pool, &input, &mut Scratch::default(), &mut found);
        Outcome { found, expected }
    }
}

/// The cache as the reference has it: `[num_blocks, k | v, num_kv_heads, block_size, head_dim]`.
fn plain_cache(
    qkv: &[f32],
    slots: &[u32],
    shape: KvShape,
    num_heads: usize,
    num_blocks: usize,
) -> Vec<f32> {
    let KvShape { num_kv_heads, block_size, head_dim } = shape;
    let mut cache = vec![0.0; num_blocks * 2 * num_kv_heads * block_size * head_dim];
    let width = (num_heads + 2 * num_kv_heads) * head_dim;
    for (row, &slot) in qkv.chunks_exact(width).zip(slots) {
        let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
        for (head, from) in row[num_heads * head_dim..].chunks_exact(head_dim).enumerate() {
            let strip = (block * 2 * num_kv_heads + head) * block_size + offset;
            cache[strip * head_dim..][..head_dim].copy_from_slice(from);
        }
    }
    cache
}

#[test]
fn rows_are_those_of_the_reference() {
    let sequences = vec![(0, 1), (1, 1), (15, 1), (31, 3), (0, 70), (149, 1), (40, 29)];
    let mut pools: Vec<Pool> = Isa::available().into_iter().map(|isa| pool(2, isa)).collect();
    for (num_kv_heads, group, head_dim) in [(1, 1, 2), (2, 3, 32), (1, 4, 80), (3, 13, 18)] {
        for block_size in [1, 4, 16, 33, 100] {
            let shape = KvShape { num_kv_heads, block_size, head_dim };
            for window in [None, Some(1), Some(7), Some(400)] {
                let scene = Scene { shape, group, window, sequences: sequences.clone() };
                for pool in &mut pools {
                    for (outcome, bound) in
                        [(scene.run::<f32>(pool), 1e-5), (scene.run::<bf16>(pool), 2e-5)]
                    {
                        for (found, expected) in outcome.found.iter().zip(&outcome.expected) {
                            let error = (found - expected).abs();
                            assert!(error < bound, "{pool:?} {shape:?} {window:?}: {error}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn bits_depend_on_nothing_but_the_row() {
    check_bits::<f32>();
    check_bits::<bf16>();
}

fn check_bits<E: Element>() {
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    for isa in Isa::available() {
        for window in [None, Some(50)] {
            let run = |num_threads, block_size, sequences: &[(usize, usize)]| {
                let shape = KvShape { num_kv_heads: 2, block_size, head_dim: 32 };
                let scene = Scene { shape, group: 4, window, sequences: sequences.to_vec() };
                bits(&scene.run::<E>(&mut pool(num_threads, isa)).found)
            };
            let whole = run(1, 16, &[(0, 150)]);
            assert_eq!(whole, run(5, 16, &[(0, 150)]));
            assert_eq!(whole, run(2, 7, &[(0, 150)]));
            let width = 2 * 4 * 32;
            // The last rows of the same sequence, as a chunk and one by one.
            assert_eq!(whole[97 * width..], run(2, 16, &[(97, 53)])[..]);
            assert_eq!(whole[149 * width..], run(2, 5, &[(149, 1)])[..]);
        }
    }
}

#[test]
#[should_panic(expected = "no row is in two tiles")]
fn a_row_in_two_tiles_is_refused() {
    let mut pool = pool(2, Isa::available()[0]);
    let tile = Tile { first_row: 0, num_rows: 1, first_position: 0, block_table: 0..1 };
    let input = AttentionInput {
        tiles: &[tile.clone(), tile],
        block_tables: &[0],
        query: &[0.0; 2],
        num_heads: 1,
        cache: &[0; 4],
        shape: KvShape { num_kv_heads: 1, block_size: 1, head_dim: 2 },
        window: None,
    };
    paged_attention::<f32>(&mut pool, &input, &mut Scratch::default(), &mut [0.0; 2]);
}
