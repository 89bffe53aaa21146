//! The search over candidate scales.

use lite_linalg::{scale_columns, unscale_gram};
use lite_quant::{QuantError, Range, RangeContext, Scheme, gram_loss, quantize_nearest};
use rayon::prelude::*;
use thiserror::Error;

use crate::Candidate;
use crate::candidates::{ChannelStats, all};

/// Rows of all consumers together that rank the candidates.
const SAMPLE_ROWS: usize = 512;

/// Candidates (besides the identity) that are scored in full.
const FINALISTS: usize = 2;

/// What can go wrong in a search.
#[derive(Debug, Error)]
pub enum AwqError {
    /// The inputs do not fit together.
    #[error(transparent)]
    Quant(#[from] QuantError),
    /// No candidate, not even the identity, has a finite loss.
    #[error(
        "no scale has a finite loss: the activations of this input hold NaN or Inf; check the model in float first, or leave these linears out"
    )]
    NoFiniteLoss,
}

/// One linear that reads the input.
#[derive(Debug, Clone, Copy)]
pub struct Consumer<'a> {
    /// `[N, K]` row-major float weight.
    pub weight: &'a [f32],
    /// N.
    pub out_features: usize,
}

/// The linears that share one input, and what is known of that input.
#[derive(Debug, Clone)]
pub struct FoldProblem<'a> {
    /// All linears that read the input.
    pub consumers: Vec<Consumer<'a>>,
    /// K.
    pub in_features: usize,
    /// `[K, K]` Gram matrix of the input, both triangles.
    pub gram: &'a [f32],
    /// `[K]` mean |x| (for the search) or max |x| (for the fixed ratio).
    pub activation: &'a [f32],
    /// `[K]`: channels with the same number are made by the same producer row and share a scale
    /// (grouped-query attention, v → o).
    pub ties: Option<&'a [u32]>,
    /// `[K]`: channels that must keep scale 1, because their producer cannot be rescaled.
    pub frozen: Option<&'a [bool]>,
}

/// The scales that won.
#[derive(Debug, Clone)]
pub struct ScaleChoice {
    /// `[K]`: consumers are multiplied by it, the producer divided.
    pub scales: Vec<f32>,
    /// Where they came from.
    pub candidate: Candidate,
    /// Output error of the consumers with these scales, quantized as they finally are.
    pub loss: f64,
    /// The same without scaling.
    pub identity_loss: f64,
}

/// Finds the scales with the least output error of the quantized consumers.
///
/// Cost: `2 · SAMPLE_ROWS · K²` flops per candidate, then three full quantizations.
/// Deterministic for any number of threads.
///
/// # Errors
/// [`AwqError::NoFiniteLoss`] if the statistics are not finite; shapes that do not fit.
pub fn search_scales(problem: &FoldProblem, scheme: &Scheme, range: Range) -> Result<ScaleChoice, AwqError> {
    let stats = ChannelStats::new(problem, scheme);
    let sample = RowSample::new(problem);
    let mut ranked: Vec<(f64, Candidate)> = Vec::new();
    for candidate in all() {
        let loss = sample.loss(&stats.scales(candidate), problem, scheme)?;
        if loss.is_finite() {
            ranked.push((loss, candidate));
        }
    }
    // Stable: equal losses keep the order of the candidates.
    ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
    ranked.truncate(FINALISTS);

    let identity = stats.scales(Candidate::Identity);
    let identity_loss = full_loss(&identity, problem, scheme, range)?;
    let mut best = ScaleChoice { scales: identity, candidate: Candidate::Identity, loss: identity_loss, identity_loss };
    for (_, candidate) in ranked {
        let scales = stats.scales(candidate);
        let loss = full_loss(&scales, problem, scheme, range)?;
        if loss < best.loss || !best.loss.is_finite() {
            best = ScaleChoice { scales, candidate, loss, identity_loss };
        }
    }
    if best.loss.is_finite() { Ok(best) } else { Err(AwqError::NoFiniteLoss) }
}

/// Output error of all consumers, quantized in full under `scales`.
fn full_loss(scales: &[f32], problem: &FoldProblem, scheme: &Scheme, range: Range) -> Result<f64, QuantError> {
    let k = problem.in_features;
    let gram = unscale_gram(problem.gram, scales);
    let mut total = 0.0;
    for consumer in &problem.consumers {
        let weight = scale_columns(consumer.weight, scales);
        let context =
            RangeContext { weight: &weight, out_features: consumer.out_features, in_features: k, gram: Some(&gram) };
        let quantized = quantize_nearest(&context, scheme, range)?;
        total += gram_loss(&weight, &quantized.dequantize(), &gram, consumer.out_features, k);
    }
    Ok(total)
}

/// Evenly spaced rows of all consumers.
struct RowSample {
    rows: Vec<f32>,
}

