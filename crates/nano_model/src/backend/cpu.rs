//! The back end on the CPU: the operators of `nano_kernels::cpu` on one pool of threads.
//!
//! Activations are float32; weights, as products read them, and the cache are of one type.

use std::cell::RefCell;
use std::rc::Rc;

use half::{bf16, f16};
use nano_kernels::cpu::attention::{
    AttentionInput, KvShape, Scratch, Tile, paged_attention, tiles,
};
use nano_kernels::cpu::matrix::PackedMatrix;
use nano_kernels::cpu::memory::{Arena, Memory};
use nano_kernels::cpu::norm::Norm;
use nano_kernels::cpu::product::{PackedRows, Store, product};
use nano_kernels::cpu::rope::{RopeRows, rope_write_kv};
use nano_kernels::cpu::{Element, Pool};

use crate::backend::{Backend, Values};
use crate::batch::Batch;
use crate::config::{CheckpointDtype, DecoderSpec};
use crate::error::{Error, Result};
use crate::weights::TensorBytes;

/// See the [module](self).
#[derive(Debug)]
pub struct CpuBackend<E: Element> {
    spec: DecoderSpec,
    pool: Pool,
    arena: Arena,
    shape: KvShape,
    /// `[layer, block, ...]`, see [`KvShape`].
    cache: Memory,
    /// Words of the cache in one layer.
    layer_len: usize,
    /// The rows of the product at hand.
    rows: PackedRows<E>,
    scratch: Scratch,
    /// The step prepared last, written over when nobody else holds it.
    step: Rc<CpuStep>,
    spare: Rc<RefCell<Vec<Vec<f32>>>>,
    /// Of all parameters.
    weight_bytes: usize,
}

/// A parameter.
#[derive(Debug)]
pub enum CpuWeight<E: Element> {
    /// A matrix, as products read it.
    Matrix(PackedMatrix<E>),
    /// `[hidden_size]`.
    Norm(Vec<f32>),
}

impl<E: Element> CpuWeight<E> {
    fn matrix(&self) -> &PackedMatrix<E> {
        match self {
            Self::Matrix(matrix) => matrix,
            Self::Norm(_) => unreachable!("a norm where the decoder has a matrix"),
        }
    }
}

/// Rows of activations, given back for the next operator when it is dropped.
#[derive(Debug)]
pub struct Rows {
    values: Vec<f32>,
    spare: Rc<RefCell<Vec<Vec<f32>>>>,
}

impl Drop for Rows {
    fn drop(&mut self) {
        self.spare.borrow_mut().push(std::mem::take(&mut self.values));
    }
}

/// A step, ready to run.
#[derive(Clone, Debug, Default)]
pub struct CpuStep {
    token_ids: Vec<u32>,
    logit_rows: Vec<u32>,
    slots: Vec<u32>,
    /// `[num_tokens, head_dim / 2]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
    tiles: Vec<Tile>,
    block_tables: Vec<u32>,
}

impl<E: Element> CpuBackend<E> {
    /// A back end with a zeroed cache, on the threads of `pool`.
    pub fn new(spec: DecoderSpec, num_blocks: u32, block_size: u32, pool: Pool) -> Result<Self> {
        let shape = KvShape {
            num_kv_heads: spec.num_kv_heads,
            block_size: block_size as usize,
            head_dim: spec.head_dim,
        };
        let layer_len = num_blocks as usize * shape.block_len::<E>();
        let mut arena = Arena::default();
        let len = layer_len * spec.layers.len();
        let cache = arena.zeroed(len).map_err(|error| {
            let bytes = len * size_of::<u32>();
            // The number may be the default.
            let reason = format!(
                "its {num_blocks} blocks take {bytes} bytes: set num_blocks or kv_cache_gib to \
                 less ({error})"
            );
            Error::NoMemory { what: "the KV cache", reason }
        })?;
        Ok(Self {
            spec,
            pool,
            arena,
            shape,
            cache,
            layer_len,
            rows: PackedRows::default(),
            scratch: Scratch::default(),
            step: Rc::default(),
            spare: Rc::default(),
            weight_bytes: 0,
        })
    }

    /// The threads, for what is done with logits.
    pub fn pool(&mut self) -> &mut Pool {
        &mut self.pool
    }

