//! Scales by formula.

use crate::SmoothQuantError;
use crate::channels::{check_statistic, check_weights, column_maxima, mean_normalised};

/// The exponent that SmoothQuant's paper and llm-compressor start from.
pub const DEFAULT_ALPHA: f64 = 0.5;

/// Scales stay between this and its inverse: norm weights are divided by them and must survive that in f16.
const SMALLEST: f64 = 1e-5;

/// LMDeploy's bound of `w̄` and of its scales.
const LMDEPLOY_SMALLEST: f64 = 1e-4;

/// The formula of the scales. `a_j = max|X_j|`, `w_j = max|W_j|` over all rows of all weights that share the input.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Algorithm {
    /// `s = a^α / w^(1−α)` (Xiao et al., arXiv:2211.10438); `s = a` where no weight reads the channel, as llm-compressor
    /// has it.
    SmoothQuant {
        /// In `[0, 1]`.
        alpha: f64,
    },
    /// `s = a / log2(2 + a)` (Li et al., arXiv:2308.15987), llm-compressor's `log_equalization`. Weights do not enter.
    LogEqualization,
    /// `s = a^r / w̄^(1−r)` with `w̄` the mean over rows of `|W| / max|W|` of the row: LMDeploy's `smooth_quant`, which
    /// fixes r = 0.5.
    MeanNormalised {
        /// In `[0, 1]`.
        ratio: f64,
    },
}

/// What is done about the common factor of all scales.
///
/// Scales per row and per token absorb any common factor, so it changes no error; it decides how large the stored norm
/// weights are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Normalisation {
    /// Divide by `sqrt(max s · min s)`, as LMDeploy does: the norm's weights keep their order of magnitude, so dividing
    /// them costs no range of f16. The default.
    #[default]
    Middle,
    /// Leave the formula's values, as the paper and llm-compressor do.
    None,
}

/// What the producer of the input allows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Constraints<'a> {
    /// `[K]`: channels with the same number are made by the same producer row and share a scale (grouped-query attention,
    /// v → o). Numbers are below K.
    pub ties: Option<&'a [u32]>,
    /// `[K]`: channels that must keep scale 1, because their producer cannot be rescaled; so do those tied to them.
    pub frozen: Option<&'a [bool]>,
}

/// How scales are computed.
#[derive(Debug, Clone, Copy)]
pub struct SmoothSettings<'a> {
    /// The formula.
    pub algorithm: Algorithm,
    /// The common factor.
    pub normalisation: Normalisation,
    /// Ties and frozen channels.
    pub constraints: Constraints<'a>,
}

impl SmoothSettings<'_> {
    /// [`Algorithm::SmoothQuant`] with `alpha`, the default normalisation and no constraints.
    pub fn alpha(alpha: f64) -> Self {
        Self {
            algorithm: Algorithm::SmoothQuant { alpha },
            normalisation: Normalisation::default(),
            constraints: Constraints::default(),
        }
    }
}

/// The scales `[K]` of linears that share an input: consumers are multiplied by them, the producer is divided.
///
/// `activation_abs_max` is `max|X_j|`, `[K]`. llm-compressor uses `max − min` and `2·max|W|` instead: for symmetric
/// activations twice both, which is a common factor; for one-sided channels the magnitude is what a symmetric quantizer
/// meets. To reproduce it, pass `max − min` over 2 and scale by `2^(2α−1)`. `weights` are `[N_i, K]` row-major with their
/// `N_i`.
///
/// All maths is in f64. A channel without activations (`a = 0`) keeps `s = 1` and takes no part in the normalisation:
/// nothing flows through it (llm-compressor and LMDeploy clamp it to 1e-5 and 1e-4, which blows its norm weight up).
/// Otherwise scales are at least 1e-5 before normalisation (1e-4 for [`Algorithm::MeanNormalised`]), and between 1e-5 and
/// 1e5 after it. Deterministic for any number of threads.
///
/// # Errors
/// [`SmoothQuantError::Alpha`] for an exponent outside `[0, 1]`; NaN, Inf and negative statistics; NaN and Inf in a weight;
/// shapes that do not fit.
pub fn smooth_scales(
    activation_abs_max: &[f32],
    weights: &[(&[f32], usize)],
    settings: &SmoothSettings,
) -> Result<Vec<f32>, SmoothQuantError> {
    let k = activation_abs_max.len();
    check_exponent(settings.algorithm.exponent())?;
    check_weights(weights, k)?;
    check_statistic(activation_abs_max, k)?;
    settings.constraints.check(k)?;
    let statistics = Statistics::new(activation_abs_max, weights, settings.algorithm, settings.constraints);
    Ok(statistics.scales(settings.algorithm, settings.normalisation))
}

