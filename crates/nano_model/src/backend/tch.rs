//! The back end on libtorch, on the CPU. No other file calls tensor operators, and this one calls
//! their fallible forms only: the plain ones panic.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use crate::backend::Backend;
use crate::batch::{Batch, BatchSequence};
use crate::config::{CheckpointDtype, DecoderSpec};
use crate::error::Result;
use crate::weights::TensorBytes;

/// Query rows of a prefill that attend at once: bounds the mask, and the work on keys that none of
/// the rows may see.
const TILE_ROWS: usize = 256;

/// See the [module](self).
#[derive(Debug)]
pub struct TchBackend {
    spec: DecoderSpec,
    kind: Kind,
    /// Per layer `[num_blocks, k | v, num_kv_heads, block_size, head_dim]`.
    cache: Vec<Tensor>,
    block_size: usize,
}

/// A step as tensors.
#[derive(Debug)]
pub struct TchStep {
    token_ids: Tensor,
    /// `[num_tokens, 1, head_dim]`.
    cos: Tensor,
    sin: Tensor,
    /// The block and the offset in it of every row's slot.
    slot_block: Tensor,
    slot_offset: Tensor,
    /// One for each window that the model's layers have.
    attention: Vec<AttentionPlan>,
    logit_rows: Tensor,
}

/// Who reads what in layers with one kind of window.
#[derive(Debug)]
struct AttentionPlan {
    window: Option<u32>,
    decodes: Vec<DecodeGroup>,
    prefills: Vec<Prefill>,
}

/// Sequences with a single row that read about as many blocks: they attend together, since an
/// operator call costs more than the keys of a short sequence.
#[derive(Debug)]
struct DecodeGroup {
    /// Their rows of the batch.
    rows: Tensor,
    /// The blocks of each, padded to the same number with blocks that the mask hides.
    blocks: Tensor,
    num_sequences: i64,
    /// `[1, num_sequences, 1, keys]`, 0 or minus infinity.
    mask: Tensor,
}

/// A sequence with several rows.
#[derive(Debug)]
struct Prefill {
    /// The blocks that hold the positions read.
    blocks: Tensor,
    tiles: Vec<Tile>,
}

/// Rows that attend at once.
#[derive(Debug)]
struct Tile {
    first_row: i64,
    num_rows: i64,
    /// The keys read, counted from the first slot of the plan's blocks.
    first_key: i64,
    num_keys: i64,
    /// `[group * num_rows, num_keys]`, 0 or minus infinity.
    mask: Tensor,
}

impl TchBackend {
    /// A back end with a zeroed cache: slots that were never written must stay finite, for a
    /// weight of 0 times infinity is no number.
    pub fn new(spec: DecoderSpec, kind: Kind, num_blocks: u32, block_size: u32) -> Result<Self> {
        let shape = [
            i64::from(num_blocks),
            2,
            spec.num_kv_heads as i64,
            i64::from(block_size),
            spec.head_dim as i64,
        ];
        let layer = |_| Tensor::f_zeros(shape, (kind, Device::Cpu));
        let cache = spec.layers.iter().map(layer).collect::<std::result::Result<_, _>>()?;
        Ok(Self { spec, kind, cache, block_size: block_size as usize })
    }