    /// Bytes that the parameters made so far take.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes as u64
    }

    /// Rows of given values, as an operator would have made them.
    pub fn hidden(&self, values: &[f32]) -> Rows {
        let mut rows = self.rows(1, values.len());
        rows.values.copy_from_slice(values);
        rows
    }

    /// Rows that nobody uses, of any content.
    fn rows(&self, num_rows: usize, width: usize) -> Rows {
        let len = num_rows * width;
        let mut spare = self.spare.borrow_mut();
        // The smallest that is large enough, or else the largest.
        let fit = |values: &Vec<f32>| {
            let capacity = values.capacity();
            if capacity < len { usize::MAX - capacity } else { capacity }
        };
        let best = (0..spare.len()).min_by_key(|&index| fit(&spare[index]));
        let mut values = best.map(|index| spare.swap_remove(index)).unwrap_or_default();
        values.resize(len, 0.0);
        Rows { values, spare: Rc::clone(&self.spare) }
    }

    /// A matrix of the given values.
    fn matrix(
        &mut self,
        rows: usize,
        columns: usize,
        is_gated: bool,
        values: Values<'_>,
    ) -> Result<CpuWeight<E>> {
        let draws: Vec<E> = match values {
            Values::Tensors(_) => Vec::new(),
            Values::Dummy(dummy) => dummy.draws().iter().map(|&draw| E::narrow(draw)).collect(),
        };
        let read = |row: usize, elements: &mut [E]| match values {
            Values::Dummy(dummy) => dummy.fill(row * columns, elements, &draws),
            Values::Tensors(parts) => {
                let mut row = row;
                for part in parts {
                    let part_rows = part.bytes.len() / (columns * part.dtype.num_bytes());
                    if row < part_rows {
                        return read_row(*part, row, elements);
                    }
                    row -= part_rows;
                }
            }
        };
        let size = (rows, columns);
        let matrix = PackedMatrix::pack(&mut self.pool, &mut self.arena, size, is_gated, read);
        let matrix = matrix.map_err(|error| {
            let bytes = rows * columns * size_of::<E>();
            let reason =
                format!("its {rows} x {columns} values take up to {bytes} bytes ({error})");
            Error::NoMemory { what: "a parameter", reason }
        })?;
        self.weight_bytes += matrix.num_bytes();
        Ok(CpuWeight::Matrix(matrix))
    }
}

impl<E: Element> Backend for CpuBackend<E> {
    type Hidden = Rows;
    type Weight = CpuWeight<E>;
    type Step = Rc<CpuStep>;

    fn weight(&mut self, rows: usize, columns: usize, values: Values<'_>) -> Result<CpuWeight<E>> {
        self.matrix(rows, columns, false, values)
    }

    fn gate_up_weight(
        &mut self,
        rows: usize,
        columns: usize,
        values: Values<'_>,
    ) -> Result<CpuWeight<E>> {
        self.matrix(rows, columns, true, values)
    }

    fn norm_weight(
        &mut self,
        size: usize,
        values: Option<TensorBytes<'_>>,
    ) -> Result<CpuWeight<E>> {
        let mut norm = vec![1.0; size];
        self.weight_bytes += size_of_val(&norm[..]);
        if let Some(tensor) = values {
            let mut elements = vec![E::narrow(0.0); size];
            read_row(tensor, 0, &mut elements);
            norm.iter_mut().zip(elements).for_each(|(norm, element)| *norm = element.widen());
        }
        Ok(CpuWeight::Norm(norm))
    }

    fn prepare(&mut self, batch: &Batch) -> Result<Rc<CpuStep>> {
        let rope = &self.spec.rope;
        let group = self.spec.num_heads / self.spec.num_kv_heads;
        let step = Rc::make_mut(&mut self.step);
        step.token_ids.clone_from(&batch.token_ids);
        step.logit_rows.clone_from(&batch.logit_rows);
        step.slots.clone_from(&batch.slot_mapping);
        step.block_tables.clone_from(&batch.block_ids);
        step.cos.clear();
        step.sin.clear();
        for &position in &batch.positions {
            for frequency in &rope.inv_freq {
                let angle = position as f32 * frequency;
                step.cos.push(angle.cos() * rope.attention_factor);
                step.sin.push(angle.sin() * rope.attention_factor);
            }
        }
        step.tiles.clear();
        for sequence in &batch.sequences {
            let rows = Tile {
                first_row: sequence.first_row,
                num_rows: sequence.num_rows,
                first_position: sequence.first_position,
                block_table: sequence.block_table.clone(),
            };
            step.tiles.extend(tiles(&rows, group));
        }
        Ok(Rc::clone(&self.step))
    }

    fn embed(&mut self, table: &CpuWeight<E>, step: &Rc<CpuStep>) -> Result<Rows> {
        let (table, size) = (table.matrix(), table.matrix().columns());
        let mut hidden = self.rows(step.token_ids.len(), size);
        for (token, row) in step.token_ids.iter().zip(hidden.values.chunks_exact_mut(size)) {
            table.row(*token as usize, row);
        }
        Ok(hidden)
    }

