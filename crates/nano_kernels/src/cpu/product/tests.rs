use std::num::NonZero;

use half::bf16;

use super::*;
use crate::reference;

fn value(index: usize) -> f32 {
    ((index * 7919 + 13) % 1009) as f32 / 300.0 - 1.7
}

fn pool() -> Pool {
    Pool::new(NonZero::new(3).unwrap())
}

/// Rows and a matrix of `rows` outputs, with the elements that they are made of.
struct Case<E: Element> {
    packed: PackedRows<E>,
    inputs: Vec<f32>,
    weights: Vec<f32>,
}

impl<E: Element> Case<E> {
    fn new(isa: Isa, pool: &mut Pool, num_rows: usize, rows: usize, columns: usize) -> Self {
        let narrowed = |index| E::narrow(value(index)).widen();
        let inputs: Vec<f32> = (0..num_rows * columns).map(|it| narrowed(it + 5)).collect();
        let mut packed = PackedRows::default();
        packed.pack(pool, isa, num_rows, columns, |row, values| {
            values.copy_from_slice(&inputs[row * columns..][..columns]);
        });
        let weights = (0..rows * columns).map(narrowed).collect();
        Self { packed, inputs, weights }
    }

    fn write(&self, pool: &mut Pool, mut matrix: PackedMatrix<E>) -> PackedMatrix<E> {
        let columns = matrix.columns();
        matrix.write(pool, |row, elements| {
            for (element, value) in elements.iter_mut().zip(&self.weights[row * columns..]) {
                *element = E::narrow(*value);
            }
        });
        matrix
    }

    fn expected(&self, columns: usize) -> Vec<Vec<f32>> {
        let row = |row| reference::product::product(row, &self.weights);
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

fn check<E: Element>(isa: Isa, pool: &mut Pool) {
    for (rows, columns) in [(1, 1), (16, 2), (17, 37), (33, 300), (48, 1031)] {
        for num_rows in [1, 2, 5, 6, 12, 13, 31, 49, 61] {
            let case = Case::<E>::new(isa, pool, num_rows, rows, columns);
            let matrix = case.write(pool, PackedMatrix::zeroed(rows, columns).unwrap());
            let expected = case.expected(columns).concat();
            let mut output = vec![f32::NAN; num_rows * rows];
            product(pool, isa, &case.packed, &matrix, &mut output);
            assert_close(&output, &expected, columns);
            let mut row = vec![0.0; columns];
            matrix.row(rows - 1, &mut row);
            assert_eq!(row, case.weights[(rows - 1) * columns..]);

            let once = output.clone();
            product_add(pool, isa, &case.packed, &matrix, &mut output);
            let twice: Vec<f32> = once.iter().map(|value| value + value).collect();
            assert_eq!(output, twice);

            if rows % 2 == 0 {
                let gated = case.write(pool, PackedMatrix::gated(rows, columns).unwrap());
                matrix.row(rows / 2, &mut row);
                assert_eq!(row, case.weights[rows / 2 * columns..][..columns]);
                let mut output = vec![f32::NAN; num_rows * rows / 2];
                gated_product(pool, isa, &case.packed, &gated, &mut output);
                let both = case.expected(columns);
                let expected: Vec<f32> =
                    both.iter().flat_map(|row| reference::activation::silu_mul(row)).collect();
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
    let mut pool = pool();
    for isa in Isa::available() {
        check::<f32>(isa, &mut pool);
        check::<bf16>(isa, &mut pool);
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_batch() {
    let (rows, columns) = (40, 700);
    let mut pool = pool();
    for isa in Isa::available() {
        let case = Case::<bf16>::new(isa, &mut pool, 100, rows, columns);
        let matrix = case.write(&mut pool, PackedMatrix::zeroed(rows, columns).unwrap());
        let run = |num_rows: usize, pool: &mut Pool| {
            let mut packed = PackedRows::default();
            packed.pack(pool, isa, num_rows, columns, |row, values| {
                values.copy_from_slice(&case.inputs[row * columns..][..columns]);
            });
            let mut output = vec![0.0; num_rows * rows];
            product(pool, isa, &packed, &matrix, &mut output);
            output.iter().map(|value| value.to_bits()).collect::<Vec<_>>()
        };
        let all = run(100, &mut pool);
        for num_rows in [1, 2, 7, 12, 16, 31, 48, 49] {
            let mut alone = Pool::new(NonZero::<usize>::MIN);
            assert_eq!(run(num_rows, &mut alone), all[..num_rows * rows], "{isa:?} {num_rows}");
        }
    }
}