    /// One parameter from the tensors that it is made of, one below the other, in the engine's
    /// data type.
    ///
    /// # Shapes
    /// Each part is `[rows, columns]`, or `[columns]` for a norm, whose `rows` is `None`.
    pub fn weight(
        &self,
        parts: &[(TensorBytes<'_>, Option<usize>)],
        columns: usize,
    ) -> Result<Tensor> {
        let rows: usize = parts.iter().map(|(_, rows)| rows.unwrap_or(1)).sum();
        let columns = columns as i64;
        let merged = Tensor::f_empty([rows as i64, columns], (self.kind, Device::Cpu))?;
        let mut row = 0;
        for (part, part_rows) in parts {
            let part_rows = part_rows.unwrap_or(1) as i64;
            // SAFETY: the bytes outlive `source`, which is dropped in this iteration; their number
            // is that of the shape and the type, which WeightMap::tensor and safetensors check; it
            // is only read. An element may lie at any address: the processors that libtorch runs
            // on load unaligned values.
            let source = unsafe {
                let data = part.bytes.as_ptr();
                let shape = [part_rows, columns];
                Tensor::f_from_blob(data, &shape, &[columns, 1], kind(part.dtype), Device::Cpu)?
            };
            merged.f_narrow(0, row, part_rows)?.f_copy_(&source)?;
            row += part_rows;
        }
        let is_norm = parts.iter().all(|(_, rows)| rows.is_none());
        Ok(if is_norm { merged.f_squeeze_dim(0)? } else { merged })
    }

    /// A random parameter: normal with standard deviation 0.02, ones for a norm.
    pub fn random_weight(&self, rows: Option<usize>, columns: usize) -> Result<Tensor> {
        let columns = columns as i64;
        let options = (self.kind, Device::Cpu);
        match rows {
            None => Ok(Tensor::f_ones([columns], options)?),
            Some(rows) => {
                Ok(Tensor::f_empty([rows as i64, columns], options)?.f_normal_(0.0, 0.02)?)
            }
        }
    }

    /// The logits on the host: `[num_logit_rows * vocab_size]`.
    pub fn to_host(&self, logits: &Tensor) -> Result<Vec<f32>> {
        let mut host = vec![0.0; logits.numel()];
        logits.f_contiguous()?.f_copy_data(&mut host, logits.numel())?;
        Ok(host)
    }

    fn rms_norm(&self, hidden: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let eps = f64::from(self.spec.rms_norm_eps);
        Ok(hidden.f_rms_norm([self.spec.hidden_size as i64], Some(weight), eps)?)
    }

    fn group(&self) -> usize {
        self.spec.num_heads / self.spec.num_kv_heads
    }

    fn plan(&self, batch: &Batch, window: Option<u32>) -> Result<AttentionPlan> {
        // Sequences that read at most twice as many blocks as their neighbours.
        let mut groups: BTreeMap<usize, Vec<&BatchSequence>> = BTreeMap::new();
        let mut prefills = Vec::new();
        for sequence in &batch.sequences {
            if sequence.num_rows == 1 {
                let size = self.blocks_read(sequence, window).len().next_power_of_two();
                groups.entry(size).or_default().push(sequence);
            } else {
                prefills.push(self.prefill(sequence, window)?);
            }
        }
        let decodes = groups.values().map(|group| self.decode_group(group, window));
        Ok(AttentionPlan { window, decodes: decodes.collect::<Result<_>>()?, prefills })
    }

    /// The first position that the row at `position` sees.
    fn oldest(position: usize, window: Option<u32>) -> usize {
        window.map_or(0, |window| (position + 1).saturating_sub(window as usize))
    }

    /// The part of the block table that holds what the sequence's rows see.
    fn blocks_read<'a>(&self, sequence: &'a BatchSequence, window: Option<u32>) -> &'a [u32] {
        let first = Self::oldest(sequence.first_position, window) / self.block_size;
        &sequence.block_table[first..sequence.context_len().div_ceil(self.block_size)]
    }

    fn decode_group(
        &self,
        sequences: &[&BatchSequence],
        window: Option<u32>,
    ) -> Result<DecodeGroup> {
        let tables = sequences.iter().map(|sequence| self.blocks_read(sequence, window));
        let tables: Vec<&[u32]> = tables.collect();
        let num_blocks = tables.iter().map(|table| table.len()).max().unwrap_or(0);
        let num_keys = num_blocks * self.block_size;
        let mut blocks: Vec<i64> = Vec::with_capacity(tables.len() * num_blocks);
        let mut mask = Vec::with_capacity(tables.len() * num_keys);
        for (sequence, table) in sequences.iter().zip(&tables) {
            let padding = std::iter::repeat(&table[0]);
            let padded = table.iter().chain(padding).take(num_blocks);
            blocks.extend(padded.map(|&block| i64::from(block)));
            let position = sequence.first_position;
            let oldest = Self::oldest(position, window);
            let origin = oldest / self.block_size * self.block_size;
            let seen = oldest - origin..=position - origin;
            let hidden = (0..num_keys).map(|key| !seen.contains(&key));
            mask.extend(hidden.map(|hidden| if hidden { f32::NEG_INFINITY } else { 0.0 }));
        }
        let num_sequences = sequences.len() as i64;
        let rows = sequences.iter().map(|sequence| sequence.first_row as i64);
        let mask = Tensor::f_from_slice(&mask)?;
        Ok(DecodeGroup {
            rows: Tensor::f_from_slice(&rows.collect::<Vec<_>>())?,
            blocks: Tensor::f_from_slice(&blocks)?,
            num_sequences,
            mask: mask.f_view([1, num_sequences, 1, num_keys as i64])?.f_to_kind(self.kind)?,
        })
    }

