//! The damped, ordered and factored Gram matrix of one input.

use lite_linalg::{FactorError, Mat, Threads, apply_inverse, gemm, gemm_into, gptq_factor_f64, gptq_factor_in_place};
use rayon::prelude::*;

use crate::{Fallback, GptqError, GptqSettings, NearestReason};

/// What all linears that read one input share: the order of columns and the factor of the inverse Hessian
/// `H = G + λ·mean(diag G)·I`, `2K³/3` flops.
///
/// Linears with the same input (q, k and v; gate and up) should be solved with one of these.
#[derive(Debug, Clone)]
pub struct Hessian<'a> {
    /// `[K, K]`, undamped.
    pub(crate) gram: &'a [f32],
    /// K.
    pub(crate) in_features: usize,
    pub(crate) settings: GptqSettings,
    /// Channels that are zero on every token.
    pub(crate) dead: Vec<bool>,
    /// The column visited at each step.
    pub(crate) order: Vec<usize>,
    /// Mean of the diagonal over channels that are not dead; the factored matrix is divided by it.
    mean: f64,
    /// The damping that worked, or the largest that was tried.
    damp: f32,
    /// Upper triangular U of `(H[order, order] / mean)⁻¹ = Uᵀ U`, row-major `[K, K]`.
    pub(crate) factor: Option<Vec<f32>>,
    fallback: Fallback,
}

impl<'a> Hessian<'a> {
    /// Orders and factors the Gram matrix (`[K, K]`, both triangles, undamped, `K = in_features`).
    ///
    /// Dead channels (zero diagonal) are decoupled: they get the mean diagonal and are visited last. If the
    /// factorization fails, λ grows tenfold up to 1, then the same in f64.
    ///
    /// # Errors
    /// Bad settings; a Gram matrix of the wrong length, with NaN or Inf, or with a negative diagonal. Without
    /// [`GptqSettings::fallback`], also one that is all zeros or that cannot be factored.
    pub fn new(gram: &'a [f32], in_features: usize, settings: &GptqSettings) -> Result<Self, GptqError> {
        Self::with_ladder(gram, in_features, settings, 1.0)
    }

