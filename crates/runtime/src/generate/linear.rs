//! A linear of the resident model.

use lite_kernels::{MAX_VECTORS, Matrix};
use lite_linalg::{Mat, Threads, gemm_into};

/// Values of a panel of expanded rows: some megabytes, so that the product reads it from the cache.
pub(super) const PANEL: usize = 1 << 22;

/// So many tokens read the weight as it is stored, [`MAX_VECTORS`] at a time; for more a product of matrices is faster.
const FEW: usize = 128;

/// A weight `[out, in]` and, maybe, a bias `[out]`.
#[derive(Debug, Clone)]
pub(super) struct Linear {
    pub(super) weight: Matrix,
    pub(super) bias: Option<Vec<f32>>,
}

impl Linear {
    /// `x · weightᵀ + bias`: `(tokens, in)` to `(tokens, out)`.
    pub(super) fn forward(&self, x: &[f32]) -> Vec<f32> {
        let mut out = multiply(&self.weight, x);
        if let Some(bias) = &self.bias {
            for row in out.chunks_exact_mut(bias.len()) {
                super::ops::add(row, bias);
            }
        }
        out
    }
}

/// `x · weightᵀ`: `(tokens, in)` to `(tokens, out)`. Few tokens read the weight as it is stored; more are a matrix product
/// with panels of it in f32.
pub(super) fn multiply(weight: &Matrix, x: &[f32]) -> Vec<f32> {
    let (rows, cols) = (weight.rows(), weight.cols());
    let tokens = x.len() / cols;
    let mut out = vec![0f32; tokens * rows];
    if tokens <= FEW {
        let some = x.chunks(MAX_VECTORS * cols).zip(out.chunks_mut(MAX_VECTORS * rows));
        some.for_each(|(x, out)| weight.multiply(x, out));
        return out;
    }
    let per_panel = (PANEL / cols).clamp(1, rows);
    let mut panel = vec![0f32; per_panel * cols];
    for first in (0..rows).step_by(per_panel) {
        let count = per_panel.min(rows - first);
        let panel = &mut panel[..count * cols];
        weight.expand_rows(first, panel);
        let (x, panel) = (Mat::new(x, tokens, cols), Mat::new(panel, count, cols));
        gemm_into(&mut out[first..], rows, 0.0, 1.0, x, panel.t(), Threads::All);
    }
    out
}
