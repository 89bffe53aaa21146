//! Matrix products over strided views, by the `gemm` crate.

use gemm::Parallelism;

/// A read-only strided matrix view.
#[derive(Debug, Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A row-major `[rows, cols]` matrix over the whole of `data`.
    ///
    /// # Panics
    /// If `data.len() != rows * cols`.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "matrix data does not fit its shape");
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// A view of `rows × cols` elements starting at `offset` of a row-major matrix with `row_stride`.
    ///
    /// # Panics
    /// If the view leaves `data`.
    pub fn window(data: &'a [f32], offset: usize, rows: usize, cols: usize, row_stride: usize) -> Self {
        if rows > 0 && cols > 0 {
            assert!(offset + (rows - 1) * row_stride + cols <= data.len(), "matrix view leaves its data");
        }
        Self { data: data.get(offset..).unwrap_or(&[]), rows, cols, row_stride, col_stride: 1 }
    }

    /// The transposed view.
    #[must_use]
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// Whether a product may use the global rayon pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread only (inside a parallel loop).
    One,
    /// All threads of the pool.
    All,
}

impl Threads {
    fn parallelism(self) -> Parallelism {
        match self {
            Self::One => Parallelism::None,
            // Splits over rows and columns only, so the sum over k has one order for any thread count.
            Self::All => match rayon::current_num_threads() {
                1 => Parallelism::None,
                n => Parallelism::Rayon(n),
            },
        }
    }
}

/// `a · b` as a new row-major `[a.rows, b.cols]` matrix.
///
/// # Panics
/// If `a.cols != b.rows`.
pub fn gemm(a: Mat, b: Mat, threads: Threads) -> Vec<f32> {
    let mut out = vec![0f32; a.rows * b.cols];
    let stride = b.cols;
    gemm_into(&mut out, stride, 0.0, 1.0, a, b, threads);
    out
}

/// `dst = beta · dst + alpha · a · b`, where `dst` is row-major with `dst_row_stride` and holds at least
/// `(a.rows − 1) · dst_row_stride + b.cols` elements. `beta = 0` never reads `dst`.
///
/// # Panics
/// If the shapes do not fit.
pub fn gemm_into(dst: &mut [f32], dst_row_stride: usize, beta: f32, alpha: f32, a: Mat, b: Mat, threads: Threads) {
    assert_eq!(a.cols, b.rows, "inner dimensions differ");
    if a.rows == 0 || b.cols == 0 {
        return;
    }
    assert!((a.rows - 1) * dst_row_stride + b.cols <= dst.len(), "destination too small");
    assert!(dst_row_stride >= b.cols, "destination rows overlap");
    // SAFETY: both views were checked against their slices when made, `dst` just now; `dst` is
    // borrowed mutably, so it overlaps neither.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            dst.as_mut_ptr(),
            1,
            dst_row_stride as isize,
            beta != 0.0,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            beta,
            alpha,
            false,
            false,
            false,
            threads.parallelism(),
        );
    }
}

/// Dot product with a fixed order of summation (sixteen lanes, then pairwise).
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0f32; LANES];
    let (ca, cb) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = ca.remainder().iter().zip(cb.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in ca.zip(cb) {
        for i in 0..LANES {
            lanes[i] += x[i] * y[i];
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0] + tail
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn naive(a: &[f32], b: &[f32], m: usize, k: usize, n: usize) -> Vec<f32> {
        let mut out = vec![0f32; m * n];
        for i in 0..m {
            for j in 0..n {
                out[i * n + j] = (0..k).map(|t| f64::from(a[i * k + t]) * f64::from(b[t * n + j])).sum::<f64>() as f32;
            }
        }
        out
    }

    proptest! {
        #[test]
        fn products_of_every_orientation_agree_with_the_definition(m in 1usize..20, k in 1usize..40, n in 1usize..20, seed in any::<u32>()) {
            let value = |i: usize| ((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / 1e7 - 0.8;
            let a: Vec<f32> = (0..m * k).map(value).collect();
            let b: Vec<f32> = (0..k * n).map(|i| value(i + 7919)).collect();
            let wanted = naive(&a, &b, m, k, n);
            let transpose = |x: &[f32], r: usize, c: usize| -> Vec<f32> { (0..r * c).map(|i| x[(i % r) * c + i / r]).collect() };
            let (at, bt) = (transpose(&a, m, k), transpose(&b, k, n));
            for got in [
                gemm(Mat::new(&a, m, k), Mat::new(&b, k, n), Threads::One),
                gemm(Mat::new(&at, k, m).t(), Mat::new(&bt, n, k).t(), Threads::All),
            ] {
                for (g, w) in got.iter().zip(&wanted) {
                    prop_assert!((g - w).abs() <= 1e-4, "{g} {w}");
                }
            }
            let direct: f64 = a.iter().zip(&a).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
            prop_assert!((f64::from(dot(&a, &a)) - direct).abs() <= 1e-4 * direct.max(1.0));
        }
    }
}
