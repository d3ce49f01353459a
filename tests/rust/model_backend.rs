//! The back ends, operator by operator, against the plain reference.
#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod oracle;
mod tch_backend;

use std::num::NonZero;

use nano_kernels::cpu::{Isa, Pool};
use nano_kernels::reference::rope;
use nano_model::backend::cpu::{CpuBackend, Rows};
use nano_model::backend::{Backend, Dtype, Values};
use nano_model::batch::{Batch, BatchSequence};
use nano_model::config::{CheckpointDtype, DecoderSpec, LayerSpec, RopeSpec};
use nano_model::weights::TensorBytes;
use oracle::{PagedCache, paged_attention, product, rms_norm, silu_mul};
use tch::Tensor;
use tch_backend::TchBackend;

const NUM_BLOCKS: u32 = 40;
const BLOCK_SIZE: u32 = 4;
const TOLERANCE: f32 = 2e-5;

fn spec(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> DecoderSpec {
    let inv_freq = (0..head_dim / 2).map(|pair| 0.5_f32.powi(pair as i32)).collect();
    DecoderSpec {
        vocab_size: 11,
        hidden_size: 6,
        intermediate_size: 5,
        num_heads,
        num_kv_heads,
        head_dim,
        rms_norm_eps: 1e-5,
        layers: vec![LayerSpec { window: None }, LayerSpec { window: Some(5) }],
        rope: RopeSpec { inv_freq, attention_factor: 1.25 },
        tied: true,
    }
}

/// A back end in float32 whose activations can be put in.
trait Probe: Backend {
    fn make(spec: &DecoderSpec, num_blocks: u32) -> Self;
    fn hidden(&self, values: &[f32], columns: usize) -> Self::Hidden;

    fn matrix(&mut self, values: &[f32], columns: usize) -> Self::Weight {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let part = TensorBytes { dtype: CheckpointDtype::Float32, bytes: &bytes };
        self.weight(values.len() / columns, columns, Values::Tensors(&[part])).unwrap()
    }

    fn host(&mut self, hidden: Self::Hidden) -> Vec<f32> {
        let mut host = Vec::new();
        self.to_host(hidden, &mut host).unwrap();
        host
    }
}

impl Probe for TchBackend {
    fn make(spec: &DecoderSpec, num_blocks: u32) -> Self {
        Self::new(spec.clone(), Dtype::Float32, num_blocks, BLOCK_SIZE)
    }

    fn hidden(&self, values: &[f32], columns: usize) -> Tensor {
        Tensor::from_slice(values).view([-1, columns as i64])
    }
}

impl Probe for CpuBackend<f32> {
    fn make(spec: &DecoderSpec, num_blocks: u32) -> Self {
        let pool = Pool::new(NonZero::new(2).unwrap(), Isa::asked().unwrap());
        Self::new(spec.clone(), num_blocks, BLOCK_SIZE, pool).unwrap()
    }

    fn hidden(&self, values: &[f32], _columns: usize) -> Rows {
        self.hidden(values)
    }
}

/// Numbers in [-1, 1) that look random and are the same every time.
fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let pairs = found.iter().zip(expected);
    let error = pairs.map(|(found, expected)| (found - expected).abs()).fold(0.0, f32::max);
    assert!(error <= TOLERANCE, "{what}: off by {error}");
}

/// One batch: `(positions already computed, rows)` for each sequence, over scattered blocks.
fn batch(parts: &[(usize, usize)]) -> Batch {
    let mut batch = Batch::default();
    let mut next_block = 0;
    for &(first_position, num_rows) in parts {
        let num_blocks = (first_position + num_rows).div_ceil(BLOCK_SIZE as usize);
        // 7 and 40 have no common factor: neighbours in a table are far apart in the pool.
        let block_table: Vec<u32> =
            (0..num_blocks as u32).map(|at| (next_block + at) * 7 % NUM_BLOCKS).collect();
        next_block += num_blocks as u32;
        let first_row = batch.positions.len();
        for position in first_position as u32..(first_position + num_rows) as u32 {
            let block = block_table[(position / BLOCK_SIZE) as usize];
            batch.positions.push(position);
            batch.token_ids.push(position % 11);
            batch.slot_mapping.push(block * BLOCK_SIZE + position % BLOCK_SIZE);
        }
        batch.logit_rows.push(batch.positions.len() as u32 - 1);
        let first_block = batch.block_ids.len();
        batch.block_ids.extend(block_table);
        let block_table = first_block..batch.block_ids.len();
        batch.sequences.push(BatchSequence { first_row, num_rows, first_position, block_table });
    }
    assert!(next_block <= NUM_BLOCKS);
    batch
}

