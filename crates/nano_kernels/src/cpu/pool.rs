//! The threads of an engine: one pool for every operator.
//!
//! An operator of a decode step lasts some hundred microseconds and there are some 160 of them, so
//! a worker looks for the next one for a while before it sleeps, and nobody waits for a worker
//! that has not come: what is left to do is claimed task by task, by the caller too.

use std::any::Any;
use std::cell::UnsafeCell;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::isa::Isa;
use super::shared::SharedMut;

/// Looks at the state before a worker sleeps: tens of microseconds.
const NUM_LOOKS: u32 = 1 << 12;
/// In the state: workers that are at it (bits 0 to 30), whether one may join, and the job's number.
const OPEN: u64 = 1 << 31;
const NEXT_JOB: u64 = 1 << 32;

/// A job: a function of a task's number, and the number of tasks.
type Job = (&'static (dyn Fn(usize) + Sync), usize);

#[derive(Debug, Default)]
struct Shared {
    /// See [`OPEN`].
    state: AtomicU64,
    next_task: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    /// The last task's, for the caller of the job.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    is_closed: AtomicBool,
    num_sleepers: AtomicUsize,
}

// SAFETY: `job` is written while no worker is at it and none may join (see `Pool::run`), and what
// it points to is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

/// Threads that wait for work, the caller among them, and the instructions that they use.
#[derive(Debug)]
pub struct Pool {
    isa: Isa,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `num_threads`, the caller included. Fewer, if the system gives no more.
    pub fn new(num_threads: NonZero<usize>, isa: Isa) -> Self {
        let shared = Arc::<Shared>::default();
        let spawn = |index| {
            let shared = Arc::clone(&shared);
            let name = format!("nano-cpu-{index}");
            thread::Builder::new().name(name).spawn(move || shared.work()).ok()
        };
        let workers = (1..num_threads.get()).filter_map(spawn).collect();
        Self { isa, shared, workers }
    }

    /// The instructions that operators on this pool use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads, the caller included.
    pub fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `job` once for each item, with its index, as [`run`](Self::run) does.
    ///
    /// # Panics
    /// If the job does.
    pub fn each<T: Send>(&mut self, items: &mut [T], job: impl Fn(usize, &mut T) + Sync) {
        let num_items = items.len();
        let items = SharedMut::new(items);
        self.run(num_items, &|index| {
            // SAFETY: an item is one task's.
            let item = unsafe { items.slice(index, 1) };
            job(index, &mut item[0]);
        });
    }

    /// Runs `job` once for each number below `num_tasks`, on all threads, and returns when all are
    /// done.
    ///
    /// # Panics
    /// If the job does.
    pub fn run(&mut self, num_tasks: usize, job: &(dyn Fn(usize) + Sync)) {
        if num_tasks <= 1 || self.workers.is_empty() {
            (0..num_tasks).for_each(job);
            return;
        }
        let shared = &*self.shared;
        // SAFETY: the lifetime that is dropped is longer than this call, which ends after the last
        // worker has left.
        let job = unsafe {
            std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(job)
        };
        // SAFETY: `self` is borrowed exclusively, so no other job is open, and the loop at the end
        // of the last one saw the last worker leave: nobody reads `job` now.
        unsafe { *shared.job.get() = Some((job, num_tasks)) };
        shared.next_task.store(0, Ordering::Relaxed);
        // One total order with the sleeper's count: either it sees this job or is seen asleep.
        shared.state.fetch_add(NEXT_JOB + OPEN, Ordering::SeqCst);
        if shared.num_sleepers.load(Ordering::SeqCst) > 0 {
            self.unpark();
        }
        // Nothing may leave this frame before the workers have: they hold a pointer into it.
        shared.claim_tasks();
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut looks = 0_u32;
        while shared.state.load(Ordering::Acquire) & (OPEN - 1) != 0 {
            looks += 1;
            if looks < NUM_LOOKS { std::hint::spin_loop() } else { thread::yield_now() }
        }
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    fn unpark(&self) {
        self.workers.iter().for_each(|worker| worker.thread().unpark());
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.is_closed.store(true, Ordering::SeqCst);
        self.unpark();
        for worker in self.workers.drain(..) {
            // A worker cannot panic: tasks are caught.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Runs tasks until none is left. A panic of one is noted for the caller of the job.
    fn claim_tasks(&self) {
        // SAFETY: the job is open, or was when this thread joined; it is not written until this
        // thread has left, and lives as long.
        let Some((job, num_tasks)) = (unsafe { *self.job.get() }) else { return };
        let run = || loop {
            let task = self.next_task.fetch_add(1, Ordering::Relaxed);
            if task >= num_tasks {
                break;
            }
            job(task);
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
    }

    /// The life of a worker.
    fn work(&self) {
        let mut last_job = 0;
        let mut looks = 0;
        while !self.is_closed.load(Ordering::Relaxed) {
            let state = self.state.load(Ordering::SeqCst);
            if state & OPEN != 0 && state / NEXT_JOB != last_job {
                let joined = self.state.compare_exchange(
                    state,
                    state + 1,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
                if joined.is_ok() {
                    last_job = state / NEXT_JOB;
                    self.claim_tasks();
                    self.state.fetch_sub(1, Ordering::Release);
                }
                looks = 0;
            } else if looks < NUM_LOOKS {
                looks += 1;
                std::hint::spin_loop();
            } else {
                self.num_sleepers.fetch_add(1, Ordering::SeqCst);
                let state = self.state.load(Ordering::SeqCst);
                let is_idle = state & OPEN == 0 || state / NEXT_JOB == last_job;
                if is_idle && !self.is_closed.load(Ordering::SeqCst) {
                    thread::park();
                }
                self.num_sleepers.fetch_sub(1, Ordering::SeqCst);
                looks = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_task_runs_once() {
        for num_threads in [1, 2, 5] {
            let mut pool = Pool::new(NonZero::new(num_threads).unwrap(), Isa::asked().unwrap());
            assert_eq!(pool.num_threads(), num_threads);
            for round in 0..2000 {
                let counts: Vec<AtomicUsize> =
                    (0..round % 17).map(|_| AtomicUsize::new(0)).collect();
                pool.run(counts.len(), &|task| {
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
                let mut items = vec![0; counts.len()];
                pool.each(&mut items, |index, item| *item += index + 1);
                assert!(items.into_iter().eq(1..=counts.len()));
                if round % 500 == 0 {
                    // Long enough for the workers to fall asleep.
                    thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let mut pool = Pool::new(NonZero::new(3).unwrap(), Isa::asked().unwrap());
        for _ in 0..50 {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(9, &|task| assert!(task != 4, "as planned"));
            }));
            assert_eq!(outcome.unwrap_err().downcast_ref(), Some(&"as planned"));
            let sum = AtomicUsize::new(0);
            pool.run(9, &|task| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 36);
        }
    }
}