    fn prefill(&self, sequence: &BatchSequence, window: Option<u32>) -> Result<Prefill> {
        let blocks = self.blocks_read(sequence, window).iter().map(|&block| i64::from(block));
        let blocks: Vec<i64> = blocks.collect();
        let origin =
            Self::oldest(sequence.first_position, window) / self.block_size * self.block_size;
        let mut tiles = Vec::new();
        for first in (0..sequence.num_rows).step_by(TILE_ROWS) {
            let num_rows = TILE_ROWS.min(sequence.num_rows - first);
            let position = sequence.first_position + first;
            let (from, to) = (Self::oldest(position, window), position + num_rows);
            let sees = |row: usize, key: usize| {
                (Self::oldest(position + row, window)..=position + row).contains(&key)
            };
            tiles.push(Tile {
                first_row: (sequence.first_row + first) as i64,
                num_rows: num_rows as i64,
                first_key: (from - origin) as i64,
                num_keys: (to - from) as i64,
                mask: self.mask(num_rows, from, to, sees)?,
            });
        }
        Ok(Prefill { blocks: Tensor::f_from_slice(&blocks)?, tiles })
    }

    /// The same rows for every head of a group.
    fn mask(
        &self,
        num_rows: usize,
        from: usize,
        to: usize,
        sees: impl Fn(usize, usize) -> bool,
    ) -> Result<Tensor> {
        let rows = (0..num_rows).flat_map(|row| (from..to).map(move |key| (row, key)));
        let values = rows.map(|(row, key)| if sees(row, key) { 0.0 } else { f32::NEG_INFINITY });
        let values: Vec<f32> = values.collect();
        let mask = Tensor::f_from_slice(&values)?;
        let mask = mask.f_view([num_rows as i64, (to - from) as i64])?.f_to_kind(self.kind)?;
        Ok(mask.f_repeat([self.group() as i64, 1])?)
    }

    /// Keys and values of `layer` in the order of `blocks`: `[2, num_kv_heads, slots, head_dim]`.
    fn gather(&self, layer: usize, blocks: &Tensor) -> Result<Tensor> {
        let by_head = self.cache[layer].f_permute([1, 2, 0, 3, 4])?;
        Ok(by_head.f_index_select(2, blocks)?.f_flatten(2, 3)?)
    }

    /// Attention of sequences with one row each, written into `output: [num_tokens, num_heads,
    /// head_dim]`.
    fn attend_decodes(
        &self,
        layer: usize,
        query: &Tensor,
        group: &DecodeGroup,
        output: &mut Tensor,
    ) -> Result<()> {
        let heads = self.spec.num_kv_heads as i64;
        let (queries, head_dim) = (self.group() as i64, self.spec.head_dim as i64);
        let gathered = self.gather(layer, &group.blocks)?;
        let gathered = gathered.f_view([2, heads, group.num_sequences, -1, head_dim])?;
        let (keys, values) = (gathered.f_select(0, 0)?, gathered.f_select(0, 1)?);
        let rows = query.f_index_select(0, &group.rows)?;
        let rows =
            rows.f_view([group.num_sequences, heads, queries, head_dim])?.f_transpose(0, 1)?;
        let attended = Tensor::f_scaled_dot_product_attention(
            &rows,
            &keys,
            &values,
            Some(&group.mask),
            0.0,
            false,
            None,
            false,
        )?;
        let attended = attended.f_transpose(0, 1)?.f_flatten(1, 2)?;
        let _ = output.f_index_copy_(0, &group.rows, &attended)?;
        Ok(())
    }

    /// Attention of one sequence with several rows, written into `output` likewise.
    fn attend_prefill(
        &self,
        layer: usize,
        query: &Tensor,
        plan: &Prefill,
        output: &Tensor,
    ) -> Result<()> {
        let heads = self.spec.num_kv_heads as i64;
        let (group, head_dim) = (self.group() as i64, self.spec.head_dim as i64);
        let gathered = self.gather(layer, &plan.blocks)?.f_unsqueeze(1)?;
        let (keys, values) = (gathered.f_select(0, 0)?, gathered.f_select(0, 1)?);
        for tile in &plan.tiles {
            let keys = keys.f_narrow(2, tile.first_key, tile.num_keys)?;
            let values = values.f_narrow(2, tile.first_key, tile.num_keys)?;
            // The heads of a group are further rows of their one head of keys and values.
            let rows = query.f_narrow(0, tile.first_row, tile.num_rows)?;
            let rows = rows.f_view([tile.num_rows, heads, group, head_dim])?;
            let rows = rows.f_permute([1, 2, 0, 3])?;
            let rows = rows.f_reshape([1, heads, group * tile.num_rows, head_dim])?;
            let attended = Tensor::f_scaled_dot_product_attention(
                &rows,
                &keys,
                &values,
                Some(&tile.mask),
                0.0,
                false,
                None,
                false,
            )?;
            let attended = attended.f_view([heads, group, tile.num_rows, head_dim])?;
            let attended = attended.f_permute([2, 0, 1, 3])?;
            let place = output.f_narrow(0, tile.first_row, tile.num_rows)?;
            place.f_view([tile.num_rows, heads, group, head_dim])?.f_copy_(&attended)?;
        }
        Ok(())
    }
}

