//! The GPTQ factor: the upper triangular `U` with `H⁻¹ = Uᵀ U` of a positive definite `H`.
//!
//! The textbook takes three steps (Cholesky of H, inverse, Cholesky of the inverse). One Cholesky and
//! one triangular inverse do: with `J` the permutation that reverses the order, factor `J H J = L Lᵀ`.
//! Then `V = J L J` is upper triangular with `H = V Vᵀ`, so `U = V⁻¹ = J L⁻¹ J`. Reversing the order of
//! rows and columns of a dense matrix is reversing its storage, so both ends are one `reverse`.
//!
//! `K³/3` flops each for the factor and the inverse, nearly all of them in products by `gemm`; the
//! diagonal blocks go to `faer`. faer's own parallel Cholesky gives the same bits for any number of threads
//! too, but it synchronises so finely that two threads on a shared machine are slower than one.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltRegularization, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::traits::ComplexField;
use faer::{MatMut, MatRef, Par};
use rayon::prelude::*;
use thiserror::Error;

use crate::{Mat, Threads, gemm, gemm_into};

/// Width of a panel: the inner size of the small products, and the size of a diagonal block.
const PANEL: usize = 256;

/// Why a matrix has no factor.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum FactorError {
    /// The slice is not `[K, K]`.
    #[error("the matrix has {found} elements, `[{k}, {k}]` was wanted")]
    Length {
        /// Elements present.
        found: usize,
        /// K.
        k: usize,
    },
    /// A pivot of the factorization is zero, negative or NaN.
    #[error("the matrix is not positive definite: no pivot for channel {channel}; raise the damping")]
    NotPositiveDefinite {
        /// The channel (row of the matrix) whose pivot failed.
        channel: usize,
    },
    /// The factor overflowed, or the matrix held NaN or Inf.
    #[error("the factor is not finite at channel {channel}; raise the damping")]
    NotFinite {
        /// The first row of the factor with NaN or Inf.
        channel: usize,
    },
}

/// `U`, upper triangular and row-major `[K, K]` with zeros below the diagonal, such that `H⁻¹ = Uᵀ U`.
///
/// `h` is `[K, K]`, symmetric with both triangles, damped. The same bits for any number of threads.
///
/// # Errors
/// [`FactorError`]: the length does not fit, or `h` is not numerically positive definite in f32.
pub fn gptq_factor(h: &[f32], k: usize) -> Result<Vec<f32>, FactorError> {
    gptq_factor_in_place(h.to_vec(), k)
}

/// [`gptq_factor`] in the storage of `h`: no second `[K, K]` matrix is made.
///
/// # Errors
/// As [`gptq_factor`].
pub fn gptq_factor_in_place(mut h: Vec<f32>, k: usize) -> Result<Vec<f32>, FactorError> {
    check_length(h.len(), k)?;
    h.reverse();
    cholesky(&mut h, k).map_err(|pivot| FactorError::NotPositiveDefinite { channel: k - 1 - pivot })?;
    invert_lower(&mut h, k);
    h.reverse();
    check_finite(&h, k)?;
    Ok(h)
}

/// [`gptq_factor`] computed in f64 on one thread and rounded to f32 at the end: for matrices that f32 cannot factor.
///
/// # Errors
/// As [`gptq_factor`].
pub fn gptq_factor_f64(h: &[f32], k: usize) -> Result<Vec<f32>, FactorError> {
    check_length(h.len(), k)?;
    let mut factor: Vec<f64> = h.iter().rev().map(|&v| f64::from(v)).collect();
    let inverse =
        factor_block(&mut factor, k).map_err(|pivot| FactorError::NotPositiveDefinite { channel: k - 1 - pivot })?;
    let upper: Vec<f32> = inverse.iter().rev().map(|&v| v as f32).collect();
    check_finite(&upper, k)?;
    Ok(upper)
}

/// `X · H⁻¹` for a row-major `[M, K]` matrix `x`, given the `[K, K]` factor `u` of [`gptq_factor`]:
/// `(X Uᵀ) U`, two products over the triangle, `2·M·K²` flops in all.
///
/// # Panics
/// If the slices do not fit `k`.
pub fn apply_inverse(x: &[f32], u: &[f32], k: usize) -> Vec<f32> {
    assert_eq!(u.len(), k * k, "factor does not fit its shape");
    let rows = x.len().checked_div(k).unwrap_or(0);
    assert_eq!(x.len(), rows * k, "matrix does not fit its shape");
    let (mut half, mut out) = (vec![0f32; x.len()], vec![0f32; x.len()]);
    if x.is_empty() {
        return out;
    }
    for start in (0..k).step_by(PANEL) {
        let width = PANEL.min(k - start);
        // Rows start.. of U are zero left of column `start`.
        let left = Mat::window(x, start, rows, k - start, k);
        let right = Mat::window(u, start * k + start, width, k - start, k).t();
        gemm_into(&mut half[start..], k, 0.0, 1.0, left, right, Threads::All);
    }
    for start in (0..k).step_by(PANEL) {
        let width = PANEL.min(k - start);
        // Columns start.. of U are zero below row `start + width`.
        let left = Mat::window(&half, 0, rows, start + width, k);
        let right = Mat::window(u, start, start + width, width, k);
        gemm_into(&mut out[start..], k, 0.0, 1.0, left, right, Threads::All);
    }
    out
}