impl Algorithm {
    fn exponent(self) -> f64 {
        match self {
            Self::SmoothQuant { alpha } => alpha,
            Self::MeanNormalised { ratio } => ratio,
            Self::LogEqualization => 0.0,
        }
    }
}

pub(crate) fn check_exponent(found: f64) -> Result<(), SmoothQuantError> {
    // NaN is in no range.
    if (0.0..=1.0).contains(&found) { Ok(()) } else { Err(SmoothQuantError::Alpha { found }) }
}

/// What the formulas read, gathered once for all exponents.
pub(crate) struct Statistics {
    activation: Vec<f64>,
    weight: Vec<f64>,
    frozen: Vec<bool>,
}

impl Statistics {
    /// For inputs that were checked. `algorithm` decides which weight statistic is needed, not its exponent.
    pub(crate) fn new(
        activation: &[f32],
        weights: &[(&[f32], usize)],
        algorithm: Algorithm,
        constraints: Constraints,
    ) -> Self {
        let k = activation.len();
        let (weight, mean) = match algorithm {
            Algorithm::SmoothQuant { .. } => {
                let mut largest = vec![0f64; k];
                for (weight, _) in weights {
                    let own = column_maxima(weight, k);
                    largest.iter_mut().zip(own).for_each(|(l, o)| *l = l.max(f64::from(o)));
                }
                (largest, false)
            }
            Algorithm::MeanNormalised { .. } => (mean_normalised(weights, k), true),
            Algorithm::LogEqualization => (vec![1.0; k], false),
        };
        let activation = activation.iter().map(|a| f64::from(*a)).collect();
        Self {
            activation: constraints.tied(activation, false),
            weight: constraints.tied(weight, mean),
            frozen: constraints.frozen_channels(k),
        }
    }

    /// Means of magnitudes alone, for AWQ's `a^r`.
    pub(crate) fn of_means(mean: &[f32], constraints: Constraints) -> Self {
        let activation: Vec<f64> = mean.iter().map(|a| f64::from(*a)).collect();
        Self {
            weight: vec![1.0; mean.len()],
            activation: constraints.tied(activation, true),
            frozen: constraints.frozen_channels(mean.len()),
        }
    }

    pub(crate) fn channels(&self) -> usize {
        self.activation.len()
    }

    /// With [`Self::of_means`], `SmoothQuant { alpha: r }` gives `a^r`.
    pub(crate) fn scales(&self, algorithm: Algorithm, normalisation: Normalisation) -> Vec<f32> {
        let raw = |a: f64, w: f64| match algorithm {
            Algorithm::SmoothQuant { alpha } if w > 0.0 => (a.powf(alpha) / w.powf(1.0 - alpha)).max(SMALLEST),
            Algorithm::SmoothQuant { .. } => a.max(SMALLEST),
            Algorithm::LogEqualization => (a / (2.0 + a).log2()).max(SMALLEST),
            Algorithm::MeanNormalised { ratio } => {
                (a.powf(ratio) / w.max(LMDEPLOY_SMALLEST).powf(1.0 - ratio)).max(LMDEPLOY_SMALLEST)
            }
        };
        let channels = || self.activation.iter().zip(&self.weight).enumerate();
        let free = |c: usize, a: f64| a > 0.0 && !self.frozen[c];
        let middle = match normalisation {
            Normalisation::None => 1.0,
            Normalisation::Middle => {
                // A channel that no weight reads must not shift the others.
                let read = channels().filter(|&(c, (a, w))| free(c, *a) && *w > 0.0);
                let (min, max) = read
                    .map(|(_, (a, w))| raw(*a, *w))
                    .fold((f64::INFINITY, 0f64), |(min, max), s| (min.min(s), max.max(s)));
                if max > 0.0 { (max * min).sqrt() } else { 1.0 }
            }
        };
        let scale = |(c, (a, w)): (usize, (&f64, &f64))| {
            if free(c, *a) { (raw(*a, *w) / middle).clamp(SMALLEST, 1.0 / SMALLEST) as f32 } else { 1.0 }
        };
        channels().map(scale).collect()
    }
}
