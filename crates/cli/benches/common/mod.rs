//! What the benchmarks of blocks share.

use std::collections::BTreeMap;
use std::time::Instant;

use lite_decoder::{DecoderError, DecoderSpec, WeightSource};
use lite_linalg::{Mat, Threads, gemm_into};

/// The binary's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Seeded noise instead of a checkpoint.
pub(crate) struct Noise(BTreeMap<String, Vec<usize>>);

impl Noise {
    /// Every tensor of `spec`.
    pub(crate) fn of(spec: &DecoderSpec) -> Self {
        Self(spec.tensors().into_iter().map(|t| (t.name, t.shape)).collect())
    }
}

impl WeightSource for Noise {
    fn load(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), DecoderError> {
        let shape = self.0[name].clone();
        let scale = if shape.len() == 1 { 1.0 } else { 1.0 / (shape[1] as f32).sqrt() };
        Ok((shape.clone(), noise(shape.iter().product(), scale)))
    }

    fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
}

/// `len` values in [−scale, scale).
pub(crate) fn noise(len: usize, scale: f32) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0) * scale
        })
        .collect()
}

/// The fastest of `runs`, seconds.
pub(crate) fn best(runs: usize, mut work: impl FnMut()) -> f64 {
    (0..runs)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

/// Flops per second of a square product on all threads.
pub(crate) fn gemm_rate(n: usize) -> f64 {
    let (a, b) = (noise(n * n, 1.0), noise(n * n, 1.0));
    let mut c = vec![0f32; n * n];
    let seconds = best(5, || gemm_into(&mut c, n, 0.0, 1.0, Mat::new(&a, n, n), Mat::new(&b, n, n).t(), Threads::All));
    2.0 * (n as f64).powi(3) / seconds
}
