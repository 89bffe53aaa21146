//! The elementwise parts of a block, on rows.

use lite_decoder::{Activation, Glu, RopePairing, RopeSpec, exp};
use rayon::prelude::*;

/// Rows of one task, about this many values.
pub(super) const TASK: usize = 1 << 15;

/// Partial sums of a reduction.
const LANES: usize = 16;

/// Sum of `f` over a row.
pub(super) fn sum_by(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0f32; LANES];
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += f(chunk[i]);
        }
    }
    let tail: f32 = rest.iter().map(|v| f(*v)).sum();
    lanes.iter().sum::<f32>() + tail
}

/// `x += y`.
pub(super) fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// `x · factor`, in place.
pub(super) fn scale(x: &mut [f32], factor: f32) {
    if factor != 1.0 {
        x.iter_mut().for_each(|v| *v *= factor);
    }
}

/// Gate and up, of two matrices, to one, which is put into `gate`.
pub(super) fn gated(glu: impl Into<Glu>, gate: &mut [f32], up: &[f32]) {
    let glu = glu.into();
    gate.par_chunks_mut(TASK).zip(up.par_chunks(TASK)).for_each(|(gate, up)| {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = glu.apply(*g, *u);
        }
    });
}

/// `activation(gate) · up` of one matrix whose rows hold the gate first: `(rows, 2·width)` to `(rows, width)`.
pub(super) fn gated_stacked(activation: Activation, both: &[f32], width: usize) -> Vec<f32> {
    let mut out = vec![0f32; both.len() / 2];
    let width = width.max(1);
    let rows = out.par_chunks_mut(width).zip(both.par_chunks(2 * width)).with_min_len(TASK / width + 1);
    rows.for_each(|(out, both)| {
        let (gate, up) = both.split_at(width);
        for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
            *o = activation.apply(*g) * u;
        }
    });
    out
}

/// `activation(x)`, in place.
pub(super) fn activate(activation: Activation, x: &mut [f32]) {
    x.par_chunks_mut(TASK).for_each(|x| x.iter_mut().for_each(|v| *v = activation.apply(*v)));
}

/// `cap · tanh(x / cap)`, in place.
pub(super) fn softcap(x: &mut [f32], cap: f32) {
    for v in x {
        *v = cap - 2.0 * cap / (1.0 + exp(*v * (2.0 / cap)));
    }
}

/// Softmax of one row, in place; a `sink` is one more score that takes its share.
pub(super) fn softmax(row: &mut [f32], sink: Option<f32>) {
    let largest = row.iter().chain(&sink).copied().fold(f32::NEG_INFINITY, f32::max);
    let mut lanes = [0f32; LANES];
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            chunk[i] = exp(chunk[i] - largest);
            lanes[i] += chunk[i];
        }
    }
    let mut total: f32 = lanes.iter().sum();
    for v in rest {
        *v = exp(*v - largest);
        total += *v;
    }
    total += sink.map_or(0.0, |sink| exp(sink - largest));
    let inverse = 1.0 / total;
    for v in row.iter_mut() {
        *v *= inverse;
    }
}

/// Cosines and sines of the new positions.
pub(super) struct Rotation {
    half: usize,
    pairing: RopePairing,
    /// `(tokens, half)`, times the attention factor.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotation {
    /// Tables for `tokens` positions from `first` on, with the frequencies for a text of `total` tokens.
    pub(super) fn new(spec: &RopeSpec, total: usize, first: usize, tokens: usize) -> Self {
        let (frequencies, factor) = spec.frequencies(total);
        let half = frequencies.len();
        let (mut cos, mut sin) = (Vec::with_capacity(tokens * half), Vec::with_capacity(tokens * half));
        for position in first..first + tokens {
            for frequency in &frequencies {
                // Rounded to f32 because the reference does so, and as the block's own tables are.
                let angle = f64::from(frequency * position as f32);
                cos.push(angle.cos() as f32 * factor);
                sin.push(angle.sin() as f32 * factor);
            }
        }
        Self { half, pairing: spec.pairing, cos, sin }
    }

    /// Turns one head of the token at `row`.
    pub(super) fn turn(&self, row: usize, head: &mut [f32]) {
        let (cos, sin) = (&self.cos[row * self.half..][..self.half], &self.sin[row * self.half..][..self.half]);
        let head = &mut head[..2 * self.half];
        match self.pairing {
            RopePairing::Halves => {
                let (low, high) = head.split_at_mut(self.half);
                for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                    (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                }
            }
            RopePairing::Neighbours => {
                for ((pair, c), s) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
                    *pair = [pair[0] * c - pair[1] * s, pair[1] * c + pair[0] * s];
                }
            }
        }
    }
}
