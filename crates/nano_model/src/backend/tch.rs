//! The back end on libtorch, on the CPU. No other file calls tensor operators, and this one calls
//! their fallible forms only: the plain ones panic.
//!
//! Products, and whatever else is large, are libtorch's. A call costs microseconds, so what is
//! small is done in one pass by `nano_kernels::cpu`, as is decoding attention, which reads the
//! cache in place.

use std::num::NonZero;

use half::bf16;
use nano_kernels::cpu::attention::{KvShape, RowAttention, SingleRow, attend_rows};
use nano_kernels::cpu::norm::rms_norm;
use nano_kernels::cpu::rope::{RopeRows, rope_write_kv};
use tch::{Device, Kind, Tensor};

use crate::backend::attention_plan::{AttentionPlan, Single, Tile, seen};
use crate::backend::bridge::{CacheMemory, Element, elements, elements_mut, with_rows};
use crate::backend::{Backend, Dtype, Values};
use crate::batch::Batch;
use crate::config::DecoderSpec;
use crate::error::{Error, Result};
use crate::weights::TensorBytes;

/// See the [module](self).
#[derive(Debug)]
pub struct TchBackend {
    spec: DecoderSpec,
    kind: Kind,
    shape: KvShape,
    /// `[layer, block, k | v, kv_head, block_size, head_dim]`.
    cache: CacheMemory,
    /// Elements of the cache in one layer.
    layer_len: usize,
    /// The windows that the model's layers have, each once.
    windows: Vec<Option<u32>>,
    num_threads: NonZero<usize>,
    _no_grad: NoGrad,
}

/// libtorch's no-grad state is per thread, and so is a back end. `tch`'s guard has no `Debug`.
struct NoGrad(#[expect(dead_code, reason = "held for its drop")] tch::NoGradGuard);

impl std::fmt::Debug for NoGrad {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NoGrad")
    }
}

/// A step, ready to run.
#[derive(Debug)]
pub struct TchStep {
    token_ids: Tensor,
    logit_rows: Tensor,
    /// `[num_tokens, head_dim / 2]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
    slots: Vec<u32>,
    block_tables: Vec<Vec<u32>>,
    /// For each of the model's windows, in their order.
    attention: Vec<TchPlan>,
}

#[derive(Debug)]
struct TchPlan {
    plan: AttentionPlan,
    /// For each tile 0 or minus infinity, `[num_rows, num_keys]`.
    masks: Vec<Tensor>,
}

/// Calls a method that is generic over the element type.
macro_rules! by_kind {
    ($self:ident.$method:ident($($argument:expr),*)) => {
        if $self.kind == Kind::Float {
            $self.$method::<f32>($($argument),*)
        } else {
            $self.$method::<bf16>($($argument),*)
        }
    };
}

impl TchBackend {
    /// A back end with a zeroed cache: slots that were never written must stay finite, for a
    /// weight of 0 times infinity is no number.
    pub fn new(spec: DecoderSpec, dtype: Dtype, num_blocks: u32, block_size: u32) -> Result<Self> {
        let shape = KvShape {
            num_kv_heads: spec.num_kv_heads,
            block_size: block_size as usize,
            head_dim: spec.head_dim,
        };
        let layer_len = num_blocks as usize * shape.block_len();
        let bytes = layer_len * spec.layers.len() * dtype.num_bytes();
        let cache = CacheMemory::new(bytes).map_err(|error| Error::BadOption {
            name: "num_blocks",
            range: "few enough for the memory of this machine".to_owned(),
            value: format!("{num_blocks}, which take {bytes} bytes ({error})"),
        })?;
        let mut windows: Vec<Option<u32>> = Vec::new();
        for layer in &spec.layers {
            if !windows.contains(&layer.window) {
                windows.push(layer.window);
            }
        }
        let num_threads =
            NonZero::new(tch::get_num_threads() as usize).unwrap_or(NonZero::<usize>::MIN);
        let kind = match dtype {
            Dtype::Float32 => Kind::Float,
            Dtype::BFloat16 => Kind::BFloat16,
        };
        let no_grad = NoGrad(tch::no_grad_guard());
        Ok(Self { spec, kind, shape, cache, layer_len, windows, num_threads, _no_grad: no_grad })
    }

