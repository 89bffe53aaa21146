//! Norms on rows, and their gradients.

use lite_decoder::{Block, NormKind, NormSpec, with_cpu_slice};

use crate::TuneError;
use crate::simd::{simd_fn, sum_by};

/// A norm with its weights on the CPU.
pub(crate) struct Norm {
    /// Whether the mean is taken out first.
    centred: bool,
    eps: f32,
    /// What each channel is multiplied by.
    factors: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl Norm {
    /// The norm `spec` of `block`.
    pub(crate) fn new(block: &Block, spec: &NormSpec) -> Result<Self, TuneError> {
        let unsupported = |what: &str| TuneError::Unsupported { what: what.to_owned() };
        let vector = |name: &String| -> Result<Vec<f32>, TuneError> {
            let tensor = block.vector(name).ok_or_else(|| unsupported("a block without its norms"))?;
            Ok(with_cpu_slice(tensor, <[f32]>::to_vec)?)
        };
        let centred = match spec.kind {
            NormKind::Rms | NormKind::RmsPlusOne => false,
            NormKind::Layer => true,
            _ => return Err(unsupported("this kind of norm")),
        };
        let factors = vector(&spec.weight)?.into_iter().map(|w| spec.kind.factor(w)).collect();
        Ok(Self { centred, eps: spec.eps, factors, bias: spec.bias.as_ref().map(vector).transpose()? })
    }

    /// Factors and eps of a norm without a mean, as those of heads are.
    pub(crate) fn rms(&self) -> Option<(&[f32], f32)> {
        (!self.centred && self.bias.is_none()).then_some((&self.factors, self.eps))
    }

    /// Normalises each row of `x` into `out`.
    pub(crate) fn forward(&self, out: &mut [f32], x: &[f32]) {
        if self.centred {
            layer_norm(out, x, &self.factors, self.eps);
        } else {
            rms_norm(out, x, &self.factors, self.eps);
        }
        if let Some(bias) = &self.bias {
            crate::kernels::add_row(out, bias);
        }
    }

    /// Adds the gradient towards `x` to `dx`.
    pub(crate) fn add_gradient(&self, dx: &mut [f32], dy: &[f32], x: &[f32]) {
        if self.centred {
            add_layer_norm_gradient(dx, dy, x, &self.factors, self.eps);
        } else {
            add_rms_norm_gradient(dx, dy, x, &self.factors, self.eps);
        }
    }
}

simd_fn! {
    /// `w · x / sqrt(mean(x²) + eps)` for each row.
    fn rms_norm<'a>(out: &'a mut [f32], x: &'a [f32], weight: &'a [f32], eps: f32) {
        let width = weight.len();
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            norm_row(out, x, weight, eps);
        }
    }
}

#[inline(always)]
fn rms_factor(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum_by(x.len(), |i| x[i] * x[i]) / x.len() as f32 + eps).sqrt()
}

/// One row of [`rms_norm`].
#[inline(always)]
pub(crate) fn norm_row(out: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let factor = rms_factor(x, eps);
    for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
        *o = w * (v * factor);
    }
}

/// What a row's gradient is multiplied by and what is subtracted along `x`: with `f` the norm's factor,
/// `dx = f · (w ∘ dy) − x · f³ · mean(x · (w ∘ dy))`.
#[inline(always)]
pub(crate) fn norm_row_slopes(dy: &[f32], x: &[f32], weight: &[f32], eps: f32) -> (f32, f32) {
    let (x, weight) = (&x[..dy.len()], &weight[..dy.len()]);
    let factor = rms_factor(x, eps);
    let along = sum_by(dy.len(), |i| x[i] * (weight[i] * dy[i])) / dy.len() as f32;
    (factor, factor * factor * factor * along)
}

simd_fn! {
    /// Adds the gradient of [`rms_norm`] towards `x` to `dx`.
    fn add_rms_norm_gradient<'a>(
        dx: &'a mut [f32],
        dy: &'a [f32],
        x: &'a [f32],
        weight: &'a [f32],
        eps: f32,
    ) {
        let width = weight.len();
        let rows = dx.chunks_exact_mut(width).zip(dy.chunks_exact(width)).zip(x.chunks_exact(width));
        for ((dx, dy), x) in rows {
            let (factor, along) = norm_row_slopes(dy, x, weight, eps);
            for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(weight) {
                *dx += factor * (w * dy) - x * along;
            }
        }
    }
}

/// Mean of a row, and one over its standard deviation.
#[inline(always)]
fn layer_factors(x: &[f32], eps: f32) -> (f32, f32) {
    let count = x.len() as f32;
    let mean = sum_by(x.len(), |i| x[i]) / count;
    (mean, 1.0 / (sum_by(x.len(), |i| (x[i] - mean) * (x[i] - mean)) / count + eps).sqrt())
}

simd_fn! {
    /// `w · (x − mean(x)) / sqrt(var(x) + eps)` for each row.
    fn layer_norm<'a>(out: &'a mut [f32], x: &'a [f32], weight: &'a [f32], eps: f32) {
        let width = weight.len();
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            let (mean, factor) = layer_factors(x, eps);
            for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
                *o = w * ((v - mean) * factor);
            }
        }
    }
}

simd_fn! {
    /// Adds the gradient of [`layer_norm`] towards `x` to `dx`: with `g = w ∘ dy` and `n` the normalised row,
    /// `f · (g − mean(g) − n · mean(g · n))`.
    fn add_layer_norm_gradient<'a>(
        dx: &'a mut [f32],
        dy: &'a [f32],
        x: &'a [f32],
        weight: &'a [f32],
        eps: f32,
    ) {
        let width = weight.len();
        let rows = dx.chunks_exact_mut(width).zip(dy.chunks_exact(width)).zip(x.chunks_exact(width));
        for ((dx, dy), x) in rows {
            let (mean, factor) = layer_factors(x, eps);
            let even = sum_by(width, |i| weight[i] * dy[i]) / width as f32;
            let along = sum_by(width, |i| weight[i] * dy[i] * ((x[i] - mean) * factor)) / width as f32;
            for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(weight) {
                *dx += factor * (w * dy - even - (x - mean) * factor * along);
            }
        }
    }
}