fn check_length(found: usize, k: usize) -> Result<(), FactorError> {
    if k.checked_mul(k) == Some(found) { Ok(()) } else { Err(FactorError::Length { found, k }) }
}

fn check_finite(upper: &[f32], k: usize) -> Result<(), FactorError> {
    let bad = |row: &[f32]| row.iter().any(|v| !v.is_finite());
    match upper.par_chunks(k.max(1)).position_first(bad) {
        Some(channel) => Err(FactorError::NotFinite { channel }),
        None => Ok(()),
    }
}

/// Replaces the lower triangle of the row-major `a` by `L` with `A = L Lᵀ`, panel by panel, left-looking: all earlier
/// columns act on a panel in one product. Fails with the row of the first bad pivot.
fn cholesky(a: &mut [f32], k: usize) -> Result<(), usize> {
    for start in (0..k).step_by(PANEL) {
        let end = k.min(start + PANEL);
        let width = end - start;
        let mut panel: Vec<f32> = a[start * k..].chunks_exact(k).flat_map(|row| &row[start..end]).copied().collect();
        let rows = k - start;
        let done = Mat::window(a, start * k, rows, start, k);
        let own = Mat::window(a, start * k, width, start, k).t();
        gemm_into(&mut panel, width, 1.0, -1.0, done, own, Threads::All);
        let (diagonal, below) = panel.split_at_mut(width * width);
        let inverse = factor_block(diagonal, width).map_err(|pivot| start + pivot)?;
        // L_below = A_below · L_diag⁻ᵀ.
        let below = gemm(Mat::new(below, rows - width, width), Mat::new(&inverse, width, width).t(), Threads::All);
        for (row, source) in
            a[start * k..].chunks_exact_mut(k).zip(diagonal.chunks_exact(width).chain(below.chunks_exact(width)))
        {
            row[start..end].copy_from_slice(source);
        }
    }
    Ok(())
}

/// Replaces the lower triangular row-major `L` by its inverse, with zeros above the diagonal. By blocks of rows:
/// `X[i, ..i] = −L_ii⁻¹ · L[i, ..i] · X[..i, ..i]`.
fn invert_lower(a: &mut [f32], k: usize) {
    for start in (0..k).step_by(PANEL) {
        let height = PANEL.min(k - start);
        let (above, rest) = a.split_at_mut(start * k);
        let rows = &mut rest[..height * k];
        let window = |columns: std::ops::Range<usize>| -> Vec<f32> {
            rows.chunks_exact(k).flat_map(|row| &row[columns.clone()]).copied().collect()
        };
        let inverse = invert_block(&window(start..start + height), height);
        // L_ii⁻¹ goes in first: it is small, so the long product's result needs no second pass.
        let mut scaled = vec![0f32; height * start];
        let left = Mat::new(&inverse, height, height);
        gemm_into(&mut scaled, start, 0.0, -1.0, left, Mat::window(rows, 0, height, start, k), Threads::All);
        let columns: Vec<usize> = (0..start).step_by(PANEL).collect();
        let blocks: Vec<Vec<f32>> = columns
            .par_iter()
            .map(|&column| {
                let left = Mat::window(&scaled, column, height, start - column, start);
                let right = Mat::window(above, column * k + column, start - column, PANEL, k);
                gemm(left, right, Threads::One)
            })
            .collect();
        for (r, row) in rows.chunks_exact_mut(k).enumerate() {
            for (block, &column) in blocks.iter().zip(&columns) {
                row[column..column + PANEL].copy_from_slice(&block[r * PANEL..(r + 1) * PANEL]);
            }
            row[start..start + height].copy_from_slice(&inverse[r * height..(r + 1) * height]);
            row[start + height..].fill(0.0);
        }
    }
}

/// Factors a small row-major `[n, n]` block in place (lower triangle, zeros above) and returns `L⁻¹`. Fails with the
/// row of the bad pivot.
fn factor_block<T: ComplexField>(block: &mut [T], n: usize) -> Result<Vec<T>, usize> {
    let mut scratch = MemBuffer::new(cholesky_in_place_scratch::<T>(n, Par::Seq, Default::default()));
    cholesky_in_place(
        MatMut::from_row_major_slice_mut(block, n, n),
        LltRegularization::default(),
        Par::Seq,
        MemStack::new(&mut scratch),
        Default::default(),
    )
    .map_err(|error| match error {
        faer::linalg::cholesky::llt::factor::LltError::NonPositivePivot { index } => index.min(n.saturating_sub(1)),
    })?;
    for (i, row) in block.chunks_exact_mut(n.max(1)).enumerate() {
        row[i + 1..].iter_mut().for_each(|v| *v = faer::traits::math_utils::zero());
    }
    Ok(invert_block(block, n))
}

