//! Products and parameters on a GPU against plain references; skips where there is none.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::float_cmp,
    clippy::print_stdout,
    reason = "a test fails by a panic and says what it measured; equal bits are the point"
)]

mod cuda_fixture;
mod oracle;

use cuda_fixture::{Random, assert_close, download, floats, hopper, kernels};
use half::{bf16, f16};
use nano_kernels::cuda::gemm::{Trial, rows_of_memory};
use nano_kernels::cuda::product::{Epilogue, FusedProduct, Norm, Product};
use nano_kernels::cuda::weights::NUM_DRAWS;
use nano_kernels::cuda::{Device, DeviceBuffer, Gemm};
use oracle::{product, rms_norm, silu_mul};

/// bf16 rounds by 2⁻⁸ of a value at worst.
const ROUNDING: f64 = 4e-3;
const EPILOGUES: [Epilogue; 3] = [Epilogue::Bf16, Epilogue::AddBf16, Epilogue::F32];

struct Case {
    shape: Product,
    input: Vec<bf16>,
    weight: Vec<bf16>,
    before: Vec<bf16>,
}

impl Case {
    fn new(num_rows: usize, out_features: usize, in_features: usize, epilogue: Epilogue) -> Self {
        let mut random = Random(num_rows as u64 + 1);
        Self {
            shape: Product { num_rows, out_features, in_features, epilogue },
            input: random.values(num_rows * in_features),
            weight: random.values(out_features * in_features),
            before: random.values(num_rows * out_features),
        }
    }

    fn run(&self, device: &Device, gemm: &mut Gemm) -> Vec<f32> {
        self.run_with(device, |out, input, weight| {
            // SAFETY: `run_with` allocates every buffer with the size of its shape.
            unsafe { gemm.product(&self.shape, out, input, weight) }.unwrap();
        })
    }

    fn run_with(&self, device: &Device, product: impl FnOnce(u64, u64, u64)) -> Vec<f32> {
        let rows = rows_of_memory(self.shape.num_rows);
        let input = device.allocate(rows * self.shape.in_features * 2).unwrap();
        let weight = device.allocate_from(&self.weight).unwrap();
        let element_bytes = if self.shape.epilogue == Epilogue::F32 { 4 } else { 2 };
        let out = device.allocate(rows * self.shape.out_features * element_bytes).unwrap();
        out.fill(0xff).unwrap();
        input.upload(0, &self.input).unwrap();
        if self.shape.epilogue == Epilogue::AddBf16 {
            out.upload(0, &self.before).unwrap();
        }
        product(out.address(), input.address(), weight.address());
        let len = self.shape.num_rows * self.shape.out_features;
        if self.shape.epilogue == Epilogue::F32 {
            let mut values = vec![0.0_f32; len];
            out.download(0, &mut values).unwrap();
            return values;
        }
        download(&out)[..len].to_vec()
    }

    /// By a kernel of ours, without a norm.
    fn launch(&self, out: u64, input: u64, weight: u64) -> FusedProduct {
        FusedProduct { product: self.shape, out, input, weight, norm: Norm::None }
    }

    fn reference(&self) -> Vec<f32> {
        let in_features = self.shape.in_features;
        let (input, weight) = (floats(&self.input), floats(&self.weight));
        // On all cores: the largest shapes take seconds.
        let num_threads = std::thread::available_parallelism().map_or(1, usize::from);
        let some_rows = self.shape.num_rows.div_ceil(num_threads) * in_features;
        let out = std::thread::scope(|scope| {
            let part = |rows: &[f32]| -> Vec<f32> {
                rows.chunks_exact(in_features).flat_map(|row| product(row, &weight)).collect()
            };
            let parts: Vec<_> =
                input.chunks(some_rows).map(|rows| scope.spawn(move || part(rows))).collect();
            parts.into_iter().flat_map(|part| part.join().unwrap()).collect()
        });
        self.added_to(out)
    }

    /// What becomes of the plain product.
    fn added_to(&self, mut out: Vec<f32>) -> Vec<f32> {
        if self.shape.epilogue == Epilogue::AddBf16 {
            out.iter_mut().zip(&self.before).for_each(|(out, before)| *out += before.to_f32());
        }
        out
    }
}

#[test]
fn products_of_any_number_of_rows_agree_with_the_reference() {
    let Some(kernels) = kernels() else { return };
    let device = kernels.device();
    for is_deterministic in [false, true] {
        let mut gemm = Gemm::new(device, None, is_deterministic).unwrap();
        for (num_rows, out_features, in_features) in
            [(1, 512, 256), (3, 151, 96), (17, 264, 704), (64, 97, 64), (300, 512, 136)]
        {
            for epilogue in EPILOGUES {
                let case = Case::new(num_rows, out_features, in_features, epilogue);
                let what = format!("{:?}, deterministic {is_deterministic}", case.shape);
                assert_close(&what, &case.run(device, &mut gemm), &case.reference(), ROUNDING);
            }
        }
    }
}

