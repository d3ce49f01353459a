//! The CPU's products, plain, coded and gated, and the norms before them.

use std::num::NonZero;

use half::bf16;

use nano_kernels::cpu::matrix::PackedMatrix;
use nano_kernels::cpu::memory::Arena;
use nano_kernels::cpu::norm::Norm;
use nano_kernels::cpu::product::{PackedRows, Store, product};
use nano_kernels::cpu::{Element, Isa, Pool};

use crate::oracle;

/// Outputs of a panel.
const LANES: usize = 16;

fn value(index: usize) -> f32 {
    ((index * 7919 + 13) % 1009) as f32 / 300.0 - 1.7
}

fn pools() -> Vec<Pool> {
    let pool = |isa| Pool::new(NonZero::new(3).unwrap(), isa);
    Isa::available().into_iter().map(pool).collect()
}

/// Rows and a matrix of `rows` outputs, with the elements that they are made of.
struct Case<E: Element> {
    packed: PackedRows<E>,
    inputs: Vec<f32>,
    weights: Vec<f32>,
}

impl<E: Element> Case<E> {
    fn new(pool: &mut Pool, num_rows: usize, rows: usize, columns: usize) -> Self {
        Self::of(pool, num_rows, rows, columns, value)
    }

    fn of(
        pool: &mut Pool,
        num_rows: usize,
        rows: usize,
        columns: usize,
        weight: impl Fn(usize) -> f32,
    ) -> Self {
        let narrowed = |index| E::narrow(value(index)).widen();
        let inputs: Vec<f32> = (0..num_rows * columns).map(|it| narrowed(it + 5)).collect();
        let mut packed = PackedRows::default();
        packed.pack(pool, &inputs, columns, None);
        let weights = (0..rows * columns).map(|index| E::narrow(weight(index)).widen()).collect();
        Self { packed, inputs, weights }
    }

    fn matrix(&self, pool: &mut Pool, columns: usize, is_gated: bool) -> PackedMatrix<E> {
        let size = (self.weights.len() / columns, columns);
        PackedMatrix::pack(pool, &mut Arena::default(), size, is_gated, |row, elements| {
            for (element, value) in elements.iter_mut().zip(&self.weights[row * columns..]) {
                *element = E::narrow(*value);
            }
        })
        .unwrap()
    }

    fn expected(&self, columns: usize) -> Vec<Vec<f32>> {
        let row = |row| oracle::product(row, &self.weights);
        self.inputs.chunks_exact(columns).map(row).collect()
    }
}

fn assert_close(found: &[f32], expected: &[f32], columns: usize) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        // Terms are below 3, so a sum of them is rounded by less than this.
        let bound = 1e-6 * columns as f32 + 1e-5 * expected.abs();
        assert!((found - expected).abs() <= bound, "{found} {expected}");
    }
}

fn check<E: Element>(pool: &mut Pool) {
    for (rows, columns) in [(1, 1), (16, 2), (17, 37), (33, 300), (48, 1031)] {
        for num_rows in [1, 2, 5, 6, 12, 13, 31, 49, 61] {
            let case = Case::<E>::new(pool, num_rows, rows, columns);
            let matrix = case.matrix(pool, columns, false);
            let expected = case.expected(columns).concat();
            let mut output = vec![f32::NAN; num_rows * rows];
            product(pool, &case.packed, &matrix, Store::Write, &mut output);
            assert_close(&output, &expected, columns);
            let mut row = vec![0.0; columns];
            matrix.row(rows - 1, &mut row);
            assert_eq!(row, case.weights[(rows - 1) * columns..]);

            let once = output.clone();
            product(pool, &case.packed, &matrix, Store::Add, &mut output);
            let twice: Vec<f32> = once.iter().map(|value| value + value).collect();
            assert_eq!(output, twice);

            if rows % 2 == 0 {
                let gated = case.matrix(pool, columns, true);
                let mut output = vec![f32::NAN; num_rows * rows / 2];
                product(pool, &case.packed, &gated, Store::Write, &mut output);
                let both = case.expected(columns);
                let expected: Vec<f32> =
                    both.iter().flat_map(|row| oracle::silu_mul(row)).collect();
                for (found, expected) in output.iter().zip(&expected) {
                    let bound = 2e-5 * columns as f32 + 1e-5 * expected.abs();
                    assert!((found - expected).abs() <= bound, "{found} {expected}");
                }
            }
        }
    }
}

