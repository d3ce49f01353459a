//! The loop that everything turns on: schedule, launch, collect, update.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::error::Result;
use crate::executor::Executor;
use crate::ids::RequestId;
use crate::request::Request;
use crate::scheduler::{Scheduler, SchedulerConfig, SchedulerStats};
use crate::step::{ScheduleOutput, TokenEvent};

/// Owns scheduler and executor outright, on one thread: no lock is needed on the hot path.
#[derive(Debug)]
pub struct EngineCore {
    executor: Box<dyn Executor>,
    scheduler: Scheduler,
    /// With the times of their launches.
    in_flight: VecDeque<(ScheduleOutput, Instant)>,
    last_collect: Instant,
    max_steps_in_flight: usize,
}

impl EngineCore {
    /// An idle engine on `executor`.
    ///
    /// # Errors
    /// If a limit or `max_itl` in `config` is 0.
    pub fn new(config: SchedulerConfig, executor: Box<dyn Executor>) -> Result<Self> {
        let capacity = executor.capacity();
        Ok(Self {
            scheduler: Scheduler::new(config, capacity)?,
            in_flight: VecDeque::new(),
            last_collect: Instant::now(),
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
    /// An error of the executor is final: the caller tells every request.
    pub fn step(&mut self) -> Result<Vec<TokenEvent>> {
        let step = self.scheduler.schedule();
        let launched = !step.sequences.is_empty();
        if launched {
            let (sequences, preempted) = (step.sequences.len(), step.num_preempted);
            tracing::debug!(step = step.step, tokens = step.num_tokens, sequences, preempted);
            let start = Instant::now();
            self.executor.launch(&step)?;
            self.in_flight.push_back((step, start));
        }
        if launched && self.in_flight.len() < self.max_steps_in_flight {
            return Ok(Vec::new());
        }
        let Some((oldest, start)) = self.in_flight.pop_front() else { return Ok(Vec::new()) };
        let rows = self.executor.collect()?;
        let end = Instant::now();
        self.scheduler.observe(&oldest, step_time(start, self.last_collect, end));
        self.last_collect = end;
        self.scheduler.update(&oldest, rows)
    }

    /// Checks the scheduler's books.
    ///
    /// # Panics
    /// If something does not hold. For tests.
    pub fn check_invariants(&self) {
        self.scheduler.check_invariants();
        assert!(self.in_flight.len() < self.max_steps_in_flight, "too many in flight");
    }
}

/// How long a step took that was launched at `start`: while the one before it ran, it had to wait.
fn step_time(start: Instant, last_collect: Instant, end: Instant) -> Duration {
    end - start.max(last_collect)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::Capacity;
    use crate::ids::TokenId;
    use crate::request::{RequestKind, RequestLimits};
    use crate::sampling_params::SamplingParams;
    use crate::step::SampledRow;

    /// Gives no answer.
    #[derive(Debug)]
    struct Silent(u32);

    impl Executor for Silent {
        fn capacity(&self) -> Capacity {
            Capacity { num_blocks: 4, block_size: 1, max_steps_in_flight: self.0 }
        }

        fn launch(&mut self, _step: &ScheduleOutput) -> Result<()> {
            Ok(())
        }

        fn collect(&mut self) -> Result<Vec<SampledRow>> {
            Ok(Vec::new())
        }
    }

    fn engine(depth: u32) -> EngineCore {
        let config = SchedulerConfig { max_num_seqs: 4, max_num_batched_tokens: 8, max_itl: None };
        EngineCore::new(config, Box::new(Silent(depth))).unwrap()
    }

    #[test]
    fn a_depth_of_zero_counts_as_one() {
        assert_eq!(engine(0).max_steps_in_flight, 1);
    }

    #[test]
    fn a_step_lasts_from_its_launch_or_the_collect_before_it() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(step_time(at(3), at(1), at(10)), Duration::from_millis(7));
        assert_eq!(step_time(at(3), at(8), at(10)), Duration::from_millis(2));
        let mut engine = engine(1);
        let built = Instant::now();
        let limits = RequestLimits {
            vocab_size: 10,
            max_model_len: 10,
            num_blocks: 4,
            block_size: 1,
            eos_token_ids: [].into(),
            seed: 0,
        };
        let kind = RequestKind::Generate(SamplingParams { max_tokens: 1, ..Default::default() });
        engine.add(Request::new(RequestId(0), vec![TokenId(1)], kind, &limits).unwrap());
        engine.step().unwrap_err();
        assert!(engine.last_collect > built);
    }
}
