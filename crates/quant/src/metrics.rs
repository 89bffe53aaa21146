//! Errors of a quantized weight, measured on what the layer outputs.

use lite_linalg::{Mat, Threads, dot, gemm};
use rayon::prelude::*;

/// Rows per product: bounds scratch memory at two `[ROWS, K]` matrices.
const ROWS: usize = 256;

/// The output error on the calibration tokens, `tr((W − Ŵ) G (W − Ŵ)ᵀ) = ‖(W − Ŵ) Xᵀ‖² / T`.
///
/// `weight` and `quantized` are `[N, K]` row-major, `gram` is `[K, K]` with both triangles.
///
/// # Panics
/// If the slices do not fit `n` and `k`.
pub fn gram_loss(weight: &[f32], quantized: &[f32], gram: &[f32], n: usize, k: usize) -> f64 {
    gram_loss_rows(weight, quantized, gram, n, k).iter().sum()
}

/// [`gram_loss`] of each of the `n` rows.
///
/// # Panics
/// If the slices do not fit `n` and `k`.
pub fn gram_loss_rows(weight: &[f32], quantized: &[f32], gram: &[f32], n: usize, k: usize) -> Vec<f64> {
    assert_eq!(weight.len(), n * k, "weight does not fit its shape");
    assert_eq!(quantized.len(), n * k, "quantized weight does not fit its shape");
    if k == 0 {
        return vec![0.0; n];
    }
    let mut losses = Vec::with_capacity(n);
    for (w, q) in weight.chunks(ROWS * k).zip(quantized.chunks(ROWS * k)) {
        let errors: Vec<f32> = w.par_iter().zip(q).map(|(w, q)| w - q).collect();
        let products = gemm(Mat::new(&errors, w.len() / k, k), Mat::new(gram, k, k), Threads::All);
        losses.extend(errors.chunks_exact(k).zip(products.chunks_exact(k)).map(|(e, p)| f64::from(dot(e, p))));
    }
    losses
}

/// Relative output error: `sqrt(loss(Ŵ) / loss(0))`, 0 for a perfect copy, 1 for all zeros.
///
/// # Panics
/// If the slices do not fit `n` and `k`.
pub fn relative_error(weight: &[f32], quantized: &[f32], gram: &[f32], n: usize, k: usize) -> f64 {
    let energy = gram_loss(weight, &vec![0.0; n * k], gram, n, k);
    let loss = gram_loss(weight, quantized, gram, n, k);
    if energy > 0.0 { (loss.max(0.0) / energy).sqrt() } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the definition: the squared difference of outputs, averaged over tokens.
    #[test]
    fn the_loss_is_the_output_error() {
        let (n, k, tokens) = (300, 5, 7);
        let value = |i: usize| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0;
        let weight: Vec<f32> = (0..n * k).map(value).collect();
        let quantized: Vec<f32> = weight.iter().map(|w| (w * 4.0).round() / 4.0).collect();
        let x: Vec<f32> = (0..tokens * k).map(|i| value(i + 5)).collect();
        let mut gram = vec![0f32; k * k];
        for t in 0..tokens {
            for i in 0..k {
                for j in 0..k {
                    gram[i * k + j] += x[t * k + i] * x[t * k + j] / tokens as f32;
                }
            }
        }
        let output = |w: &[f32], row: usize, t: usize| (0..k).map(|c| w[row * k + c] * x[t * k + c]).sum::<f32>();
        let error = |other: &[f32]| -> f64 {
            (0..n)
                .flat_map(|row| (0..tokens).map(move |t| (row, t)))
                .map(|(row, t)| f64::from(output(&weight, row, t) - output(other, row, t)).powi(2) / tokens as f64)
                .sum()
        };
        let loss = gram_loss(&weight, &quantized, &gram, n, k);
        assert!((loss - error(&quantized)).abs() < 1e-3 * loss, "{loss} {}", error(&quantized));
        let relative = relative_error(&weight, &quantized, &gram, n, k);
        let wanted = (error(&quantized) / error(&vec![0.0; n * k])).sqrt();
        assert!((relative - wanted).abs() < 1e-3 * wanted);
    }
}
