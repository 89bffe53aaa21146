//! The nonlinearities of feed-forwards, on CPU slices.

use rayon::prelude::*;

use crate::Activation;
use crate::kernels::{TASK, exp, rows_per_task, simd_fn};

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

simd_fn! {
    fn gated_rows<'a>(
        activation: Activation,
        out: &'a mut [f32],
        gate: &'a [f32],
        up: &'a [f32],
        width: usize,
        stride: usize,
    ) {
        let rows = gate.chunks(stride).zip(up.chunks(stride));
        for (out, (gate, up)) in out.chunks_exact_mut(width).zip(rows) {
            let values = out.iter_mut().zip(gate).zip(up);
            match activation {
                Activation::Silu => values.for_each(|((o, g), u)| *o = silu(*g) * u),
                Activation::GeluTanh => values.for_each(|((o, g), u)| *o = gelu_tanh(*g) * u),
            }
        }
    }
}

/// `activation(gate) · up` for `rows` rows of `width` values; row `r` of each starts at `r · stride` of its slice.
pub(crate) fn gated(
    activation: Activation,
    gate: &[f32],
    up: &[f32],
    rows: usize,
    width: usize,
    stride: usize,
) -> Vec<f32> {
    let mut out = vec![0f32; rows * width];
    let task = rows_per_task(width);
    let inputs = gate.par_chunks(task * stride).zip(up.par_chunks(task * stride));
    let tasks = out.par_chunks_mut(task * width).zip(inputs);
    tasks.for_each(|(out, (gate, up))| gated_rows(activation, out, gate, up, width, stride));
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
            let (one, two) = (activated(activation, &gate), gated(activation, &gate, &up, rows, width, width));
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
}
