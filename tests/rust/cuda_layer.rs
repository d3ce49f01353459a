//! Products of few rows that share norms, one behind the other as in a decoder's layer, against
//! plain references; skips where there is no Hopper GPU.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::float_cmp,
    clippy::print_stdout,
    reason = "a test fails by a panic and says what it measured; equal bits are the point"
)]

mod cuda_fixture;

use cuda_fixture::{Random, assert_close, download, floats, kernels, poisoned};
use half::bf16;
use nano_kernels::cuda::row_product::Epilogue;
use nano_kernels::cuda::skinny::{NormBefore, NormBehind, SQUARES_BYTES, SkinnyProduct};
use nano_kernels::cuda::{DeviceBuffer, Kernels};
use nano_kernels::reference::activation::silu_mul;
use nano_kernels::reference::norm::rms_norm;
use nano_kernels::reference::product::product;

/// The residual, the rows times the norm's weight and the gate are rounded to bf16 on the way, each
/// by 2⁻⁸ at worst.
const ROUNDING: f64 = 8e-3;
const EPS: f32 = 1e-5;
const CONTEXT_SIZE: usize = 320;
const QKV_SIZE: usize = 640;

/// From attention to the next layer's: `output`, `gate_up`, `down` and `qkv`.
struct Layer {
    num_rows: usize,
    hidden_size: usize,
    intermediate_size: usize,
    context: Vec<bf16>,
    residual: Vec<bf16>,
    norms: [Vec<bf16>; 2],
    weights: [Vec<bf16>; 4],
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
            ],
        }
    }

    /// The residual and `qkv`.
    fn run(&self, kernels: &Kernels) -> [Vec<f32>; 2] {
        let device = kernels.device();
        let on = |values: &Vec<bf16>| device.allocate_from(values).unwrap();
        let rows = |width: usize| poisoned(device, self.num_rows * width);
        let (context, residual) = (on(&self.context), on(&self.residual));
        let (norms, weights) = (self.norms.each_ref().map(on), self.weights.each_ref().map(on));
        let (scaled, gated) = (rows(self.hidden_size), rows(self.intermediate_size));
        let qkv = rows(QKV_SIZE);
        let squares_on = poisoned(device, SQUARES_BYTES / 2);
        let squares = squares_on.address();
        let product = |out: &DeviceBuffer, input: &DeviceBuffer, index: usize| SkinnyProduct {
            out: out.address(),
            input: input.address(),
            weight: weights[index].address(),
            num_rows: self.num_rows,
            out_features: 0,
            in_features: self.hidden_size,
            epilogue: Epilogue::Bf16,
            norm_before: Some(NormBefore { squares, eps: EPS }),
            norm_behind: None,
        };
        let add = |input: &DeviceBuffer, in_features: usize, index: usize| SkinnyProduct {
            out_features: self.hidden_size,
            in_features,
            epilogue: Epilogue::AddBf16,
            norm_before: None,
            norm_behind: Some(NormBehind {
                weight: norms[index / 2].address(),
                scaled: scaled.address(),
                squares,
            }),
            ..product(&residual, input, index)
        };
        for launch in [
            add(&context, CONTEXT_SIZE, 0),
            SkinnyProduct {
                out_features: 2 * self.intermediate_size,
                epilogue: Epilogue::Gated,
                ..product(&gated, &scaled, 1)
            },
            add(&gated, self.intermediate_size, 2),
            SkinnyProduct { out_features: QKV_SIZE, ..product(&qkv, &scaled, 3) },
        ] {
            // SAFETY: every buffer was allocated above with the size of its shape.
            unsafe { kernels.skinny_product(&launch) }.unwrap();
        }
        [download(&residual), download(&qkv)]
    }

    fn reference(&self) -> [Vec<f32>; 2] {
        let weights = self.weights.each_ref().map(|weight| floats(weight));
        let norms = self.norms.each_ref().map(|norm| floats(norm));
        let add = |to: &[f32], product: &[f32]| -> Vec<f32> {
            to.iter().zip(product).map(|(a, b)| a + b).collect()
        };
        let (context, residual) = (floats(&self.context), floats(&self.residual));
        let rows = context.chunks_exact(CONTEXT_SIZE).zip(residual.chunks_exact(self.hidden_size));
        let (mut residuals, mut qkvs) = (Vec::new(), Vec::new());
        for (context, residual) in rows {
            let residual = add(residual, &product(context, &weights[0]));
            let both = product(&rms_norm(&residual, &norms[0], EPS), &weights[1]);
            let residual = add(&residual, &product(&silu_mul(&both), &weights[2]));
            qkvs.extend(product(&rms_norm(&residual, &norms[1], EPS), &weights[3]));
            residuals.extend(residual);
        }
        [residuals, qkvs]
    }
}

#[test]
fn products_that_share_norms_agree_with_the_references() {
    let Some(kernels) = kernels() else { return };
    if !kernels.has_skinny_product(1, 64) {
        println!("skipped: the GPU is no Hopper");
        return;
    }
    // Tiles of one, two, three and five times 16 rows, with a last one that is not whole; every
    // number of tokens of a wgmma, full and not.
    for (num_rows, hidden_size, intermediate_size) in [
        (2, 256, 512),
        (3, 1088, 320),
        (8, 4096, 256),
        (9, 192, 64),
        (16, 5120, 64),
        (17, 10_240, 64),
        (32, 4096, 640),
    ] {
        let layer = Layer::new(num_rows, hidden_size, intermediate_size);
        let (found, expected) = (layer.run(&kernels), layer.reference());
        for (name, found, expected) in
            [("residual", &found[0], &expected[0]), ("qkv", &found[1], &expected[1])]
        {
            let what = format!("{name} {num_rows} x {hidden_size} x {intermediate_size}");
            assert_close(&what, found, expected, ROUNDING);
        }
        assert!(layer.run(&kernels) == found, "other bits the second time, {num_rows} rows");
    }
}
