//! The operators, which only enqueue, and how parameters come to the device.

use half::bf16;
use nano_kernels::cuda::DeviceBuffer;
use nano_kernels::cuda::attention::{AttentionInput, DecodeRows, PrefillRows};
use nano_kernels::cuda::gather::{Gather, TokenIds};
use nano_kernels::cuda::product::Epilogue;
use nano_kernels::cuda::rope::RopeWriteKv;

use super::step::{CudaStep, StepInput};
use super::{BF16_BYTES, CudaBackend, CudaHidden, CudaWeight, no_room};
use crate::backend::{Backend, Values};
use crate::batch::Batch;
use crate::config::CheckpointDtype;
use crate::error::Result;
use crate::weights::TensorBytes;

impl CudaBackend {
    /// One checkpoint tensor into its place in a weight.
    fn place(&self, buffer: &DeviceBuffer, offset: usize, part: TensorBytes<'_>) -> Result<usize> {
        let (is_half, num_elements) = match part.dtype {
            CheckpointDtype::BFloat16 => {
                buffer.upload_large(offset, part.bytes)?;
                return Ok(part.bytes.len());
            }
            CheckpointDtype::Float16 => (true, part.bytes.len() / 2),
            CheckpointDtype::Float32 => (false, part.bytes.len() / 4),
        };
        let source = self.device().allocate(part.bytes.len())?;
        source.upload_large(0, part.bytes)?;
        let out = buffer.address() + offset as u64;
        // SAFETY: the weight has room for its parts, and the source is dropped after the wait.
        unsafe { self.kernels.round_to_bf16(out, source.address(), num_elements, is_half) }?;
        self.device().synchronize()?;
        Ok(num_elements * BF16_BYTES)
    }
}

impl Backend for CudaBackend {
    type Hidden = CudaHidden;
    type Weight = CudaWeight;
    type Step = CudaStep;

    fn weight(&mut self, rows: usize, columns: usize, values: Values<'_>) -> Result<CudaWeight> {
        let num_elements = rows * columns;
        let buffer = self.device().allocate(num_elements * BF16_BYTES)?;
        match values {
            Values::Tensors(parts) => {
                let mut offset = 0;
                for part in parts {
                    offset += self.place(&buffer, offset, *part)?;
                }
            }
            Values::Dummy(dummy) => {
                let draws = if let Some(draws) = self.draws.take() {
                    draws
                } else {
                    let draws = dummy.draws().iter().map(|&draw| bf16::from_f32(draw));
                    self.device().allocate_from(&draws.collect::<Vec<_>>())?
                };
                let (out, source) = (buffer.address(), draws.address());
                // SAFETY: the weight was allocated above; the draws live until `make_room`, which
                // waits for the device by giving them back.
                unsafe { self.kernels.fill_random(out, source, num_elements, dummy.seed()) }?;
                self.draws = Some(draws);
            }
        }
        Ok(CudaWeight { buffer, rows, columns })
    }

    fn norm_weight(&mut self, size: usize, values: Option<TensorBytes<'_>>) -> Result<CudaWeight> {
        let buffer = self.device().allocate(size * BF16_BYTES)?;
        match values {
            Some(tensor) => drop(self.place(&buffer, 0, tensor)?),
            None => buffer.upload(0, &vec![bf16::ONE; size])?,
        }
        Ok(CudaWeight { buffer, rows: 1, columns: size })
    }

    fn prepare(&mut self, batch: &Batch) -> Result<CudaStep> {
        let batch = batch.clone();
        self.upload(&StepInput { batch, keeps_logits: true, ..StepInput::default() })
    }

    fn embed(&mut self, table: &CudaWeight, step: &CudaStep) -> Result<CudaHidden> {
        // What would be added to the residual of a step without a row of logits, which ends here.
        self.waiting = None;
        let out = self.activations.residual.address();
        let gather = Gather {
            out,
            source: table.buffer.address(),
            num_rows: step.counts.tokens,
            num_source_rows: table.rows,
            row_size: table.columns,
        };
        let ids = TokenIds {
            token: step.at.token,
            from_sampled: step.at.from_sampled,
            sampled: self.sampled.address(),
        };
        // SAFETY: as in `norm`; rows of the step before are below its number of sampled rows.
        unsafe { self.kernels.embed_tokens(&gather, &ids) }?;
        Ok(CudaHidden { address: out, num_rows: step.counts.tokens })
    }

    fn norm_product(
        &mut self,
        hidden: &CudaHidden,
        norm: &CudaWeight,
        weight: &CudaWeight,
    ) -> Result<CudaHidden> {
        self.product(self.activations.qkv.address(), *hidden, Some(norm), weight, Epilogue::Bf16)
    }

    /// Of the rows that do not decode: decode attention does this itself, see `paged_attention`.
    fn rope_write_kv(
        &mut self,
        layer: usize,
        qkv: CudaHidden,
        step: &CudaStep,
    ) -> Result<CudaHidden> {
        let room = self.room.as_ref().ok_or_else(no_room)?;
        let query = self.activations.query.address();
        let from = |address: u64, row_bytes: usize| address + (step.num_decodes * row_bytes) as u64;
        let launch = RopeWriteKv {
            query: from(query, self.heads.num_heads * self.heads.head_dim * BF16_BYTES),
            cache: room.cache.address() + (layer * room.layer_bytes) as u64,
            qkv: from(qkv.address, self.spec.qkv_size() * BF16_BYTES),
            cos_sin: room.cos_sin.address(),
            position: from(step.at.position, size_of::<u32>()),
            slot: from(step.at.slot, size_of::<u32>()),
            num_tokens: step.counts.tokens - step.num_decodes,
            heads: self.heads,
        };
        // SAFETY: as in `norm`; positions are below max_model_len and slots below the cache's end,
        // which the scheduler answers for, and no two rows of a step are the same token.
        unsafe { self.kernels.rope_write_kv(&launch) }?;
        Ok(CudaHidden { address: query, ..qkv })
    }