#[test]
fn a_row_product_with_norm_gate_and_residual_agrees_with_the_references() {
    let Some(kernels) = kernels() else { return };
    let device = kernels.device();
    let mut random = Random(9);
    for (out_features, in_features) in
        [(6144, 4096), (512, 14336), (300, 1032), (151, 96), (97, 264)]
    {
        let on = |values: &[bf16]| device.allocate_from(values).unwrap();
        let (input, norm) = (random.values(in_features), random.values(in_features));
        let weight = random.values(out_features * in_features);
        let before = random.values(out_features);
        let (input_on, weight_on, norm_on) = (on(&input), on(&weight), on(&norm));
        for (epilogue, with_norm) in [
            (Epilogue::Bf16, true),
            (Epilogue::AddBf16, false),
            (Epilogue::F32, true),
            (Epilogue::Gated, true),
        ] {
            if epilogue == Epilogue::Gated && out_features % 2 == 1 {
                continue;
            }
            let element_bytes = if epilogue == Epilogue::F32 { 4 } else { 2 };
            let width = if epilogue == Epilogue::Gated { out_features / 2 } else { out_features };
            let out = device.allocate(width * element_bytes).unwrap();
            out.fill(0xff).unwrap();
            if epilogue == Epilogue::AddBf16 {
                out.upload(0, &before).unwrap();
            }
            let whole = Norm::Whole { weight: norm_on.address(), eps: 1e-5 };
            let launch = FusedProduct {
                out: out.address(),
                input: input_on.address(),
                weight: weight_on.address(),
                product: Product { num_rows: 1, out_features, in_features, epilogue },
                norm: if with_norm { whole } else { Norm::None },
            };
            // SAFETY: every buffer was allocated above with the size of its shape.
            unsafe { kernels.row_product(&launch) }.unwrap();
            let row = floats(&input);
            let row = if with_norm { rms_norm(&row, &floats(&norm), 1e-5) } else { row };
            let mut expected = product(&row, &floats(&weight));
            if epilogue == Epilogue::AddBf16 {
                expected.iter_mut().zip(&before).for_each(|(y, before)| *y += before.to_f32());
            }
            if epilogue == Epilogue::Gated {
                expected = silu_mul(&expected);
            }
            let found = if epilogue == Epilogue::F32 {
                let mut values = vec![0.0_f32; width];
                out.download(0, &mut values).unwrap();
                values
            } else {
                download(&out)
            };
            // The normalised input is rounded once more than the reference's.
            let what = format!("{out_features} x {in_features} {epilogue:?}");
            assert_close(&what, &found, &expected, 1.5 * ROUNDING);
        }
    }
}

#[test]
fn skinny_products_agree_with_the_reference() {
    let Some(kernels) = hopper() else { return };
    let device = kernels.device();
    for (num_rows, out_features, in_features) in [
        (1, 512, 256),
        (3, 151, 192),
        (8, 6144, 512),
        (9, 97, 64),
        (16, 4096, 4096),
        (17, 264, 704),
        (32, 17024, 256),
        (32, 4096, 1024),
        (31, 1024, 14336),
        (5, 40, 64),
    ] {
        for epilogue in EPILOGUES {
            let case = Case::new(num_rows, out_features, in_features, epilogue);
            let found = case.run_with(device, |out, input, weight| {
                // SAFETY: `run_with` allocates every buffer with the size of its shape.
                unsafe { kernels.skinny_product(&case.launch(out, input, weight)) }.unwrap();
            });
            let what = format!("skinny {:?}", case.shape);
            assert_close(&what, &found, &case.reference(), ROUNDING);
        }
    }
}

#[test]
fn batch_products_agree_with_the_reference() {
    let Some(kernels) = hopper() else { return };
    let device = kernels.device();
    // Uncut, cut in two and in four, with a last share that is shorter; a tile that is not whole;
    // more tiles than multiprocessors.
    for (num_rows, out_features, in_features) in [
        (33, 8, 8),
        (40, 512, 256),
        (64, 4096, 1024),
        (65, 1032, 1096),
        (100, 4352, 1088),
        (136, 264, 14336),
        (140, 17024, 136),
        (150, 264, 1160),
        (40, 8520, 1032),
        (192, 1032, 1096),
    ] {
        let plain = Case::new(num_rows, out_features, in_features, Epilogue::F32).reference();
        for epilogue in EPILOGUES {
            let case = Case::new(num_rows, out_features, in_features, epilogue);
            let run = || {
                case.run_with(device, |out, input, weight| {
                    // SAFETY: `run_with` allocates every buffer with the size of its shape.
                    unsafe { kernels.batch_product(&case.launch(out, input, weight)) }.unwrap();
                })
            };
            let found = run();
            let what = format!("batch {:?}", case.shape);
            assert_close(&what, &found, &case.added_to(plain.clone()), ROUNDING);
            assert!(run() == found, "{what}: other bits the second time");
        }
    }
}

