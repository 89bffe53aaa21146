use lite_linalg::{gram_update, mirror_lower};
use rayon::prelude::*;

/// Statistics of one linear input over all tokens seen so far.
#[derive(Debug, Clone)]
pub struct InputStats {
    /// K.
    pub in_features: usize,
    /// Number of tokens seen.
    pub tokens: u64,
    /// `[K, K]`: `Σ x xᵀ` in the lower triangle while gathering, `XᵀX / T` in both once finished.
    gram: Vec<f32>,
    /// `[K]`: `Σ |x|`.
    abs_sum: Vec<f64>,
    /// `[K]`: `max |x|`; NaN if any value was.
    abs_max: Vec<f32>,
    finished: bool,
}

/// Rows per partial sum: fixed, so that sums do not depend on the number of threads.
const ROWS: usize = 256;

impl InputStats {
    /// Empty statistics of an input with `in_features` channels.
    pub fn new(in_features: usize) -> Self {
        Self {
            in_features,
            tokens: 0,
            gram: vec![0.0; in_features * in_features],
            abs_sum: vec![0.0; in_features],
            abs_max: vec![0.0; in_features],
            finished: false,
        }
    }

    /// Adds `x`, `(tokens, K)` row-major.
    ///
    /// # Panics
    /// If `x` is not a whole number of rows, or the statistics are finished.
    pub fn update(&mut self, x: &[f32]) {
        let k = self.in_features;
        assert!(!self.finished, "finished statistics take no more tokens");
        assert!(k > 0 && x.len().is_multiple_of(k), "activations are not whole rows");
        self.tokens += (x.len() / k) as u64;
        gram_update(&mut self.gram, x, x.len() / k, k);
        let partial: Vec<(Vec<f32>, Vec<f32>)> = x.par_chunks(ROWS * k).map(|block| column_stats(block, k)).collect();
        for (sum, max) in &partial {
            self.abs_sum.iter_mut().zip(sum).for_each(|(total, s)| *total += f64::from(*s));
            self.abs_max.iter_mut().zip(max).for_each(|(largest, m)| *largest = nan_max(*largest, *m));
        }
    }

    /// Divides by the number of tokens and completes the Gram matrix.
    pub fn finish(&mut self) {
        if !self.finished {
            mirror_lower(&mut self.gram, self.in_features, 1.0 / self.tokens.max(1) as f32);
            self.finished = true;
        }
    }

    /// `XᵀX / T`, `[K, K]`, both triangles.
    ///
    /// # Panics
    /// Before [`InputStats::finish`].
    pub fn gram(&self) -> &[f32] {
        assert!(self.finished, "statistics are read once finished");
        &self.gram
    }

    /// `[K]` mean |x|.
    pub fn abs_mean(&self) -> Vec<f32> {
        self.abs_sum.iter().map(|sum| (sum / self.tokens.max(1) as f64) as f32).collect()
    }

    /// `[K]` max |x|.
    pub fn abs_max(&self) -> &[f32] {
        &self.abs_max
    }

    /// Number of channels with a NaN or Inf, or whose squares overflowed.
    pub fn broken_channels(&self) -> usize {
        (0..self.in_features)
            .filter(|&c| !self.abs_max[c].is_finite() || !self.gram[c * self.in_features + c].is_finite())
            .count()
    }
}

fn nan_max(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { a.max(b) }
}

/// Column sums and maxima of |x| over a block of rows.
fn column_stats(block: &[f32], k: usize) -> (Vec<f32>, Vec<f32>) {
    let (mut sum, mut max) = (vec![0f32; k], vec![0f32; k]);
    for row in block.chunks_exact(k) {
        for ((s, m), v) in sum.iter_mut().zip(&mut max).zip(row) {
            let v = v.abs();
            *s += v;
            // Not f32::max, which would drop NaN.
            *m = if v <= *m { *m } else { v };
        }
    }
    // A NaN may have been overwritten in the maximum by a later value, but never in the sum.
    max.iter_mut().zip(&sum).for_each(|(m, s)| *m = if s.is_nan() { f32::NAN } else { *m });
    (sum, max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_match_their_definitions() {
        let (k, tokens) = (3, 700);
        let x: Vec<f32> = (0..tokens * k).map(|i| ((i * 31 % 97) as f32 - 48.0) / 16.0).collect();
        let mut stats = InputStats::new(k);
        stats.update(&x[..300 * k]);
        stats.update(&x[300 * k..]);
        stats.finish();
        assert_eq!(stats.tokens, 700);
        for c in 0..k {
            let column: Vec<f64> = x.iter().skip(c).step_by(k).map(|v| f64::from(*v)).collect();
            let mean = column.iter().map(|v| v.abs()).sum::<f64>() / tokens as f64;
            assert!((f64::from(stats.abs_mean()[c]) - mean).abs() < 1e-6);
            assert_eq!(f64::from(stats.abs_max()[c]), column.iter().fold(0.0, |m: f64, v| m.max(v.abs())));
            let square = column.iter().map(|v| v * v).sum::<f64>() / tokens as f64;
            assert!((f64::from(stats.gram()[c * k + c]) - square).abs() < 1e-4);
        }
        assert_eq!(stats.gram()[1], stats.gram()[3]);
        assert_eq!(stats.broken_channels(), 0);
    }

    #[test]
    fn a_nan_anywhere_is_seen() {
        for at in [0, 5, 11] {
            let mut x = vec![1.0; 12];
            x[at] = f32::NAN;
            let mut stats = InputStats::new(3);
            stats.update(&x);
            stats.finish();
            assert_eq!(stats.broken_channels(), 1, "{at}");
        }
    }

    #[test]
    fn threads_do_not_change_the_bits() {
        let k = 130;
        let x: Vec<f32> = (0..1000 * k).map(|i| ((i * 7919 % 10_007) as f32 / 5000.0) - 1.0).collect();
        let run = |threads| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let mut stats = InputStats::new(k);
                stats.update(&x);
                stats.finish();
                (stats.gram().to_vec(), stats.abs_mean())
            })
        };
        assert_eq!(run(1), run(2));
    }
}
