//! How a CUDA kernel is timed, and what becomes of the time: a row of a table and, where a baseline
//! is asked for, a figure that criterion keeps and compares.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use criterion::Criterion;
use nano_kernels::cuda::{Device, Graph, Result};

/// Launches of a graph.
pub(crate) const LAUNCHES: usize = 40;
const REPLAYS: usize = 21;
/// Of an H100 or H200, for attention's arithmetic floor: a measured large matrix product.
const FLOPS: f64 = 760e12;

pub(crate) struct Timing {
    pub(crate) bytes_per_second: f64,
    /// With `--save-baseline NAME` or `--baseline NAME`.
    criterion: Option<RefCell<Criterion>>,
}

/// What a launch has to do at least.
#[derive(Clone, Copy)]
pub(crate) struct Work {
    pub(crate) bytes: usize,
    pub(crate) flops: f64,
}

impl Timing {
    pub(crate) fn new() -> Self {
        let names_a_baseline = std::env::args().any(|argument| argument.contains("baseline"));
        let criterion = names_a_baseline.then(|| {
            // A kernel takes microseconds: a short look is many launches.
            let criterion = Criterion::default()
                .sample_size(10)
                .warm_up_time(Duration::from_millis(50))
                .measurement_time(Duration::from_millis(300))
                .without_plots()
                .configure_from_args();
            RefCell::new(criterion)
        });
        Self { bytes_per_second: f64::INFINITY, criterion }
    }

    /// Seconds of one launch, the median over replays of a graph of them.
    pub(crate) fn seconds(
        device: &Device,
        mut launch: impl FnMut(usize) -> Result<()>,
    ) -> Result<f64> {
        let graph = Graph::capture(device, || (0..LAUNCHES).try_for_each(&mut launch))?;
        median_seconds(device, &graph)
    }

    /// Prints a row of the table.
    pub(crate) fn report(
        &self,
        device: &Device,
        name: &str,
        work: Work,
        mut launch: impl FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let graph = Graph::capture(device, || (0..LAUNCHES).try_for_each(&mut launch))?;
        let seconds = median_seconds(device, &graph)?;
        let floor = (work.bytes as f64 / self.bytes_per_second).max(work.flops / FLOPS);
        println!(
            "| {name} | {:.3} | {:.2} | {:.2} | {:.2} | {:.0} % |",
            work.bytes as f64 / 1e6,
            work.flops / 1e9,
            floor * 1e6,
            seconds * 1e6,
            100.0 * floor / seconds
        );
        if let Some(criterion) = &self.criterion {
            criterion.borrow_mut().bench_function(name, |bencher| {
                bencher.iter_custom(|num_launches| {
                    let replays = num_launches.div_ceil(LAUNCHES as u64);
                    let elapsed = replay(device, &graph, replays);
                    assert!(elapsed.is_ok(), "{elapsed:?}");
                    let share = num_launches as f64 / (replays * LAUNCHES as u64) as f64;
                    elapsed.unwrap_or_default().mul_f64(share)
                });
            });
        }
        Ok(())
    }
}

fn median_seconds(device: &Device, graph: &Graph) -> Result<f64> {
    let times: Result<Vec<_>> = (0..REPLAYS).map(|_| replay(device, graph, 1)).collect();
    let mut times = times?;
    times.sort_unstable();
    Ok(times[REPLAYS / 2].as_secs_f64() / LAUNCHES as f64)
}

/// How long some replays take, from an idle device to an idle device.
fn replay(device: &Device, graph: &Graph, replays: u64) -> Result<Duration> {
    device.synchronize()?;
    let start = Instant::now();
    for _ in 0..replays {
        graph.launch()?;
    }
    device.synchronize()?;
    Ok(start.elapsed())
}
