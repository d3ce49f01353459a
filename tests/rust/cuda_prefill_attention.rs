//! Paged attention of many tokens a sequence against its reference on a GPU; skips where there is
//! none.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by a panic and says what it measured"
)]

mod cuda_case;
mod cuda_fixture;
mod oracle;

use cuda_case::{BOUND, Case, MANY_HEADS, Sequence, heads};
use cuda_fixture::{Random, assert_close, download, hopper, kernels, poisoned};
use nano_kernels::cuda::Kernels;
use nano_kernels::cuda::attention::{PrefillRows, PrefillTile, prefill_tiles};
use nano_kernels::cuda::compile::Compiler;
use nano_kernels::cuda::spec::KERNELS;

impl Case {
    /// By each kernel that this device has; the one for any device first.
    fn prefill(&self, kernels: &Kernels) -> Vec<Vec<f32>> {
        let device = kernels.device();
        let mut first_token = 0;
        let sequences: Vec<PrefillTile> = self
            .sequences
            .iter()
            .enumerate()
            .map(|(sequence, &Sequence { prefix, num_tokens })| {
                first_token += num_tokens;
                PrefillTile {
                    sequence: sequence as i32,
                    first_token: (first_token - num_tokens) as i32,
                    num_tokens: num_tokens as i32,
                    first_position: prefix as i32,
                }
            })
            .collect();
        let tiles = prefill_tiles(self.heads, sequences);
        let tiles_on = device.allocate_from(&tiles).unwrap();
        let (out, input) = (poisoned(device, self.query.len()), self.input());
        let rows = PrefillRows {
            query: self.query_on.address(),
            tiles: tiles_on.address(),
            num_tiles: tiles.len(),
            num_tokens: first_token,
        };
        // SAFETY: every buffer was allocated with the size of its shape; positions fit the tables.
        unsafe { kernels.prefill_attention(&input, &rows, out.address()) }.unwrap();
        let mut found = vec![download(&out)];
        // Twice: what the first launch leaves behind does not change the second.
        for round in 0..2 {
            if !device.is_hopper() {
                break;
            }
            out.fill(0xff).unwrap();
            // SAFETY: as above.
            unsafe { kernels.prefill_attention_wgmma(&input, &rows, out.address()) }.unwrap();
            if round == 0 {
                found.push(download(&out));
            } else {
                assert_eq!(download(&out), found[1], "equal launches give equal bits");
            }
        }
        found
    }

    fn check_prefill(&self, what: &str, kernels: &Kernels) {
        let expected = self.expected();
        for (number, found) in self.prefill(kernels).iter().enumerate() {
            assert_close(&format!("{what}, kernel {number}"), found, &expected, BOUND);
        }
    }
}

fn sequences(batch: &[(usize, usize)]) -> Vec<Sequence> {
    batch.iter().map(|&(prefix, num_tokens)| Sequence { prefix, num_tokens }).collect()
}

#[test]
fn a_chunk_at_32k_sees_all_before_it() {
    let Some(kernels) = kernels() else { return };
    let mut random = Random(10);
    for (heads, window) in
        [(heads(32, 8, 128), None), (heads(32, 8, 64), None), (heads(32, 8, 128), Some(4096))]
    {
        let chunk = sequences(&[(32_768 - 70, 70)]);
        let case = Case::new(&kernels, &mut random, heads, window, &chunk);
        let what = format!("prefill at 32k, window {window:?}, {heads:?}");
        case.check_prefill(&what, &kernels);
    }
}

#[test]
fn new_tokens_see_the_prefix_and_each_other_causally() {
    let Some(kernels) = kernels() else { return };
    let mut random = Random(11);
    for heads in MANY_HEADS {
        for batch in [
            &[(0, 1)][..],
            &[(0, 16)],
            &[(0, 33)],
            &[(15, 17)],
            &[(0, 70), (100, 33), (45, 1), (0, 128), (511, 2)],
            &[(640, 300)],
        ] {
            let case = Case::new(&kernels, &mut random, heads, None, &sequences(batch));
            let what = format!("prefill {batch:?}, {heads:?}");
            case.check_prefill(&what, &kernels);
        }
    }
}

