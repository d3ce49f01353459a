//! The CPU's operators beside the rate at which the machine reads memory.
#![expect(missing_docs, clippy::unwrap_used, reason = "a bench")]

use std::hint::black_box;
use std::num::NonZero;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use nano_kernels::cpu::attention::{AttentionInput, KvShape, Scratch, Tile, paged_attention};
use nano_kernels::cpu::matrix::PackedMatrix;
use nano_kernels::cpu::memory::Arena;
use nano_kernels::cpu::norm::Norm;
use nano_kernels::cpu::product::{PackedRows, Store, product};
use nano_kernels::cpu::sampling::sample;
use nano_kernels::cpu::{Element, Isa, Pool};
use nano_kernels::reference::sampling::Sampling;

/// Matrices that are read in turn: what a cache keeps of one does not last until it comes again.
const NUM_MATRICES: usize = 4;
/// 134 MB of bfloat16, or 100 as it is stored where parameters are coded.
const ROWS: usize = 18_688;
const COLUMNS: usize = 3584;

fn pool() -> Pool {
    let num_threads = thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN);
    Pool::new(num_threads, Isa::asked().unwrap())
}

fn value(index: usize) -> f32 {
    ((index * 7919 + 13) % 100_003) as f32 / 30_000.0 - 1.7
}

fn packed<E: Element>(pool: &mut Pool, rows: usize, columns: usize) -> PackedMatrix<E> {
    PackedMatrix::pack(
        pool,
        &mut Arena::default(),
        (rows, columns),
        false,
        |row, elements: &mut [E]| {
            for (column, element) in elements.iter_mut().enumerate() {
                *element = E::narrow(value(row * columns + column));
            }
        },
    )
    .unwrap()
}

/// All words, read as quickly as memory gives them.
fn read(words: &[u32]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has the instructions.
        return unsafe { read_avx512(words) };
    }
    words.iter().fold(0, |all, word| all ^ word)
}

/// The same, asking for lines ahead as products do.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn read_avx512(words: &[u32]) -> u32 {
    use std::arch::x86_64::{
        _MM_HINT_NTA, _mm_prefetch, _mm512_loadu_si512, _mm512_reduce_or_epi32,
        _mm512_setzero_si512, _mm512_xor_si512,
    };
    let mut all = [_mm512_setzero_si512(); 4];
    for lines in words.as_chunks::<16>().0.as_chunks::<4>().0 {
        for (all, line) in all.iter_mut().zip(lines) {
            _mm_prefetch::<_MM_HINT_NTA>(line.as_ptr().wrapping_byte_add(6144).cast());
            // SAFETY: a line is 512 bits.
            *all = _mm512_xor_si512(*all, unsafe { _mm512_loadu_si512(line.as_ptr().cast()) });
        }
    }
    let [a, b, c, d] = all;
    _mm512_reduce_or_epi32(_mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d)))
        .cast_unsigned()
}

fn product_reads_memory(criterion: &mut Criterion) {
    let mut pool = pool();
    let matrices = [(); NUM_MATRICES].map(|()| packed::<bf16>(&mut pool, ROWS, COLUMNS));
    let mut turns = matrices.iter().cycle();
    let mut next = || turns.next().unwrap();
    let (num_threads, num_bytes) = (pool.num_threads(), next().num_bytes());
    let name = format!("{num_threads} threads, {} MB", num_bytes / 1_000_000);
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Bytes(num_bytes as u64));
    group.sample_size(20);
    group.bench_function("read", |bencher| {
        bencher.iter(|| {
            let (matrix, total) = (next(), AtomicU64::new(0));
            // In parts as long as a product's: memory is read best in one go.
            let num_parts = 4 * num_threads;
            let bound = |part: usize| part * matrix.num_pairs() / num_parts;
            pool.run(num_parts, &|part| {
                for pair in bound(part)..bound(part + 1) {
                    total.fetch_add(u64::from(read(matrix.pair(pair))), Ordering::Relaxed);
                }
            });
            black_box(total.into_inner())
        });
    });
    for num_rows in [1, 2, 4, 8, 12, 16, 24, 32, 128] {
        let mut rows = PackedRows::<bf16>::default();
        let values: Vec<f32> = (0..num_rows * COLUMNS).map(value).collect();
        rows.pack(&mut pool, &values, COLUMNS, None);
        let mut output = vec![0.0; num_rows * ROWS];
        group.bench_function(BenchmarkId::new("product", num_rows), |bencher| {
            bencher.iter(|| product(&mut pool, &rows, next(), Store::Write, &mut output));
        });
    }
}

/// 16 sequences decode: keys and values of one layer, more than the caches hold.
fn decode_attention(criterion: &mut Criterion) {
    let mut pool = pool();
    let shape = KvShape { num_kv_heads: 4, block_size: 16, head_dim: 64 };
    let (num_sequences, num_heads) = (16, 16);
    let mut group = criterion.benchmark_group("decode attention, 16 sequences, 16/4 heads of 64");
    for context in [128, 1024, 8192] {
        let blocks = context / shape.block_size;
        let num_blocks = num_sequences * blocks;
        let mut cache = Arena::default().zeroed(num_blocks * shape.block_len::<bf16>()).unwrap();
        cache.as_mut_slice().fill(0x3C00_3C00);
        // Neighbours in a table are far apart in the pool.
        let block_tables: Vec<u32> = (0..num_sequences)
            .flat_map(|sequence| (0..blocks).map(move |at| (at * num_sequences + sequence) as u32))
            .collect();
        let tiles: Vec<Tile> = (0..num_sequences)
            .map(|row| Tile {
                first_row: row,
                num_rows: 1,
                first_position: context - 1,
                block_table: row * blocks..(row + 1) * blocks,
            })
            .collect();
        let query: Vec<f32> = (0..num_sequences * num_heads * shape.head_dim).map(value).collect();
        let input = AttentionInput {
            tiles: &tiles,
            block_tables: &block_tables,
            query: &query,
            num_heads,
            cache: cache.as_slice(),
            shape,
            window: None,
        };
        let (mut scratch, mut output) = (Scratch::default(), vec![0.0; query.len()]);
        group.throughput(Throughput::Bytes((cache.as_slice().len() * 4) as u64));
        group.bench_function(BenchmarkId::from_parameter(context), |bencher| {
            bencher.iter(|| paged_attention::<bf16>(&mut pool, &input, &mut scratch, &mut output));
        });
    }
}

/// What surrounds the products: norms, and the choice of a token.
fn rows(criterion: &mut Criterion) {
    let mut pool = pool();
    let values: Vec<f32> = (0..16 * 4096).map(value).collect();
    let norm = Norm { weight: &values[..4096], eps: 1e-5 };
    let mut rows = PackedRows::<bf16>::default();
    criterion.bench_function("norm and pack 16 rows of 4096", |bencher| {
        bencher.iter(|| rows.pack(&mut pool, black_box(&values), 4096, Some(norm)));
    });
    let mut kept = Vec::new();
    let logits: Vec<f32> = (0..32_000).map(value).collect();
    for temperature in [0.0, 1.0] {
        let sampling = Sampling {
            temperature,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            seed: 1,
            position: 9,
            index: 0,
        };
        criterion.bench_function(&format!("sample, temperature {temperature}"), |bencher| {
            bencher.iter(|| sample(pool.isa(), black_box(&logits), &sampling, &mut kept));
        });
    }
}

criterion_group!(benches, product_reads_memory, decode_attention, rows);
criterion_main!(benches);
