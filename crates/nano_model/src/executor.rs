//! The executor on the CPU: one step in flight, run where it is launched.

pub mod cuda;

use std::ops::Range;

use nano_core::executor::{Capacity, Executor};
use nano_core::step::{LogitRows, RowAnswer, SampledRow, ScheduleOutput, ScheduledSequence};
use nano_core::{Error as CoreError, TokenId};
use nano_kernels::cpu::Element;
use nano_kernels::cpu::sampling::sample;
use nano_kernels::reference::sampling::Sampling;

use crate::backend::Backend;
use crate::backend::cpu::CpuBackend;
use crate::batch::{Batch, num_logit_rows};
use crate::decoder::{Decoder, forward};
use crate::error::{Error, Result};

/// Runs steps on the CPU.
#[derive(Debug)]
pub struct CpuExecutor<E: Element> {
    backend: CpuBackend<E>,
    model: Decoder<CpuBackend<E>>,
    capacity: Capacity,
    vocab_size: usize,
    batch: Batch,
    /// Those of the step launched last.
    sequences: Vec<ScheduledSequence>,
    /// `[num_logit_rows, vocab_size]` of that step, until they are collected.
    logits: Vec<f32>,
    /// One for each of the sequences, and perhaps more.
    draws: Vec<Draw>,
    /// The token that each sequence of the last step sampled.
    previous: Vec<TokenId>,
}

/// The choice of one sequence's token.
#[derive(Debug, Default)]
struct Draw {
    /// Where its rows of logits are.
    logits: Range<usize>,
    token: Option<u32>,
    /// Memory for the logits that thresholds keep.
    kept: Vec<f32>,
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
            batch: Batch::default(),
            sequences: Vec::new(),
            logits: Vec::new(),
            draws: Vec::new(),
            previous: Vec::new(),
        }
    }

    fn run(&mut self, step: &ScheduleOutput) -> Result<()> {
        let order = 0..step.sequences.len();
        self.batch.refill(step, order, self.capacity.block_size, &self.previous);
        let prepared = self.backend.prepare(&self.batch)?;
        let logits = forward(&mut self.backend, &self.model, &prepared)?;
        self.backend.to_host(logits, &mut self.logits)?;
        self.sequences.clone_from(&step.sequences);
        self.sample_rows();
        Ok(())
    }

    fn sample_rows(&mut self) {
        let Self { sequences, logits, draws, vocab_size, .. } = self;
        let vocab_size = *vocab_size;
        draws.resize_with(sequences.len().max(draws.len()), Draw::default);
        let mut start = 0;
        for (scheduled, draw) in sequences.iter().zip(&mut *draws) {
            draw.logits = start..start + num_logit_rows(scheduled) as usize * vocab_size;
            draw.token = None;
            start = draw.logits.end;
            for token in scheduled.banned.iter().flat_map(|banned| &**banned) {
                let last = &mut logits[draw.logits.end - vocab_size..draw.logits.end];
                if let Some(logit) = last.get_mut(token.0 as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        let pool = self.backend.pool();
        let isa = pool.isa();
        pool.each(&mut draws[..sequences.len()], |row, draw| {
            let scheduled = &sequences[row];
            if scheduled.logit_rows == LogitRows::Last {
                let last = &logits[draw.logits.end - vocab_size..draw.logits.end];
                draw.token = sample(isa, last, &sampling_of(scheduled), &mut draw.kept);
            }
        });
        self.previous.clear();
        let tokens = draws[..sequences.len()].iter().map(|draw| TokenId(draw.token.unwrap_or(0)));
        self.previous.extend(tokens);
    }
}

/// How a sequence's next token is chosen: nothing becomes infinite, or a `top_p` zero.
fn sampling_of(scheduled: &ScheduledSequence) -> Sampling {
    let params = &scheduled.params;
    Sampling {
        temperature: params.temperature.min(f32::MAX.into()) as f32,
        top_k: params.top_k,
        top_p: params.top_p.max(f32::MIN_POSITIVE.into()) as f32,
        min_p: params.min_p as f32,
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

    fn collect(&mut self) -> nano_core::Result<Vec<SampledRow>> {
        let mut rows = Vec::with_capacity(self.sequences.len());
        for (scheduled, draw) in self.sequences.iter().zip(&self.draws) {
            let answer = match (scheduled.logit_rows, draw.token) {
                (LogitRows::None, _) => continue,
                (LogitRows::All, _) => RowAnswer::Logits(self.logits[draw.logits.clone()].to_vec()),
                (LogitRows::Last, Some(token)) => RowAnswer::Token(TokenId(token)),
                (LogitRows::Last, None) => {
                    let position = scheduled.context_len();
                    RowAnswer::Error(CoreError::LogitsNotFinite { position })
                }
            };
            rows.push(SampledRow { sequence: scheduled.sequence, answer });
        }
        if self.sequences.iter().any(|it| it.logit_rows == LogitRows::All) {
            // They have a row for each token, other steps one for a sequence.
            self.logits = Vec::new();
        }
        Ok(rows)
    }
}

fn failed(error: &Error) -> CoreError {
    match error {
        Error::Stopped => CoreError::Stopped,
        _ => CoreError::ExecutorFailed { message: error.to_string() },
    }
}
