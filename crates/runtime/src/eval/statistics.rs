//! Means with their standard errors, and quantiles, as llama.cpp's `perplexity --kl-divergence` prints them.

/// A mean and its standard error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The estimate; NaN of nothing.
    pub value: f64,
    /// Its standard error; NaN with fewer than two values.
    pub standard_error: f64,
}

impl Estimate {
    /// Mean of `values`, its standard error `sqrt(variance / (n − 1))` with the variance over n. Two passes, so that
    /// nothing cancels.
    pub fn mean(values: impl Iterator<Item = f64> + Clone) -> Self {
        let (sum, count) = values.clone().fold((0.0, 0usize), |(sum, n), v| (sum + v, n + 1));
        let mean = sum / count as f64;
        let squares: f64 = values.map(|v| (v - mean) * (v - mean)).sum();
        let standard_error = if count < 2 { f64::NAN } else { (squares / count as f64 / (count as f64 - 1.0)).sqrt() };
        Self { value: mean, standard_error }
    }

    /// Root of an estimated mean square, by the delta method: `d sqrt(m) = dm / (2 sqrt(m))`.
    pub fn sqrt(self) -> Self {
        let value = self.value.sqrt();
        let standard_error = if value > 0.0 { 0.5 * self.standard_error / value } else { self.standard_error * 0.0 };
        Self { value, standard_error }
    }

    /// exp of an estimate, by the delta method: `d exp(m) = exp(m) dm`.
    pub fn exp(self) -> Self {
        let value = self.value.exp();
        Self { value, standard_error: value * self.standard_error }
    }
}

/// The `q` quantile of ascending values, `q` in 0 to 1, linear between neighbours (numpy's default); NaN of nothing.
pub fn quantile(sorted: &[f64], q: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = q.clamp(0.0, 1.0) * last as f64;
    let low = (at.floor() as usize).min(last);
    let part = at - low as f64;
    let (a, b) = (sorted[low], sorted[(low + 1).min(last)]);
    if part > 0.0 { a + (b - a) * part } else { a }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn estimates_are_those_of_numpy() {
        // x = [1, 2, 4, 8]; x.mean(), x.std() / sqrt(3)
        let found = Estimate::mean([1.0, 2.0, 4.0, 8.0].into_iter());
        assert_eq!(found.value, 3.75);
        assert!((found.standard_error - 1.547_847_968_417_2).abs() < 1e-12, "{found:?}");
        let root = found.sqrt();
        assert!((root.value - 3.75f64.sqrt()).abs() < 1e-15);
        assert!((root.standard_error - 0.399_652_626_942_7).abs() < 1e-12, "{root:?}");
        let one = Estimate::mean([2.0].into_iter());
        assert!(one.value == 2.0 && one.standard_error.is_nan());
        assert!(Estimate::mean(std::iter::empty()).value.is_nan());
        let zero = Estimate::mean([0.0, 0.0].into_iter()).sqrt();
        assert_eq!((zero.value, zero.standard_error), (0.0, 0.0));
    }

    #[test]
    fn quantiles_are_those_of_numpy() {
        // np.quantile([1, 2, 4, 8], q)
        let x = [1.0, 2.0, 4.0, 8.0];
        for (q, wanted) in [(0.0, 1.0), (0.5, 3.0), (0.9, 6.8), (0.99, 7.88), (1.0, 8.0)] {
            assert!((quantile(&x, q) - wanted).abs() < 1e-12, "{q}");
        }
        assert!(quantile(&[], 0.5).is_nan());
        assert_eq!(quantile(&[3.0], 0.9), 3.0);
    }
}
