//! Synthetic layers.

use lite_linalg::{Mat, Threads, gemm, gram_update, mirror_lower};

/// Uniform noise in [-1, 1).
pub(crate) fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
        })
        .collect()
}

/// Inputs `[tokens, k]` that a few directions explain, plus noise and some loud channels.
pub(crate) fn correlated(tokens: usize, k: usize, seed: u64) -> Vec<f32> {
    let rank = (k / 4).max(1);
    let (hidden, mix) = (noise(tokens * rank, seed), noise(rank * k, 1234));
    let mut x = gemm(Mat::new(&hidden, tokens, rank), Mat::new(&mix, rank, k), Threads::One);
    x.iter_mut().zip(noise(tokens * k, seed + 1)).for_each(|(x, n)| *x += 0.2 * n);
    for row in x.chunks_exact_mut(k) {
        row.iter_mut().skip(3).step_by(41).for_each(|v| *v *= 10.0);
    }
    x
}

/// `XᵀX / T`, both triangles.
pub(crate) fn gram(x: &[f32], k: usize) -> Vec<f32> {
    let tokens = x.len() / k;
    let mut gram = vec![0.0; k * k];
    gram_update(&mut gram, x, tokens, k);
    mirror_lower(&mut gram, k, 1.0 / tokens as f32);
    gram
}
