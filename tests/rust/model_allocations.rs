//! A warm decode step takes no memory from the heap.
#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod model_fixture;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs::{self, DirEntry};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::{io, thread};

use model_fixture::{BLOCK_SIZE, load, model, options};
use nano_core::step::{LogitRows, RowAnswer, ScheduledSequence, TokenSource};
use nano_core::{BlockId, SamplingParams, ScheduleOutput, SequenceId, TokenId};
use nano_model::{Dtype, ModelOptions};

/// The system's allocator, and how often it was asked for memory by any thread but the harness's.
struct Counting;

static NUM_ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static IS_FIRST: AtomicBool = AtomicBool::new(true);

thread_local! {
    /// The harness keeps its books beside the test, on the thread that began the process.
    static IS_HARNESS: Cell<bool> = const { Cell::new(false) };
}

// SAFETY: the system's, unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if IS_FIRST.swap(false, Ordering::Relaxed) {
            IS_HARNESS.set(true);
        }
        NUM_ALLOCATIONS.fetch_add((!IS_HARNESS.get()).into(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(address, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn num_allocations(work: impl FnOnce()) -> usize {
    let before = NUM_ALLOCATIONS.load(Ordering::Relaxed);
    work();
    NUM_ALLOCATIONS.load(Ordering::Relaxed) - before
}

/// A thread takes memory when it begins; once it has its name it is done with that.
fn wait_for_worker() {
    let is_named = |task: io::Result<DirEntry>| {
        let name = fs::read_to_string(task.unwrap().path().join("comm"));
        name.is_ok_and(|name| name.trim() == "nano-cpu-1")
    };
    while !fs::read_dir("/proc/self/task").unwrap().any(is_named) {
        thread::yield_now();
    }
}

/// A step in which each sequence runs the token at `position`, and the way of choosing differs.
fn decode(num_sequences: u32, position: u32) -> ScheduleOutput {
    let mut step = ScheduleOutput::default();
    for row in 0..num_sequences {
        let first_block = step.block_ids.len() as u32;
        let blocks = (0..=position / BLOCK_SIZE).map(|at| BlockId(at * num_sequences + row));
        step.block_ids.extend(blocks);
        step.token_ids.push(TokenId(row));
        step.sequences.push(ScheduledSequence {
            sequence: SequenceId(row.into()),
            tokens: match row % 2 {
                0 => TokenSource::PreviousStep { row },
                _ => TokenSource::Host(row..row + 1),
            },
            num_computed_tokens: position,
            num_scheduled_tokens: 1,
            block_table: first_block..step.block_ids.len() as u32,
            logit_rows: LogitRows::Last,
            banned: None,
            params: Arc::new(SamplingParams {
                temperature: [0.0, 0.7][row as usize % 2],
                top_k: [None, None, Some(5)][row as usize % 3],
                top_p: [1.0, 0.9][row as usize / 2 % 2],
                ..SamplingParams::default()
            }),
            seed: row.into(),
        });
    }
    step.num_tokens = num_sequences;
    step
}

#[test]

fn warm_decode_steps_take_no_memory_but_for_their_answer() {
    let dir = model();
    for (dtype, num_sequences) in [(Dtype::Float32, 3), (Dtype::BFloat16, 14)] {
        let num_blocks = Some(num_sequences * 12);
        let num_threads = Some(2);
        let options = ModelOptions { dtype: Some(dtype), num_blocks, num_threads, ..options() };
        let (mut executor, _) = load(dir.path(), &options).unwrap();
        wait_for_worker();
        // The first step's sequences name nothing before; the second is as long as any.
        let mut first = decode(num_sequences, 40);
        for (row, sequence) in (0..).zip(&mut first.sequences) {
            sequence.tokens = TokenSource::Host(row..row + 1);
        }
        let longest = decode(num_sequences, 40);
        for step in [&first, &longest] {
            executor.launch(step).unwrap();
            executor.collect().unwrap();
        }
        for position in 20..=40 {
            let step = decode(num_sequences, position);
            let run = num_allocations(|| executor.launch(&step).unwrap());
            assert_eq!(run, 0, "{num_sequences} sequences at {position}");
            let mut rows = Vec::new();
            let answer = num_allocations(|| rows = executor.collect().unwrap());
            // The rows, which the scheduler keeps.
            assert_eq!((answer, rows.len()), (1, num_sequences as usize));
            assert!(rows.iter().all(|row| matches!(row.answer, RowAnswer::Token(_))));
        }
    }
}
