//! The back end on the CPU: the operators of `nano_kernels::cpu` on one pool of threads.
//!
//! Activations are float32; weights, as products read them, and the cache are of one type.

use std::cell::RefCell;
use std::num::NonZero;
use std::rc::Rc;

use half::{bf16, f16};
use nano_kernels::cpu::attention::{AttentionInput, KvShape, Tile, paged_attention, tiles};
use nano_kernels::cpu::matrix::PackedMatrix;
use nano_kernels::cpu::memory::Memory;
use nano_kernels::cpu::norm::rms_norm;
use nano_kernels::cpu::product::{PackedRows, gated_product, product, product_add};
use nano_kernels::cpu::rope::{RopeRows, rope_write_kv};
use nano_kernels::cpu::{Element, Isa, Pool};

use crate::backend::{Backend, Dtype, Values};
use crate::batch::Batch;
use crate::config::{CheckpointDtype, DecoderSpec};
use crate::error::{Error, Result};
use crate::weights::TensorBytes;

/// See the [module](self).
#[derive(Debug)]
pub struct CpuBackend<E: Element> {
    spec: DecoderSpec,
    isa: Isa,
    pool: Pool,
    shape: KvShape,
    /// `[layer, block, ...]`, see [`KvShape`].
    cache: Memory<E::Word>,
    /// Words of the cache in one layer.
    layer_len: usize,
    /// The rows of the product at hand.
    rows: PackedRows<E>,
    spare: Rc<RefCell<Vec<Vec<f32>>>>,
}

/// A parameter.
#[derive(Debug)]
pub struct CpuWeight<E: Element> {
    matrix: PackedMatrix<E>,
    /// A norm has these and no matrix.
    norm: Vec<f32>,
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
#[derive(Debug, Default)]
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
    /// A back end with a zeroed cache, on `num_threads` threads.
    pub fn new(
        spec: DecoderSpec,
        num_blocks: u32,
        block_size: u32,
        num_threads: NonZero<usize>,
    ) -> Result<Self> {
        let shape = KvShape {
            num_kv_heads: spec.num_kv_heads,
            block_size: block_size as usize,
            head_dim: spec.head_dim,
        };
        let layer_len = num_blocks as usize * shape.block_len::<E>();
        let cache = Memory::zeroed(layer_len * spec.layers.len()).map_err(|error| {
            let bytes = layer_len * spec.layers.len() * size_of::<E::Word>();
            Error::BadOption {
                name: "num_blocks",
                range: "few enough for the memory of this machine".to_owned(),
                value: format!("{num_blocks}, which take {bytes} bytes ({error})"),
            }
        })?;
        Ok(Self {
            spec,
            isa: Isa::detect(),
            pool: Pool::new(num_threads),
            shape,
            cache,
            layer_len,
            rows: PackedRows::default(),
            spare: Rc::default(),
        })
    }

    /// The threads, for what is done with logits.
    pub fn pool(&mut self) -> &mut Pool {
        &mut self.pool
    }

    /// Rows of given values, as an operator would have made them.
    pub fn hidden(&self, values: &[f32]) -> Rows {
        let mut rows = self.rows(1, values.len());
        rows.values.copy_from_slice(values);
        rows
    }

    /// Rows that nobody uses, of any content.
    fn rows(&self, num_rows: usize, width: usize) -> Rows {
        let mut values = self.spare.borrow_mut().pop().unwrap_or_default();
        values.resize(num_rows * width, 0.0);
        Rows { values, spare: Rc::clone(&self.spare) }
    }

    /// Norms rows, as the next product takes them, and returns their number.
    fn norm(&mut self, hidden: &Rows, norm: &[f32]) -> usize {
        let (isa, size, eps) = (self.isa, norm.len(), self.spec.rms_norm_eps);
        let values = &hidden.values;
        let num_rows = values.len() / size;
        self.rows.pack(&mut self.pool, isa, num_rows, size, |row, output| {
            rms_norm(isa, &values[row * size..][..size], norm, eps, output);
        });
        num_rows
    }

    /// Fills a matrix.
    fn filled(
        &mut self,
        matrix: std::io::Result<PackedMatrix<E>>,
        values: Values<'_>,
    ) -> Result<CpuWeight<E>> {
        let mut matrix = matrix.map_err(|error| no_memory("a parameter", &error))?;
        let (rows, columns) = (matrix.rows(), matrix.columns());
        match values {
            Values::Tensors(parts) => matrix.write(&mut self.pool, |row, elements| {
                let mut row = row;
                for part in parts {
                    let part_rows = part.bytes.len() / (columns * part.dtype.num_bytes());
                    if row < part_rows {
                        return read_row(*part, row, elements);
                    }
                    row -= part_rows;
                }
            }),
            Values::Dummy(dummy) => {
                let dtype = if E::PER_WORD == 2 { Dtype::BFloat16 } else { Dtype::Float32 };
                let bytes = &dummy.bytes(rows * columns, dtype);
                let part = TensorBytes { dtype: dtype.into(), bytes };
                matrix.write(&mut self.pool, |row, elements| read_row(part, row, elements));
            }
        }
        Ok(CpuWeight { matrix, norm: Vec::new() })
    }
}

fn no_memory(what: &'static str, error: &std::io::Error) -> Error {
    Error::NoMemory { what, reason: error.to_string() }
}

impl<E: Element> Backend for CpuBackend<E> {
    type Hidden = Rows;
    type Weight = CpuWeight<E>;
    type Step = CpuStep;

    fn weight(&mut self, rows: usize, columns: usize, values: Values<'_>) -> Result<CpuWeight<E>> {
        self.filled(PackedMatrix::zeroed(rows, columns), values)
    }

