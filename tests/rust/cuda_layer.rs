//! Products that share norms, one behind the other as in a decoder's layer, against plain
//! references; skips where there is no Hopper GPU.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::float_cmp,
    clippy::print_stdout,
    reason = "a test fails by a panic and says what it measured; equal bits are the point"
)]

mod cuda_fixture;
mod oracle;

use cuda_fixture::{Random, assert_close, download, floats, hopper, poisoned};
use half::bf16;
use nano_kernels::cuda::product::{
    Epilogue, FusedProduct, Norm, Product, ProductKernel, SQUARES_BYTES,
};
use nano_kernels::cuda::{DeviceBuffer, Kernels};
use oracle::{product, rms_norm, silu_mul};

/// The residual, the rows times the norm's weight and the gate are rounded to bf16 on the way, each
/// by 2⁻⁸ at worst.
const ROUNDING: f64 = 8e-3;
const EPS: f32 = 1e-5;
const CONTEXT_SIZE: usize = 320;
const QKV_SIZE: usize = 640;
const VOCAB_SIZE: usize = 1000;

/// From attention to the next layer's, and what would be logits: `output`, `gate_up`, `down`, `qkv`
/// and `lm_head`.
struct Layer {
    num_rows: usize,
    hidden_size: usize,
    intermediate_size: usize,
    context: Vec<bf16>,
    residual: Vec<bf16>,
    norms: [Vec<bf16>; 2],
    weights: [Vec<bf16>; 5],
}

impl Layer {
    fn new(num_rows: usize, hidden_size: usize, intermediate_size: usize) -> Self {
        let mut random = Random(num_rows as u64);
        let mut matrix = |rows: usize, columns: usize| random.values(rows * columns);
        Self {
            num_rows,
            hidden_size,
            intermediate_size,
            context: matrix(num_rows, CONTEXT_SIZE),
            residual: matrix(num_rows, hidden_size),
            norms: [matrix(1, hidden_size), matrix(1, hidden_size)],
            weights: [
                matrix(hidden_size, CONTEXT_SIZE),
                matrix(2 * intermediate_size, hidden_size),
                matrix(hidden_size, intermediate_size),
                matrix(QKV_SIZE, hidden_size),
                matrix(VOCAB_SIZE, hidden_size),
            ],
        }
    }

    /// The residual, `qkv` and logits.
    fn run(&self, kernels: &Kernels) -> [Vec<f32>; 3] {
        let device = kernels.device();
        let on = |values: &Vec<bf16>| device.allocate_from(values).unwrap();
        let rows = |width: usize| poisoned(device, self.num_rows * width);
        let (context, residual) = (on(&self.context), on(&self.residual));
        let (norms, weights) = (self.norms.each_ref().map(on), self.weights.each_ref().map(on));
        let (scaled, gated) = (rows(self.hidden_size), rows(self.intermediate_size));
        let (qkv, logits) = (rows(QKV_SIZE), rows(2 * VOCAB_SIZE));
        let squares_on = poisoned(device, SQUARES_BYTES / 2);
        let squares = squares_on.address();
        let add = |input: &DeviceBuffer, in_features: usize, index: usize| FusedProduct {
            out: residual.address(),
            input: input.address(),
            weight: weights[index].address(),
            product: Product {
                num_rows: self.num_rows,
                out_features: self.hidden_size,
                in_features,
                epilogue: Epilogue::AddBf16,
            },
            norm: Norm::Behind {
                weight: norms[index / 2].address(),
                scaled: scaled.address(),
                squares,
            },
        };
        let (output, down) =
            (add(&context, CONTEXT_SIZE, 0), add(&gated, self.intermediate_size, 2));
        let normed = |out: &DeviceBuffer, behind: &FusedProduct, index: usize| {
            let num_squares = kernels.num_squares(&behind.product).unwrap();
            FusedProduct {
                out: out.address(),
                input: scaled.address(),
                weight: weights[index].address(),
                product: Product {
                    num_rows: self.num_rows,
                    out_features: weights[index].num_bytes() / 2 / self.hidden_size,
                    in_features: self.hidden_size,
                    epilogue: [Epilogue::Gated, Epilogue::Bf16, Epilogue::F32][index / 2],
                },
                norm: Norm::Begun { squares, num_squares, eps: EPS },
            }
        };
        for launch in [
            output,
            normed(&gated, &output, 1),
            down,
            normed(&qkv, &down, 3),
            normed(&logits, &down, 4),
        ] {
            // SAFETY: every buffer was allocated above with the size of its shape.
            unsafe { kernels.fused_product(&launch) }.unwrap();
        }
        let mut logits_of = vec![0.0_f32; self.num_rows * VOCAB_SIZE];
        logits.download(0, &mut logits_of).unwrap();
        [download(&residual), download(&qkv), logits_of]
    }

