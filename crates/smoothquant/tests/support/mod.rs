//! Layers with the outlier channels that real ones have.

use lite_quant::floats::FloatFormat;
use lite_quant::{ActivationFormat, ActivationScale, ActivationScheme, GroupSize, LinearScheme, ScaleDtype, Scheme};
use lite_smoothquant::Sample;

/// Uniform in `[−1, 1)`, the same for the same seed.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u32 << 23) as f32) - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Two weights `[40, K]` and `[24, K]`, and tokens whose channels 5, 36, 67, … are `loud` times the others.
pub(crate) struct Layer {
    pub(crate) k: usize,
    pub(crate) tokens: Vec<f32>,
    pub(crate) abs_max: Vec<f32>,
    pub(crate) abs_mean: Vec<f32>,
    pub(crate) first: Vec<f32>,
    pub(crate) second: Vec<f32>,
}

impl Layer {
    pub(crate) fn new(k: usize, loud: f32, seed: u64) -> Self {
        let count = 64;
        let mut tokens = noise(count * k, seed);
        for token in tokens.chunks_exact_mut(k) {
            token.iter_mut().skip(5).step_by(31).for_each(|x| *x *= loud);
        }
        let (mut abs_max, mut abs_mean) = (vec![0f32; k], vec![0f32; k]);
        for token in tokens.chunks_exact(k) {
            abs_max.iter_mut().zip(token).for_each(|(m, x)| *m = m.max(x.abs()));
            abs_mean.iter_mut().zip(token).for_each(|(m, x)| *m += x.abs() / count as f32);
        }
        Self { k, tokens, abs_max, abs_mean, first: noise(40 * k, seed + 1), second: noise(24 * k, seed + 2) }
    }

    pub(crate) fn sample(&self) -> Sample<'_> {
        Sample { tokens: &self.tokens, abs_max: &self.abs_max }
    }

    pub(crate) fn weights(&self) -> [(&[f32], usize); 2] {
        [(&self.first, 40), (&self.second, 24)]
    }
}

/// Eight-bit integers both ways, one scale per output channel.
pub(crate) fn w8a8(symmetric: bool, scale: ActivationScale) -> LinearScheme {
    let weights = Scheme { bits: 8, group_size: GroupSize::Channel, symmetric: true, scale_dtype: ScaleDtype::F32 };
    let format = ActivationFormat::Int { bits: 8, symmetric };
    LinearScheme { weights: weights.into(), activations: Some(ActivationScheme { format, scale }) }
}

pub(crate) const E4M3: ActivationFormat = ActivationFormat::Float(FloatFormat::E4M3);
