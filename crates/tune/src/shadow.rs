//! The tuned parameters of one linear: a relative change of every group scale, and for every code a real-valued
//! shadow, both moved by Adam (Kingma and Ba 2015, arXiv:1412.6980).
//!
//! The weight of a step is `(round(shadow) − zero) · stored(s · (1 + δ))`: exactly what would be written. Both
//! roundings are passed straight through by gradients (Bengio et al. 2013, arXiv:1308.3432).

use lite_quant::QuantizedLinear;
use rayon::prelude::*;

use crate::simd::{simd_fn, sum_by};

/// A shadow stays this close to the ends of the grid, so that it can always come back; and to its code at the start, so
/// that the first weights are the solved ones.
const INSIDE: f32 = 0.499;

/// Adam's decay rates and ε.
const BETA1: f32 = 0.9;
const BETA2: f32 = 0.999;
const EPSILON: f32 = 1e-8;

/// One Adam step's rates.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rates {
    /// Learning rate of the scales over `1 − β₁ᵗ`.
    scale: f32,
    /// Learning rate of the codes over `1 − β₁ᵗ`.
    code: f32,
    /// `1 / (1 − β₂ᵗ)`
    second: f32,
}

impl Rates {
    /// For step `step` (from 0) with the given learning rates.
    pub(crate) fn new(step: usize, scale: f32, code: f32) -> Self {
        let power = |beta: f32| 1.0 - f64::from(beta).powi(i32::try_from(step).unwrap_or(i32::MAX).saturating_add(1));
        let first = power(BETA1);
        let over = |rate: f32| (f64::from(rate) / first) as f32;
        Self { scale: over(scale), code: over(code), second: (1.0 / power(BETA2)) as f32 }
    }
}

/// A parameter's moving averages of its gradient and of the square.
#[derive(Debug, Clone, Copy, Default)]
struct Moments {
    first: f32,
    second: f32,
}

impl Moments {
    /// The step for gradient `g`, before the learning rate.
    #[inline(always)]
    fn advance(&mut self, g: f32, rates: Rates) -> f32 {
        self.first = BETA1 * self.first + (1.0 - BETA1) * g;
        self.second = BETA2 * self.second + (1.0 - BETA2) * (g * g);
        self.first / ((self.second * rates.second).sqrt() + EPSILON)
    }
}

/// The tuned parameters of one linear.
pub(crate) struct Shadow {
    solved: QuantizedLinear,
    width: usize,
    /// `[N, K]` in code units, and its moments.
    shadow: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
    /// `[N, G]` relative change of each scale, and its moments.
    change: Vec<f32>,
    change_moments: Vec<Moments>,
    /// `[N, G]` scales in use, as stored.
    scales: Vec<f32>,
}

impl Shadow {
    /// Starts at a solved linear, shadows at most `reach` from their codes; `target` `[N, K]` is what it was solved
    /// for. All were checked.
    pub(crate) fn new(solved: QuantizedLinear, mut target: Vec<f32>, reach: f32) -> Self {
        let (k, groups) = (solved.in_features, solved.groups());
        let width = k / groups.max(1);
        let reach = reach.min(INSIDE);
        let groups_of_target = target.par_chunks_mut(width).zip(solved.codes.par_chunks(width)).enumerate();
        groups_of_target.for_each(|(group, (target, codes))| {
            let (scale, zero) = (solved.scales[group], f32::from(solved.zeros[group]));
            for (value, &code) in target.iter_mut().zip(codes) {
                let code = f32::from(code);
                *value = (*value / scale + zero).clamp(code - reach, code + reach);
            }
        });
        let (weights, params) = (target.len(), solved.scales.len());
        Self {
            width,
            shadow: target,
            first: vec![0.0; weights],
            second: vec![0.0; weights],
            change: vec![0.0; params],
            change_moments: vec![Moments::default(); params],
            scales: solved.scales.clone(),
            solved,
        }
    }