/// More pieces of work than the device takes at once, and long ones.
#[test]
fn many_new_tokens_are_the_same_to_both_kernels() {
    let Some(kernels) = kernels() else { return };
    let mut random = Random(14);
    for (heads, window) in [
        (heads(32, 8, 128), None),
        (heads(32, 8, 64), None),
        (heads(32, 8, 128), Some(1000)),
        (heads(12, 4, 128), None),
        (heads(16, 16, 64), Some(130)),
    ] {
        let batch = [(0, 2048), (4096, 512), (3, 1), (777, 901), (0, 16), (1000, 5)];
        let case = Case::new(&kernels, &mut random, heads, window, &sequences(&batch));
        let found = case.prefill(&kernels);
        for other in &found[1..] {
            let what = format!("3483 tokens by both kernels, window {window:?}, {heads:?}");
            assert_close(&what, other, &found[0], BOUND);
        }
    }
}

#[test]
fn new_tokens_see_their_windows_alone() {
    let Some(kernels) = kernels() else { return };
    let mut random = Random(12);
    for heads in [heads(32, 8, 128), heads(6, 2, 64), heads(2, 2, 128)] {
        for window in [1, 16, 17, 100, 1000] {
            let batch = [(0, 1), (0, 300), (900, 150), (2000, 40)];
            let case = Case::new(&kernels, &mut random, heads, Some(window), &sequences(&batch));
            let what = format!("prefill, window {window}, {heads:?}");
            case.check_prefill(&what, &kernels);
        }
    }
}

/// Few tiles over many keys, which the kernel for Hopper cuts into parts.
#[test]
fn few_new_tokens_over_a_long_prefix_are_the_same_to_both_kernels() {
    let Some(kernels) = kernels() else { return };
    let mut random = Random(16);
    let mut check = |heads, window, batch: &[(usize, usize)]| {
        let case = Case::new(&kernels, &mut random, heads, window, &sequences(batch));
        let found = case.prefill(&kernels);
        for other in &found[1..] {
            let what = format!("{batch:?} by both kernels, window {window:?}, {heads:?}");
            assert_close(&what, other, &found[0], BOUND);
        }
    };
    for heads in [heads(32, 8, 128), heads(8, 1, 128), heads(6, 2, 64), heads(10, 2, 128)] {
        for prefix in [0, 100, 600, 4096, 5000] {
            for num_tokens in [1, 16, 17, 64, 130] {
                check(heads, None, &[(prefix, num_tokens)]);
            }
        }
        for window in [None, Some(1), Some(17), Some(1000), Some(3000)] {
            check(heads, window, &[(5000, 1), (0, 16), (4096, 17), (100, 64), (700, 3), (2050, 9)]);
            check(heads, window, &[(4999, 130)]);
        }
    }
}

/// A part that does not wait for the others leaves its share of the merge to the last one to come:
/// here all do, and no bit changes.
#[test]
fn parts_that_go_leave_their_shares_to_the_last() {
    let Some(kernels) = hopper() else { return };
    let mut specs = KERNELS;
    for spec in specs.iter_mut().filter(|spec| spec.defines.contains(&"-DIN_PARTS=1")) {
        spec.defines = [spec.defines, &["-DPATIENCE=0"]].concat().leak();
    }
    let compiler = Compiler::new(Compiler::default_cache_dir()).unwrap();
    let impatient = Kernels::load(kernels.device(), &compiler, &specs).unwrap();
    let mut random = Random(17);
    for heads in [heads(32, 8, 128), heads(8, 1, 128), heads(6, 2, 64)] {
        for batch in [&[(5000, 17)][..], &[(900, 130)], &[(4096, 3), (0, 16), (2050, 40)]] {
            let case = Case::new(&kernels, &mut random, heads, None, &sequences(batch));
            let (expected, found) = (case.prefill(&kernels).pop(), case.prefill(&impatient).pop());
            assert_eq!(found, expected, "{batch:?}, {heads:?}");
        }
    }
}

/// The multiprocessors that the parts of a tile wait for may be another stream's, whose parts wait
/// likewise: nobody waits for ever, and the sums are the same.
#[test]
fn parts_of_two_streams_at_once_do_not_wait_for_each_other() {
    let run = |seed| {
        let Some(kernels) = kernels() else { return };
        let mut random = Random(seed);
        let chunk = sequences(&[(3000, 20)]);
        let case = Case::new(&kernels, &mut random, heads(32, 8, 128), None, &chunk);
        let first = case.prefill(&kernels).pop();
        for _ in 0..100 {
            assert_eq!(case.prefill(&kernels).pop(), first, "equal launches give equal bits");
        }
    };
    std::thread::scope(|scope| {
        for seed in 20..23 {
            scope.spawn(move || run(seed));
        }
    });
}