/// The reference's cache, filled like the back end's.
struct Reference {
    spec: DecoderSpec,
    data: Vec<f32>,
}

impl Reference {
    fn new(spec: &DecoderSpec) -> Self {
        let slots = (NUM_BLOCKS * BLOCK_SIZE) as usize;
        Self { spec: spec.clone(), data: vec![0.0; slots * 2 * spec.num_kv_heads * spec.head_dim] }
    }

    fn cache(&self) -> PagedCache<'_> {
        let DecoderSpec { num_kv_heads, head_dim, .. } = self.spec;
        PagedCache { data: &self.data, block_size: BLOCK_SIZE as usize, num_kv_heads, head_dim }
    }

    /// Rotates, writes, and returns the rotated queries of every row.
    fn rope_write_kv(&mut self, batch: &Batch, qkv: &[f32]) -> Vec<Vec<f32>> {
        let DecoderSpec { num_heads, num_kv_heads, head_dim, .. } = self.spec;
        let factor = self.spec.rope.attention_factor;
        let mut queries = Vec::new();
        for (row, qkv) in qkv.chunks_exact(self.spec.qkv_size()).enumerate() {
            let angle = |frequency: &f32| batch.positions[row] as f32 * frequency;
            let angles: Vec<f32> = self.spec.rope.inv_freq.iter().map(angle).collect();
            let cos: Vec<f32> = angles.iter().map(|angle| angle.cos() * factor).collect();
            let sin: Vec<f32> = angles.iter().map(|angle| angle.sin() * factor).collect();
            let mut heads: Vec<f32> = qkv.to_vec();
            for head in heads.chunks_exact_mut(head_dim).take(num_heads + num_kv_heads) {
                rope::rotate(head, &cos, &sin);
            }
            let slot = batch.slot_mapping[row];
            let (table, at) = ([slot / BLOCK_SIZE], (slot % BLOCK_SIZE) as usize);
            for part in 0..2 {
                for kv_head in 0..num_kv_heads {
                    let to = self.cache().offset(&table, part, kv_head, at);
                    let from = (num_heads + part * num_kv_heads + kv_head) * head_dim;
                    self.data[to..to + head_dim].copy_from_slice(&heads[from..from + head_dim]);
                }
            }
            heads.truncate(num_heads * head_dim);
            queries.push(heads);
        }
        queries
    }

    fn attention(&self, batch: &Batch, queries: &[Vec<f32>], layer: usize) -> Vec<f32> {
        let window = self.spec.layers[layer].window.map(|window| window as usize);
        let mut output = Vec::new();
        for sequence in &batch.sequences {
            let rows = sequence.first_row..sequence.first_row + sequence.num_rows;
            for (query, &position) in queries[rows.clone()].iter().zip(&batch.positions[rows]) {
                let position = position as usize;
                let table = &batch.block_ids[sequence.block_table.clone()];
                output.extend(paged_attention(query, self.cache(), table, position, window));
            }
        }
        output
    }
}

#[test]
fn rope_cache_and_attention_agree_over_prefills_chunks_and_decodes() {
    check_rope_cache_and_attention_agree_over_prefills_chunks_and_decodes::<TchBackend>();
    check_rope_cache_and_attention_agree_over_prefills_chunks_and_decodes::<CpuBackend<f32>>();
}