    fn reference(&self) -> [Vec<f32>; 3] {
        let weights = self.weights.each_ref().map(|weight| floats(weight));
        let norms = self.norms.each_ref().map(|norm| floats(norm));
        let add = |to: &[f32], product: &[f32]| -> Vec<f32> {
            to.iter().zip(product).map(|(a, b)| a + b).collect()
        };
        let (context, residual) = (floats(&self.context), floats(&self.residual));
        let row = |row: usize| {
            let context = &context[row * CONTEXT_SIZE..][..CONTEXT_SIZE];
            let residual = &residual[row * self.hidden_size..][..self.hidden_size];
            let residual = add(residual, &product(context, &weights[0]));
            let both = product(&rms_norm(&residual, &norms[0], EPS), &weights[1]);
            let residual = add(&residual, &product(&silu_mul(&both), &weights[2]));
            let normed = rms_norm(&residual, &norms[1], EPS);
            let (qkv, logits) = (product(&normed, &weights[3]), product(&normed, &weights[4]));
            [residual, qkv, logits]
        };
        let mut all = [Vec::new(), Vec::new(), Vec::new()];
        for found in on_all_cores(self.num_rows, row) {
            all.iter_mut().zip(found).for_each(|(all, of_a_row)| all.extend(of_a_row));
        }
        all
    }
}

/// `work` of every row, in order.
fn on_all_cores<T: Send>(num_rows: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let num_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (rows, work): (Vec<usize>, _) = ((0..num_rows).collect(), &work);
    std::thread::scope(|scope| {
        let part = |rows: &[usize]| rows.iter().map(|&row| work(row)).collect::<Vec<_>>();
        let parts = rows.chunks(num_rows.div_ceil(num_threads));
        let parts: Vec<_> = parts.map(|rows| scope.spawn(move || part(rows))).collect();
        parts.into_iter().flat_map(|part| part.join().unwrap()).collect()
    })
}

#[test]
fn products_that_share_norms_agree_with_the_references() {
    let Some(kernels) = hopper() else { return };
    // Of few rows, tiles of one, two, three and five times 16 rows, with a last one that is not
    // whole; every number of tokens of a wgmma, full and not; one kernel's squares read by another;
    // sums that are cut between thread blocks and sums that are not.
    for (num_rows, hidden_size, intermediate_size) in [
        (2, 256, 512),
        (3, 1088, 320),
        (8, 4096, 256),
        (9, 192, 64),
        (16, 5120, 64),
        (17, 10_240, 64),
        (20, 200, 256),
        (24, 256, 200),
        (32, 4096, 640),
        (33, 8, 8),
        (40, 4096, 1032),
        (64, 1160, 256),
        (65, 1032, 1096),
        (96, 136, 2056),
        (100, 4352, 1088),
        (128, 520, 1160),
        (129, 1032, 1096),
        (160, 200, 328),
        (177, 4096, 1024),
        (192, 264, 1160),
    ] {
        let layer = Layer::new(num_rows, hidden_size, intermediate_size);
        let (found, expected) = (layer.run(&kernels), layer.reference());
        for (name, (found, expected)) in
            ["residual", "qkv", "logits"].into_iter().zip(found.iter().zip(&expected))
        {
            let what = format!("{name} {num_rows} x {hidden_size} x {intermediate_size}");
            assert_close(&what, found, expected, ROUNDING);
        }
        assert!(layer.run(&kernels) == found, "other bits the second time, {num_rows} rows");
    }
}