#[test]
fn gated_products_agree_with_the_references() {
    let Some(kernels) = hopper() else { return };
    let device = kernels.device();
    // Few rows; one row tile, a taller one and one more; pairs of them, with a half that has no rows; more than
    // stay in the cache together.
    for (num_rows, intermediate_size, in_features) in [
        (1, 512, 256),
        (3, 1000, 96),
        (8, 14336, 64),
        (17, 264, 704),
        (20, 1000, 192),
        (32, 4096, 264),
        (5, 8, 8),
        (33, 8, 8),
        (64, 14336, 72),
        (128, 112, 4096),
        (129, 136, 72),
        (144, 15_008, 72),
        (160, 1000, 264),
        (192, 1160, 1096),
        (200, 9000, 72),
        (300, 1000, 264),
        (385, 232, 1024),
        (1537, 504, 136),
        (2177, 120, 72),
    ] {
        let case = Case::new(num_rows, 2 * intermediate_size, in_features, Epilogue::Bf16);
        let input = device.allocate_from(&case.input).unwrap();
        let weight = device.allocate_from(&case.weight).unwrap();
        // One row more than is written.
        let out = device.allocate((num_rows + 1) * intermediate_size * 2).unwrap();
        let run = || {
            out.fill(0xff).unwrap();
            let launch = FusedProduct {
                product: Product { epilogue: Epilogue::Gated, ..case.shape },
                ..case.launch(out.address(), input.address(), weight.address())
            };
            // SAFETY: every buffer was allocated above with the size of its shape.
            unsafe {
                if num_rows == 1 {
                    kernels.skinny_product(&launch)
                } else {
                    kernels.fused_product(&launch)
                }
            }
            .unwrap();
            download(&out)
        };
        let found = run();
        let (found, behind) = found.split_at(num_rows * intermediate_size);
        let both = case.reference();
        let expected: Vec<f32> =
            both.chunks_exact(2 * intermediate_size).flat_map(silu_mul).collect();
        let what = format!("gated {num_rows} x {intermediate_size} x {in_features}");
        assert_close(&what, found, &expected, ROUNDING);
        assert!(behind.iter().all(|value| value.is_nan()), "{what}: written behind its end");
        assert!(run()[..found.len()] == *found, "{what}: other bits the second time");
    }
}

#[test]
fn a_deterministic_row_has_the_same_bits_in_any_batch() {
    let Some(kernels) = kernels() else { return };
    let device = kernels.device();
    let mut gemm = Gemm::new(device, None, true).unwrap();
    for epilogue in EPILOGUES {
        let all = Case::new(515, 1024, 4096, epilogue);
        let expected = all.run(device, &mut gemm);
        for (first, num_rows) in [(0, 1), (7, 9), (100, 300), (514, 1)] {
            let part = |values: &[bf16], width: usize| {
                values[first * width..(first + num_rows) * width].to_vec()
            };
            let case = Case {
                shape: Product { num_rows, ..all.shape },
                input: part(&all.input, 4096),
                weight: all.weight.clone(),
                before: part(&all.before, 1024),
            };
            let rows = &expected[first * 1024..(first + num_rows) * 1024];
            assert!(case.run(device, &mut gemm) == rows, "{epilogue:?}, rows {first} + {num_rows}");
        }
    }
}

