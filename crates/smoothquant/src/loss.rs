//! The error of quantized linears on sampled tokens.

use lite_linalg::{Mat, Threads, gemm, gemm_into};
use lite_quant::{
    ActivationScale, ActivationScheme, LinearScheme, QuantError, StaticRange, WeightScheme, fake_quantize_tokens,
};
use rayon::prelude::*;

use crate::SmoothQuantError;
use crate::channels::{check_statistic, check_weights};
use crate::weights::RowSample;

/// What is known of the input of some linears: tokens drawn from the calibration set, and what all of it looked like.
#[derive(Debug, Clone, Copy)]
pub struct Sample<'a> {
    /// `[T, K]` row-major.
    pub tokens: &'a [f32],
    /// `[K]` max |x| over all calibration tokens: SmoothQuant's statistic, and the range of static scales.
    pub abs_max: &'a [f32],
}

impl Sample<'_> {
    fn check(&self) -> Result<(), SmoothQuantError> {
        let k = self.abs_max.len();
        check_statistic(self.abs_max, k)?;
        if self.tokens.is_empty() {
            return Err(SmoothQuantError::Empty { what: "tokens" });
        }
        if !self.tokens.len().is_multiple_of(k) {
            let wanted = (self.tokens.len() / k.max(1) + 1).saturating_mul(k);
            return Err(QuantError::Length { what: "activations", found: self.tokens.len(), wanted }.into());
        }
        let bad = |v: &f32| !v.is_finite();
        if let Some(first) = self.tokens.par_iter().position_first(bad) {
            let count = self.tokens.par_iter().filter(|v| bad(v)).count();
            return Err(QuantError::ActivationNotFinite { count, token: first / k, channel: first % k }.into());
        }
        Ok(())
    }
}

/// `‖Q(X / s) Q(W s)ᵀ − X Wᵀ‖²`, summed over the sampled tokens and the rows of all weights that share the input: what
/// `scales` (`[K]`) are worth under `scheme`.
///
/// Weights (`[N_i, K]` row-major with their `N_i`) are rounded to nearest over their whole range; of them at most
/// `max_rows` evenly spaced rows are looked at (0: all). Activations are quantized as [`fake_quantize_tokens`] does; static
/// scales cover `abs_max / s` of every channel, with the signs seen in the sample.
///
/// # Errors
/// NaN, Inf or shapes that do not fit in any input; scales that are not positive normal numbers; scaled values that
/// overflow; schemes that no file or engine has.
pub fn quantized_loss(
    sample: &Sample,
    weights: &[(&[f32], usize)],
    scales: &[f32],
    scheme: &LinearScheme,
    max_rows: usize,
) -> Result<f64, SmoothQuantError> {
    let mut evaluator = Evaluator::new(sample, weights, scheme, max_rows)?;
    let k = sample.abs_max.len();
    if scales.len() != k {
        return Err(SmoothQuantError::Length { what: "scales", found: scales.len(), wanted: k });
    }
    if let Some(channel) = scales.iter().position(|s| !s.is_normal() || *s < 0.0) {
        return Err(SmoothQuantError::Scale { channel, found: scales[channel] });
    }
    evaluator.loss(scales)
}

/// Everything that candidates have in common.
pub(crate) struct Evaluator<'a> {
    sample: Sample<'a>,
    /// `[K]` lower and upper end of each channel over all calibration tokens.
    bounds: Vec<(f32, f32)>,
    rows: RowSample,
    activations: Option<ActivationScheme>,
    /// `[T, n]`: `X Wᵀ` of the sampled rows.
    target: Vec<f32>,
    /// `[T, K]` and `[T, n]` scratch.
    tokens: Vec<f32>,
    outputs: Vec<f32>,
}