fn check_rope_cache_and_attention_agree_over_prefills_chunks_and_decodes<B: Probe>() {
    // One token; a full last block and one more; a chunk in the middle; decodes of odd lengths.
    let first: &[(usize, usize)] = &[(0, 1), (0, 4), (0, 5), (0, 19), (0, 13)];
    let second: &[(usize, usize)] = &[(1, 1), (4, 1), (5, 6), (19, 1), (13, 2)];
    for (num_heads, num_kv_heads, head_dim) in [(1, 1, 2), (4, 2, 8), (6, 2, 16), (3, 3, 4)] {
        let spec = spec(num_heads, num_kv_heads, head_dim);
        let mut backend = B::make(&spec, NUM_BLOCKS);
        for layer in 0..2 {
            let mut reference = Reference::new(&spec);
            // The tables of the second step extend those of the first: both are made for its end.
            let ends: Vec<_> =
                second.iter().map(|&(computed, rows)| (0, computed + rows)).collect();
            let whole = batch(&ends);
            for (seed, parts) in [(1, first), (2, second)] {
                let mut step = Batch { block_ids: whole.block_ids.clone(), ..Batch::default() };
                for (&(computed, rows), sequence) in parts.iter().zip(&whole.sequences) {
                    let rows_of_whole = sequence.first_row + computed..;
                    let first_row = step.positions.len();
                    for row in rows_of_whole.take(rows) {
                        step.positions.push(whole.positions[row]);
                        step.token_ids.push(whole.token_ids[row]);
                        step.slot_mapping.push(whole.slot_mapping[row]);
                    }
                    step.sequences.push(BatchSequence {
                        first_row,
                        num_rows: rows,
                        first_position: computed,
                        block_table: sequence.block_table.clone(),
                    });
                }
                let qkv = noise(step.positions.len() * spec.qkv_size(), seed);
                let prepared = backend.prepare(&step).unwrap();
                let qkv_rows = backend.hidden(&qkv, spec.qkv_size());
                let query = backend.rope_write_kv(layer, qkv_rows, &prepared).unwrap();
                let queries = reference.rope_write_kv(&step, &qkv);
                let rotated = backend.host(query);
                assert_close(&rotated, &queries.concat(), "rotated queries");
                let query = backend.hidden(&rotated, num_heads * head_dim);
                let found = backend.paged_attention(layer, query, &prepared).unwrap();
                let expected = reference.attention(&step, &queries, layer);
                let what = format!("{num_heads}/{num_kv_heads} heads, layer {layer}, step {seed}");
                assert_close(&backend.host(found), &expected, &what);
            }
        }
    }
}

#[test]
fn a_prefill_longer_than_a_tile_agrees() {
    check_a_prefill_longer_than_a_tile_agrees::<TchBackend>();
    check_a_prefill_longer_than_a_tile_agrees::<CpuBackend<f32>>();
}

fn check_a_prefill_longer_than_a_tile_agrees<B: Probe>() {
    let spec = spec(2, 1, 4);
    let mut backend = B::make(&spec, 200);
    let mut reference = Reference { spec: spec.clone(), data: vec![0.0; 200 * 4 * 2 * 4] };
    let num_rows = 600;
    let mut step = Batch::default();
    step.positions.extend(0..num_rows);
    step.token_ids.resize(num_rows as usize, 0);
    step.slot_mapping.extend(0..num_rows);
    step.block_ids.extend(0..num_rows / BLOCK_SIZE);
    let block_table = 0..step.block_ids.len();
    let num_rows = num_rows as usize;
    step.sequences.push(BatchSequence { first_row: 0, num_rows, first_position: 0, block_table });
    let qkv = noise(num_rows * spec.qkv_size(), 3);
    for layer in 0..2 {
        let prepared = backend.prepare(&step).unwrap();
        let qkv_rows = backend.hidden(&qkv, spec.qkv_size());
        let query = backend.rope_write_kv(layer, qkv_rows, &prepared).unwrap();
        let queries = reference.rope_write_kv(&step, &qkv);
        let found = backend.paged_attention(layer, query, &prepared).unwrap();
        let expected = reference.attention(&step, &queries, layer);
        assert_close(&backend.host(found), &expected, &format!("layer {layer}"));
    }
}

