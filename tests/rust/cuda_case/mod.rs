//! What the tests of paged attention share: a batch with its cache, on the device and on the host.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::ops::Range;

use half::bf16;
use nano_kernels::cuda::attention::{AttentionInput, Heads};
use nano_kernels::cuda::{DeviceBuffer, Kernels};

use crate::cuda_fixture::{Random, floats};
use crate::oracle::{PagedCache, paged_attention};

pub(crate) const BLOCK_SIZE: usize = 16;
/// Operands and weights are bf16, sums f32.
pub(crate) const BOUND: f64 = 5e-3;

/// New tokens of one sequence and the length of its cached prefix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sequence {
    pub(crate) prefix: usize,
    pub(crate) num_tokens: usize,
}

/// A batch on both sides: scattered blocks, NaN wherever no key may be read.
pub(crate) struct Case {
    pub(crate) heads: Heads,
    pub(crate) window: Option<u32>,
    pub(crate) sequences: Vec<Sequence>,
    pub(crate) max_blocks: usize,
    pub(crate) tables: Vec<Vec<u32>>,
    pub(crate) cache: Vec<bf16>,
    pub(crate) query: Vec<bf16>,
    pub(crate) cache_on: DeviceBuffer,
    pub(crate) query_on: DeviceBuffer,
    pub(crate) table_on: DeviceBuffer,
}

impl Case {
    pub(crate) fn new(
        kernels: &Kernels,
        random: &mut Random,
        heads: Heads,
        window: Option<u32>,
        sequences: &[Sequence],
    ) -> Self {
        let num_blocks_of =
            |sequence: &Sequence| (sequence.prefix + sequence.num_tokens).div_ceil(BLOCK_SIZE);
        let max_blocks = sequences.iter().map(num_blocks_of).max().unwrap() + 1;
        let num_blocks: usize = sequences.iter().map(num_blocks_of).sum();
        let mut free = random.shuffled(num_blocks + 1);
        let tables: Vec<Vec<u32>> = sequences
            .iter()
            .map(|sequence| free.split_off(free.len() - num_blocks_of(sequence)))
            .map(|table| table.into_iter().map(|block| block as u32).collect())
            .collect();

        let row_len = heads.head_dim;
        let block_len = 2 * heads.num_kv_heads * BLOCK_SIZE * row_len;
        let mut cache = random.values((num_blocks + 1) * block_len);
        for (sequence, table) in sequences.iter().zip(&tables) {
            let len = sequence.prefix + sequence.num_tokens;
            for position in len..len.next_multiple_of(BLOCK_SIZE) {
                for row in cache_rows(heads, table, position) {
                    cache[row].fill(bf16::NAN);
                }
            }
        }
        let num_tokens: usize = sequences.iter().map(|sequence| sequence.num_tokens).sum();
        let query = random.values(num_tokens * heads.num_heads * row_len);

        // Blocks that every token's window has left behind are gone from the table.
        let visible_from = |sequence: &Sequence| {
            window.map_or(0, |window| (sequence.prefix + 1).saturating_sub(window as usize))
        };
        let flat: Vec<i32> = sequences
            .iter()
            .zip(&tables)
            .flat_map(|(sequence, table)| {
                let first_block = visible_from(sequence) / BLOCK_SIZE;
                (0..max_blocks).map(move |i| match table.get(i) {
                    Some(&block) if i >= first_block => block as i32,
                    _ => i32::MAX,
                })
            })
            .collect();
        let device = kernels.device();
        Self {
            cache_on: device.allocate_from(&cache).unwrap(),
            query_on: device.allocate_from(&query).unwrap(),
            table_on: device.allocate_from(&flat).unwrap(),
            heads,
            window,
            sequences: sequences.to_vec(),
            max_blocks,
            tables,
            cache,
            query,
        }
    }

    pub(crate) fn input(&self) -> AttentionInput {
        AttentionInput {
            cache: self.cache_on.address(),
            block_table: self.table_on.address(),
            max_blocks: self.max_blocks,
            heads: self.heads,
            window: self.window,
        }
    }

    pub(crate) fn expected(&self) -> Vec<f32> {
        let Heads { num_heads, num_kv_heads, head_dim } = self.heads;
        let data = floats(&self.cache);
        let cache = PagedCache { data: &data, block_size: BLOCK_SIZE, num_kv_heads, head_dim };
        let query = floats(&self.query);
        let mut rows = query.chunks(num_heads * head_dim);
        let mut expected = Vec::with_capacity(query.len());
        for (sequence, table) in self.sequences.iter().zip(&self.tables) {
            for token in 0..sequence.num_tokens {
                let position = sequence.prefix + token;
                let window = self.window.map(|window| window as usize);
                let row = rows.next().unwrap();
                expected.extend(paged_attention(row, cache, table, position, window));
            }
        }
        expected
    }

    pub(crate) fn lengths(&self) -> Vec<u32> {
        self.sequences.iter().map(|s| (s.prefix + s.num_tokens) as u32).collect()
    }
}

/// Where the keys of a position lie in the cache, head by head, and then its values.
pub(crate) fn cache_rows(
    heads: Heads,
    table: &[u32],
    position: usize,
) -> impl Iterator<Item = Range<usize>> + use<> {
    let Heads { num_kv_heads, head_dim, .. } = heads;
    let block = table[position / BLOCK_SIZE] as usize;
    (0..2 * num_kv_heads).map(move |head| {
        let tile = block * 2 * num_kv_heads + head;
        let row = (tile * BLOCK_SIZE + position % BLOCK_SIZE) * head_dim;
        row..row + head_dim
    })
}

pub(crate) const fn heads(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> Heads {
    Heads { num_heads, num_kv_heads, head_dim }
}

pub(crate) const MANY_HEADS: [Heads; 8] = [
    heads(32, 8, 128),
    heads(32, 8, 64),
    heads(8, 1, 128),
    heads(4, 4, 64),
    heads(6, 2, 128),
    heads(10, 2, 64),
    heads(14, 2, 128),
    heads(12, 2, 64),
];
