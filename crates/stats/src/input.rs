use candle_core::Tensor;
use lite_decoder::{DecoderError, with_cpu_slice};
use lite_linalg::{gram_update, mirror_lower};
use rayon::prelude::*;

use crate::StatsError;
use crate::device::DeviceSums;

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
    /// What was gathered on a device, until [`InputStats::collect`].
    device: Option<DeviceSums>,
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
            device: None,
        }
    }

    /// Finished statistics as they were read back: `gram` is `XᵀX / T` in both triangles, `[K, K]`, `abs_mean` and
    /// `abs_max` are `[K]`. [`InputStats::gram`], [`InputStats::abs_mean`] and [`InputStats::abs_max`] then return
    /// exactly these values.
    ///
    /// # Errors
    /// [`StatsError::Invalid`] where no activations can have such statistics: a length that is not K or K², NaN, Inf or
    /// negative values where there can be none, a Gram matrix that is not symmetric to the bit, no tokens.
    pub fn from_parts(
        in_features: usize,
        tokens: u64,
        gram: Vec<f32>,
        abs_mean: &[f32],
        abs_max: Vec<f32>,
    ) -> Result<Self, StatsError> {
        let k = in_features;
        let invalid = |what: String| Err(StatsError::Invalid { what });
        if k.checked_mul(k) != Some(gram.len()) || abs_mean.len() != k || abs_max.len() != k {
            let (g, mean, max) = (gram.len(), abs_mean.len(), abs_max.len());
            return invalid(format!("{g} Gram values, {mean} means and {max} maxima do not belong to {k} channels"));
        }
        if tokens == 0 {
            return invalid("they count no tokens".to_owned());
        }
        // Written so that NaN fails.
        let sound = |v: f32| v >= 0.0 && v.is_finite();
        for c in 0..k {
            let (mean, max, square) = (abs_mean[c], abs_max[c], gram[c * k + c]);
            if !(sound(mean) && sound(max) && sound(square)) {
                return invalid(format!(
                    "channel {c} has mean |x| {mean}, max |x| {max} and mean square {square}, wanted finite values of 0 or more"
                ));
            }
        }
        if let Some((row, col, what)) = flaw(&gram, k) {
            return invalid(format!("the Gram matrix {what} at row {row}, column {col}"));
        }
        // The product and the quotient are off by at most one f64 rounding each, so rounding to f32 gives `m` back.
        let abs_sum = abs_mean.iter().map(|m| f64::from(*m) * tokens as f64).collect();
        Ok(Self { in_features, tokens, gram, abs_sum, abs_max, finished: true, device: None })
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

    /// Adds `x`, `(tokens, K)`: [`InputStats::update`] on the CPU, elsewhere [`InputStats::update_composed`].
    ///
    /// # Errors
    /// If `x` does not fit, or its device fails.
    ///
    /// # Panics
    /// If the statistics are finished.
    pub fn update_tensor(&mut self, x: &Tensor) -> Result<(), DecoderError> {
        if !x.device().is_cpu() {
            return self.update_composed(x);
        }
        self.tokens_of(x)?;
        with_cpu_slice(x, |values| self.update(values))
    }

    /// Adds `x`, `(tokens, K)`, by candle operations on its device; the sums stay there until [`InputStats::collect`].
    ///
    /// # Errors
    /// If `x` does not fit, or its device fails.
    ///
    /// # Panics
    /// If the statistics are finished.
    pub fn update_composed(&mut self, x: &Tensor) -> Result<(), DecoderError> {
        assert!(!self.finished, "finished statistics take no more tokens");
        let tokens = self.tokens_of(x)?;
        DeviceSums::add(&mut self.device, &x.contiguous()?)?;
        self.tokens += tokens as u64;
        Ok(())
    }

    fn tokens_of(&self, x: &Tensor) -> Result<usize, DecoderError> {
        let (tokens, k) = x.dims2()?;
        if k == self.in_features && tokens > 0 {
            return Ok(tokens);
        }
        let reason = format!("statistics of {} channels were given activations {:?}", self.in_features, x.dims());
        Err(DecoderError::Input { reason })
    }

    /// Brings what was gathered on a device to the host. Nothing to do for what was gathered on the CPU.
    ///
    /// # Errors
    /// If the device cannot be read.
    pub fn collect(&mut self) -> Result<(), DecoderError> {
        let Some(sums) = self.device.take() else { return Ok(()) };
        let sums = sums.to_host()?;
        self.gram.iter_mut().zip(&sums.gram).for_each(|(total, g)| *total += g);
        self.abs_sum.iter_mut().zip(&sums.abs_sum).for_each(|(total, s)| *total += s);
        self.abs_max.iter_mut().zip(&sums.abs_max).for_each(|(largest, m)| *largest = nan_max(*largest, *m));
        Ok(())
    }

    /// Divides by the number of tokens and completes the Gram matrix.
    ///
    /// # Panics
    /// If something gathered on a device was not brought to the host by [`InputStats::collect`].
    pub fn finish(&mut self) {
        assert!(self.device.is_none(), "statistics gathered on a device are collected before they are finished");
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

/// The first value, by row, that is NaN or Inf or differs from its mirror image.
fn flaw(gram: &[f32], k: usize) -> Option<(usize, usize, &'static str)> {
    // Tiles keep both triangles' lines in the cache.
    const TILE: usize = 64;
    let rows: Vec<usize> = (0..k).step_by(TILE).collect();
    let in_rows = |&first: &usize| {
        let last = (first + TILE).min(k);
        (0..last).step_by(TILE).find_map(|start| {
            (first..last).find_map(|row| {
                (start..(start + TILE).min(row + 1)).find_map(|col| {
                    let (lower, upper) = (gram[row * k + col], gram[col * k + row]);
                    if !lower.is_finite() || !upper.is_finite() {
                        Some((row, col, "holds NaN or Inf"))
                    } else {
                        (lower.to_bits() != upper.to_bits()).then_some((row, col, "is not symmetric"))
                    }
                })
            })
        })
    };
    rows.par_iter().find_map_first(in_rows)
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

    /// Gathered by candle operations, on every device there is, in two updates.
    fn composed(x: &[f32], k: usize) -> Vec<InputStats> {
        let on = |compute: &lite_decoder::Compute| {
            let tokens = x.len() / k;
            let x = Tensor::from_slice(x, (tokens, k), compute.device()).unwrap();
            let mut stats = InputStats::new(k);
            let cut = tokens / 3;
            stats.update_composed(&x.narrow(0, 0, cut.max(1)).unwrap()).unwrap();
            stats.update_composed(&x.narrow(0, cut.max(1), tokens - cut.max(1)).unwrap()).unwrap();
            stats.collect().unwrap();
            stats.finish();
            stats
        };
        lite_decoder::Compute::every()[1..].iter().map(on).collect()
    }

    #[test]
    fn sums_on_a_device_are_those_of_the_cpu() {
        let k = 37;
        let x: Vec<f32> = (0..500 * k).map(|i| ((i * 7919 % 10_007) as f32 / 5000.0) - 1.0).collect();
        let mut wanted = InputStats::new(k);
        wanted.update(&x);
        wanted.finish();
        let close = |a: &[f32], b: &[f32]| {
            assert_eq!(a.len(), b.len());
            a.iter().zip(b).for_each(|(a, b)| assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{a} {b}"));
        };
        for found in composed(&x, k) {
            assert_eq!((found.tokens, found.abs_max()), (500, wanted.abs_max()));
            close(found.gram(), wanted.gram());
            close(&found.abs_mean(), &wanted.abs_mean());
            let parts = (found.gram().to_vec(), found.abs_mean(), found.abs_max().to_vec());
            InputStats::from_parts(k, 500, parts.0, &parts.1, parts.2).unwrap();
        }
        // Both ways in one: what one tensor is gathered by does not matter.
        let mut mixed = InputStats::new(k);
        mixed.update_tensor(&Tensor::from_slice(&x[..100 * k], (100, k), &candle_core::Device::Cpu).unwrap()).unwrap();
        mixed
            .update_composed(&Tensor::from_slice(&x[100 * k..], (400, k), &candle_core::Device::Cpu).unwrap())
            .unwrap();
        mixed.collect().unwrap();
        mixed.finish();
        close(mixed.gram(), wanted.gram());
        let narrow = Tensor::zeros((4, k - 1), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        assert!(InputStats::new(k).update_tensor(&narrow).is_err());
        assert!(InputStats::new(k).update_composed(&narrow).is_err());
    }

    #[test]
    fn a_nan_on_a_device_is_seen() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 5, 11] {
                let mut x = vec![1.0; 12];
                x[at] = bad;
                composed(&x, 3).iter().for_each(|stats| assert_eq!(stats.broken_channels(), 1, "{at}"));
            }
        }
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
    fn parts_come_back_as_they_were() {
        let (k, tokens) = (130, 333);
        let x: Vec<f32> = (0..tokens * k).map(|i| ((i * 7919 % 10_007) as f32 / 777.0) - 6.0).collect();
        let mut stats = InputStats::new(k);
        stats.update(&x);
        stats.finish();
        let parts = || (stats.gram().to_vec(), stats.abs_mean(), stats.abs_max().to_vec());
        let (gram, mean, max) = parts();
        let back = InputStats::from_parts(k, stats.tokens, gram, &mean, max).unwrap();
        assert_eq!((back.gram(), back.abs_mean(), back.abs_max()), (stats.gram(), stats.abs_mean(), stats.abs_max()));

        type Damage = fn(&mut Vec<f32>, &mut Vec<f32>, &mut Vec<f32>);
        let cases: [(Damage, &str); 8] = [
            (|gram, _, _| gram[5] = f32::NAN, "row 5, column 0"),
            (|gram, _, _| gram[129 * 130 + 70] = f32::INFINITY, "NaN or Inf at row 129, column 70"),
            (|gram, _, _| gram[70 * 130 + 3] += 1.0, "not symmetric at row 70, column 3"),
            (|gram, _, _| gram[2 * 131] = -1.0, "mean square -1"),
            (|gram, _, _| gram.truncate(130 * 130 - 1), "16899 Gram values"),
            (|_, mean, _| mean[3] = f32::NAN, "channel 3 has mean |x| NaN"),
            (|_, _, max| max[3] = f32::INFINITY, "max |x| inf"),
            (|_, _, max| max.push(1.0), "131 maxima"),
        ];
        for (damage, wanted) in cases {
            let (mut gram, mut mean, mut max) = parts();
            damage(&mut gram, &mut mean, &mut max);
            let error = InputStats::from_parts(k, 333, gram, &mean, max).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
        let (gram, mean, max) = parts();
        assert!(InputStats::from_parts(k, 0, gram, &mean, max).is_err(), "no tokens");
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