#[test]
fn norms_products_gates_and_logits_agree() {
    check_norms_products_gates_and_logits_agree::<TchBackend>();
    check_norms_products_gates_and_logits_agree::<CpuBackend<f32>>();
}

fn check_norms_products_gates_and_logits_agree<B: Probe>() {
    let spec = spec(2, 1, 4);
    let mut backend = B::make(&spec, NUM_BLOCKS);
    let (hidden_size, rows) = (spec.hidden_size, 3);
    let hidden = noise(rows * hidden_size, 4);
    let norm_weight = noise(hidden_size, 5);
    let bytes: Vec<u8> = norm_weight.iter().flat_map(|value| value.to_le_bytes()).collect();
    let part = TensorBytes { dtype: CheckpointDtype::Float32, bytes: &bytes };
    let norm = backend.norm_weight(hidden_size, Some(part)).unwrap();
    let hidden_rows = backend.hidden(&hidden, hidden_size);
    let normed: Vec<Vec<f32>> = hidden
        .chunks_exact(hidden_size)
        .map(|row| rms_norm(row, &norm_weight, spec.rms_norm_eps))
        .collect();
    let through = |weights: &[f32]| -> Vec<Vec<f32>> {
        normed.iter().map(|row| product(row, weights)).collect()
    };

    let qkv = noise(7 * hidden_size, 6);
    let qkv_weight = backend.matrix(&qkv, hidden_size);
    let found = backend.norm_product(&hidden_rows, &norm, &qkv_weight).unwrap();
    assert_close(&backend.host(found), &through(&qkv).concat(), "norm_product");

    let gate_up = noise(2 * spec.intermediate_size * hidden_size, 7);
    let bytes: Vec<u8> = gate_up.iter().flat_map(|value| value.to_le_bytes()).collect();
    let part = TensorBytes { dtype: CheckpointDtype::Float32, bytes: &bytes };
    let rows_of_both = 2 * spec.intermediate_size;
    let gate_up_weight =
        backend.gate_up_weight(rows_of_both, hidden_size, Values::Tensors(&[part])).unwrap();
    let found = backend.norm_gated_product(&hidden_rows, &norm, &gate_up_weight).unwrap();
    let gated: Vec<Vec<f32>> = through(&gate_up).iter().map(|row| silu_mul(row)).collect();
    let gated_rows = backend.host(found);
    assert_close(&gated_rows, &gated.concat(), "norm_gated_product");
    let found = backend.hidden(&gated_rows, spec.intermediate_size);

    let down = noise(hidden_size * spec.intermediate_size, 8);
    let down_weight = backend.matrix(&down, spec.intermediate_size);
    let residual = backend.hidden(&hidden, hidden_size);
    let found = backend.product_add(&found, &down_weight, residual).unwrap();
    let mut expected = hidden.clone();
    for (row, gated) in expected.chunks_exact_mut(hidden_size).zip(&gated) {
        for (value, added) in row.iter_mut().zip(product(gated, &down)) {
            *value += added;
        }
    }
    assert_close(&backend.host(found), &expected, "product_add");

    let step = backend.prepare(&batch(&[(0, 2), (0, 1)])).unwrap();
    let head = noise(spec.vocab_size * hidden_size, 9);
    let head_weight = backend.matrix(&head, hidden_size);
    let (context, residual) = (noise(rows * 2 * 4, 10), backend.hidden(&hidden, hidden_size));
    let context_rows = backend.hidden(&context, 2 * 4);
    let (found, residual) = backend.logit_rows(context_rows, residual, &step).unwrap();
    assert_close(&backend.host(found), &context[2 * 4..], "attention of rows 1 and 2");
    let found = backend.logits(&residual, &norm, &head_weight, &step).unwrap();
    let all = through(&head);
    assert_close(
        &backend.host(found),
        &[&all[1][..], &all[2][..]].concat(),
        "logits of rows 1 and 2",
    );

    let embedded = backend.embed(&head_weight, &step).unwrap();
    let row = |token: usize| &head[token * hidden_size..][..hidden_size];
    assert_close(&backend.host(embedded), &[row(0), row(1), row(0)].concat(), "embed");
}
