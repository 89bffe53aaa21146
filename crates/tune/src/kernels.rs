//! Rows of residuals and scores: sums, softmax, caps, and their derivatives.

use lite_decoder::exp;

use crate::simd::{max_of, simd_fn, sum_by};

simd_fn! {
    /// Adds `row` to each row of `x`.
    pub(crate) fn add_row<'a>(x: &'a mut [f32], row: &'a [f32]) {
        for x in x.chunks_exact_mut(row.len()) {
            for (x, r) in x.iter_mut().zip(row) {
                *x += r;
            }
        }
    }
}

simd_fn! {
    /// `x += factor · y`.
    pub(crate) fn add_scaled<'a>(x: &'a mut [f32], y: &'a [f32], factor: f32) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += factor * y;
        }
    }
}

simd_fn! {
    /// Turns `out` into `(out − target) · seed` and adds the sum of the squared differences to `loss`.
    pub(crate) fn squared_error<'a>(
        out: &'a mut [f32],
        target: &'a [f32],
        width: usize,
        seed: f32,
        loss: &'a mut f64,
    ) {
        for (out, target) in out.chunks_exact_mut(width).zip(target.chunks_exact(width)) {
            for (o, t) in out.iter_mut().zip(target) {
                *o -= t;
            }
            *loss += f64::from(sum_by(width, |i| out[i] * out[i]));
            for o in out.iter_mut() {
                *o *= seed;
            }
        }
    }
}

/// Largest score of a row and one over its sum of exponentials.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Softmax {
    pub(crate) largest: f32,
    pub(crate) inverse: f32,
}

simd_fn! {
    /// Turns each row of `scores` (`(rows, keys)`) into its softmax inside its span `[start, end)` of keys and 0
    /// outside, and notes what [`attention_gradient`] needs to do it again.
    pub(crate) fn softmax<'a>(
        scores: &'a mut [f32],
        keys: usize,
        spans: &'a [(usize, usize)],
        notes: &'a mut [Softmax],
    ) {
        for ((row, &(start, end)), note) in scores.chunks_exact_mut(keys).zip(spans).zip(notes) {
            row[..start].fill(0.0);
            row[end..].fill(0.0);
            let row = &mut row[start..end];
            let largest = max_of(row);
            for value in row.iter_mut() {
                *value = exp(*value - largest);
            }
            let inverse = 1.0 / sum_by(row.len(), |i| row[i]);
            for value in row.iter_mut() {
                *value *= inverse;
            }
            *note = Softmax { largest, inverse };
        }
    }
}

simd_fn! {
    /// Turns each value inside its row's span into `cap · tanh(value / cap)`.
    pub(crate) fn softcap<'a>(scores: &'a mut [f32], keys: usize, spans: &'a [(usize, usize)], cap: f32) {
        let twice = 2.0 / cap;
        for (row, &(start, end)) in scores.chunks_exact_mut(keys).zip(spans) {
            for value in &mut row[start..end] {
                *value = cap - 2.0 * cap / (1.0 + exp(*value * twice));
            }
        }
    }
}

simd_fn! {
    /// The gradient of [`softcap`] from its outputs: `slopes · (1 − (capped / cap)²)`.
    pub(crate) fn softcap_gradient<'a>(slopes: &'a mut [f32], capped: &'a [f32], cap: f32) {
        let inverse = 1.0 / cap;
        for (slope, value) in slopes.iter_mut().zip(capped) {
            let tanh = value * inverse;
            *slope *= 1.0 - tanh * tanh;
        }
    }
}

simd_fn! {
    /// Turns rows of `scores` into their softmax `p`, and rows of `dp` (gradient towards `p`) into the gradient
    /// towards the scores, `p · (dp − Σ p·dp)`.
    pub(crate) fn attention_gradient<'a>(
        scores: &'a mut [f32],
        dp: &'a mut [f32],
        keys: usize,
        spans: &'a [(usize, usize)],
        notes: &'a [Softmax],
    ) {
        let rows = scores.chunks_exact_mut(keys).zip(dp.chunks_exact_mut(keys));
        for (((p, dp), &(start, end)), note) in rows.zip(spans).zip(notes) {
            for row in [&mut *p, &mut *dp] {
                row[..start].fill(0.0);
                row[end..].fill(0.0);
            }
            let (p, dp) = (&mut p[start..end], &mut dp[start..end]);
            for value in p.iter_mut() {
                *value = exp(*value - note.largest) * note.inverse;
            }
            let sum = sum_by(p.len(), |i| p[i] * dp[i]);
            for (p, dp) in p.iter().zip(dp) {
                *dp = p * (*dp - sum);
            }
        }
    }
}
