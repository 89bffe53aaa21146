//! The nonlinearities of feed-forwards, on CPU slices.

use rayon::prelude::*;

use crate::kernels::{TASK, exp, rows_per_task, simd_fn};
use crate::{Activation, Glu};

/// `x / (1 + exp(−x))`.
#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// GELU with tanh, as `x / (1 + exp(−2u))`: `(1 + tanh u) / 2` is a sigmoid of `2u`.
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    /// `2 · √(2/π)`
    const TWICE: f32 = 1.595_769_2;
    x / (1.0 + exp(-TWICE * (x + 0.044_715 * x * x * x)))
}

impl Activation {
    /// The nonlinearity at `x`; the relative error is below 1e-6 for values that matter (`x > −3`).
    #[inline(always)]
    pub fn apply(self, x: f32) -> f32 {
        match self {
            Self::Silu => silu(x),
            Self::GeluTanh => gelu_tanh(x),
        }
    }
}

/// gpt-oss's gated unit. Comparisons, not `min` and `max`: those would hide NaN.
#[inline(always)]
fn clamped(gate: f32, up: f32, slope: f32, limit: f32) -> f32 {
    let gate = if gate > limit { limit } else { gate };
    let up = if up > limit { limit } else { up };
    let up = if up < -limit { -limit } else { up };
    (up + 1.0) * (gate / (1.0 + exp(-slope * gate)))
}

impl Glu {
    /// The unit at one gate and up.
    #[inline(always)]
    pub fn apply(self, gate: f32, up: f32) -> f32 {
        match self {
            Self::Product(activation) => activation.apply(gate) * up,
            Self::Clamped { slope, limit } => clamped(gate, up, slope, limit),
        }
    }
}

simd_fn! {
    fn gated_rows<'a>(
        glu: Glu,
        out: &'a mut [f32],
        gate: &'a [f32],
        up: &'a [f32],
        width: usize,
        stride: usize,
    ) {
        let rows = gate.chunks(stride).zip(up.chunks(stride));
        for (out, (gate, up)) in out.chunks_exact_mut(width).zip(rows) {
            let values = out.iter_mut().zip(gate).zip(up);
            match glu {
                Glu::Product(Activation::Silu) => values.for_each(|((o, g), u)| *o = silu(*g) * u),
                Glu::Product(Activation::GeluTanh) => values.for_each(|((o, g), u)| *o = gelu_tanh(*g) * u),
                Glu::Clamped { slope, limit } => {
                    values.for_each(|((o, g), u)| *o = clamped(*g, *u, slope, limit));
                }
            }
        }
    }
}

/// The gated unit for `rows` rows of `width` values; row `r` of each starts at `r · stride` of its slice.
pub(crate) fn gated(glu: Glu, gate: &[f32], up: &[f32], rows: usize, width: usize, stride: usize) -> Vec<f32> {
    let mut out = vec![0f32; rows * width];
    let task = rows_per_task(width);
    let inputs = gate.par_chunks(task * stride).zip(up.par_chunks(task * stride));
    let tasks = out.par_chunks_mut(task * width).zip(inputs);
    tasks.for_each(|(out, (gate, up))| gated_rows(glu, out, gate, up, width, stride));
    out
}

simd_fn! {
    fn activate<'a>(activation: Activation, out: &'a mut [f32], x: &'a [f32]) {
        let values = out.iter_mut().zip(x);
        match activation {
            Activation::Silu => values.for_each(|(o, v)| *o = silu(*v)),
            Activation::GeluTanh => values.for_each(|(o, v)| *o = gelu_tanh(*v)),
        }
    }
}

/// `activation(x)`.
pub(crate) fn activated(activation: Activation, x: &[f32]) -> Vec<f32> {
    let mut out = vec![0f32; x.len()];
    let tasks = out.par_chunks_mut(TASK).zip(x.par_chunks(TASK));
    tasks.for_each(|(out, x)| activate(activation, out, x));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(activation: Activation, x: f64) -> f64 {
        match activation {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
            }
        }
    }

    #[test]
    fn values_agree_with_the_definitions() {
        let (rows, width) = (5, 333);
        let gate: Vec<f32> = (0..rows * width).map(|i| i as f32 * 0.012 - 10.0).collect();
        let up: Vec<f32> = (0..rows * width).map(|i| (i % 13) as f32 * 0.3 - 1.7).collect();
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let (one, two) = (activated(activation, &gate), gated(activation.into(), &gate, &up, rows, width, width));
            for i in 0..gate.len() {
                let wanted = definition(activation, f64::from(gate[i]));
                let off = (f64::from(one[i]) - wanted).abs();
                assert!(off <= 1e-6 * wanted.abs().max(5e-3), "{activation:?} at {}: {off}", gate[i]);
                assert_eq!((activation.apply(gate[i]), one[i] * up[i]), (one[i], two[i]));
            }
            for (x, wanted) in [(1e4, 1e4), (-1e4, 0.0), (0.0, 0.0)] {
                assert!((activation.apply(x) - wanted).abs() < 1e-20, "{activation:?} {x}");
            }
            assert!(activated(activation, &[f32::NAN])[0].is_nan());
        }
    }

    #[test]
    fn clamped_units_agree_with_the_definition() {
        let (rows, width) = (7, 301);
        let gate: Vec<f32> = (0..rows * width).map(|i| i as f32 * 0.013 - 14.0).collect();
        let up: Vec<f32> = (0..rows * width).map(|i| (i % 41) as f32 * 0.5 - 10.0).collect();
        let glu = Glu::Clamped { slope: 1.702, limit: 7.0 };
        let found = gated(glu, &gate, &up, rows, width, width);
        for i in 0..gate.len() {
            let (g, u) = (f64::from(gate[i]).min(7.0), f64::from(up[i]).clamp(-7.0, 7.0));
            let wanted = (u + 1.0) * g / (1.0 + (-f64::from(1.702f32) * g).exp());
            assert!((f64::from(found[i]) - wanted).abs() <= 2e-6 * wanted.abs().max(5e-3), "{} {}", gate[i], up[i]);
            assert_eq!(glu.apply(gate[i], up[i]), found[i]);
        }
        // Up alone changes the output by an offset too: no factor on it can be undone.
        assert!(glu.apply(1.0, 0.0) != 0.0 && !glu.is_proportional_to_up());
        let broken = gated(glu, &[f32::NAN, 1.0], &[1.0, f32::NAN], 1, 2, 2);
        assert!(broken.iter().all(|v| v.is_nan()), "undefined values are not hidden");
    }
}
