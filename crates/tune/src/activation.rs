//! Nonlinearities of the feed-forward, and their gradients.

use lite_decoder::{Activation, exp};

use crate::TuneError;
use crate::simd::simd_fn;

/// The nonlinearity of a block, and whether it gates. `activation(gate) · up`, or `activation(up)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Nonlinearity {
    gelu: bool,
    gated: bool,
}

impl Nonlinearity {
    pub(crate) fn new(activation: Activation, gated: bool) -> Result<Self, TuneError> {
        match activation {
            Activation::Silu => Ok(Self { gelu: false, gated }),
            Activation::GeluTanh => Ok(Self { gelu: true, gated }),
            _ => Err(TuneError::Unsupported { what: "this activation".to_owned() }),
        }
    }

    /// Rows of `width` values, from rows of the projections: gate then up, or up alone.
    pub(crate) fn forward(self, out: &mut [f32], projections: &[f32], width: usize) {
        match (self.gelu, self.gated) {
            (false, true) => silu_mul(out, projections, width),
            (true, true) => gelu_mul(out, projections, width),
            (gelu, false) => alone(out, projections, gelu),
        }
    }

    /// The gradient towards the projections.
    pub(crate) fn gradient(self, out: &mut [f32], dy: &[f32], projections: &[f32], width: usize) {
        match (self.gelu, self.gated) {
            (false, true) => silu_mul_gradient(out, dy, projections, width),
            (true, true) => gelu_mul_gradient(out, dy, projections, width),
            (gelu, false) => alone_gradient(out, dy, projections, gelu),
        }
    }
}

/// `2 · √(2/π)`
const TWICE: f32 = 1.595_769_2;
const CUBIC: f32 = 0.044_715;

/// SiLU and its slope.
#[inline(always)]
fn silu(x: f32) -> (f32, f32) {
    let sigmoid = 1.0 / (1.0 + exp(-x));
    let value = x * sigmoid;
    (value, sigmoid + value * (1.0 - sigmoid))
}

/// GELU with tanh, which is `x` times a sigmoid of a cubic, and its slope.
#[inline(always)]
fn gelu(x: f32) -> (f32, f32) {
    let sigmoid = 1.0 / (1.0 + exp(-TWICE * (x + CUBIC * x * x * x)));
    let value = x * sigmoid;
    (value, sigmoid + value * (1.0 - sigmoid) * (TWICE * (1.0 + 3.0 * CUBIC * x * x)))
}

/// A pair of functions on rows that hold the gate first: `(rows, 2·width)` to `(rows, width)`, and back.
macro_rules! gated {
    ($forward:ident, $gradient:ident, $value:expr, $slope:expr) => {
        simd_fn! {
            fn $forward<'a>(out: &'a mut [f32], gate_up: &'a [f32], width: usize) {
                for (out, gate_up) in out.chunks_exact_mut(width).zip(gate_up.chunks_exact(2 * width)) {
                    let (gate, up) = gate_up.split_at(width);
                    for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
                        *o = $value(*g) * u;
                    }
                }
            }
        }

        simd_fn! {
            fn $gradient<'a>(out: &'a mut [f32], dy: &'a [f32], gate_up: &'a [f32], width: usize) {
                let rows =
                    out.chunks_exact_mut(2 * width).zip(dy.chunks_exact(width)).zip(gate_up.chunks_exact(2 * width));
                for ((out, dy), gate_up) in rows {
                    let ((gate, up), (d_gate, d_up)) = (gate_up.split_at(width), out.split_at_mut(width));
                    for ((((dg, du), dy), g), u) in d_gate.iter_mut().zip(d_up).zip(dy).zip(gate).zip(up) {
                        let (value, slope) = $slope(*g);
                        *dg = dy * u * slope;
                        *du = dy * value;
                    }
                }
            }
        }
    };
}

gated!(silu_mul, silu_mul_gradient, |g: f32| g / (1.0 + exp(-g)), silu);
gated!(gelu_mul, gelu_mul_gradient, |g: f32| gelu(g).0, gelu);

simd_fn! {
    fn alone<'a>(out: &'a mut [f32], x: &'a [f32], is_gelu: bool) {
        for (o, x) in out.iter_mut().zip(x) {
            *o = if is_gelu { gelu(*x).0 } else { silu(*x).0 };
        }
    }
}

simd_fn! {
    fn alone_gradient<'a>(out: &'a mut [f32], dy: &'a [f32], x: &'a [f32], is_gelu: bool) {
        for ((o, dy), x) in out.iter_mut().zip(dy).zip(x) {
            *o = dy * if is_gelu { gelu(*x).1 } else { silu(*x).1 };
        }
    }
}
