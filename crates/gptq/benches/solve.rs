//! `cargo bench -p lite-gptq [-- FILTER]`: seconds and share of the GEMM rate of factor and solve.
//!
//! A filter is compared with `OUTxIN`. Flops are what the algorithm asks for: `2K³/3` for the factor, `N·K²` each
//! for the error feedback and for scoring nearest rounding and the result, `2·N·K²` for the residual that refinement
//! starts from and for each sweep.
#![allow(clippy::print_stdout)]

use std::time::Instant;

use lite_gptq::{GptqSettings, Hessian};
use lite_linalg::{Mat, Threads, gemm, gram_update, mirror_lower};
use lite_quant::{Range, RangeContext, ScaleDtype, Scheme, quantize_nearest};

fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
        })
        .collect()
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let start = Instant::now();
    let result = work();
    (result, start.elapsed().as_secs_f64())
}

/// GFLOP/s of a square product on all threads: the best of three.
fn gemm_rate() -> f64 {
    let size = 3072;
    let (a, b) = (noise(size * size, 1), noise(size * size, 2));
    let run = || timed(|| gemm(Mat::new(&a, size, size), Mat::new(&b, size, size), Threads::All)).1;
    let best = (0..3).map(|_| run()).fold(f64::INFINITY, f64::min);
    2.0 * (size as f64).powi(3) / best / 1e9
}

fn main() {
    let filters: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    println!("{:>12} {:>22} {:>8} {:>9} {:>10}", "out x in", "step", "seconds", "GFLOP/s", "of GEMM");
    for (n, k) in [(1024, 1024), (4096, 4096), (4096, 14336)] {
        let name = format!("{n}x{k}");
        // `4096` alone means the square one.
        if !filters.is_empty() && !filters.iter().any(|f| *f == name || (n == k && *f == n.to_string())) {
            continue;
        }
        let tokens = 1024;
        let mut gram = vec![0.0; k * k];
        gram_update(&mut gram, &noise(tokens * k, 3), tokens, k);
        mirror_lower(&mut gram, k, 1.0 / tokens as f32);
        let weight = noise(n * k, 4);
        let scheme = Scheme::new(4, 128, false, ScaleDtype::F16).expect("a scheme that every layout knows");
        let rate = gemm_rate();
        let report = |step: &str, seconds: f64, flops: f64| {
            let speed = flops / seconds / 1e9;
            println!("{name:>12} {step:>22} {seconds:>8.2} {speed:>9.1} {:>9.0}%", 100.0 * speed / rate);
        };
        println!("{name:>12} {:>22} {:>8} {rate:>9.1}", "GEMM, all threads", "");
        let (nf, kf) = (n as f64, k as f64);
        for sweeps in [0, 1, 3] {
            let settings = GptqSettings { range: Range::MinMax, refine_sweeps: sweeps, ..GptqSettings::default() };
            let (hessian, factor) = timed(|| Hessian::new(&gram, k, &settings).expect("a damped Gram matrix"));
            let (solution, solve) = timed(|| hessian.solve(&weight, n, &scheme).expect("matching shapes"));
            assert!(solution.loss < solution.nearest_loss);
            if sweeps == 0 {
                report("factor", factor, 2.0 / 3.0 * kf.powi(3));
            }
            let passes = 3.0 + if sweeps > 0 { 2.0 + 2.0 * sweeps as f64 } else { 0.0 };
            report(&format!("solve, {sweeps} sweeps"), solve, passes * nf * kf * kf);
        }
        let context = RangeContext { weight: &weight, out_features: n, in_features: k, gram: Some(&gram) };
        let (_, search) = timed(|| quantize_nearest(&context, &scheme, Range::Search).expect("matching shapes"));
        report("range search", search, 2.0 * 21.0 * 128.0 * nf * kf);
    }
}