#[test]
fn mistrals_gate_and_logits_behind_a_shared_norm_agree_with_the_references() {
    const HIDDEN: usize = 4096;
    const IN_FRONT: usize = 64;
    const MAX_ROWS: usize = 192;
    let Some(kernels) = hopper() else { return };
    let device = kernels.device();
    let mut random = Random(7);
    // A prime number of values again and again: no two rows are alike.
    let values = random.values(1_000_003);
    let repeated = |len: usize| -> Vec<bf16> { values.iter().copied().cycle().take(len).collect() };
    let (context, before) = (random.values(MAX_ROWS * IN_FRONT), random.values(MAX_ROWS * HIDDEN));
    let (norm, front) = (random.values(HIDDEN), random.values(HIDDEN * IN_FRONT));
    let consumers =
        [(2 * 14_336, Epilogue::Gated), (32_000, Epilogue::F32), (6144, Epilogue::Bf16)];
    let weights = consumers.map(|(out_features, _)| repeated(out_features * HIDDEN));
    let on = |values: &Vec<bf16>| device.allocate_from(values).unwrap();
    let (context_on, norm_on, front_on) = (on(&context), on(&norm), on(&front));
    let weights_on = weights.each_ref().map(on);
    let float_weights = weights.each_ref().map(|weight| floats(weight));
    let (context, front, norm) = (floats(&context), floats(&front), floats(&norm));
    let before_of = floats(&before);
    for num_rows in [4, 16, 32, 64, 130, MAX_ROWS] {
        let residual = on(&before);
        let scaled = poisoned(device, num_rows * HIDDEN);
        let squares_on = poisoned(device, SQUARES_BYTES / 2);
        let squares = squares_on.address();
        let add = FusedProduct {
            out: residual.address(),
            input: context_on.address(),
            weight: front_on.address(),
            product: Product {
                num_rows,
                out_features: HIDDEN,
                in_features: IN_FRONT,
                epilogue: Epilogue::AddBf16,
            },
            norm: Norm::Behind { weight: norm_on.address(), scaled: scaled.address(), squares },
        };
        let num_squares = kernels.num_squares(&add.product).unwrap();
        // SAFETY: every buffer was allocated above with the size of its shape.
        unsafe { kernels.fused_product(&add) }.unwrap();
        // Not all rows, or the reference would take minutes.
        let rows: Vec<usize> =
            (0..num_rows).filter(|row| row % 11 == 0 || row + 1 == num_rows).collect();
        let normed = on_all_cores(rows.len(), |at| {
            let context = &context[rows[at] * IN_FRONT..][..IN_FRONT];
            let before = &before_of[rows[at] * HIDDEN..][..HIDDEN];
            let sums = product(context, &front);
            let residual: Vec<f32> = before.iter().zip(sums).map(|(a, b)| a + b).collect();
            rms_norm(&residual, &norm, EPS)
        });
        for (index, (out_features, epilogue)) in consumers.into_iter().enumerate() {
            let out = poisoned(device, num_rows * out_features * 2);
            let launch = FusedProduct {
                out: out.address(),
                input: scaled.address(),
                weight: weights_on[index].address(),
                product: Product { num_rows, out_features, in_features: HIDDEN, epilogue },
                norm: Norm::Begun { squares, num_squares, eps: EPS },
            };
            // SAFETY: every buffer was allocated above with the size of its shape.
            unsafe { kernels.fused_product(&launch) }.unwrap();
            let is_gated = epilogue == Epilogue::Gated;
            let width = if is_gated { out_features / 2 } else { out_features };
            let found = if epilogue == Epilogue::F32 {
                let mut values = vec![0.0_f32; num_rows * width];
                out.download(0, &mut values).unwrap();
                values
            } else {
                download(&out)
            };
            let some: Vec<f32> =
                rows.iter().flat_map(|row| &found[row * width..][..width]).copied().collect();
            let expected = on_all_cores(rows.len(), |at| {
                let out = product(&normed[at], &float_weights[index]);
                if is_gated { silu_mul(&out) } else { out }
            });
            let what = format!("{epilogue:?} {num_rows} x {out_features} x {HIDDEN}");
            assert_close(&what, &some, &expected.concat(), ROUNDING);
            assert!(found[..num_rows * width].iter().all(|it| !it.is_nan()), "{what}: left out");
        }
    }
}

#[test]
fn which_kernel_runs_goes_by_rows_and_features() {
    let Some(kernels) = hopper() else { return };
    let which = |num_rows, out_features, in_features, epilogue| {
        kernels.product_kernel(&Product { num_rows, out_features, in_features, epilogue })
    };
    for (num_rows, of_down, of_gate) in [
        (1, Some(ProductKernel::Row), Some(ProductKernel::Row)),
        (2, Some(ProductKernel::Skinny), Some(ProductKernel::Skinny)),
        (32, Some(ProductKernel::Skinny), Some(ProductKernel::Skinny)),
        (33, Some(ProductKernel::Batch), Some(ProductKernel::Gated)),
        (128, Some(ProductKernel::Batch), Some(ProductKernel::Gated)),
        (192, Some(ProductKernel::Batch), Some(ProductKernel::Gated)),
        (193, None, Some(ProductKernel::Gated)),
    ] {
        assert_eq!(which(num_rows, 4096, 14_336, Epilogue::AddBf16), of_down, "{num_rows}");
        assert_eq!(which(num_rows, 28_672, 4096, Epilogue::Gated), of_gate, "{num_rows}");
    }
    assert_eq!(which(2, 97, 64, Epilogue::F32), Some(ProductKernel::Skinny));
    assert_eq!(which(2, 97, 72, Epilogue::F32), None);
    assert_eq!(which(2, 96, 72, Epilogue::F32), Some(ProductKernel::Batch));
    assert_eq!(which(2, 96, 71, Epilogue::F32), None);
}
