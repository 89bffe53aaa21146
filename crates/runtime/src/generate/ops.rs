//! The elementwise parts of a block, on rows.

use lite_decoder::exp;
use rayon::prelude::*;

/// Rows of one task, about this many values.
const TASK: usize = 1 << 15;

/// Partial sums of a reduction.
const LANES: usize = 16;

fn sum_of_squares(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0f32; LANES];
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += chunk[i] * chunk[i];
        }
    }
    let tail: f32 = rest.iter().map(|v| v * v).sum();
    lanes.iter().sum::<f32>() + tail
}

/// `w · x / sqrt(mean(x²) + eps)` of one row, in place.
pub(super) fn rms_norm_row(x: &mut [f32], weight: &[f32], eps: f32) {
    let factor = 1.0 / (sum_of_squares(x) / x.len() as f32 + eps).sqrt();
    for (v, w) in x.iter_mut().zip(weight) {
        *v = w * (*v * factor);
    }
}

/// [`rms_norm_row`] of each row of `x`, as a new matrix.
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = x.to_vec();
    let width = weight.len().max(1);
    out.par_chunks_mut(width).with_min_len(TASK / width + 1).for_each(|row| rms_norm_row(row, weight, eps));
    out
}

/// `x += y`.
pub(super) fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// `silu(gate) · up` into `gate`, which are rows of `width` values: of two matrices.
pub(super) fn silu_mul(gate: &mut [f32], up: &[f32]) {
    gate.par_chunks_mut(TASK).zip(up.par_chunks(TASK)).for_each(|(gate, up)| {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = *g / (1.0 + exp(-*g)) * u;
        }
    });
}

/// The same of one matrix whose rows hold the gate first: `(rows, 2·width)` to `(rows, width)`.
pub(super) fn silu_mul_stacked(both: &[f32], width: usize) -> Vec<f32> {
    let mut out = vec![0f32; both.len() / 2];
    let width = width.max(1);
    let rows = out.par_chunks_mut(width).zip(both.par_chunks(2 * width)).with_min_len(TASK / width + 1);
    rows.for_each(|(out, both)| {
        let (gate, up) = both.split_at(width);
        for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
            *o = g / (1.0 + exp(-g)) * u;
        }
    });
    out
}

/// Softmax of one row, in place.
pub(super) fn softmax(row: &mut [f32]) {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
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
    let inverse = 1.0 / total;
    for v in row.iter_mut() {
        *v *= inverse;
    }
}

/// Cosines and sines of the new positions: value `i` of a head turns with value `i + half`.
pub(super) struct Rotation {
    half: usize,
    /// `(tokens, half)`, times the attention factor.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotation {
    /// Tables for `tokens` positions from `first` on, from frequencies and the factor on both tables.
    pub(super) fn new(frequencies: &[f32], factor: f32, first: usize, tokens: usize) -> Self {
        let half = frequencies.len();
        let (mut cos, mut sin) = (Vec::with_capacity(tokens * half), Vec::with_capacity(tokens * half));
        for position in first..first + tokens {
            for frequency in frequencies {
                // Rounded to f32 because the reference does so, and as the block's own tables are.
                let angle = f64::from(frequency * position as f32);
                cos.push(angle.cos() as f32 * factor);
                sin.push(angle.sin() as f32 * factor);
            }
        }
        Self { half, cos, sin }
    }

    /// Turns one head of the token at `row`.
    pub(super) fn turn(&self, row: usize, head: &mut [f32]) {
        let (cos, sin) = (&self.cos[row * self.half..][..self.half], &self.sin[row * self.half..][..self.half]);
        let (low, high) = head[..2 * self.half].split_at_mut(self.half);
        for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
        }
    }
}
