//! The executor on the CPU: one step in flight, run where it is launched.

use nano_core::executor::{Capacity, Executor};
use nano_core::scheduler::output::{LogitRows, SampledRow, ScheduleOutput, StepOutput, TokenMasks};
use nano_core::{Error as CoreError, TokenId};
use nano_kernels::reference::sampling::{Sampling, sample};
use smallvec::smallvec;

use crate::backend::Backend;
use crate::batch::Batch;
use crate::decoder::{Decoder, forward};
use crate::error::{Error, Result};

/// Runs steps on a back end whose operators are done when they return.
#[derive(Debug)]
pub struct CpuExecutor<B: Backend> {
    backend: B,
    model: Decoder<B>,
    capacity: Capacity,
    vocab_size: usize,
    /// The step that was launched and not collected.
    step: ScheduleOutput,
    /// `[num_logit_rows, vocab_size]` of that step.
    logits: Vec<f32>,
    rows: Vec<SampledRow>,
    /// The token that each sequence of the last step sampled.
    previous: Vec<TokenId>,
}

impl<B: Backend> CpuExecutor<B> {
    /// Runs `model` on `backend`, whose cache has the given capacity.
    pub fn new(backend: B, model: Decoder<B>, capacity: Capacity, vocab_size: usize) -> Self {
        Self {
            backend,
            model,
            capacity,
            vocab_size,
            step: ScheduleOutput::default(),
            logits: Vec::new(),
            rows: Vec::new(),
            previous: Vec::new(),
        }
    }

    fn run(&mut self, step: &ScheduleOutput) -> Result<()> {
        let batch = Batch::new(step, self.capacity.block_size, &self.previous);
        let logits = forward(&mut self.backend, &self.model, &batch)?;
        self.backend.to_host(logits, &mut self.logits)?;
        self.step = step.clone();
        Ok(())
    }

    fn sample_rows(&mut self, masks: &TokenMasks) -> Result<()> {
        let mut logits = &mut self.logits[..];
        let mut banned = masks.banned.iter().peekable();
        self.previous.clear();
        for (row, scheduled) in self.step.sequences.iter().enumerate() {
            let num_rows = match scheduled.logit_rows {
                LogitRows::None => 0,
                LogitRows::Last(last) => last.min(scheduled.num_scheduled_tokens),
                LogitRows::All => scheduled.num_scheduled_tokens,
            };
            let (mine, rest) =
                std::mem::take(&mut logits).split_at_mut(num_rows as usize * self.vocab_size);
            logits = rest;
            let sequence = scheduled.sequence;
            let mut token = TokenId(0);
            match scheduled.logit_rows {
                LogitRows::None => {}
                LogitRows::All => {
                    let (tokens, logits) = (smallvec![], Some(mine.to_vec()));
                    self.rows.push(SampledRow { sequence, tokens, logits });
                }
                LogitRows::Last(_) => {
                    let last = mine.len() - self.vocab_size;
                    let mine = &mut mine[last..];
                    while let Some(mask) = banned.next_if(|mask| mask.row as usize <= row) {
                        let mine_too = mask.row as usize == row;
                        for token in mask.token_ids.iter().filter(|_| mine_too) {
                            if let Some(logit) = mine.get_mut(token.0 as usize) {
                                *logit = f32::NEG_INFINITY;
                            }
                        }
                    }
                    let position = scheduled.context_len();
                    let params = &scheduled.params;
                    let sampling = Sampling {
                        temperature: params.temperature,
                        top_k: params.top_k,
                        top_p: params.top_p,
                        min_p: params.min_p,
                        seed: scheduled.seed,
                        position,
                        index: 0,
                    };
                    let chosen = sample(mine, &sampling);
                    token = TokenId(chosen.ok_or(Error::NotFinite { position })?);
                    let (tokens, logits) = (smallvec![token], None);
                    self.rows.push(SampledRow { sequence, tokens, logits });
                }
            }
            self.previous.push(token);
        }
        Ok(())
    }
}

impl<B: Backend> Executor for CpuExecutor<B> {
    fn capacity(&self) -> Capacity {
        self.capacity
    }

    fn launch(&mut self, step: &ScheduleOutput) -> nano_core::Result<()> {
        self.run(step).map_err(|error| failed(&error))
    }

    fn sample(&mut self, masks: &TokenMasks) -> nano_core::Result<()> {
        self.sample_rows(masks).map_err(|error| failed(&error))
    }

    fn collect(&mut self) -> nano_core::Result<StepOutput> {
        Ok(StepOutput { rows: std::mem::take(&mut self.rows) })
    }
}

fn failed(error: &Error) -> CoreError {
    CoreError::ExecutorFailed { message: error.to_string() }
}
