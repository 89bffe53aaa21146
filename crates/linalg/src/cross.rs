//! Cross-Gram matrices `C += X̃ᵀX` of two streams of activations.

use crate::{Mat, Threads, gemm_into};

/// Adds `YᵀX` to `cross` (`[width, k]`): Y is `(tokens, width)`, X `(tokens, k)`, both row-major.
///
/// # Panics
/// If the slices do not fit their shapes.
pub fn cross_update(cross: &mut [f32], float: &[f32], quantized: &[f32], tokens: usize, width: usize, k: usize) {
    assert_eq!(cross.len(), width * k, "cross-Gram matrix does not fit its shape");
    let (left, right) = (Mat::new(float, tokens, width).t(), Mat::new(quantized, tokens, k));
    gemm_into(cross, k, 1.0, 1.0, left, right, Threads::All);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_the_first_stream() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]);
        let mut cross = vec![1.0; 4];
        cross_update(&mut cross, &a, &b, 2, 2, 2);
        // Σ_t a[t, i] · b[t, j]
        assert_eq!(cross, [1.0 + 100.0, 1.0 + 140.0, 1.0 + 140.0, 1.0 + 200.0]);
        cross_update(&mut cross, &[1.0, 0.0], &[0.0, 5.0], 1, 2, 2);
        assert_eq!(cross, [101.0, 146.0, 141.0, 201.0]);
        let mut wide = vec![0.0; 3];
        cross_update(&mut wide, &[2.0, 3.0], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, 1, 3);
        assert_eq!(wide, [2.0 + 12.0, 4.0 + 15.0, 6.0 + 18.0]);
    }
}
