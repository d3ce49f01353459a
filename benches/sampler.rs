//! What the choice of a token costs the CPU: one row of 32,000 logits, by what is asked for.
//!
//! `cargo bench -p nano_kernels --bench sampler`
#![expect(missing_docs, clippy::unwrap_used, reason = "a bench")]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use nano_kernels::cpu::Isa;
use nano_kernels::cpu::sampling::sample;
use nano_kernels::reference::sampling::Sampling;

const VOCAB_SIZE: usize = 32_000;

fn bench(criterion: &mut Criterion) {
    // Spread as logits are: a few far above the rest.
    let logits: Vec<f32> = (0..VOCAB_SIZE)
        .map(|index| ((index * 7919 + 13) % 10_007) as f32 / 10_007.0)
        .map(|share| -3.0 * (1.0 - share).max(1e-4).ln() - 5.0)
        .collect();
    let plain = Sampling {
        temperature: 0.8,
        top_k: None,
        top_p: 1.0,
        min_p: 0.0,
        seed: 1,
        position: 9,
        index: 0,
    };
    let cases = [
        ("greedy", Sampling { temperature: 0.0, ..plain }),
        ("temperature", plain),
        ("top_k 50", Sampling { top_k: Some(50), ..plain }),
        ("top_p 0.9", Sampling { top_p: 0.9, ..plain }),
        ("min_p 0.05", Sampling { min_p: 0.05, ..plain }),
    ];
    let (isa, mut kept) = (Isa::asked().unwrap(), Vec::new());
    let mut group = criterion.benchmark_group("sampler");
    for (name, sampling) in cases {
        group.bench_function(name, |bencher| {
            bencher.iter(|| sample(isa, black_box(&logits), &sampling, &mut kept));
        });
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
