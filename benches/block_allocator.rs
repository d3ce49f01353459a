//! What one operation of the block allocator costs. 4,096 blocks, half of them in use.
//!
//! `cargo bench -p nano_core --bench block_allocator`
#![expect(missing_docs, reason = "criterion_group! writes a function without them")]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use nano_core::BlockId;
use nano_core::kv_cache::{BlockAllocator, KvCacheManager};

const NUM_BLOCKS: u32 = 4096;

/// An allocator and the blocks in use.
fn half_full() -> (BlockAllocator, Vec<BlockId>) {
    let mut allocator = BlockAllocator::new(NUM_BLOCKS);
    let blocks = (0..NUM_BLOCKS / 2).filter_map(|_| allocator.allocate()).collect();
    (allocator, blocks)
}

fn bench(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("block_allocator");
    let (mut allocator, blocks) = half_full();
    group.bench_function("allocate and free", |bencher| {
        bencher.iter(|| {
            if let Some(block) = allocator.allocate() {
                allocator.free(black_box(block));
            }
        });
    });
    group.bench_function("retain and free", |bencher| {
        let mut next = blocks.iter().cycle();
        bencher.iter(|| {
            if let Some(&block) = next.next() {
                allocator.retain(black_box(block));
                allocator.free(black_box(block));
            }
        });
    });
    group.bench_function("a table of 32 blocks from start to end", |bencher| {
        let mut cache = KvCacheManager::new(NUM_BLOCKS, 16);
        bencher.iter(|| {
            let mut table = Vec::new();
            black_box(cache.allocate(&mut table, 512));
            cache.free(table, 0);
        });
    });
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