/// The inverse of a small lower triangular row-major `[n, n]` block.
fn invert_block<T: ComplexField>(block: &[T], n: usize) -> Vec<T> {
    let mut inverse: Vec<T> = (0..n * n).map(|_| faer::traits::math_utils::zero()).collect();
    invert_lower_triangular(
        MatMut::from_row_major_slice_mut(&mut inverse, n, n),
        MatRef::from_row_major_slice(block, n, n),
        Par::Seq,
    );
    inverse
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{gram_update, mirror_lower};
    use proptest::prelude::*;

    fn noise(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn damped_gram(tokens: usize, k: usize, seed: u64, damp: f32) -> Vec<f32> {
        let mut gram = vec![0.0; k * k];
        gram_update(&mut gram, &noise(tokens * k, seed), tokens, k);
        mirror_lower(&mut gram, k, 1.0 / tokens as f32);
        (0..k).for_each(|i| gram[i * k + i] += damp);
        gram
    }

    /// Largest element of `|H Uᵀ U − I|`, in f64.
    fn residual(h: &[f32], u: &[f32], k: usize) -> f64 {
        let mut worst = 0f64;
        for i in 0..k {
            let product: Vec<f64> =
                (0..k).map(|m| (m..k).map(|j| f64::from(h[i * k + j]) * f64::from(u[m * k + j])).sum()).collect();
            for j in 0..k {
                let value: f64 = (0..=j).map(|m| product[m] * f64::from(u[m * k + j])).sum();
                worst = worst.max((value - f64::from(i == j)).abs());
            }
        }
        worst
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn the_factor_inverts_the_matrix(k in 1usize..90, tokens in 1usize..120, seed in any::<u64>()) {
            let h = damped_gram(tokens, k, seed, 0.05);
            for u in [gptq_factor(&h, k).unwrap(), gptq_factor_f64(&h, k).unwrap()] {
                prop_assert!((0..k).all(|i| u[i * k..i * k + i].iter().all(|&v| v == 0.0)), "lower triangle");
                prop_assert!((0..k).all(|i| u[i * k + i] > 0.0), "positive diagonal");
                prop_assert!(residual(&h, &u, k) < 2e-3, "{}", residual(&h, &u, k));
            }
        }
    }

    /// Sizes around the panel width, against the same factor in f64.
    #[test]
    fn panels_join_without_seams() {
        for k in [PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 37] {
            let h = damped_gram(2 * k, k, k as u64, 0.01);
            let (u, wanted) = (gptq_factor(&h, k).unwrap(), gptq_factor_f64(&h, k).unwrap());
            let scale = wanted.iter().fold(0f32, |m, v| m.max(v.abs()));
            let worst = u.iter().zip(&wanted).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(worst < 2e-5 * scale, "k {k}: {worst} of {scale}");
        }
    }

    #[test]
    fn the_inverse_is_applied_from_the_right() {
        let (rows, k) = (7, PANEL + 45);
        let h = damped_gram(2 * k, k, 5, 0.1);
        let x = noise(rows * k, 6);
        let product = gemm(Mat::new(&x, rows, k), Mat::new(&h, k, k), Threads::One);
        let back = apply_inverse(&product, &gptq_factor(&h, k).unwrap(), k);
        assert!(back.iter().zip(&x).all(|(a, b)| (a - b).abs() < 1e-4));
        assert!(apply_inverse(&[], &[], 0).is_empty());
    }

    #[test]
    fn threads_do_not_change_the_bits() {
        let k = 2 * PANEL + 100;
        let h = damped_gram(300, k, 9, 0.01);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let u = gptq_factor(&h, k).unwrap();
                let applied = apply_inverse(&h[..5 * k], &u, k);
                (u, applied)
            })
        };
        let one = run(1);
        assert!(one == run(2) && one == run(5));
    }

    #[test]
    fn bad_matrices_are_refused_by_channel() {
        let k = PANEL + 20;
        let mut h = vec![0f32; k * k];
        (0..k).for_each(|i| h[i * k + i] = 1.0);
        assert!(gptq_factor(&h, k).is_ok());
        h[3 * k + 3] = -1.0;
        for result in [gptq_factor(&h, k), gptq_factor_f64(&h, k)] {
            assert_eq!(result, Err(FactorError::NotPositiveDefinite { channel: 3 }));
        }
        h[3 * k + 3] = f32::NAN;
        assert!(gptq_factor(&h, k).is_err() && gptq_factor_f64(&h, k).is_err());
        h[3 * k + 3] = f32::INFINITY;
        assert!(gptq_factor(&h, k).is_err());
        assert_eq!(gptq_factor(&h[1..], k), Err(FactorError::Length { found: k * k - 1, k }));
        assert_eq!(gptq_factor(&[], 0), Ok(vec![]));
    }
}
