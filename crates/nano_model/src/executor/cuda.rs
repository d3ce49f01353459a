//! The executor on one GPU: two steps in flight, decoding by captured graphs.
//!
//! A step is one copy to the device (two, where most of the block tables is unused), one graph (or,
//! with prompts in it, the operators one by one), and the sampling, which writes four bytes a
//! sequence to the host. The next step reads what this one sampled on the device, so the host never
//! waits between the two.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use nano_core::executor::{Capacity, Executor};
use nano_core::step::{LogitRows, RowAnswer, SampledRow, ScheduleOutput, ScheduledSequence};
use nano_core::{Error as CoreError, SequenceId, TokenId};
use nano_kernels::cuda::sampling::{NO_TOKEN, RowSampling};
use nano_kernels::cuda::{Error as CudaError, Graph};

use super::{failed, sampling_of};
use crate::backend::cuda::{Answer, CudaBackend, CudaStep, StepInput};
use crate::batch::Batch;
use crate::decoder::{Decoder, forward};
use crate::error::{Error, Result};

/// Steps that are launched and not collected.
pub const MAX_STEPS_IN_FLIGHT: u32 = 2;
/// More sequences than this decode without a graph: a launch costs nothing beside so large a step.
const MAX_GRAPH_ROWS: usize = 256;

/// Runs steps on a GPU.
#[derive(Debug)]
pub struct CudaExecutor {
    // Dropped in this order: what names memory before what owns it.
    graphs: BTreeMap<usize, Graph>,
    in_flight: VecDeque<InFlight>,
    idle: Vec<Answer>,
    model: Decoder<CudaBackend>,
    backend: CudaBackend,
    capacity: Capacity,
    /// For each sequence of the step launched last, the row of its choice.
    previous: Vec<TokenId>,
}

#[derive(Debug)]
struct InFlight {
    step: CudaStep,
    rows: Vec<Row>,
    logits: Vec<f32>,
    answer: Answer,
}

/// What a sequence gets of a step.
#[derive(Debug)]
struct Row {
    sequence: SequenceId,
    /// The position of the token to be sampled.
    position: u32,
    wanted: Wanted,
}

#[derive(Debug)]
enum Wanted {
    Nothing,
    /// The choice at this row.
    Token(usize),
    /// These rows of logits.
    Logits(Range<usize>),
}

impl CudaExecutor {
    /// Runs `model` on `backend`, which has its cache; captures the graphs.
    ///
    /// # Errors
    /// If the device fails or has too little memory.
    pub fn new(
        mut backend: CudaBackend,
        model: Decoder<CudaBackend>,
        capacity: Capacity,
    ) -> Result<Self> {
        let limits = backend.limits();
        let mut graphs = BTreeMap::new();
        for num_rows in graph_sizes(limits.max_tokens.min(limits.max_sequences)) {
            let input = StepInput { graph_rows: Some(num_rows), ..StepInput::default() };
            let step = backend.upload(&input)?;
            // Once outside of the capture, during which nothing may be loaded.
            forward(&mut backend, &model, &step)?;
            let device = backend.device().clone();
            let graph = Graph::capture(&device, || forward(&mut backend, &model, &step).map(drop))?;
            graphs.insert(num_rows, graph);
        }
        backend.device().synchronize()?;
        let answer = |_| Answer::new(backend.device(), limits.max_sequences);
        let idle = (0..MAX_STEPS_IN_FLIGHT).map(answer).collect::<Result<_>>()?;
        let (in_flight, previous) = (VecDeque::new(), Vec::new());
        Ok(Self { graphs, in_flight, idle, model, backend, capacity, previous })
    }

    fn launch_step(&mut self, step: &ScheduleOutput) -> Result<()> {
        let answer = self.idle.pop().ok_or_else(|| broken("more steps than two are in flight"))?;
        let (input, rows) = self.plan(step);
        let launched = self.backend.upload(&input)?;
        match input.graph_rows.and_then(|num_rows| self.graphs.get(&num_rows)) {
            Some(graph) => graph.launch()?,
            None => drop(forward(&mut self.backend, &self.model, &launched)?),
        }
        let logits = self.backend.take_logits();
        let chosen = |row: &Row| match row.wanted {
            Wanted::Token(at) => TokenId(at as u32),
            _ => TokenId(0),
        };
        self.previous = rows.iter().map(chosen).collect();
        self.in_flight.push_back(InFlight { step: launched, rows, logits, answer });
        self.sample_step(step)
    }

