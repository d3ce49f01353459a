//! The executor on the CPU: one step in flight, run where it is launched.

pub mod cuda;

use nano_core::executor::{Capacity, Executor};
use nano_core::scheduler::output::{
    LogitRows, SampledRow, ScheduleOutput, ScheduledSequence, StepOutput, TokenMasks,
};
use nano_core::{Error as CoreError, TokenId};
use nano_kernels::cpu::sampling::sample;
use nano_kernels::cpu::{Element, Isa};
use nano_kernels::reference::sampling::Sampling;
use parking_lot::Mutex;
use smallvec::smallvec;

use crate::backend::Backend;
use crate::backend::cpu::CpuBackend;
use crate::batch::Batch;
use crate::decoder::{Decoder, forward};
use crate::error::{Error, Result};

/// Runs steps on the CPU.
#[derive(Debug)]
pub struct CpuExecutor<E: Element> {
    backend: CpuBackend<E>,
    model: Decoder<CpuBackend<E>>,
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

impl<E: Element> CpuExecutor<E> {
    /// Runs `model` on `backend`, whose cache has the given capacity.
    pub fn new(
        backend: CpuBackend<E>,
        model: Decoder<CpuBackend<E>>,
        capacity: Capacity,
        vocab_size: usize,
    ) -> Self {
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
        let prepared = self.backend.prepare(&batch)?;
        let logits = forward(&mut self.backend, &self.model, &prepared)?;
        self.backend.to_host(logits, &mut self.logits)?;
        self.step = step.clone();
        Ok(())
    }

    fn sample_rows(&mut self, masks: &TokenMasks) {
        let mut logits = &mut self.logits[..];
        let mut banned = masks.banned.iter().peekable();
        // Each sequence's logits, and the token that comes of them.
        let mut rows: Vec<Mutex<(&mut [f32], Option<u32>)>> = Vec::new();
        for (row, scheduled) in self.step.sequences.iter().enumerate() {
            let num_rows = num_logit_rows(scheduled);
            let (mine, rest) = std::mem::take(&mut logits).split_at_mut(num_rows * self.vocab_size);
            logits = rest;
            while let Some(mask) = banned.next_if(|mask| mask.row as usize <= row) {
                let is_mine = mask.row as usize == row && num_rows > 0;
                for token in mask.token_ids.iter().filter(|_| is_mine) {
                    let last = (num_rows - 1) * self.vocab_size;
                    if let Some(logit) = mine[last..].get_mut(token.0 as usize) {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
            rows.push(Mutex::new((mine, None)));
        }
        let sequences = &self.step.sequences;
        self.backend.pool().run(rows.len(), &|row| {
            let scheduled = &sequences[row];
            if let LogitRows::Last(_) = scheduled.logit_rows {
                let (logits, token) = &mut *rows[row].lock();
                let last = logits.len() - self.vocab_size;
                *token = sample(Isa::detect(), &logits[last..], &sampling_of(scheduled));
            }
        });
        self.previous.clear();
        for (scheduled, row) in sequences.iter().zip(rows) {
            let (logits, token) = row.into_inner();
            let mut answer = SampledRow {
                sequence: scheduled.sequence,
                tokens: smallvec![],
                logits: None,
                error: None,
            };
            match (scheduled.logit_rows, token) {
                (LogitRows::None, _) => {}
                (LogitRows::All, _) => answer.logits = Some(logits.to_vec()),
                (LogitRows::Last(_), Some(token)) => answer.tokens.push(TokenId(token)),
                (LogitRows::Last(_), None) => {
                    let position = scheduled.context_len();
                    answer.error = Some(CoreError::LogitsNotFinite { position });
                }
            }
            self.previous.push(TokenId(token.unwrap_or(0)));
            if scheduled.logit_rows != LogitRows::None {
                self.rows.push(answer);
            }
        }
    }
}

/// The rows of logits that a sequence has in its step.
fn num_logit_rows(scheduled: &ScheduledSequence) -> usize {
    match scheduled.logit_rows {
        LogitRows::None => 0,
        LogitRows::Last(last) => last.min(scheduled.num_scheduled_tokens) as usize,
        LogitRows::All => scheduled.num_scheduled_tokens as usize,
    }
}

/// How a sequence's next token is chosen.
fn sampling_of(scheduled: &ScheduledSequence) -> Sampling {
    let params = &scheduled.params;
    Sampling {
        temperature: params.temperature,
        top_k: params.top_k,
        top_p: params.top_p,
        min_p: params.min_p,
        seed: scheduled.seed,
        position: scheduled.context_len(),
        index: 0,
    }
}

impl<E: Element> Executor for CpuExecutor<E> {
    fn capacity(&self) -> Capacity {
        self.capacity
    }

    fn launch(&mut self, step: &ScheduleOutput) -> nano_core::Result<()> {
        self.run(step).map_err(|error| failed(&error))
    }

    fn sample(&mut self, masks: &TokenMasks) -> nano_core::Result<()> {
        self.sample_rows(masks);
        Ok(())
    }

    fn collect(&mut self) -> nano_core::Result<StepOutput> {
        Ok(StepOutput { rows: std::mem::take(&mut self.rows) })
    }
}

fn failed(error: &Error) -> CoreError {
    CoreError::ExecutorFailed { message: error.to_string() }
}
