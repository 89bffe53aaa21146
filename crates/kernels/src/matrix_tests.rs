use proptest::prelude::*;

use super::*;

/// Reproducible values in (−1, 1).
fn random(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

fn vector(len: usize, seed: u64) -> Vec<f32> {
    let mut next = random(seed);
    (0..len).map(|_| next()).collect()
}

/// What a product may differ by: some units in the last place of the sum of absolute terms.
fn check_products(matrix: &Matrix, weights: &[f64], x: &[f32], vectors: usize) {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    for kernel in Kernel::available() {
        let mut out = vec![f32::NAN; vectors * rows];
        matrix.multiply_with(kernel, x, &mut out);
        for (index, found) in out.iter().enumerate() {
            let (vector, row) = (index / rows, index % rows);
            let terms = (0..cols).map(|c| weights[row * cols + c] * f64::from(x[vector * cols + c]));
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
            let error = (f64::from(*found) - sum).abs();
            assert!(error <= 1e-6 * size + 1e-30, "{} [{rows}, {cols}] {vectors}: {found} {sum}", kernel.name());
        }
        let mut values = vec![f32::NAN; rows * cols];
        matrix.expand_rows_with(kernel, 0, &mut values);
        for (found, wanted) in values.iter().zip(weights) {
            assert!((f64::from(*found) - wanted).abs() <= 1e-7 * wanted.abs(), "{found} {wanted}");
        }
        if rows > 1 {
            let mut last = vec![f32::NAN; cols];
            matrix.expand_rows_with(kernel, rows - 1, &mut last);
            assert_eq!(last, values[(rows - 1) * cols..]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn float_products_agree_with_f64(rows in 1usize..40, cols in 1usize..400, vectors in 1usize..=8, kind in 0..3, seed in any::<u64>()) {
        let round = |v: f32| match kind {
            0 => v,
            1 => bf16::from_f32(v).to_f32(),
            _ => f16::from_f32(v).to_f32(),
        };
        let values: Vec<f32> = vector(rows * cols, seed).into_iter().map(round).collect();
        let matrix = Matrix::from_f32(rows, cols, &values).unwrap();
        if rows * cols > 64 {
            prop_assert_eq!(matrix.element_type(), [ElementType::F32, ElementType::Bf16, ElementType::F16][kind as usize]);
        }
        let weights: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
        prop_assert_eq!(Matrix::bytes_of(matrix.element_type(), rows, cols, 1), matrix.bytes() as u64);
        check_products(&matrix, &weights, &vector(vectors * cols, seed ^ 7), vectors);
    }

    #[test]
    fn code_products_agree_with_f64(
        bits in 1u8..=8,
        rows in 1usize..20,
        groups in 1usize..12,
        width in prop::sample::select(vec![16usize, 32, 64, 128, 256, 0]),
        odd in 1usize..500,
        vectors in 1usize..=8,
        seed in any::<u64>(),
    ) {
        // Width 0: one group per row, of any width.
        let (groups, cols) = if width == 0 { (1, odd) } else { (groups, groups * width) };
        let mut next = random(seed);
        let top = (1u16 << bits) as f32;
        let mut code = || ((next() + 1.0) / 2.0 * top).min(top - 1.0) as u8;
        let codes: Vec<u8> = (0..rows * cols).map(|_| code()).collect();
        let zeros: Vec<u8> = (0..rows * groups).map(|_| code()).collect();
        let scales: Vec<f32> = vector(rows * groups, seed ^ 3).into_iter().map(|v| v.abs() + 0.01).collect();
        let matrix = Matrix::from_codes(bits, rows, cols, &codes, &scales, &zeros).unwrap();
        prop_assert_eq!(matrix.element_type(), if bits <= 4 { ElementType::Int4 } else { ElementType::Int8 });
        prop_assert_eq!(Matrix::bytes_of(matrix.element_type(), rows, cols, groups), matrix.bytes() as u64);
        let weights: Vec<f64> = (0..rows * cols)
            .map(|i| {
                let group = i / cols * groups + i % cols / (cols / groups);
                (f64::from(codes[i]) - f64::from(zeros[group])) * f64::from(scales[group])
            })
            .collect();
        check_products(&matrix, &weights, &vector(vectors * cols, seed ^ 7), vectors);
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let (rows, cols) = (1531, 1000);
    let float = Matrix::from_f32(rows, cols, &vector(rows * cols, 1)).unwrap();
    let codes: Vec<u8> = (0..rows * cols).map(|i| (i * 31 % 16) as u8).collect();
    let coded = Matrix::from_codes(4, rows, cols, &codes, &vec![0.1; rows], &vec![8; rows]).unwrap();
    for matrix in [float, coded] {
        for vectors in [1, 3, 8] {
            let x = vector(vectors * cols, 2);
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut out = vec![0f32; vectors * rows];
                pool.install(|| matrix.multiply(&x, &mut out));
                out
            };
            assert_eq!(run(1), run(5));
        }
    }
}

/// NaN and Inf in the weights must come out, not be lost in padding.
#[test]
fn bad_values_come_out() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut values = vector(3 * 200, 5);
        values[2 * 200 + 199] = bad;
        let matrix = Matrix::from_f32(3, 200, &values).unwrap();
        for kernel in Kernel::available() {
            let mut out = [0f32; 3];
            matrix.multiply_with(kernel, &vec![1.0; 200], &mut out);
            assert!(out[0].is_finite() && out[1].is_finite() && !out[2].is_finite(), "{out:?}");
        }
    }
}

#[test]
fn four_bits_take_half_a_byte() {
    let matrix = Matrix::from_codes(4, 4, 1024, &[5; 4096], &[1.0; 32], &[8; 32]).unwrap();
    // Scales of four bytes and zero points of one for each of 8 groups a row.
    assert_eq!(matrix.bytes(), 4 * 512 + 32 * 5);
    let matrix = Matrix::from_f32(4, 1024, &[0.1; 4096]).unwrap();
    assert_eq!(matrix.bytes(), 4096 * 4);
    let matrix = Matrix::from_f32(4, 1024, &[0.5; 4096]).unwrap();
    assert_eq!((matrix.bytes(), matrix.element_type()), (4096 * 2, ElementType::Bf16));
}

#[test]
fn what_does_not_fit_is_refused() {
    let length = |what, found, wanted| KernelError::Length { what, rows: 2, cols: 32, found, wanted };
    assert_eq!(Matrix::from_f32(2, 32, &[0.0; 63]).unwrap_err(), length("values", 63, 64));
    assert_eq!(Matrix::from_f32(0, 32, &[]).unwrap_err(), KernelError::Shape { rows: 0, cols: 32 });
    let huge = usize::MAX / 3;
    assert_eq!(Matrix::from_f32(huge, 8, &[]).unwrap_err(), KernelError::Shape { rows: huge, cols: 8 });
    let codes =
        |bits, codes: &[u8], scales: &[f32], zeros: &[u8]| Matrix::from_codes(bits, 2, 32, codes, scales, zeros);
    assert_eq!(codes(4, &[0; 63], &[1.0; 2], &[0; 2]).unwrap_err(), length("codes", 63, 64));
    assert_eq!(codes(4, &[0; 64], &[1.0; 3], &[0; 2]).unwrap_err(), length("scales", 3, 2));
    assert_eq!(codes(4, &[0; 64], &[1.0; 2], &[0; 3]).unwrap_err(), length("zero points", 3, 2));
    assert_eq!(codes(4, &[16; 64], &[1.0; 2], &[0; 2]).unwrap_err(), KernelError::Bits { bits: 4 });
    assert_eq!(codes(9, &[0; 64], &[1.0; 2], &[0; 2]).unwrap_err(), KernelError::Bits { bits: 9 });
    assert_eq!(codes(4, &[0; 64], &[1.0; 8], &[0; 8]).unwrap_err(), KernelError::GroupWidth { width: 8 });
    assert_eq!(codes(4, &[0; 64], &[1.0; 6], &[0; 6]).unwrap_err(), KernelError::GroupWidth { width: 10 });
}
