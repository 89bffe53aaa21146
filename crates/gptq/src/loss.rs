//! The output error of a chunk, per row.

use lite_linalg::{Mat, Threads, gemm_into};

/// Width of a panel of the Gram matrix.
const PANEL: usize = 256;

/// `dᵀ G d` of every row of `errors` (`[K, R]`), from the lower triangle and the diagonal blocks of `gram` (`[K, K]`):
/// half the work of the full product.
pub(crate) fn losses(errors: &[f32], gram: &[f32], k: usize, lanes: usize, scratch: &mut Vec<f32>) -> Vec<f64> {
    let mut sums = vec![0f64; lanes];
    scratch.resize(PANEL.min(k) * lanes, 0.0);
    for start in (0..k).step_by(PANEL) {
        let width = PANEL.min(k - start);
        let scratch = &mut scratch[..width * lanes];
        let own = Mat::window(gram, start * k + start, width, width, k);
        let own_errors = &errors[start * lanes..(start + width) * lanes];
        gemm_into(scratch, lanes, 0.0, 1.0, own, Mat::new(own_errors, width, lanes), Threads::One);
        let left = Mat::window(gram, start * k, width, start, k);
        gemm_into(scratch, lanes, 1.0, 2.0, left, Mat::new(&errors[..start * lanes], start, lanes), Threads::One);
        add_products(&mut sums, own_errors, scratch);
    }
    sums
}

/// `sums[r] += Σ_k a[k, r] · b[k, r]`, in f64.
pub(crate) fn add_products(sums: &mut [f64], a: &[f32], b: &[f32]) {
    let lanes = sums.len();
    for (a, b) in a.chunks_exact(lanes).zip(b.chunks_exact(lanes)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += f64::from(*a) * f64::from(*b);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lite_quant::gram_loss_rows;

    /// Around the panel width, against the full product.
    #[test]
    fn half_the_matrix_gives_the_whole_loss() {
        for k in [1, 16, PANEL, PANEL + 1, 2 * PANEL + 33] {
            let lanes = 16;
            let value = |i: usize| ((i * 7919 + 13) % 257) as f32 / 128.0 - 1.0;
            let errors: Vec<f32> = (0..k * lanes).map(value).collect();
            let gram: Vec<f32> = (0..k * k).map(|at| value((at / k).max(at % k) * 31 + (at / k).min(at % k))).collect();
            let rows: Vec<f32> = (0..k * lanes).map(|at| errors[(at % k) * lanes + at / k]).collect();
            let wanted = gram_loss_rows(&rows, &vec![0.0; k * lanes], &gram, lanes, k);
            let found = losses(&errors, &gram, k, lanes, &mut Vec::new());
            for (a, b) in found.iter().zip(&wanted) {
                assert!((a - b).abs() < 1e-4 * (k * k) as f64, "{a} {b}");
            }
        }
    }
}
