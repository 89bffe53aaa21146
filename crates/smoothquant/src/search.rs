//! The search over exponents.

use lite_quant::{LinearScheme, QuantError};

use crate::channels::check_statistic;
use crate::loss::Evaluator;
use crate::scales::{Statistics, check_exponent};
use crate::{Algorithm, Constraints, Normalisation, Sample, SmoothQuantError};

/// Rows of all weights together that candidates are scored on, by default.
pub const MAX_ROWS: usize = 1024;

/// Exponents 0, 0.05, … 1.
pub fn exponent_grid() -> Vec<f64> {
    (0..=20).map(|i| f64::from(i) / 20.0).collect()
}

/// What a search tries, and for which quantization.
#[derive(Debug, Clone)]
pub struct SearchSettings<'a> {
    /// How the linears will be quantized; with `activations: None` only weights are.
    pub scheme: LinearScheme,
    /// Exponents to try, each in `[0, 1]`, in any order; no smoothing is always tried.
    pub grid: Vec<f64>,
    /// The common factor of the scales.
    pub normalisation: Normalisation,
    /// Ties and frozen channels.
    pub constraints: Constraints<'a>,
    /// At most so many evenly spaced rows of all weights together are scored (0: all). The estimate is unbiased, and the
    /// cost `2 · T · K · rows` flops per candidate.
    pub max_rows: usize,
}

impl SearchSettings<'_> {
    /// The default grid, normalisation and number of rows, without constraints.
    pub fn new(scheme: LinearScheme) -> Self {
        Self {
            scheme,
            grid: exponent_grid(),
            normalisation: Normalisation::default(),
            constraints: Constraints::default(),
            max_rows: MAX_ROWS,
        }
    }
}

/// One exponent and what it costs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CandidateLoss {
    /// α of SmoothQuant or r of AWQ.
    pub exponent: f64,
    /// `‖Q(X / s) Q(W s)ᵀ − X Wᵀ‖²` on the sample; infinite where scaled values overflow.
    pub loss: f64,
}

/// The scales that won.
#[derive(Debug, Clone, PartialEq)]
pub struct ScaleSearch {
    /// `[K]`: consumers are multiplied by it, the producer divided. All 1 if `exponent` is `None`.
    pub scales: Vec<f32>,
    /// α of SmoothQuant or r of AWQ; `None` if leaving the activations alone is best.
    pub exponent: Option<f64>,
    /// The loss of these scales.
    pub loss: f64,
    /// The loss without smoothing.
    pub identity_loss: f64,
    /// `‖X Wᵀ‖²` on the same tokens and rows: `sqrt(loss / energy)` is the relative error.
    pub energy: f64,
    /// All exponents that were tried, ascending.
    pub losses: Vec<CandidateLoss>,
}

/// Finds the α of SmoothQuant with the least output error when activations and weights are quantized by
/// `settings.scheme`.
///
/// `weights` are `[N_i, K]` row-major with their `N_i`; see [`quantized_loss`](crate::quantized_loss) for the loss. Equal
/// losses go to no smoothing, then to the smaller α. Deterministic for any number of threads.
///
/// # Errors
/// NaN, Inf or shapes that do not fit in any input; [`SmoothQuantError::Alpha`] for a grid that leaves `[0, 1]`;
/// [`SmoothQuantError::NoFiniteLoss`] if not even the unscaled linears have a finite loss.
pub fn search_alpha(
    sample: &Sample,
    weights: &[(&[f32], usize)],
    settings: &SearchSettings,
) -> Result<ScaleSearch, SmoothQuantError> {
    settings.constraints.check(sample.abs_max.len())?;
    let evaluator = Evaluator::new(sample, weights, &settings.scheme, settings.max_rows)?;
    let formula = Algorithm::SmoothQuant { alpha: 0.0 };
    search(evaluator, Statistics::new(sample.abs_max, weights, formula, settings.constraints), settings)
}

/// AWQ's scales `s = mean|X_j|^r` for linears whose activations are quantized too: [`search_alpha`] with another
/// candidate. `abs_mean` is `[K]` mean |x| over the calibration tokens.
///
/// # Errors
/// As [`search_alpha`].
pub fn awq_act_scales(
    sample: &Sample,
    abs_mean: &[f32],
    weights: &[(&[f32], usize)],
    settings: &SearchSettings,
) -> Result<ScaleSearch, SmoothQuantError> {
    settings.constraints.check(sample.abs_max.len())?;
    check_statistic(abs_mean, sample.abs_max.len())?;
    let evaluator = Evaluator::new(sample, weights, &settings.scheme, settings.max_rows)?;
    search(evaluator, Statistics::of_means(abs_mean, settings.constraints), settings)
}

fn search(
    mut evaluator: Evaluator,
    statistics: Statistics,
    settings: &SearchSettings,
) -> Result<ScaleSearch, SmoothQuantError> {
    settings.grid.iter().try_for_each(|alpha| check_exponent(*alpha))?;
    let mut grid = settings.grid.clone();
    grid.sort_by(f64::total_cmp);
    grid.dedup();
    let energy = evaluator.energy();
    let identity = vec![1f32; statistics.channels()];
    let identity_loss = score(&mut evaluator, &identity)?;
    let mut best = ScaleSearch {
        scales: identity,
        exponent: None,
        loss: identity_loss,
        identity_loss,
        energy,
        losses: Vec::new(),
    };
    for alpha in grid {
        let scales = statistics.scales(Algorithm::SmoothQuant { alpha }, settings.normalisation);
        let loss = if scales.iter().all(|s| *s == 1.0) { identity_loss } else { score(&mut evaluator, &scales)? };
        best.losses.push(CandidateLoss { exponent: alpha, loss });
        if loss < best.loss {
            (best.scales, best.exponent, best.loss) = (scales, Some(alpha), loss);
        }
    }
    if best.loss.is_finite() { Ok(best) } else { Err(SmoothQuantError::NoFiniteLoss) }
}

/// The loss of one candidate. Scales so extreme that values overflow make a bad candidate, not a bad model.
fn score(evaluator: &mut Evaluator, scales: &[f32]) -> Result<f64, SmoothQuantError> {
    match evaluator.loss(scales) {
        Ok(loss) if loss.is_nan() => Ok(f64::INFINITY),
        Err(SmoothQuantError::Quant(QuantError::NotFinite { .. } | QuantError::ActivationNotFinite { .. })) => {
            Ok(f64::INFINITY)
        }
        other => other,
    }
}