    /// [`Self::new`] with λ growing to `largest` at most.
    pub(crate) fn with_ladder(
        gram: &'a [f32],
        in_features: usize,
        settings: &GptqSettings,
        largest: f32,
    ) -> Result<Self, GptqError> {
        settings.check()?;
        let k = in_features;
        check_finite("Gram matrix", gram, k, k)?;
        let diagonal: Vec<f32> = (0..k).map(|i| gram[i * k + i]).collect();
        if let Some(channel) = diagonal.iter().position(|&d| d < 0.0) {
            return Err(GptqError::NegativeDiagonal { channel, value: diagonal[channel] });
        }
        let mut order: Vec<usize> = (0..k).collect();
        if settings.act_order {
            // Stable: equal diagonals keep the order of the channels.
            order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]));
        }
        let dead: Vec<bool> = diagonal.iter().map(|&d| d == 0.0).collect();
        let live = dead.iter().filter(|&&dead| !dead).count();
        let mean = diagonal.iter().map(|&d| f64::from(d)).sum::<f64>() / live.max(1) as f64;
        let mut hessian = Self {
            gram,
            in_features,
            settings: *settings,
            dead,
            order,
            mean,
            damp: settings.damp,
            factor: None,
            fallback: Fallback::None,
        };
        if live == 0 {
            if k > 0 && !settings.fallback {
                return Err(GptqError::NoSignal);
            }
            hessian.fallback = Fallback::Nearest { reason: NearestReason::NoSignal };
            return Ok(hessian);
        }
        match hessian.factor_with_retries(largest, gptq_factor_in_place) {
            Ok((factor, damp, fallback)) => {
                hessian.factor = Some(factor);
                hessian.damp = damp;
                hessian.fallback = fallback;
            }
            Err(reason) if settings.fallback => {
                hessian.damp = largest;
                hessian.fallback = Fallback::Nearest { reason: NearestReason::NotFactored(reason) };
            }
            Err(reason) => return Err(GptqError::NotFactored { damp: largest, reason }),
        }
        Ok(hessian)
    }

    /// What had to be done to factor the matrix.
    pub fn fallback(&self) -> Fallback {
        self.fallback
    }

    /// What damping adds to the diagonal of the Gram matrix.
    pub(crate) fn ridge(&self) -> f32 {
        (f64::from(self.damp) * self.mean) as f32
    }

    /// The factor, the damping that worked, and what had to be done. `single` factors in f32.
    fn factor_with_retries(
        &self,
        largest: f32,
        single: impl Fn(Vec<f32>, usize) -> Result<Vec<f32>, FactorError>,
    ) -> Result<(Vec<f32>, f32, Fallback), FactorError> {
        let first = self.settings.damp;
        // 0.01 · 10 · 10 in f32 is just below 1: that is the last step, not one before it.
        let next = |damp: f32| if damp * 10.0 > 0.99 * largest { largest } else { damp * 10.0 };
        let dampings = || std::iter::successors(Some(first), |&damp| (damp < largest).then(|| next(damp)));
        for damp in dampings() {
            if let Ok(factor) = single(self.ordered(damp), self.in_features) {
                let fallback = if damp == first { Fallback::None } else { Fallback::Damped { damp } };
                return Ok((factor, damp, fallback));
            }
        }
        let mut reason = FactorError::NotPositiveDefinite { channel: 0 };
        for damp in dampings() {
            match gptq_factor_f64(&self.ordered(damp), self.in_features) {
                Ok(factor) => return Ok((factor, damp, Fallback::Double { damp })),
                Err(error) => reason = error,
            }
        }
        Err(reason)
    }

    /// `H[order, order] / mean`: GPTQ does not depend on the scale of H, f32 does.
    fn ordered(&self, damp: f32) -> Vec<f32> {
        let k = self.in_features;
        let inverse = 1.0 / self.mean;
        let mut h = vec![0f32; k * k];
        h.par_chunks_mut(k).zip(&self.order).enumerate().for_each(|(step, (row, &channel))| {
            let source = &self.gram[channel * k..(channel + 1) * k];
            for (value, &other) in row.iter_mut().zip(&self.order) {
                *value = (f64::from(source[other]) * inverse) as f32;
            }
            if self.dead[channel] {
                row[step] = 1.0;
            }
            row[step] += damp;
        });
        h
    }

    /// The target that makes up for what the input has lost to earlier quantization, `W + W (C − G) H⁻¹` `[N, K]`.
    ///
    /// `weight` is `[N, K]` row-major and `cross` `[K, K]` is `C = X̃ᵀX / T`, rows by channels of the float input X̃,
    /// columns by channels of the quantized input X. See [`crate::error_aware_target`].
    ///
    /// # Errors
    /// Lengths that do not fit, NaN or Inf in `cross`, a Gram matrix that was not factored.
    pub fn error_aware_target(&self, weight: &[f32], cross: &[f32]) -> Result<Vec<f32>, GptqError> {
        let k = self.in_features;
        check_finite("cross-Gram matrix", cross, k, k)?;
        let rows = self.rows(weight)?;
        let mut shift = vec![0f32; k * k];
        shift.par_iter_mut().zip(cross).zip(self.gram).for_each(|((s, c), g)| *s = c - g);
        self.shifted(weight, gemm(Mat::new(weight, rows, k), Mat::new(&shift, k, k), Threads::All))
    }

    /// The same target from the float model's outputs: `product` is `(X̃Wᵀ)ᵀX / T`, `[N, K]`, bias left out. It is
    /// `W·C` without C, which costs less to gather where N is smaller than K.
    ///
    /// # Errors
    /// As [`Hessian::error_aware_target`].
    pub fn error_aware_target_from_outputs(&self, weight: &[f32], product: &[f32]) -> Result<Vec<f32>, GptqError> {
        let k = self.in_features;
        let rows = self.rows(weight)?;
        check_finite("product of outputs and inputs", product, rows, k)?;
        let mut drift = product.to_vec();
        let (weights, gram) = (Mat::new(weight, rows, k), Mat::new(self.gram, k, k));
        gemm_into(&mut drift, k, 1.0, -1.0, weights, gram, Threads::All);
        self.shifted(weight, drift)
    }

    /// Rows of `weight`.
    fn rows(&self, weight: &[f32]) -> Result<usize, GptqError> {
        let k = self.in_features;
        let rows = weight.len().checked_div(k).unwrap_or(0);
        if rows * k != weight.len() {
            return Err(GptqError::Length { what: "weight", found: weight.len(), wanted: rows * k });
        }
        Ok(rows)
    }

    /// `W + drift · (G + λI)⁻¹`, with `drift = W(C − G)`.
    fn shifted(&self, weight: &[f32], drift: Vec<f32>) -> Result<Vec<f32>, GptqError> {
        let k = self.in_features;
        let factor = match (&self.factor, self.fallback) {
            (Some(factor), _) => factor,
            (None, Fallback::Nearest { reason: NearestReason::NotFactored(reason) }) => {
                return Err(GptqError::NotFactored { damp: self.damp, reason });
            }
            // No token: X is zero, so is C, and W stays.
            (None, _) => return Ok(weight.to_vec()),
        };
        let mut ordered = vec![0f32; drift.len()];
        ordered.par_chunks_mut(k).zip(drift.par_chunks(k)).for_each(|(ordered, drift)| {
            ordered.iter_mut().zip(&self.order).for_each(|(o, &channel)| *o = drift[channel]);
        });
        let correction = apply_inverse(&ordered, factor, k);
        let mut target = weight.to_vec();
        target.par_chunks_mut(k).zip(correction.par_chunks(k)).for_each(|(target, correction)| {
            for (c, &channel) in correction.iter().zip(&self.order) {
                target[channel] += (f64::from(*c) / self.mean) as f32;
            }
        });
        Ok(target)
    }
}

/// Checks that `matrix` is `[rows, k]` and finite.
fn check_finite(what: &'static str, matrix: &[f32], rows: usize, k: usize) -> Result<(), GptqError> {
    let wanted = rows.saturating_mul(k);
    if matrix.len() != wanted {
        return Err(GptqError::Length { what, found: matrix.len(), wanted });
    }
    let bad = |row: &[f32]| row.iter().position(|v| !v.is_finite());
    let found = matrix.par_chunks(k.max(1)).enumerate().find_map_first(|(i, row)| bad(row).map(|column| (i, column)));
    match found {
        Some((row, column)) => Err(GptqError::NotFinite { what, row, column }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What f32 cannot factor with damping 1 depends on the machine's rounding, so f32 is made to fail.
    #[test]
    fn double_precision_starts_from_the_damping_asked_for() {
        let k = 32;
        let gram: Vec<f32> = (0..k * k).map(|at| 0.5f32.powi(usize::abs_diff(at / k, at % k) as i32)).collect();
        let hessian = Hessian::new(&gram, k, &GptqSettings::default()).unwrap();
        let failure = FactorError::NotPositiveDefinite { channel: 3 };
        let (factor, damp, fallback) = hessian.factor_with_retries(1.0, |_, _| Err(failure)).unwrap();
        assert_eq!((damp, fallback), (0.01, Fallback::Double { damp: 0.01 }));
        let single = hessian.factor.unwrap();
        assert!(factor.iter().zip(&single).all(|(a, b)| (a - b).abs() < 1e-5));
    }
}