    fn empty(&self, rows: usize, columns: usize) -> Result<Tensor> {
        Ok(Tensor::f_empty([rows as i64, columns as i64], (self.kind, Device::Cpu))?)
    }

    fn query_size(&self) -> usize {
        self.spec.num_heads * self.spec.head_dim
    }

    fn layer<E: Element>(&self, layer: usize) -> &[E] {
        &self.cache.elements()[layer * self.layer_len..][..self.layer_len]
    }

    fn mask(&self, tile: &Tile, window: Option<u32>) -> Result<Tensor> {
        let num_keys = tile.seen.len();
        let mut values = vec![f32::NEG_INFINITY; tile.num_rows * num_keys];
        for (row, values) in values.chunks_exact_mut(num_keys).enumerate() {
            let seen = seen(tile.first_position + row, window);
            values[seen.start - tile.seen.start..seen.end - tile.seen.start].fill(0.0);
        }
        let mask = Tensor::f_from_slice(&values)?.f_to_kind(self.kind)?;
        Ok(mask.f_view([tile.num_rows as i64, num_keys as i64])?)
    }

    fn norm_rows<E: Element>(&self, hidden: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let mut output = hidden.f_empty_like()?;
        let (rows, weight) = (elements::<E>(hidden)?, elements(weight)?);
        // SAFETY: made in this function, and not viewed before the slice is gone.
        let output_elements = unsafe { elements_mut(&mut output) }?;
        rms_norm(rows, weight, self.spec.rms_norm_eps, output_elements);
        Ok(output)
    }

    fn rotate_rows<E: Element>(
        &mut self,
        layer: usize,
        qkv: &Tensor,
        step: &TchStep,
    ) -> Result<Tensor> {
        let mut query = self.empty(step.slots.len(), self.query_size())?;
        let rows = RopeRows {
            qkv: elements::<E>(qkv)?,
            num_heads: self.spec.num_heads,
            cos: &step.cos,
            sin: &step.sin,
            slots: &step.slots,
        };
        let cache = &mut self.cache.elements_mut()[layer * self.layer_len..][..self.layer_len];
        // SAFETY: made in this function, and not viewed before the slice is gone.
        let query_elements = unsafe { elements_mut(&mut query) }?;
        rope_write_kv(rows, self.shape, cache, query_elements);
        Ok(query)
    }

    fn attend<E: Element>(&self, layer: usize, query: &Tensor, step: &TchStep) -> Result<Tensor> {
        let mut output = self.empty(step.slots.len(), self.query_size())?;
        let cache = self.layer::<E>(layer);
        let window = self.spec.layers[layer].window;
        let plans = self.windows.iter().zip(&step.attention);
        for (_, TchPlan { plan, masks }) in plans.filter(|(of, _)| **of == window) {
            if !plan.singles.is_empty() {
                let row = |single: &Single| SingleRow {
                    row: single.row,
                    block_table: &step.block_tables[single.sequence],
                    first: single.seen.start,
                    end: single.seen.end,
                };
                let rows: Vec<SingleRow<'_>> = plan.singles.iter().map(row).collect();
                let input = RowAttention {
                    rows: &rows,
                    query: elements(query)?,
                    num_heads: self.spec.num_heads,
                    cache,
                    shape: self.shape,
                    num_threads: self.num_threads,
                };
                // SAFETY: made in this function, and not viewed before the slice is gone.
                let output_elements = unsafe { elements_mut(&mut output) }?;
                attend_rows(&input, output_elements);
            }
            for (tile, mask) in plan.tiles.iter().zip(masks) {
                let blocks = &step.block_tables[tile.sequence];
                let attended = self.attend_tile(cache, query, tile, blocks, mask)?;
                let (first, num_rows) = (tile.first_row as i64, tile.num_rows as i64);
                output.f_narrow(0, first, num_rows)?.f_copy_(&attended)?;
            }
        }
        Ok(output)
    }