    fn gate_up_weight(
        &mut self,
        rows: usize,
        columns: usize,
        values: Values<'_>,
    ) -> Result<CpuWeight<E>> {
        self.filled(PackedMatrix::gated(rows, columns), values)
    }

    fn norm_weight(
        &mut self,
        size: usize,
        values: Option<TensorBytes<'_>>,
    ) -> Result<CpuWeight<E>> {
        let mut norm = vec![1.0; size];
        if let Some(tensor) = values {
            let mut elements = vec![E::narrow(0.0); size];
            read_row(tensor, 0, &mut elements);
            norm.iter_mut().zip(elements).for_each(|(norm, element)| *norm = element.widen());
        }
        let matrix = PackedMatrix::zeroed(0, 0).map_err(|error| no_memory("a norm", &error))?;
        Ok(CpuWeight { matrix, norm })
    }

    fn prepare(&mut self, batch: &Batch) -> Result<CpuStep> {
        let rope = &self.spec.rope;
        let group = self.spec.num_heads / self.spec.num_kv_heads;
        let mut step = CpuStep {
            token_ids: batch.token_ids.clone(),
            logit_rows: batch.logit_rows.clone(),
            slots: batch.slot_mapping.clone(),
            ..CpuStep::default()
        };
        for &position in &batch.positions {
            for frequency in &rope.inv_freq {
                let angle = position as f32 * frequency;
                step.cos.push(angle.cos() * rope.attention_factor);
                step.sin.push(angle.sin() * rope.attention_factor);
            }
        }
        for sequence in &batch.sequences {
            let first = step.block_tables.len();
            step.block_tables.extend_from_slice(&sequence.block_table);
            let rows = Tile {
                first_row: sequence.first_row,
                num_rows: sequence.num_rows,
                first_position: sequence.first_position,
                block_table: first..step.block_tables.len(),
            };
            step.tiles.extend(tiles(&rows, group));
        }
        Ok(step)
    }

    fn embed(&mut self, table: &CpuWeight<E>, step: &CpuStep) -> Result<Rows> {
        let size = table.matrix.columns();
        let mut hidden = self.rows(step.token_ids.len(), size);
        for (token, row) in step.token_ids.iter().zip(hidden.values.chunks_exact_mut(size)) {
            table.matrix.row(*token as usize, row);
        }
        Ok(hidden)
    }

    fn norm_product(
        &mut self,
        hidden: &Rows,
        norm: &CpuWeight<E>,
        weight: &CpuWeight<E>,
    ) -> Result<Rows> {
        let num_rows = self.norm(hidden, &norm.norm);
        let mut output = self.rows(num_rows, weight.matrix.rows());
        product(&mut self.pool, self.isa, &self.rows, &weight.matrix, &mut output.values);
        Ok(output)
    }

    fn rope_write_kv(&mut self, layer: usize, qkv: Rows, step: &CpuStep) -> Result<Rows> {
        let num_heads = self.spec.num_heads;
        let mut query = self.rows(step.slots.len(), num_heads * self.spec.head_dim);
        let rows = RopeRows {
            qkv: &qkv.values,
            num_heads,
            cos: &step.cos,
            sin: &step.sin,
            slots: &step.slots,
        };
        let cache = &mut self.cache.as_mut_slice()[layer * self.layer_len..][..self.layer_len];
        rope_write_kv::<E>(&mut self.pool, &rows, self.shape, cache, &mut query.values);
        Ok(query)
    }

    fn paged_attention(&mut self, layer: usize, query: Rows, step: &CpuStep) -> Result<Rows> {
        let num_heads = self.spec.num_heads;
        let mut output = self.rows(step.slots.len(), num_heads * self.spec.head_dim);
        let input = AttentionInput::<E> {
            tiles: &step.tiles,
            block_tables: &step.block_tables,
            query: &query.values,
            num_heads,
            cache: &self.cache.as_slice()[layer * self.layer_len..][..self.layer_len],
            shape: self.shape,
            window: self.spec.layers[layer].window.map(|window| window as usize),
        };
        paged_attention(&mut self.pool, self.isa, &input, &mut output.values);
        Ok(output)
    }

    fn product_add(&mut self, input: &Rows, weight: &CpuWeight<E>, residual: Rows) -> Result<Rows> {
        let mut residual = residual;
        let size = weight.matrix.columns();
        let values = &input.values;
        self.rows.pack(&mut self.pool, self.isa, values.len() / size, size, |row, output| {
            output.copy_from_slice(&values[row * size..][..size]);
        });
        product_add(&mut self.pool, self.isa, &self.rows, &weight.matrix, &mut residual.values);
        Ok(residual)
    }

    fn norm_gated_product(
        &mut self,
        hidden: &Rows,
        norm: &CpuWeight<E>,
        gate_up: &CpuWeight<E>,
    ) -> Result<Rows> {
        let num_rows = self.norm(hidden, &norm.norm);
        let mut output = self.rows(num_rows, gate_up.matrix.rows() / 2);
        gated_product(&mut self.pool, self.isa, &self.rows, &gate_up.matrix, &mut output.values);
        Ok(output)
    }

    fn logit_rows(
        &mut self,
        context: Rows,
        residual: Rows,
        step: &CpuStep,
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

    fn logits(
        &mut self,
        hidden: &Rows,
        norm: &CpuWeight<E>,
        weight: &CpuWeight<E>,
        _step: &CpuStep,
    ) -> Result<Rows> {
        self.norm_product(hidden, norm, weight)
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