    /// How a step runs, and what each of its sequences gets.
    fn plan(&self, step: &ScheduleOutput) -> (StepInput, Vec<Row>) {
        let scheduled = &step.sequences;
        let keeps_logits = scheduled.iter().any(|it| it.logit_rows == LogitRows::All);
        let decodes = !keeps_logits && scheduled.iter().all(is_single);
        let fitting = self.graphs.range(scheduled.len()..).next();
        let graph_rows = fitting.filter(|_| decodes).map(|(&num_rows, _)| num_rows);

        // Rows that decode come first; the rest keeps its order.
        let mut order: Vec<usize> = (0..scheduled.len()).collect();
        order.sort_by_key(|&index| !is_single(&scheduled[index]));
        let block_size = self.capacity.block_size;
        let mut batch = Batch::ordered(step, order.iter().copied(), block_size, &self.previous);
        // What is sampled comes before what is only kept; a graph has logits of every row.
        batch.logit_rows.clear();
        let mut sampling = Vec::new();
        let row = |it: &ScheduledSequence| Row {
            sequence: it.sequence,
            position: it.context_len(),
            wanted: Wanted::Nothing,
        };
        let mut rows: Vec<Row> = scheduled.iter().map(row).collect();
        for (part, &index) in batch.sequences.iter().zip(&order) {
            let wants_token = scheduled[index].logit_rows == LogitRows::Last;
            if wants_token {
                rows[index].wanted = Wanted::Token(sampling.len());
            }
            if wants_token || graph_rows.is_some() {
                batch.logit_rows.push((part.first_row + part.num_rows - 1) as u32);
                sampling.push(RowSampling::from(&sampling_of(&scheduled[index])));
            }
        }
        for (part, &index) in batch.sequences.iter().zip(&order) {
            if scheduled[index].logit_rows == LogitRows::All {
                let first = batch.logit_rows.len();
                batch.logit_rows.extend((part.first_row..).take(part.num_rows).map(|it| it as u32));
                rows[index].wanted = Wanted::Logits(first..batch.logit_rows.len());
            }
        }
        (StepInput { batch, sampling, graph_rows, keeps_logits }, rows)
    }

    fn sample_step(&mut self, step: &ScheduleOutput) -> Result<()> {
        let flight = self.in_flight.back_mut().ok_or_else(|| broken("no step was launched"))?;
        let mut banned = Vec::new();
        for (row, scheduled) in flight.rows.iter().zip(&step.sequences) {
            if let (Wanted::Token(at), Some(tokens)) = (&row.wanted, &scheduled.banned) {
                banned.extend(tokens.iter().flat_map(|token| [*at as u32, token.0]));
            }
        }
        self.backend.sample(&flight.step, &banned, &mut flight.answer)
    }

    fn collect_step(&mut self) -> Result<Vec<SampledRow>> {
        let flight = self.in_flight.pop_front().ok_or_else(|| broken("no step is in flight"))?;
        let chosen = flight.answer.wait()?;
        let vocab_size = self.backend.spec().vocab_size;
        let mut answers = Vec::new();
        for Row { sequence, position, wanted } in flight.rows {
            let answer = match wanted {
                Wanted::Nothing => continue,
                Wanted::Token(at) => match u32::from_ne_bytes(chosen[at]) {
                    NO_TOKEN => RowAnswer::Error(CoreError::LogitsNotFinite { position }),
                    token => RowAnswer::Token(TokenId(token)),
                },
                Wanted::Logits(rows) => {
                    let numbers = rows.start * vocab_size..rows.end * vocab_size;
                    RowAnswer::Logits(flight.logits[numbers].to_vec())
                }
            };
            answers.push(SampledRow { sequence, answer });
        }
        self.idle.push(flight.answer);
        Ok(answers)
    }
}

fn is_single(scheduled: &ScheduledSequence) -> bool {
    scheduled.num_scheduled_tokens == 1
}

/// Rows that steps are filled up to: 1, 2, 4, 8, 16, 24 and so on, the last one at least `most`.
fn graph_sizes(most: usize) -> Vec<usize> {
    let all = [1, 2, 4].into_iter().chain((8..=MAX_GRAPH_ROWS).step_by(8));
    let mut sizes: Vec<usize> = all.clone().take_while(|&size| size < most).collect();
    sizes.extend(all.skip(sizes.len()).take(1));
    sizes
}

/// A caller that does not keep to the order of launch and collect.
fn broken(message: &str) -> Error {
    CudaError::Driver(message.to_owned()).into()
}

impl Executor for CudaExecutor {
    fn capacity(&self) -> Capacity {
        self.capacity
    }

    fn launch(&mut self, step: &ScheduleOutput) -> nano_core::Result<()> {
        self.launch_step(step).map_err(|error| failed(&error))
    }

    fn collect(&mut self) -> nano_core::Result<Vec<SampledRow>> {
        self.collect_step().map_err(|error| failed(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_graph_has_room_for_every_batch_up_to_its_bound() {
        assert_eq!(graph_sizes(1), [1]);
        assert_eq!(graph_sizes(5), [1, 2, 4, 8]);
        assert_eq!(graph_sizes(8), [1, 2, 4, 8]);
        assert_eq!(graph_sizes(17), [1, 2, 4, 8, 16, 24]);
        for most in [256, 1000] {
            assert_eq!((graph_sizes(most).len(), graph_sizes(most).last()), (35, Some(&256)));
        }
    }
}
