//! The loop that everything turns on: schedule, launch, collect, update.

use std::collections::VecDeque;

use crate::error::Result;
use crate::executor::Executor;
use crate::ids::RequestId;
use crate::request::Request;
use crate::scheduler::output::{FinishReason, ScheduleOutput, TokenEvent};
use crate::scheduler::{Scheduler, SchedulerConfig, SchedulerStats};

/// Owns scheduler and executor outright, on one thread: no lock is needed on the hot path.
#[derive(Debug)]
pub struct EngineCore<E> {
    executor: E,
    scheduler: Scheduler,
    in_flight: VecDeque<ScheduleOutput>,
    max_steps_in_flight: usize,
}

impl<E: Executor> EngineCore<E> {
    /// An idle engine on `executor`.
    ///
    /// # Errors
    /// If a limit in `config` is 0.
    pub fn new(config: SchedulerConfig, executor: E) -> Result<Self> {
        let capacity = executor.capacity();
        Ok(Self {
            scheduler: Scheduler::new(config, capacity)?,
            in_flight: VecDeque::new(),
            max_steps_in_flight: capacity.max_steps_in_flight.max(1) as usize,
            executor,
        })
    }

    /// Queues a request.
    pub fn add(&mut self, request: Request) {
        self.scheduler.add(request);
    }

    /// Drops a request; `None` if it has ended already.
    pub fn abort(&mut self, request: RequestId) -> Option<TokenEvent> {
        self.scheduler.abort(request)
    }

    /// Ends every request with `reason`; steps in flight are no longer waited for.
    pub fn abort_all(&mut self, reason: &FinishReason) -> Vec<TokenEvent> {
        self.scheduler.abort_all(reason)
    }

    /// Whether a call of [`step`](Self::step) has nothing to do.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle() && self.in_flight.is_empty()
    }

    /// The present load.
    pub fn stats(&self) -> SchedulerStats {
        self.scheduler.stats()
    }

    /// Launches the next step if there is one, then collects the oldest if the pipeline is full
    /// or there was nothing to launch.
    ///
    /// # Errors
    /// An error of the executor is final: the caller ends every request with it.
    pub fn step(&mut self) -> Result<Vec<TokenEvent>> {
        let step = self.scheduler.schedule();
        let launched = !step.sequences.is_empty();
        if launched {
            self.executor.launch(&step)?;
            self.executor.sample(&self.scheduler.token_masks(&step))?;
            self.in_flight.push_back(step);
        }
        if launched && self.in_flight.len() < self.max_steps_in_flight {
            return Ok(Vec::new());
        }
        let Some(oldest) = self.in_flight.pop_front() else { return Ok(Vec::new()) };
        let output = self.executor.collect()?;
        self.scheduler.update(&oldest, output)
    }

    /// Checks the scheduler's books.
    ///
    /// # Panics
    /// If something does not hold. For tests.
    pub fn check_invariants(&self) {
        self.scheduler.check_invariants();
        assert!(self.in_flight.len() < self.max_steps_in_flight.max(2), "too many in flight");
    }
}
