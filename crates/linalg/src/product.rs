//! Matrix products over strided views, by the `gemm` crate.

use gemm::Parallelism;
use rayon::prelude::*;

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

/// Rows of `a` beyond which the transposed product of [`few_rows`] gains nothing, however long they are.
const FEW_ROWS: usize = 512;
/// Side of the tiles in which a product is transposed.
const TILE: usize = 16;

/// Whether `a · b` is that of a few rows and a transposed row-major matrix, such as a linear's weight. The product is
/// formed column by column of the result: bringing a row-major result about, `gemm` would copy the whole weight into its
/// own order for a few rows' sake, and with 100 rows that takes longer than multiplying. The price is to transpose the
/// result, which longer rows of `a` pay for. (Two cores, AVX-512, a 768 × 2048 weight in Gflop/s: 32 rows 58 → 283, 96 rows
/// 127 → 329, 256 rows 238 → 336; the values are the same to the bit.)
fn few_rows(a: &Mat, b: &Mat) -> bool {
    let transposed = b.row_stride == 1 && b.col_stride >= b.rows && a.col_stride == 1;
    transposed && a.rows > 1 && b.cols >= TILE && a.rows <= FEW_ROWS.min(a.cols / 4)
}

/// `src`, row-major `[columns, rows]`, as row-major `[rows, columns]`.
fn transposed(src: &[f32], rows: usize, columns: usize, threads: Threads) -> Vec<f32> {
    let mut out = vec![0f32; src.len()];
    let tiles = |(tile, out): (usize, &mut [f32])| {
        let first = tile * TILE;
        for j in 0..columns.div_ceil(TILE) {
            for (i, row) in out.chunks_exact_mut(columns).enumerate() {
                let columns = j * TILE..(j * TILE + TILE).min(columns);
                for (value, j) in row[columns.clone()].iter_mut().zip(columns) {
                    *value = src[j * rows + first + i];
                }
            }
        }
    };
    let task = TILE * columns.max(1);
    match threads {
        Threads::One => out.chunks_mut(task).enumerate().for_each(tiles),
        Threads::All => out.par_chunks_mut(task).enumerate().for_each(tiles),
    }
    out
}

/// `a · b` as a new row-major `[a.rows, b.cols]` matrix.
///
/// # Panics
/// If `a.cols != b.rows`.
pub fn gemm(a: Mat, b: Mat, threads: Threads) -> Vec<f32> {
    if few_rows(&a, &b) {
        assert_eq!(a.cols, b.rows, "inner dimensions differ");
        let mut out = vec![0f32; a.rows * b.cols];
        // SAFETY: both views were checked against their slices when made, and `out` holds `b.cols` columns of `a.rows`
        // values, one after the other; it was just made, so it overlaps neither.
        unsafe { product(out.as_mut_ptr(), [1, a.rows], 0.0, 1.0, a, b, threads) };
        return transposed(&out, a.rows, b.cols, threads);
    }
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
    unsafe { product(dst.as_mut_ptr(), [dst_row_stride, 1], beta, alpha, a, b, threads) }
}

/// `dst = beta · dst + alpha · a · b`; `strides` are those from row to row and from column to column of `dst`.
///
/// # Safety
/// Both views must lie within their slices, as those that [`Mat`] makes do, their inner dimensions must agree, and `dst`
/// must hold `a.rows × b.cols` distinct elements at `strides`, none of them in `a` or `b`.
unsafe fn product(dst: *mut f32, strides: [usize; 2], beta: f32, alpha: f32, a: Mat, b: Mat, threads: Threads) {
    // SAFETY: as asked of the caller.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            dst,
            strides[1] as isize,
            strides[0] as isize,
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

    #[test]
    fn few_rows_give_what_many_give() {
        let value = |i: usize| ((i as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / 1e7 - 0.8;
        for (n, k) in [(16, 64), (17, 300), (100, 1030), (768, 2048), (64, 5000)] {
            let w: Vec<f32> = (0..n * k).map(value).collect();
            for rows in [1, 2, 3, 15, 16, 17, 33, 96, 250, 512, 513] {
                let x: Vec<f32> = (0..rows * k).map(|i| value(i + 7919)).collect();
                let (x, w) = (Mat::new(&x, rows, k), Mat::new(&w, n, k).t());
                let mut wanted = vec![0f32; rows * n];
                gemm_into(&mut wanted, n, 0.0, 1.0, x, w, Threads::One);
                for threads in [Threads::One, Threads::All] {
                    assert!(gemm(x, w, threads) == wanted, "{rows} x {n} x {k}, {threads:?}");
                }
            }
        }
        assert!(few_rows(&Mat::new(&[0.0; 8192], 4, 2048), &Mat::new(&vec![0.0; 32 * 2048], 32, 2048).t()));
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
