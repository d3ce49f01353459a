//! The back end on libtorch: the plain reading of every operator, and the oracle of the others.
//! An operator that fails panics, and with it the test.

use tch::{Device, Kind, Tensor};

use nano_model::backend::{Backend, Dtype, Values};
use nano_model::batch::{Batch, BatchSequence};
use nano_model::config::{CheckpointDtype, DecoderSpec};
use nano_model::error::Result;
use nano_model::weights::TensorBytes;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct TchBackend {
    spec: DecoderSpec,
    kind: Kind,
    block_size: u32,
    /// Keys and values of each layer, `[num_slots, num_kv_heads, head_dim]`.
    cache: Vec<(Tensor, Tensor)>,
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
pub(crate) struct TchStep {
    token_ids: Tensor,
    logit_rows: Tensor,
    slots: Tensor,
    /// `[num_tokens, 1, head_dim / 2]`.
    cos: Tensor,
    sin: Tensor,
    sequences: Vec<BatchSequence>,
    block_ids: Vec<u32>,
}

impl TchBackend {
    /// A back end with a zeroed cache: slots that were never written must stay finite, for a
    /// weight of 0 times infinity is no number.
    pub(crate) fn new(spec: DecoderSpec, dtype: Dtype, num_blocks: u32, block_size: u32) -> Self {
        let kind = match dtype {
            Dtype::Float32 => Kind::Float,
            Dtype::BFloat16 => Kind::BFloat16,
        };
        let num_slots = i64::from(num_blocks) * i64::from(block_size);
        let shape = [num_slots, spec.num_kv_heads as i64, spec.head_dim as i64];
        let zeros = || Tensor::zeros(shape, (kind, Device::Cpu));
        let cache = spec.layers.iter().map(|_| (zeros(), zeros())).collect();
        let no_grad = NoGrad(tch::no_grad_guard());
        Self { spec, kind, block_size, cache, _no_grad: no_grad }
    }

    /// RMSNorm, computed in float32.
    fn norm(&self, hidden: &Tensor, weight: &Tensor) -> Tensor {
        let wide = hidden.to_kind(Kind::Float);
        let square = (&wide * &wide).mean_dim(&[-1_i64][..], true, Kind::Float);
        let scale = (square + f64::from(self.spec.rms_norm_eps)).rsqrt();
        (wide * scale * weight).to_kind(self.kind)
    }

    /// Heads `[num_tokens, heads, head_dim]`, of which the two halves turn against each other.
    fn rotate(&self, heads: &Tensor, step: &TchStep) -> Tensor {
        let half = self.spec.head_dim as i64 / 2;
        let wide = heads.to_kind(Kind::Float);
        let (x, y) = (wide.narrow(-1, 0, half), wide.narrow(-1, half, half));
        let first = &x * &step.cos - &y * &step.sin;
        let second = y * &step.cos + x * &step.sin;
        Tensor::cat(&[first, second], -1).to_kind(self.kind)
    }

    /// Attention of one sequence's rows, `[num_rows, num_heads, head_dim]`.
    fn attend(
        &self,
        layer: usize,
        query: &Tensor,
        sequence: &BatchSequence,
        step: &TchStep,
    ) -> Tensor {
        let block_size = self.block_size as usize;
        let table = &step.block_ids[sequence.block_table.clone()];
        let slot = |position: usize| {
            let block = table[position / block_size];
            i64::from(block) * block_size as i64 + (position % block_size) as i64
        };
        let slots: Vec<i64> = (0..sequence.context_len()).map(slot).collect();
        let slots = Tensor::from_slice(&slots);
        let group = (self.spec.num_heads / self.spec.num_kv_heads) as i64;
        let heads = |cache: &Tensor| {
            let rows = cache.index_select(0, &slots).permute([1, 0, 2]);
            rows.repeat_interleave_self_int(group, 0, None)
        };
        let (keys, values) = (heads(&self.cache[layer].0), heads(&self.cache[layer].1));
        let scale = (self.spec.head_dim as f64).sqrt().recip();
        let scores = query.permute([1, 0, 2]).bmm(&keys.transpose(1, 2));
        let scores = (scores * scale).to_kind(Kind::Float) + self.mask(layer, sequence);
        let weights = scores.softmax(-1, Kind::Float).to_kind(self.kind);
        weights.bmm(&values).permute([1, 0, 2])
    }

    /// 0 for a position that a row sees, else minus infinity: `[num_rows, context_len]`.
    fn mask(&self, layer: usize, sequence: &BatchSequence) -> Tensor {
        let window = self.spec.layers[layer].window.map_or(usize::MAX, |window| window as usize);
        let num_keys = sequence.context_len();
        let mut mask = Vec::with_capacity(sequence.num_rows * num_keys);
        for row in sequence.first_position..num_keys {
            let value =
                |key| if key <= row && row - key < window { 0.0 } else { f32::NEG_INFINITY };
            mask.extend((0..num_keys).map(value));
        }
        Tensor::from_slice(&mask).view([sequence.num_rows as i64, num_keys as i64])
    }
}

impl Backend for TchBackend {
    type Hidden = Tensor;
    type Weight = Tensor;
    type Step = TchStep;

    fn weight(&mut self, rows: usize, columns: usize, values: Values<'_>) -> Result<Tensor> {
        let shape = [rows as i64, columns as i64];
        match values {
            Values::Tensors(parts) => {
                let parts = parts.iter().map(|part| self.tensor(*part, columns));
                Ok(Tensor::cat(&parts.collect::<Vec<_>>(), 0).view(shape))
            }
            Values::Dummy(dummy) => {
                let mut values = vec![0.0_f32; rows * columns];
                dummy.fill(0, &mut values, dummy.draws());
                Ok(Tensor::from_slice(&values).to_kind(self.kind).view(shape))
            }
        }
    }

    fn norm_weight(&mut self, size: usize, values: Option<TensorBytes<'_>>) -> Result<Tensor> {
        match values {
            Some(tensor) => Ok(self.tensor(tensor, size).view([size as i64])),
            None => Ok(Tensor::ones([size as i64], (self.kind, Device::Cpu))),
        }
    }

    fn prepare(&mut self, batch: &Batch) -> Result<TchStep> {
        let rope = &self.spec.rope;
        let frequencies = Tensor::from_slice(&rope.inv_freq).view([1, 1, -1]);
        let positions = indices(&batch.positions).to_kind(Kind::Float).view([-1, 1, 1]);
        let angles = positions * frequencies;
        let factor = f64::from(rope.attention_factor);
        Ok(TchStep {
            token_ids: indices(&batch.token_ids),
            logit_rows: indices(&batch.logit_rows),
            slots: indices(&batch.slot_mapping),
            cos: angles.cos() * factor,
            sin: angles.sin() * factor,
            sequences: batch.sequences.clone(),
            block_ids: batch.block_ids.clone(),
        })
    }

    fn embed(&mut self, table: &Tensor, step: &TchStep) -> Result<Tensor> {
        Ok(table.index_select(0, &step.token_ids))
    }

    fn norm_product(&mut self, hidden: &Tensor, norm: &Tensor, weight: &Tensor) -> Result<Tensor> {
        Ok(self.norm(hidden, norm).linear(weight, None::<&Tensor>))
    }

    fn rope_write_kv(&mut self, layer: usize, qkv: Tensor, step: &TchStep) -> Result<Tensor> {
        let (num_heads, kv_heads) = (self.spec.num_heads as i64, self.spec.num_kv_heads as i64);
        let heads = qkv.view([-1, num_heads + 2 * kv_heads, self.spec.head_dim as i64]);
        let key = self.rotate(&heads.narrow(1, num_heads, kv_heads), step);
        let value = heads.narrow(1, num_heads + kv_heads, kv_heads);
        let (keys, values) = &mut self.cache[layer];
        *keys = keys.index_copy_(0, &step.slots, &key);
        *values = values.index_copy_(0, &step.slots, &value);
        Ok(self.rotate(&heads.narrow(1, 0, num_heads), step))
    }

    fn paged_attention(&mut self, layer: usize, query: Tensor, step: &TchStep) -> Result<Tensor> {
        let query = query.view([-1, self.spec.num_heads as i64, self.spec.head_dim as i64]);
        let attend = |sequence: &BatchSequence| {
            let (first, num_rows) = (sequence.first_row as i64, sequence.num_rows as i64);
            self.attend(layer, &query.narrow(0, first, num_rows), sequence, step)
        };
        let parts = step.sequences.iter().map(attend).collect::<Vec<_>>();
        Ok(Tensor::cat(&parts, 0).reshape([query.size()[0], -1]))
    }

    fn product_add(&mut self, input: &Tensor, weight: &Tensor, residual: Tensor) -> Result<Tensor> {
        Ok(residual + input.linear(weight, None::<&Tensor>))
    }

    fn norm_gated_product(
        &mut self,
        hidden: &Tensor,
        norm: &Tensor,
        gate_up: &Tensor,
    ) -> Result<Tensor> {
        let both = self.norm_product(hidden, norm, gate_up)?;
        let size = self.spec.intermediate_size as i64;
        let gate = both.narrow(1, 0, size).silu();
        Ok(gate * both.narrow(1, size, size))
    }

    fn logit_rows(
        &mut self,
        context: Tensor,
        residual: Tensor,
        step: &TchStep,
    ) -> Result<(Tensor, Tensor)> {
        let rows = |hidden: Tensor| hidden.index_select(0, &step.logit_rows);
        Ok((rows(context), rows(residual)))
    }

    fn logits(
        &mut self,
        hidden: &Tensor,
        norm: &Tensor,
        weight: &Tensor,
        _step: &TchStep,
    ) -> Result<Tensor> {
        Ok(self.norm_product(hidden, norm, weight)?.to_kind(Kind::Float))
    }

    fn to_host(&mut self, logits: Tensor, host: &mut Vec<f32>) -> Result<()> {
        host.resize(logits.numel(), 0.0);
        logits.contiguous().copy_data(host, logits.numel());
        Ok(())
    }
}

impl TchBackend {
    /// A copy of a checkpoint's tensor, `[rows, columns]`.
    fn tensor(&self, part: TensorBytes<'_>, columns: usize) -> Tensor {
        let num_rows = part.bytes.len() / part.dtype.num_bytes() / columns.max(1);
        let shape = [num_rows, columns];
        assert_eq!(part.bytes.len(), num_rows * columns * part.dtype.num_bytes(), "{shape:?}");
        let stored =
            Tensor::from_data_size(part.bytes, &shape.map(|size| size as i64), kind(part.dtype));
        stored.to_kind(self.kind)
    }
}

fn kind(dtype: CheckpointDtype) -> Kind {
    match dtype {
        CheckpointDtype::Float32 => Kind::Float,
        CheckpointDtype::Float16 => Kind::Half,
        CheckpointDtype::BFloat16 => Kind::BFloat16,
    }
}

/// libtorch's indices have 64 bits.
fn indices(values: &[u32]) -> Tensor {
    let values: Vec<i64> = values.iter().map(|&value| i64::from(value)).collect();
    Tensor::from_slice(&values)
}