impl Backend for TchBackend {
    type Hidden = Tensor;
    type Weight = Tensor;
    type Step = TchStep;

    fn prepare(&mut self, batch: &Batch) -> Result<TchStep> {
        let wide = |values: &[u32]| -> Result<Tensor> {
            let values: Vec<i64> = values.iter().map(|&value| i64::from(value)).collect();
            Ok(Tensor::f_from_slice(&values)?)
        };
        let num_tokens = batch.positions.len() as i64;
        let inv_freq = Tensor::f_from_slice(&self.spec.rope.inv_freq)?;
        let positions = wide(&batch.positions)?.f_to_kind(Kind::Float)?;
        let angles = positions.f_view([num_tokens, 1])?.f_mul(&inv_freq)?;
        let angles = Tensor::f_cat(&[&angles, &angles], 1)?.f_unsqueeze(1)?;
        let factor = f64::from(self.spec.rope.attention_factor);
        let mut windows: Vec<Option<u32>> = Vec::new();
        for layer in &self.spec.layers {
            if !windows.contains(&layer.window) {
                windows.push(layer.window);
            }
        }
        let slots = wide(&batch.slot_mapping)?;
        let block_size = self.block_size as i64;
        Ok(TchStep {
            token_ids: wide(&batch.token_ids)?,
            cos: angles.f_cos()?.f_mul_scalar(factor)?.f_to_kind(self.kind)?,
            sin: angles.f_sin()?.f_mul_scalar(factor)?.f_to_kind(self.kind)?,
            slot_block: slots.f_floor_divide_scalar(block_size)?,
            slot_offset: slots.f_remainder(block_size)?,
            attention: windows.iter().map(|&w| self.plan(batch, w)).collect::<Result<_>>()?,
            logit_rows: wide(&batch.logit_rows)?,
        })
    }

    fn embed(&mut self, table: &Tensor, step: &TchStep) -> Result<Tensor> {
        Ok(table.f_index_select(0, &step.token_ids)?)
    }

    fn norm_product(&mut self, hidden: &Tensor, norm: &Tensor, weight: &Tensor) -> Result<Tensor> {
        Ok(self.rms_norm(hidden, norm)?.f_linear(weight, None::<&Tensor>)?)
    }

    fn rope_write_kv(&mut self, layer: usize, qkv: Tensor, step: &TchStep) -> Result<Tensor> {
        let DecoderSpec { num_heads, num_kv_heads, head_dim, .. } = self.spec;
        let (num_heads, num_kv_heads) = (num_heads as i64, num_kv_heads as i64);
        let (head_dim, num_tokens) = (head_dim as i64, qkv.size()[0]);
        let qkv = qkv.f_view([num_tokens, num_heads + 2 * num_kv_heads, head_dim])?;
        let plain = qkv.f_narrow(1, 0, num_heads + num_kv_heads)?;
        let first = plain.f_narrow(2, 0, head_dim / 2)?;
        let second = plain.f_narrow(2, head_dim / 2, head_dim / 2)?;
        let turned = Tensor::f_cat(&[&second.f_neg()?, &first], 2)?;
        let rotated = plain.f_mul(&step.cos)?.f_add(&turned.f_mul(&step.sin)?)?;

        let keys = rotated.f_narrow(1, num_heads, num_kv_heads)?;
        let values = qkv.f_narrow(1, num_heads + num_kv_heads, num_kv_heads)?;
        let both = Tensor::f_stack(&[&keys, &values], 1)?;
        // [num_blocks, block_size, 2, num_kv_heads, head_dim], indexed by the first two.
        let mut by_slot = self.cache[layer].f_permute([0, 3, 1, 2, 4])?;
        let slots = [Some(&step.slot_block), Some(&step.slot_offset)];
        let _ = by_slot.f_index_put_(&slots, &both, false)?;
        Ok(rotated.f_narrow(1, 0, num_heads)?)
    }

    fn paged_attention(&mut self, layer: usize, query: Tensor, step: &TchStep) -> Result<Tensor> {
        let window = self.spec.layers[layer].window;
        let mut output = query.f_empty_like()?.f_contiguous()?;
        for plan in step.attention.iter().filter(|plan| plan.window == window) {
            for group in &plan.decodes {
                self.attend_decodes(layer, &query, group, &mut output)?;
            }
            for prefill in &plan.prefills {
                self.attend_prefill(layer, &query, prefill, &output)?;
            }
        }
        Ok(output.f_flatten(1, 2)?)
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
}

fn kind(dtype: CheckpointDtype) -> Kind {
    match dtype {
        CheckpointDtype::Float32 => Kind::Float,
        CheckpointDtype::Float16 => Kind::Half,
        CheckpointDtype::BFloat16 => Kind::BFloat16,
    }
}
