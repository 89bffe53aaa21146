//! What channel scales `s` do to a weight and to the Gram matrix of its input, when `x` becomes `x / s`.

use rayon::prelude::*;

/// `W · diag(s)` of a row-major `[N, K]` weight, `K = scales.len()`.
pub fn scale_columns(weight: &[f32], scales: &[f32]) -> Vec<f32> {
    let k = scales.len().max(1);
    let mut out = vec![0f32; weight.len()];
    out.par_chunks_mut(k).zip(weight.par_chunks(k)).for_each(|(out, row)| {
        for ((o, w), s) in out.iter_mut().zip(row).zip(scales) {
            *o = w * s;
        }
    });
    out
}

/// `G / (s sᵀ)` of a `[K, K]` matrix: the Gram matrix of `x / s`, without another calibration pass.
pub fn unscale_gram(gram: &[f32], scales: &[f32]) -> Vec<f32> {
    let k = scales.len().max(1);
    let inverse: Vec<f32> = scales.iter().map(|s| 1.0 / s).collect();
    let mut out = vec![0f32; gram.len()];
    out.par_chunks_mut(k).zip(gram.par_chunks(k)).zip(&inverse).for_each(|((out, row), i)| {
        for ((o, g), j) in out.iter_mut().zip(row).zip(&inverse) {
            *o = g * i * j;
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scaling_keeps_the_product() {
        let (weight, x, scales) = ([1.0, -2.0, 3.0, 0.5], [4.0f32, 5.0], [2.0f32, 0.25]);
        let scaled = scale_columns(&weight, &scales);
        let small: Vec<f32> = x.iter().zip(&scales).map(|(x, s)| x / s).collect();
        for row in 0..2 {
            let product = |w: &[f32], x: &[f32]| w[row * 2] * x[0] + w[row * 2 + 1] * x[1];
            assert_eq!(product(&weight, &x), product(&scaled, &small));
        }
        let outer = |x: &[f32]| vec![x[0] * x[0], x[0] * x[1], x[1] * x[0], x[1] * x[1]];
        assert_eq!(unscale_gram(&outer(&x), &scales), outer(&small));
    }
}