    fn attend_tile<E: Element>(
        &self,
        cache: &[E],
        query: &Tensor,
        tile: &Tile,
        blocks: &[u32],
        mask: &Tensor,
    ) -> Result<Tensor> {
        let kv_heads = self.spec.num_kv_heads as i64;
        let group = self.spec.num_heads as i64 / kv_heads;
        let (head_dim, num_rows) = (self.spec.head_dim as i64, tile.num_rows as i64);
        let num_keys = tile.seen.len() as i64;
        let gather = |part| -> Result<Tensor> {
            let mut gathered =
                self.empty(self.spec.num_kv_heads * tile.seen.len(), self.spec.head_dim)?;
            // SAFETY: made in this function, and not viewed before the slice is gone.
            let gathered_elements = unsafe { elements_mut(&mut gathered) }?;
            self.gather(cache, part, tile, blocks, gathered_elements);
            Ok(gathered.f_view([kv_heads, num_keys, head_dim])?)
        };
        let (keys, values) = (gather(0)?, gather(1)?);
        // The heads of a group are further rows of their one head of keys and values.
        let rows = query.f_narrow(0, tile.first_row as i64, num_rows)?;
        let rows = rows.f_view([num_rows, kv_heads, group, head_dim])?.f_permute([1, 2, 0, 3])?;
        let rows = rows.f_reshape([kv_heads, group * num_rows, head_dim])?;
        let scores = rows.f_bmm(&keys.f_transpose(1, 2)?)?;
        let mut scores = scores.f_view([kv_heads * group, num_rows, num_keys])?;
        let scores = scores.f_mul_scalar_((head_dim as f64).sqrt().recip())?.f_add_(mask)?;
        let weights = scores.f_softmax(-1, self.kind)?;
        let attended = weights.f_view([kv_heads, group * num_rows, num_keys])?.f_bmm(&values)?;
        let attended = attended.f_view([kv_heads * group, num_rows, head_dim])?;
        Ok(attended.f_permute([1, 0, 2])?.f_reshape([num_rows, -1])?)
    }

    /// Copies what a tile sees of the keys or values: `[num_kv_heads, num_keys, head_dim]`.
    fn gather<E: Element>(
        &self,
        cache: &[E],
        part: usize,
        tile: &Tile,
        blocks: &[u32],
        output: &mut [E],
    ) {
        let KvShape { block_size, head_dim, .. } = self.shape;
        let heads = output.chunks_exact_mut(tile.seen.len() * head_dim);
        for (kv_head, mut output) in heads.enumerate() {
            let mut position = tile.seen.start;
            while position < tile.seen.end {
                let offset = position % block_size;
                let len = (block_size - offset).min(tile.seen.end - position);
                let block = blocks[position / block_size] as usize;
                let start = self.shape.strip(block, part, kv_head) + offset * head_dim;
                let (now, rest) = output.split_at_mut(len * head_dim);
                now.copy_from_slice(&cache[start..start + len * head_dim]);
                output = rest;
                position += len;
            }
        }
    }
}

impl Backend for TchBackend {
    type Hidden = Tensor;
    type Weight = Tensor;
    type Step = TchStep;

    fn weight(&mut self, rows: usize, columns: usize, values: Values<'_>) -> Result<Tensor> {
        let mut merged = self.empty(rows, columns)?;
        match values {
            Values::Tensors(parts) => {
                let mut row = 0;
                for part in parts {
                    row += with_rows(*part, columns as i64, |part| {
                        let part_rows = part.size()[0];
                        merged.f_narrow(0, row, part_rows)?.f_copy_(part)?;
                        Ok(part_rows)
                    })?;
                }
            }
            Values::Dummy(dummy) => {
                let dtype = if self.kind == Kind::Float { Dtype::Float32 } else { Dtype::BFloat16 };
                let part =
                    TensorBytes { dtype: dtype.into(), bytes: &dummy.bytes(rows * columns, dtype) };
                with_rows(part, columns as i64, |part| Ok(merged.f_copy_(part)?))?;
            }
            Values::Ones => merged = merged.f_fill_(1.0)?,
        }
        Ok(merged)
    }

