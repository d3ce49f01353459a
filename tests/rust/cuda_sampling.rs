//! The sampling kernel against the CPU's choice on a GPU; skips where there is none.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by a panic and says what it measured"
)]

mod cuda_fixture;

use cuda_fixture::{Random, kernels};
use nano_kernels::cuda::Kernels;
use nano_kernels::cuda::sampling::{NO_TOKEN, RowSampling, Sample};
use nano_kernels::reference::sampling::{Sampling, sample};

const GREEDY: Sampling = Sampling {
    temperature: 0.0,
    top_k: None,
    top_p: 1.0,
    min_p: 0.0,
    seed: 1,
    position: 0,
    index: 0,
};

fn choose(kernels: &Kernels, logits: &[f32], rows: &[Sampling]) -> Vec<u32> {
    let device = kernels.device();
    let logits_on = device.allocate_from(logits).unwrap();
    let rows_on =
        device.allocate_from(&rows.iter().map(RowSampling::from).collect::<Vec<_>>()).unwrap();
    let chosen = device.allocate(rows.len() * 4).unwrap();
    chosen.fill(0xab).unwrap();
    let answer = device.allocate_pinned(rows.len() * 4).unwrap();
    let launch = Sample {
        chosen: chosen.address(),
        answer: answer.address(),
        logits: logits_on.address(),
        rows: rows_on.address(),
        num_rows: rows.len(),
        vocab_size: logits.len() / rows.len(),
    };
    // SAFETY: every buffer was allocated above with the size of its shape.
    unsafe { kernels.sample(&launch) }.unwrap();
    let mut tokens = vec![0; rows.len()];
    chosen.download(0, &mut tokens).unwrap();
    let (answered, _) = answer.as_slice().as_chunks();
    assert_eq!(answered.iter().map(|&it| u32::from_ne_bytes(it)).collect::<Vec<_>>(), tokens);
    tokens
}

/// Logits near a language model's: a bell of a few units, a handful far above it.
fn random_logits(random: &mut Random, vocab_size: usize) -> Vec<f32> {
    let mut logits: Vec<f32> =
        (0..vocab_size).map(|_| (0..4).map(|_| random.value()).sum::<f32>()).collect();
    for _ in 0..8 {
        let token = random.below(vocab_size);
        logits[token] += 6.0 + random.value();
    }
    logits
}

fn random_sampling(random: &mut Random) -> Sampling {
    let pick = |random: &mut Random, choices: &[f32]| choices[random.below(choices.len())];
    Sampling {
        temperature: pick(random, &[0.0, 0.3, 0.7, 1.0, 1.7]),
        top_k: [None, Some(1), Some(5), Some(50), Some(3000), Some(1_000_000)][random.below(6)],
        top_p: pick(random, &[0.001, 0.5, 0.9, 0.95, 0.999, 1.0]),
        min_p: pick(random, &[0.0, 0.01, 0.1, 1.0]),
        seed: u64::from(random.next()) << 32 | u64::from(random.next()),
        position: random.next() % 5000,
        index: random.next() % 4,
    }
}

#[test]
fn the_gpu_chooses_what_the_cpu_chooses() {
    let Some(kernels) = kernels() else { return };
    let mut random = Random(6);
    let mut num_rows = 0;
    for vocab_size in [1, 2, 31, 1000, 1024, 1025, 4096, 32_000, 131_072] {
        let rows: Vec<Sampling> = (0..64).map(|_| random_sampling(&mut random)).collect();
        let logits: Vec<f32> =
            rows.iter().flat_map(|_| random_logits(&mut random, vocab_size)).collect();
        let expected: Vec<u32> = logits
            .chunks(vocab_size)
            .zip(&rows)
            .map(|(logits, sampling)| sample(logits, sampling).unwrap_or(NO_TOKEN))
            .collect();
        for (row, (chosen, expected)) in
            choose(&kernels, &logits, &rows).iter().zip(&expected).enumerate()
        {
            assert_eq!(chosen, expected, "vocab {vocab_size}, row {row}: {:?}", rows[row]);
            num_rows += 1;
        }
    }
    println!("{num_rows} rows agree");
}

#[test]
fn a_row_is_chosen_alike_alone_and_in_a_batch() {
    let Some(kernels) = kernels() else { return };
    let mut random = Random(7);
    let rows: Vec<Sampling> = (0..200).map(|_| random_sampling(&mut random)).collect();
    let logits: Vec<f32> = rows.iter().flat_map(|_| random_logits(&mut random, 5000)).collect();
    let together = choose(&kernels, &logits, &rows);
    for ((row, logits), chosen) in rows.iter().zip(logits.chunks(5000)).zip(together) {
        assert_eq!(choose(&kernels, logits, &[*row]), [chosen]);
    }
}

#[test]
fn ties_and_what_is_no_number_are_as_on_the_cpu() {
    let Some(kernels) = kernels() else { return };
    let (nan, low, high) = (f32::NAN, f32::NEG_INFINITY, f32::INFINITY);
    let sampled = Sampling { temperature: 1.0, top_k: Some(2), top_p: 0.9, ..GREEDY };
    let cold = Sampling { temperature: 1e-44, top_p: 0.9, ..GREEDY };
    for logits in [
        [nan, 2.0, 3.0, 3.0, low],
        [nan, low, low, nan, low],
        [1.0, high, 0.0, nan, 2.0],
        [0.0, -0.0, low, -1.0, 0.0],
        [-0.0, 0.0, low, -1.0, nan],
        [-5.0, -5.0, -5.0, -5.0, -5.0],
        [1.0, 30.0, 29.9, f32::MIN, f32::MAX],
    ] {
        for sampling in [GREEDY, sampled, cold] {
            let expected = sample(&logits, &sampling).unwrap_or(NO_TOKEN);
            assert_eq!(
                choose(&kernels, &logits, &[sampling]),
                [expected],
                "{logits:?} {sampling:?}"
            );
        }
    }
}

/// Chi-square over 20,000 draws, 5 kinds: 13.3 is the 1 % point of 4 degrees of freedom.
#[test]
fn tokens_come_as_often_as_their_softmax_says() {
    let Some(kernels) = kernels() else { return };
    let logits = [0.0_f32, 1.0, -1.0, 0.5, 2.0];
    let rows: Vec<Sampling> = (0..20_000)
        .map(|position| Sampling { temperature: 1.0, seed: 11, position, ..GREEDY })
        .collect();
    let chosen = choose(&kernels, &logits.repeat(rows.len()), &rows);
    let total: f32 = logits.iter().map(|logit| logit.exp()).sum();
    let chi_square: f32 = (0..5)
        .map(|token| {
            let count = chosen.iter().filter(|&&chosen| chosen == token).count() as f32;
            let expected = rows.len() as f32 * logits[token as usize].exp() / total;
            (count - expected).powi(2) / expected
        })
        .sum();
    println!("chi-square {chi_square}");
    assert!(chi_square < 13.3);
}