    /// Moves every parameter by `gradient` `[N, K]` and writes the new weight.
    pub(crate) fn step(&mut self, gradient: &[f32], weight: &mut [f32], rates: Rates) {
        let (k, width) = (self.solved.in_features, self.width);
        let groups = k / width;
        let (dtype, top) = (self.solved.scheme.scale_dtype, f32::from(self.solved.scheme.max_code()));
        let rows = gradient
            .par_chunks(k)
            .zip(weight.par_chunks_mut(k))
            .zip(self.shadow.par_chunks_mut(k).zip(self.first.par_chunks_mut(k)).zip(self.second.par_chunks_mut(k)))
            .zip(self.scales.par_chunks_mut(groups))
            .zip(self.change.par_chunks_mut(groups).zip(self.change_moments.par_chunks_mut(groups)))
            .zip(self.solved.scales.par_chunks(groups).zip(self.solved.zeros.par_chunks(groups)));
        rows.for_each(
            |(((((gradient, weight), ((shadow, first), second)), scales), (change, moments)), (base, zeros))| {
                for group in 0..groups {
                    let at = group * width..(group + 1) * width;
                    let (gradient, shadow) = (&gradient[at.clone()], &mut shadow[at.clone()]);
                    let (zero, old) = (f32::from(zeros[group]), scales[group]);
                    let mut slope = 0.0;
                    scale_slope(gradient, shadow, zero, &mut slope);
                    change[group] -= rates.scale * moments[group].advance(slope * base[group], rates);
                    let scale = base[group] * (1.0 + change[group]);
                    scales[group] = dtype.round(scale.clamp(dtype.smallest_scale(), dtype.largest()));
                    let (first, second, weight) = (&mut first[at.clone()], &mut second[at.clone()], &mut weight[at]);
                    move_group(gradient, shadow, first, second, weight, [old, scales[group], zero, top], rates);
                }
            },
        );
    }

    /// The linear as it is now.
    pub(crate) fn quantized(&self) -> QuantizedLinear {
        let codes = self.shadow.par_iter().map(|shadow| shadow.round_ties_even() as u8).collect();
        QuantizedLinear { codes, scales: self.scales.clone(), ..self.solved.clone() }
    }

    /// The linear as it was given.
    pub(crate) fn into_solved(self) -> QuantizedLinear {
        self.solved
    }
}

/// Rounds to the nearest integer, ties to even, in any instruction set; for |x| < 2²².
#[inline(always)]
fn nearest(x: f32) -> f32 {
    /// 1.5 · 2²³
    const ROUND: f32 = 12_582_912.0;
    (x + ROUND) - ROUND
}

simd_fn! {
    /// Writes `Σ gradient · (code − zero)`: the gradient towards the group's scale.
    fn scale_slope<'a>(gradient: &'a [f32], shadow: &'a [f32], zero: f32, out: &'a mut f32) {
        let shadow = &shadow[..gradient.len()];
        *out = sum_by(gradient.len(), |i| gradient[i] * (nearest(shadow[i]) - zero));
    }
}

simd_fn! {
    /// Moves the shadows of one group whose scale goes from `grid[0]` to `grid[1]`, with zero point `grid[2]` and largest
    /// code `grid[3]`, and writes its weights.
    fn move_group<'a>(
        gradient: &'a [f32],
        shadow: &'a mut [f32],
        first: &'a mut [f32],
        second: &'a mut [f32],
        weight: &'a mut [f32],
        grid: [f32; 4],
        rates: Rates,
    ) {
        let [old, new, zero, top] = grid;
        let parameters = shadow.iter_mut().zip(first).zip(second);
        for (((shadow, first), second), (gradient, weight)) in parameters.zip(gradient.iter().zip(weight)) {
            let mut moments = Moments { first: *first, second: *second };
            let step = moments.advance(gradient * old, rates);
            (*first, *second) = (moments.first, moments.second);
            *shadow = (*shadow - rates.code * step).clamp(-INSIDE, top + INSIDE);
            *weight = (nearest(*shadow) - zero) * new;
        }
    }
}
