//! What text costs: a token of each of 256 streams, as the output thread decodes them after a step.
//!
//! `cargo bench -p nano_text --bench detokenizer`. The tokenizer is the embedded model's.
#![expect(missing_docs, reason = "criterion_group! writes a function without them")]
#![expect(clippy::unwrap_used, reason = "a bench ends at the first surprise")]

use std::hint::black_box;
use std::path::Path;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use nano_text::{TextDecoder, TextOptions, Tokenizer};

const NUM_STREAMS: usize = 256;
const PROMPT_LEN: usize = 32;
const NUM_CHARS: usize = 20_000;
const TEXT: &str = include_str!("../tests/data/persuasion.txt");
const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../python/nano_batch/models/austen");

fn bench(criterion: &mut Criterion) {
    let tokenizer = Tokenizer::from_dir(Path::new(MODEL)).unwrap().unwrap();
    let text: String = TEXT.chars().take(NUM_CHARS).collect();
    let tokens = tokenizer.encode(&text, false).unwrap();
    let mut group = criterion.benchmark_group("detokenizer");
    for (name, stop) in [("no stop string", vec![]), ("2 stop strings", vec!["\n\n", "Anne."])] {
        let stop = stop.into_iter().map(str::to_owned).collect();
        let options = TextOptions { stop, ..TextOptions::default() };
        // Each stream is somewhere else in the text.
        let open = || -> Vec<(TextDecoder, usize)> {
            (0..NUM_STREAMS)
                .map(|stream| {
                    let prompt = &tokens[stream..stream + PROMPT_LEN];
                    let decoder = TextDecoder::new(Some(tokenizer.clone()), prompt, &options);
                    (decoder.unwrap(), stream + PROMPT_LEN)
                })
                .collect()
        };
        group.bench_function(format!("a token of 256 streams, {name}"), |bencher| {
            bencher.iter_batched_ref(
                open,
                |streams| {
                    for (decoder, next) in streams {
                        black_box(decoder.push(tokens[*next]).unwrap());
                    }
                },
                BatchSize::LargeInput,
            );
        });
    }
    group.bench_function("encode 20,000 characters", |bencher| {
        bencher.iter(|| tokenizer.encode(black_box(&text), false).unwrap());
    });
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