    /// Rows that decode come first and are read where the product left them, in `qkv`.
    fn paged_attention(
        &mut self,
        layer: usize,
        query: CudaHidden,
        step: &CudaStep,
    ) -> Result<CudaHidden> {
        let room = self.room.as_ref().ok_or_else(no_room)?;
        let out = self.activations.context.address();
        let input = AttentionInput {
            cache: room.cache.address() + (layer * room.layer_bytes) as u64,
            block_table: step.at.block_table,
            max_blocks: room.steps.max_blocks,
            heads: self.heads,
            window: self.spec.layers[layer].window,
        };
        let decodes = DecodeRows {
            qkv: self.activations.qkv.address(),
            cos_sin: room.cos_sin.address(),
            parts: step.at.parts,
            num_sequences: step.num_decodes,
        };
        let prefills = PrefillRows {
            query: query.address,
            tiles: step.at.tiles,
            num_tiles: step.counts.tiles,
            num_tokens: query.num_rows,
        };
        // SAFETY: as in `norm`; tables are those of the scheduler, whose blocks are the cache's, and
        // whose lengths are at most max_model_len.
        unsafe {
            self.kernels.decode_attention(&self.decode_plan, &input, &decodes, out)?;
            if self.uses_hopper {
                self.kernels.prefill_attention_wgmma(&input, &prefills, out)?;
            } else {
                self.kernels.prefill_attention(&input, &prefills, out)?;
            }
        }
        Ok(CudaHidden { address: out, ..query })
    }

    fn product_add(
        &mut self,
        input: &CudaHidden,
        weight: &CudaWeight,
        residual: CudaHidden,
    ) -> Result<CudaHidden> {
        self.product(residual.address, *input, None, weight, Epilogue::AddBf16)
    }

    fn norm_gated_product(
        &mut self,
        hidden: &CudaHidden,
        norm: &CudaWeight,
        gate_up: &CudaWeight,
    ) -> Result<CudaHidden> {
        let out = self.activations.gated.address();
        let product = gate_up.product(hidden.num_rows, Epilogue::Gated);
        if let Some(kernel) = self.product_kernel(&product) {
            return self.fused_product(kernel, product, out, *hidden, Some(norm), gate_up);
        }
        let both = self.activations.gate_up.address();
        let both = self.product(both, *hidden, Some(norm), gate_up, Epilogue::Bf16)?;
        let width = self.spec.intermediate_size;
        // SAFETY: as in `norm`.
        unsafe { self.kernels.silu_mul(out, both.address, both.num_rows, width) }?;
        Ok(CudaHidden { address: out, ..both })
    }

    fn logit_rows(
        &mut self,
        context: CudaHidden,
        residual: CudaHidden,
        step: &CudaStep,
    ) -> Result<(CudaHidden, CudaHidden)> {
        if step.is_graph {
            return Ok((context, residual));
        }
        self.launch_waiting()?;
        let gather =
            |out: &DeviceBuffer, source: CudaHidden, row_size: usize| -> Result<CudaHidden> {
                let gather = Gather {
                    out: out.address(),
                    source: source.address,
                    num_rows: step.counts.logit_rows,
                    num_source_rows: source.num_rows,
                    row_size,
                };
                // SAFETY: as in `norm`.
                unsafe { self.kernels.gather_rows(&gather, step.at.logit_row) }?;
                Ok(CudaHidden { address: gather.out, num_rows: gather.num_rows })
            };
        // Queries have been read by now, and are as wide as what attention made of them.
        let query_size = self.heads.num_heads * self.heads.head_dim;
        let context = gather(&self.activations.query, context, query_size)?;
        Ok((context, gather(&self.activations.gathered, residual, self.spec.hidden_size)?))
    }

    fn logits(
        &mut self,
        hidden: &CudaHidden,
        norm: &CudaWeight,
        weight: &CudaWeight,
        step: &CudaStep,
    ) -> Result<CudaHidden> {
        let out = self.activations.logits.address();
        let (num_rows, vocab_size) = (step.counts.logit_rows, self.spec.vocab_size);
        let mut at_once = num_rows.max(1);
        if step.keeps_logits {
            self.kept.resize(num_rows * vocab_size, 0.0);
            at_once = self.limits.max_sequences;
        }
        let mut logits = CudaHidden { address: out, num_rows: 0 };
        // More rows than the buffer has go to the host piece by piece. The first piece is the last
        // to be made, and stays: what is sampled comes first.
        for first in (0..num_rows).step_by(at_once).rev() {
            let num_rows = at_once.min(num_rows - first);
            let row_bytes = self.spec.hidden_size * BF16_BYTES;
            let address = hidden.address + (first * row_bytes) as u64;
            let rows = CudaHidden { address, num_rows };
            logits = self.product(out, rows, Some(norm), weight, Epilogue::F32)?;
            if step.keeps_logits {
                let kept = &mut self.kept[first * vocab_size..][..num_rows * vocab_size];
                self.activations.logits.download(0, kept)?;
            }
        }
        Ok(logits)
    }

    fn to_host(&mut self, _logits: CudaHidden, host: &mut Vec<f32>) -> Result<()> {
        *host = self.take_logits();
        Ok(())
    }
}
