//! The elementwise parts of a block and their derivatives, on rows.

use lite_decoder::exp;

use crate::simd::{max_of, simd_fn, sum_by};

simd_fn! {
    /// `w · x / sqrt(mean(x²) + eps)` for each row.
    pub(crate) fn rms_norm<'a>(out: &'a mut [f32], x: &'a [f32], weight: &'a [f32], eps: f32) {
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

#[inline(always)]
fn norm_row(out: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let factor = rms_factor(x, eps);
    for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
        *o = w * (v * factor);
    }
}

/// What a row's gradient is multiplied by and what is subtracted along `x`: with `f` the norm's factor,
/// `dx = f · (w ∘ dy) − x · f³ · mean(x · (w ∘ dy))`.
#[inline(always)]
fn norm_row_slopes(dy: &[f32], x: &[f32], weight: &[f32], eps: f32) -> (f32, f32) {
    let (x, weight) = (&x[..dy.len()], &weight[..dy.len()]);
    let factor = rms_factor(x, eps);
    let along = sum_by(dy.len(), |i| x[i] * (weight[i] * dy[i])) / dy.len() as f32;
    (factor, factor * factor * factor * along)
}

simd_fn! {
    /// Adds the gradient of [`rms_norm`] towards `x` to `dx`.
    pub(crate) fn add_rms_norm_gradient<'a>(
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
    /// `silu(gate) · up` of rows that hold the gate first: `(rows, 2·width)` to `(rows, width)`.
    pub(crate) fn silu_mul<'a>(out: &'a mut [f32], gate_up: &'a [f32], width: usize) {
        for (out, gate_up) in out.chunks_exact_mut(width).zip(gate_up.chunks_exact(2 * width)) {
            let (gate, up) = gate_up.split_at(width);
            for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
                *o = g / (1.0 + exp(-g)) * u;
            }
        }
    }
}

simd_fn! {
    /// The gradient of [`silu_mul`] towards gate and up.
    pub(crate) fn silu_mul_gradient<'a>(out: &'a mut [f32], dy: &'a [f32], gate_up: &'a [f32], width: usize) {
        let rows = out.chunks_exact_mut(2 * width).zip(dy.chunks_exact(width)).zip(gate_up.chunks_exact(2 * width));
        for ((out, dy), gate_up) in rows {
            let ((gate, up), (d_gate, d_up)) = (gate_up.split_at(width), out.split_at_mut(width));
            for ((((dg, du), dy), g), u) in d_gate.iter_mut().zip(d_up).zip(dy).zip(gate).zip(up) {
                let sigmoid = 1.0 / (1.0 + exp(-g));
                let silu = g * sigmoid;
                *dg = dy * u * (sigmoid + silu * (1.0 - sigmoid));
                *du = dy * silu;
            }
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

/// Rotary tables `(tokens, half)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rotation<'a> {
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
    pub(crate) half: usize,
    pub(crate) tokens: usize,
}

impl Rotation<'_> {
    #[inline(always)]
    fn of_row(&self, row: usize) -> (&[f32], &[f32]) {
        let at = row % self.tokens * self.half;
        (&self.cos[at..at + self.half], &self.sin[at..at + self.half])
    }
}

simd_fn! {
    /// Normalises (if `norm` gives weight and eps) and rotates every head of the rows of `x`, the first of which is
    /// row `first` of its windows: head `h` is `x[row · stride + columns[h]..][..dim]`, the result `(rows, heads · dim)`.
    pub(crate) fn rotate<'a>(
        out: &'a mut [f32],
        x: &'a [f32],
        stride: usize,
        first: usize,
        columns: &'a [usize],
        dim: usize,
        rotation: Rotation<'a>,
        norm: Option<(&'a [f32], f32)>,
    ) {
        let half = rotation.half;
        for (index, (out, x)) in out.chunks_exact_mut(columns.len() * dim).zip(x.chunks_exact(stride)).enumerate() {
            let (cos, sin) = rotation.of_row(first + index);
            for (out, &column) in out.chunks_exact_mut(dim).zip(columns) {
                let x = &x[column..column + dim];
                match norm {
                    Some((weight, eps)) => norm_row(out, x, weight, eps),
                    None => out.copy_from_slice(x),
                }
                let (low, high) = out[..2 * half].split_at_mut(half);
                for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                    (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                }
            }
        }
    }
}

simd_fn! {
    /// The gradient of [`rotate`]: `dy` `(windows, heads, tokens, dim)` into the heads' columns of `dx`, which is laid
    /// out like `x`.
    pub(crate) fn rotate_gradient<'a>(
        dx: &'a mut [f32],
        dy: &'a [f32],
        x: &'a [f32],
        stride: usize,
        first: usize,
        columns: &'a [usize],
        dim: usize,
        rotation: Rotation<'a>,
        norm: Option<(&'a [f32], f32)>,
    ) {
        let (half, tokens) = (rotation.half, rotation.tokens);
        for (index, (dx, x)) in dx.chunks_exact_mut(stride).zip(x.chunks_exact(stride)).enumerate() {
            let row = first + index;
            let (cos, sin) = rotation.of_row(row);
            for (head, &column) in columns.iter().enumerate() {
                let dx = &mut dx[column..column + dim];
                let from = ((row / tokens * columns.len() + head) * tokens + row % tokens) * dim;
                dx.copy_from_slice(&dy[from..from + dim]);
                let (low, high) = dx[..2 * half].split_at_mut(half);
                for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                    (*a, *b) = (*a * c + *b * s, *b * c - *a * s);
                }
                if let Some((weight, eps)) = norm {
                    let x = &x[column..column + dim];
                    let (factor, along) = norm_row_slopes(dx, x, weight, eps);
                    for ((dx, x), w) in dx.iter_mut().zip(x).zip(weight) {
                        *dx = factor * (w * *dx) - x * along;
                    }
                }
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