impl RowSample {
    fn new(problem: &FoldProblem) -> Self {
        let k = problem.in_features;
        let total: usize = problem.consumers.iter().map(|c| c.out_features).sum();
        let step = total.div_ceil(SAMPLE_ROWS).max(1);
        // The middle of each run of `step` rows; offsets run on across consumers.
        let mut rows = Vec::with_capacity(total.div_ceil(step) * k);
        let all = problem.consumers.iter().flat_map(|c| c.weight.chunks_exact(k.max(1)));
        for row in all.skip(step / 2).step_by(step) {
            rows.extend_from_slice(row);
        }
        Self { rows }
    }

    /// Output error of the sampled rows: nearest rounding by min/max, the cheapest faithful ranking.
    fn loss(&self, scales: &[f32], problem: &FoldProblem, scheme: &Scheme) -> Result<f64, QuantError> {
        let k = problem.in_features;
        let n = self.rows.len() / k.max(1);
        let scaled = scale_columns(&self.rows, scales);
        let context = RangeContext { weight: &scaled, out_features: n, in_features: k, gram: None };
        let mut back = match quantize_nearest(&context, scheme, Range::MinMax) {
            Ok(quantized) => quantized.dequantize(),
            // A scale so extreme that the weights overflow is a bad candidate, not a bad model.
            Err(QuantError::NotFinite { .. }) => return Ok(f64::INFINITY),
            Err(error) => return Err(error),
        };
        back.par_chunks_mut(k.max(1)).for_each(|row| row.iter_mut().zip(scales).for_each(|(v, s)| *v /= s));
        Ok(gram_loss(&self.rows, &back, problem.gram, n, k))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lite_linalg::{gram_update, mirror_lower};
    use lite_quant::ScaleDtype;
    use proptest::prelude::*;

    fn noise(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((state >> 40) as f32 / (1u32 << 23) as f32) - 1.0
            })
            .collect()
    }

    /// Inputs with outlier channels, as in real models: what AWQ is for.
    fn problem_data(k: usize, seed: u64) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let tokens = 400;
        let mut x = noise(tokens * k, seed);
        for row in x.chunks_exact_mut(k) {
            for c in (5..k).step_by(31) {
                row[c] *= 20.0;
            }
        }
        let mut gram = vec![0.0; k * k];
        gram_update(&mut gram, &x, tokens, k);
        mirror_lower(&mut gram, k, 1.0 / tokens as f32);
        let mut absmean = vec![0f32; k];
        x.chunks_exact(k).for_each(|row| absmean.iter_mut().zip(row).for_each(|(m, v)| *m += v.abs() / tokens as f32));
        (gram, absmean, noise(96 * k, seed + 1))
    }

    #[test]
    fn outlier_channels_make_the_search_worth_it() {
        let k = 128;
        let (gram, activation, weight) = problem_data(k, 7);
        let problem = FoldProblem {
            consumers: vec![
                Consumer { weight: &weight[..64 * k], out_features: 64 },
                Consumer { weight: &weight[64 * k..], out_features: 32 },
            ],
            in_features: k,
            gram: &gram,
            activation: &activation,
            ties: None,
            frozen: None,
        };
        let scheme = Scheme::new(4, 64, false, ScaleDtype::F16).unwrap();
        for range in [Range::MinMax, Range::Search] {
            let choice = search_scales(&problem, &scheme, range).unwrap();
            assert!(choice.loss < 0.9 * choice.identity_loss, "{range:?} {} {}", choice.loss, choice.identity_loss);
            assert!(choice.scales[5] > 1.5 * choice.scales[6], "the loud channel is protected");
        }
    }

    #[test]
    fn nothing_finite_is_an_error() {
        let k = 16;
        let weight = noise(4 * k, 1);
        let problem = FoldProblem {
            consumers: vec![Consumer { weight: &weight, out_features: 4 }],
            in_features: k,
            gram: &vec![f32::NAN; k * k],
            activation: &[1.0; 16],
            ties: None,
            frozen: None,
        };
        let scheme = Scheme::new(4, 16, false, ScaleDtype::F16).unwrap();
        assert!(matches!(search_scales(&problem, &scheme, Range::MinMax), Err(AwqError::NoFiniteLoss)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn never_worse_than_leaving_the_weights_alone(seed in any::<u32>(), bits in 2i64..=8, symmetric in any::<bool>()) {
            let k = 64;
            let (gram, activation, weight) = problem_data(k, u64::from(seed));
            let problem = FoldProblem {
                consumers: vec![Consumer { weight: &weight[..40 * k], out_features: 40 }],
                in_features: k, gram: &gram, activation: &activation, ties: None, frozen: None,
            };
            let scheme = Scheme::new(bits, 32, symmetric, ScaleDtype::BF16).unwrap();
            let choice = search_scales(&problem, &scheme, Range::Search).unwrap();
            prop_assert!(choice.loss <= choice.identity_loss);
        }
    }
}