impl<'a> Evaluator<'a> {
    pub(crate) fn new(
        sample: &Sample<'a>,
        weights: &[(&[f32], usize)],
        scheme: &LinearScheme,
        max_rows: usize,
    ) -> Result<Self, SmoothQuantError> {
        let k = sample.abs_max.len();
        check_weights(weights, k)?;
        sample.check()?;
        if let WeightScheme::Int(scheme) = scheme.weights {
            scheme.groups(k)?;
        }
        let max_rows = if max_rows == 0 { usize::MAX } else { max_rows };
        let rows = RowSample::new(weights, k, scheme.weights, max_rows)?;
        let (t, n) = (sample.tokens.len() / k, rows.rows.len() / k);
        let target = gemm(Mat::new(sample.tokens, t, k), Mat::new(&rows.rows, n, k).t(), Threads::All);
        let mut evaluator = Self {
            sample: *sample,
            bounds: channel_bounds(sample),
            rows,
            activations: scheme.activations,
            outputs: vec![0.0; target.len()],
            target,
            tokens: Vec::new(),
        };
        // An activation scheme that cannot be simulated is the caller's mistake, not a bad candidate.
        if let Some(activations) = scheme.activations {
            let found = evaluator.static_range(&vec![1.0; k])?.quantization(&activations)?;
            evaluator.tokens.resize(k, 0.0);
            fake_quantize_tokens(&mut evaluator.tokens, k, &activations, found.as_ref())?;
        }
        Ok(evaluator)
    }

    /// `‖X Wᵀ‖²` of the sampled rows: the loss of answering zero.
    pub(crate) fn energy(&self) -> f64 {
        self.sum_of_squares(|_, target| target)
    }

    pub(crate) fn loss(&mut self, scales: &[f32]) -> Result<f64, SmoothQuantError> {
        let k = scales.len();
        let weight = self.rows.quantized(scales)?;
        self.tokens.clear();
        self.tokens.extend_from_slice(self.sample.tokens);
        self.tokens.par_chunks_mut(k).for_each(|token| token.iter_mut().zip(scales).for_each(|(x, s)| *x /= s));
        if let Some(scheme) = self.activations {
            let found = match scheme.scale {
                ActivationScale::StaticTensor | ActivationScale::StaticTensorLocal(_) => {
                    self.static_range(scales)?.quantization(&scheme)?
                }
                _ => None,
            };
            fake_quantize_tokens(&mut self.tokens, k, &scheme, found.as_ref())?;
        }
        let (t, n) = (self.tokens.len() / k, weight.len() / k);
        let (tokens, weight) = (Mat::new(&self.tokens, t, k), Mat::new(&weight, n, k).t());
        gemm_into(&mut self.outputs, n, 0.0, 1.0, tokens, weight, Threads::All);
        Ok(self.sum_of_squares(|output, target| output - target))
    }

    /// The range of `x / s` over all calibration tokens.
    fn static_range(&self, scales: &[f32]) -> Result<StaticRange, QuantError> {
        let join =
            |(min, max): (f32, f32), (bound, s): (&(f32, f32), &f32)| (min.min(bound.0 / s), max.max(bound.1 / s));
        let (min, max) = self.bounds.iter().zip(scales).fold((0f32, 0f32), join);
        StaticRange::from_bounds(min, max)
    }

    /// Rows are summed in order, each in f64: the same bits for any number of threads.
    fn sum_of_squares(&self, error: impl Fn(f32, f32) -> f32 + Sync) -> f64 {
        let n = self.target.len() / (self.sample.tokens.len() / self.sample.abs_max.len());
        let of_token = |(outputs, targets): (&[f32], &[f32])| -> f64 {
            outputs.iter().zip(targets).map(|(o, t)| f64::from(error(*o, *t)).powi(2)).sum()
        };
        let sums: Vec<f64> = self.outputs.par_chunks(n).zip(self.target.par_chunks(n)).map(of_token).collect();
        sums.iter().sum()
    }
}

/// The range of each channel: that of the sample, its louder side widened to the maximum over all calibration tokens.
fn channel_bounds(sample: &Sample) -> Vec<(f32, f32)> {
    let mut bounds = vec![(0f32, 0f32); sample.abs_max.len()];
    for token in sample.tokens.chunks_exact(bounds.len()) {
        bounds.iter_mut().zip(token).for_each(|(b, x)| *b = (b.0.min(*x), b.1.max(*x)));
    }
    for (bound, largest) in bounds.iter_mut().zip(sample.abs_max) {
        if -bound.0 > bound.1 {
            bound.0 = bound.0.min(-largest);
        } else {
            bound.1 = bound.1.max(*largest);
        }
    }
    bounds
}