#[test]
fn sums_are_those_of_the_reference() {
    for pool in &mut pools() {
        check::<f32>(pool);
        check::<bf16>(pool);
    }
}

/// About normally distributed, and among them what no code is for: zeros, tiny numbers, large ones.
fn weight(index: usize) -> f32 {
    let hash = |salt: u64| (4 * index as u64 + salt).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let uniform = |salt: u64| {
        ((hash(salt) ^ hash(salt) >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 40) as f32
            / (1 << 24) as f32
            - 0.5
    };
    match index % 3019 {
        0 => 0.0,
        1500 => 1e-20,
        2700 => -3e4,
        _ => 0.03 * (0..4).map(uniform).sum::<f32>(),
    }
}

#[test]
fn coded_parameters_are_the_same_bits_and_give_the_sums_of_the_reference() {
    for pool in &mut pools() {
        for (rows, columns) in [(1, 8), (33, 256), (64, 1032), (70, 2048)] {
            for num_rows in [1, 3, 4, 5, 12, 13, 31, 49, 61] {
                let case = Case::<bf16>::of(pool, num_rows, rows, columns, weight);
                let matrix = case.matrix(pool, columns, false);
                let is_coded = matrix.num_bytes() < rows.next_multiple_of(2 * LANES) * columns * 2;
                // The first parameter has no code, which is much of a matrix of eight.
                assert_eq!(is_coded, pool.isa().has_bf16_products() && columns > 8, "{pool:?}");
                let mut row = vec![0.0; columns];
                for index in 0..rows {
                    matrix.row(index, &mut row);
                    assert_eq!(row, case.weights[index * columns..][..columns]);
                }
                let sums = case.expected(columns);
                // Sums are rounded by their largest terms.
                let terms = Case { weights: abs(&case.weights), inputs: abs(&case.inputs), ..case };
                let bounds: Vec<f32> =
                    terms.expected(columns).concat().iter().map(|it| 1e-5 * it).collect();
                let mut output = vec![f32::NAN; num_rows * rows];
                product(pool, &terms.packed, &matrix, Store::Write, &mut output);
                assert_within(&output, &sums.concat(), &bounds);
                let twice: Vec<f32> = output.iter().map(|value| value + value).collect();
                product(pool, &terms.packed, &matrix, Store::Add, &mut output);
                assert_eq!(output, twice);
            }
        }
    }
}

fn abs(values: &[f32]) -> Vec<f32> {
    values.iter().map(|value| value.abs()).collect()
}

fn assert_within(found: &[f32], expected: &[f32], bounds: &[f32]) {
    assert_eq!((found.len(), found.len()), (expected.len(), bounds.len()));
    for ((found, expected), bound) in found.iter().zip(expected).zip(bounds) {
        assert!((found - expected).abs() <= *bound, "{found} {expected} {bound}");
    }
}

#[test]
fn coded_gates_are_those_of_the_reference() {
    for pool in &mut pools() {
        for num_rows in [1, 12, 13, 49] {
            let (rows, columns) = (70, 256);
            let case = Case::<bf16>::of(pool, num_rows, rows, columns, |index| {
                // Sums of some size, or the gate would hide them.
                if index % 3019 == 2700 { 0.0 } else { 20.0 * weight(index) }
            });
            let matrix = case.matrix(pool, columns, true);
            assert_eq!(matrix.num_bytes() < 96 * columns * 2, pool.isa().has_bf16_products());
            let mut output = vec![f32::NAN; num_rows * rows / 2];
            product(pool, &case.packed, &matrix, Store::Write, &mut output);
            let rows = case.expected(columns);
            let expected = rows.iter().flat_map(|row| oracle::silu_mul(row));
            for (found, expected) in output.iter().zip(expected) {
                assert!(
                    (found - expected).abs() <= 1e-3 + 1e-4 * expected.abs(),
                    "{found} {expected}"
                );
            }
        }
    }
}

#[test]
fn too_many_parameters_without_a_code_that_no_sample_shows_are_stored_plainly() {
    let (rows, columns) = (2048, 64);
    for pool in &mut pools() {
        // Every eighth row is looked at.
        for (zero_rows, is_coded) in [(0, pool.isa().has_bf16_products()), (6, false)] {
            let arena = &mut Arena::default();
            let is_zero = |row: usize| (1..=zero_rows).contains(&(row % 8));
            let matrix =
                PackedMatrix::<bf16>::pack(pool, arena, (rows, columns), false, |row, it| {
                    it.fill(bf16::from_f32(if is_zero(row) { 0.0 } else { 0.5 }));
                });
            let num_bytes = matrix.unwrap().num_bytes();
            assert_eq!(num_bytes < 2 * rows * columns, is_coded, "{pool:?} {num_bytes}");
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_batch() {
    for is_gated in [false, true] {
        check_bits::<f32>(is_gated);
        check_bits::<bf16>(is_gated);
    }
}

fn check_bits<E: Element>(is_gated: bool) {
    // Of 1000 columns parameters can be coded.
    for columns in [700, 1000] {
        check_bits_of::<E>(is_gated, columns);
    }
}

fn check_bits_of<E: Element>(is_gated: bool, columns: usize) {
    let rows = 80;
    let width = if is_gated { rows / 2 } else { rows };
    for pool in &mut pools() {
        let case = Case::<E>::of(pool, 100, rows, columns, weight);
        let matrix = case.matrix(pool, columns, is_gated);
        let run = |num_rows: usize, pool: &mut Pool| {
            let mut packed = PackedRows::default();
            packed.pack(pool, &case.inputs[..num_rows * columns], columns, None);
            let mut output = vec![0.0; num_rows * width];
            product(pool, &packed, &matrix, Store::Write, &mut output);
            output.iter().map(|value| value.to_bits()).collect::<Vec<_>>()
        };
        let all = run(100, pool);
        for num_rows in [1, 2, 7, 12, 16, 31, 48, 49] {
            let mut alone = Pool::new(NonZero::<usize>::MIN, pool.isa());
            assert_eq!(run(num_rows, &mut alone), all[..num_rows * width], "{pool:?} {num_rows}");
        }
    }
}

#[test]
fn rows_are_normed_as_the_reference_does() {
    for pool in &mut pools() {
        for columns in [1, 15, 16, 37, 257, 1024] {
            let rows: Vec<f32> = (0..3 * columns).map(value).collect();
            let weight: Vec<f32> = (0..columns).map(|index| value(index + 5)).collect();
            let mut packed = PackedRows::<f32>::default();
            packed.pack(pool, &rows, columns, Some(Norm { weight: &weight, eps: 1e-5 }));
            // A product with the unit matrix is what was packed.
            let arena = &mut Arena::default();
            let size = (columns, columns);
            let unit = PackedMatrix::pack(pool, arena, size, false, |row, elements| {
                elements.fill(0.0);
                elements[row] = 1.0;
            });
            let mut found = vec![f32::NAN; rows.len()];
            product(pool, &packed, &unit.unwrap(), Store::Write, &mut found);
            let expected =
                rows.chunks_exact(columns).flat_map(|row| oracle::rms_norm(row, &weight, 1e-5));
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() <= 1e-5 * expected.abs().max(1.0));
            }
        }
    }
}
