//! The machine's own rate of matrix products, for estimates of time.

use std::time::Instant;

use lite_linalg::{Mat, Threads, gemm_into};

/// Flops per second of an f32 product of 1024 × 1024 matrices on all threads: the best of a few runs,
/// about a tenth of a second in all. On a shared machine it is what is left at that moment.
pub fn measured_gemm_rate() -> f64 {
    const N: usize = 1024;
    let a: Vec<f32> = (0..N * N).map(|i| (i % 7) as f32 - 3.0).collect();
    let b: Vec<f32> = (0..N * N).map(|i| (i % 5) as f32 - 2.0).collect();
    let mut c = vec![0f32; N * N];
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let start = Instant::now();
        gemm_into(&mut c, N, 0.0, 1.0, Mat::new(&a, N, N), Mat::new(&b, N, N).t(), Threads::All);
        best = best.min(start.elapsed().as_secs_f64());
    }
    2.0 * (N as f64).powi(3) / best.max(1e-9)
}