#[test]
fn what_was_timed_is_kept_and_a_broken_cache_is_made_again() {
    let Some(kernels) = kernels() else { return };
    let device = kernels.device();
    let folder = tempfile::tempdir().unwrap();
    let case = Case::new(24, 512, 256, Epilogue::AddBf16);
    let weight = device.allocate_from(&case.weight).unwrap();
    let buffer = || -> DeviceBuffer { device.allocate(256 * 512 * 2).unwrap() };
    let (out, input) = (buffer(), buffer());
    let trial = Trial {
        product: case.shape,
        out: out.address(),
        input: input.address(),
        weights: vec![weight.address()],
    };
    let tuned = || {
        let mut gemm = Gemm::new(device, Some(folder.path()), false).unwrap();
        // SAFETY: every buffer was allocated above with the size of its shape.
        unsafe { gemm.tune(std::slice::from_ref(&trial)) }.unwrap();
        let file = folder.path().read_dir().unwrap().next().unwrap().unwrap().path();
        assert_close("timed", &case.run(device, &mut gemm), &case.reference(), ROUNDING);
        (std::fs::read(&file).unwrap(), file)
    };
    let (content, file) = tuned();
    let written = file.metadata().unwrap().modified().unwrap();
    assert_eq!(tuned().0, content);
    assert_eq!(file.metadata().unwrap().modified().unwrap(), written, "nothing is timed twice");
    std::fs::write(&file, "broken").unwrap();
    let remade = tuned().0;
    assert_ne!(remade, b"broken");
}

const SEED: u64 = 0x1234_5678_9abc_def0;

/// As `nano_model`'s dummy weights are defined.
fn hash(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[test]
fn random_parameters_are_the_hosts() {
    let Some(kernels) = kernels() else { return };
    let device = kernels.device();
    let draws = Random(3).values(NUM_DRAWS);
    let draws_on = device.allocate_from(&draws).unwrap();
    for num_elements in [1, 7, 1000, (1 << 19) + 5] {
        let out = device.allocate(num_elements * 2).unwrap();
        out.fill(0xff).unwrap();
        let (to, from) = (out.address(), draws_on.address());
        // SAFETY: both buffers were allocated above with the size of their shapes.
        unsafe { kernels.fill_random(to, from, num_elements, SEED) }.unwrap();
        let expected: Vec<f32> = (0..num_elements as u64)
            .map(|i| {
                let bits = hash(hash(SEED ^ (i >> 18)).wrapping_add(i % (1 << 18) / 4));
                draws[(bits >> (16 * (i % 4)) & 0xffff) as usize].to_f32()
            })
            .collect();
        assert!(download(&out) == expected, "{num_elements} elements");
    }
}

#[test]
fn other_types_are_rounded_as_the_host_rounds_them() {
    let Some(kernels) = kernels() else { return };
    let device = kernels.device();
    let mut random = Random(4);
    let singles: Vec<f32> = (0..100_003).map(|_| random.value() * 1e-3).collect();
    let halves: Vec<f16> = singles.iter().map(|&value| f16::from_f32(value)).collect();
    let bytes_of_singles: Vec<u8> = singles.iter().flat_map(|it| it.to_le_bytes()).collect();
    let bytes_of_halves: Vec<u8> = halves.iter().flat_map(|it| it.to_le_bytes()).collect();
    let rounded = |values: &mut dyn Iterator<Item = f32>| -> Vec<f32> {
        values.map(|value| bf16::from_f32(value).to_f32()).collect()
    };
    for (bytes, is_half, expected) in [
        (&bytes_of_singles, false, rounded(&mut singles.iter().copied())),
        (&bytes_of_halves, true, rounded(&mut halves.iter().map(|it| it.to_f32()))),
    ] {
        let source = device.allocate(bytes.len()).unwrap();
        // From the middle of a page to the middle of another.
        source.upload_large(0, bytes).unwrap();
        let out = device.allocate(singles.len() * 2).unwrap();
        let (to, from) = (out.address(), source.address());
        // SAFETY: both buffers were allocated above with the size of their shapes.
        unsafe { kernels.round_to_bf16(to, from, singles.len(), is_half) }.unwrap();
        assert!(download(&out) == expected, "half {is_half}");
    }
}

#[test]
fn banned_tokens_and_no_others_become_minus_infinity() {
    let Some(kernels) = kernels() else { return };
    let device = kernels.device();
    let (num_rows, vocab_size) = (3, 151);
    let logits = device.allocate_from(&vec![1.0_f32; num_rows * vocab_size]).unwrap();
    let banned = [[0_u32, 5], [2, 150], [1, 151], [2, 7]];
    let banned_on = device.allocate_from(banned.as_flattened()).unwrap();
    let (to, from) = (logits.address(), banned_on.address());
    // SAFETY: both buffers were allocated above with the size of their shapes.
    unsafe { kernels.ban_tokens(to, from, banned.len(), vocab_size) }.unwrap();
    let mut values = vec![0.0_f32; num_rows * vocab_size];
    logits.download(0, &mut values).unwrap();
    for (at, value) in values.iter().enumerate() {
        let is_banned = [5, 2 * vocab_size + 150, 2 * vocab_size + 7].contains(&at);
        assert_eq!(*value, if is_banned { f32::NEG_INFINITY } else { 1.0 }, "{at}");
    }
}
