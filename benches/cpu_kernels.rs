//! The CPU's operators beside the rate at which the machine reads memory.
#![expect(missing_docs, clippy::unwrap_used, reason = "a bench")]

use std::hint::black_box;
use std::num::NonZero;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use nano_kernels::cpu::matrix::PackedMatrix;
use nano_kernels::cpu::product::{PackedRows, product};
use nano_kernels::cpu::{Element, Isa, Pool};

/// 103 MB of bfloat16, more than any cache.
const ROWS: usize = 14_336;
const COLUMNS: usize = 3584;

fn pool() -> Pool {
    Pool::new(thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN))
}

fn value(index: usize) -> f32 {
    ((index * 7919 + 13) % 1009) as f32 / 300.0 - 1.7
}

fn packed<E: Element>(pool: &mut Pool, rows: usize, columns: usize) -> PackedMatrix<E> {
    let mut matrix = PackedMatrix::zeroed(rows, columns).unwrap();
    matrix.write(pool, |row, elements: &mut [E]| {
        for (column, element) in elements.iter_mut().enumerate() {
            *element = E::narrow(value(row * columns + column));
        }
    });
    matrix
}

fn product_reads_memory(criterion: &mut Criterion) {
    let mut pool = pool();
    let matrix = packed::<bf16>(&mut pool, ROWS, COLUMNS);
    let mut group = criterion.benchmark_group(format!("{} threads, 103 MB", pool.num_threads()));
    group.throughput(Throughput::Bytes((ROWS * COLUMNS * 2) as u64));
    group.sample_size(20);
    group.bench_function("read", |bencher| {
        bencher.iter(|| {
            let total = AtomicU64::new(0);
            pool.run(matrix.num_panels(), &|panel| {
                let words = matrix.panel(panel).as_chunks::<16>().0;
                let mut sums = [0_u32; 16];
                for words in words {
                    sums.iter_mut().zip(words).for_each(|(sum, word)| *sum ^= word);
                }
                total.fetch_add(sums.iter().map(|&sum| u64::from(sum)).sum(), Ordering::Relaxed);
            });
            black_box(total.into_inner())
        });
    });
    for num_rows in [1, 2, 4, 8, 12, 16, 24, 32, 128] {
        let mut rows = PackedRows::<bf16>::default();
        rows.pack(&mut pool, Isa::detect(), num_rows, COLUMNS, |row, values| {
            for (column, output) in values.iter_mut().enumerate() {
                *output = value(row + column);
            }
        });
        let mut output = vec![0.0; num_rows * ROWS];
        group.bench_function(BenchmarkId::new("product", num_rows), |bencher| {
            bencher.iter(|| product(&mut pool, Isa::detect(), &rows, &matrix, &mut output));
        });
    }
}

criterion_group!(benches, product_reads_memory);
criterion_main!(benches);