    fn norm_product(
        &mut self,
        hidden: &Rows,
        norm: &CpuWeight<E>,
        weight: &CpuWeight<E>,
    ) -> Result<Rows> {
        let CpuWeight::Norm(norm) = norm else { unreachable!("a matrix where a norm is") };
        let norm = Norm { weight: norm, eps: self.spec.rms_norm_eps };
        let matrix = weight.matrix();
        let mut output = self.rows(hidden.values.len() / matrix.columns(), matrix.width());
        self.rows.pack(&mut self.pool, &hidden.values, matrix.columns(), Some(norm));
        product(&mut self.pool, &self.rows, matrix, Store::Write, &mut output.values);
        Ok(output)
    }

    fn rope_write_kv(&mut self, layer: usize, mut qkv: Rows, step: &Rc<CpuStep>) -> Result<Rows> {
        let num_heads = self.spec.num_heads;
        let mut query = self.rows(step.slots.len(), num_heads * self.spec.head_dim);
        let rows = RopeRows { num_heads, cos: &step.cos, sin: &step.sin, slots: &step.slots };
        let cache = &mut self.cache.as_mut_slice()[layer * self.layer_len..][..self.layer_len];
        let (qkv, query_values) = (&mut qkv.values, &mut query.values);
        rope_write_kv::<E>(&mut self.pool, &rows, self.shape, qkv, cache, query_values);
        Ok(query)
    }

    fn paged_attention(&mut self, layer: usize, query: Rows, step: &Rc<CpuStep>) -> Result<Rows> {
        let num_heads = self.spec.num_heads;
        let mut output = self.rows(step.slots.len(), num_heads * self.spec.head_dim);
        let input = AttentionInput {
            tiles: &step.tiles,
            block_tables: &step.block_tables,
            query: &query.values,
            num_heads,
            cache: &self.cache.as_slice()[layer * self.layer_len..][..self.layer_len],
            shape: self.shape,
            window: self.spec.layers[layer].window.map(|window| window as usize),
        };
        paged_attention::<E>(&mut self.pool, &input, &mut self.scratch, &mut output.values);
        Ok(output)
    }

    fn product_add(
        &mut self,
        input: &Rows,
        weight: &CpuWeight<E>,
        mut residual: Rows,
    ) -> Result<Rows> {
        let matrix = weight.matrix();
        self.rows.pack(&mut self.pool, &input.values, matrix.columns(), None);
        product(&mut self.pool, &self.rows, matrix, Store::Add, &mut residual.values);
        Ok(residual)
    }

    fn norm_gated_product(
        &mut self,
        hidden: &Rows,
        norm: &CpuWeight<E>,
        gate_up: &CpuWeight<E>,
    ) -> Result<Rows> {
        // A gated matrix says so itself.
        self.norm_product(hidden, norm, gate_up)
    }

    fn logit_rows(
        &mut self,
        context: Rows,
        residual: Rows,
        step: &Rc<CpuStep>,
    ) -> Result<(Rows, Rows)> {
        let num_rows = step.slots.len();
        if step.logit_rows.len() == num_rows {
            return Ok((context, residual));
        }
        let gather = |source: &Rows| {
            let size = source.values.len() / num_rows;
            let mut output = self.rows(step.logit_rows.len(), size);
            for (row, output) in step.logit_rows.iter().zip(output.values.chunks_exact_mut(size)) {
                output.copy_from_slice(&source.values[*row as usize * size..][..size]);
            }
            output
        };
        Ok((gather(&context), gather(&residual)))
    }

    fn to_host(&mut self, mut logits: Rows, host: &mut Vec<f32>) -> Result<()> {
        std::mem::swap(host, &mut logits.values);
        Ok(())
    }
}

/// Converts one row of a tensor.
fn read_row<E: Element>(tensor: TensorBytes<'_>, row: usize, elements: &mut [E]) {
    fn convert<E: Element, const N: usize>(
        bytes: &[u8],
        elements: &mut [E],
        decode: impl Fn([u8; N]) -> f32,
    ) {
        for (element, bytes) in elements.iter_mut().zip(bytes.as_chunks::<N>().0) {
            *element = E::narrow(decode(*bytes));
        }
    }
    let row_bytes = elements.len() * tensor.dtype.num_bytes();
    let bytes = &tensor.bytes[row * row_bytes..][..row_bytes];
    match tensor.dtype {
        CheckpointDtype::Float32 => convert(bytes, elements, f32::from_le_bytes),
        CheckpointDtype::Float16 => convert(bytes, elements, |it| f16::from_le_bytes(it).to_f32()),
        CheckpointDtype::BFloat16 => convert(bytes, elements, |it| bf16::from_le_bytes(it).widen()),
    }
}