    fn prepare(&mut self, batch: &Batch) -> Result<TchStep> {
        let rope = &self.spec.rope;
        let angles = batch.positions.iter().flat_map(|&position| {
            rope.inv_freq.iter().map(move |frequency| position as f32 * frequency)
        });
        let (cos, sin) = angles
            .map(|angle| (angle.cos() * rope.attention_factor, angle.sin() * rope.attention_factor))
            .unzip();
        let plan = |&window: &Option<u32>| -> Result<TchPlan> {
            let plan = AttentionPlan::new(batch, window, self.spec.num_heads);
            let masks = plan.tiles.iter().map(|tile| self.mask(tile, window));
            Ok(TchPlan { masks: masks.collect::<Result<_>>()?, plan })
        };
        Ok(TchStep {
            token_ids: indices(&batch.token_ids)?,
            logit_rows: indices(&batch.logit_rows)?,
            cos,
            sin,
            slots: batch.slot_mapping.clone(),
            block_tables: batch.sequences.iter().map(|it| it.block_table.clone()).collect(),
            attention: self.windows.iter().map(plan).collect::<Result<_>>()?,
        })
    }

    fn embed(&mut self, table: &Tensor, step: &TchStep) -> Result<Tensor> {
        Ok(table.f_index_select(0, &step.token_ids)?)
    }

    fn norm_product(&mut self, hidden: &Tensor, norm: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let normed = by_kind!(self.norm_rows(hidden, norm))?;
        Ok(normed.f_linear(weight, None::<&Tensor>)?)
    }

    fn rope_write_kv(&mut self, layer: usize, qkv: Tensor, step: &TchStep) -> Result<Tensor> {
        by_kind!(self.rotate_rows(layer, &qkv, step))
    }

    fn paged_attention(&mut self, layer: usize, query: Tensor, step: &TchStep) -> Result<Tensor> {
        by_kind!(self.attend(layer, &query, step))
    }

    fn product_add(&mut self, input: &Tensor, weight: &Tensor, residual: Tensor) -> Result<Tensor> {
        let mut residual = residual;
        Ok(residual.f_add_(&input.f_linear(weight, None::<&Tensor>)?)?)
    }

    fn norm_gated_product(
        &mut self,
        hidden: &Tensor,
        norm: &Tensor,
        gate_up: &Tensor,
    ) -> Result<Tensor> {
        let both = self.norm_product(hidden, norm, gate_up)?;
        let size = self.spec.intermediate_size as i64;
        let gate = both.f_narrow(1, 0, size)?.f_silu()?;
        Ok(gate.f_mul(&both.f_narrow(1, size, size)?)?)
    }

    fn logits(
        &mut self,
        hidden: &Tensor,
        norm: &Tensor,
        weight: &Tensor,
        step: &TchStep,
    ) -> Result<Tensor> {
        let rows = hidden.f_index_select(0, &step.logit_rows)?;
        Ok(self.norm_product(&rows, norm, weight)?.f_to_kind(Kind::Float)?)
    }

    fn to_host(&mut self, logits: &Tensor, host: &mut Vec<f32>) -> Result<()> {
        host.resize(logits.numel(), 0.0);
        Ok(logits.f_contiguous()?.f_copy_data(host, logits.numel())?)
    }
}

/// libtorch's indices have 64 bits.
fn indices(values: &[u32]) -> Result<Tensor> {
    let values: Vec<i64> = values.iter().map(|&value| i64::from(value)).collect();
    Ok(Tensor::f_from_slice(&values)?)
}
