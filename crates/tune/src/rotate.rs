//! The rotation of heads, with the norm before it, and their gradient.

use lite_decoder::RopePairing;

use crate::norm::{norm_row, norm_row_slopes};
use crate::simd::{simd_fn, sum_by};

/// Rotary tables `(tokens, half)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rotation<'a> {
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
    pub(crate) half: usize,
    pub(crate) tokens: usize,
    pub(crate) pairing: RopePairing,
}

impl Rotation<'_> {
    #[inline(always)]
    fn of_row(&self, row: usize) -> (&[f32], &[f32]) {
        let at = row % self.tokens * self.half;
        (&self.cos[at..at + self.half], &self.sin[at..at + self.half])
    }

    /// Turns one head; back if `sign` is −1.
    #[inline(always)]
    fn turn(&self, head: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
        let head = &mut head[..2 * self.half];
        match self.pairing {
            RopePairing::Halves => {
                let (low, high) = head.split_at_mut(self.half);
                for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                    let s = sign * s;
                    (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                }
            }
            RopePairing::Neighbours => {
                for ((pair, c), s) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
                    let s = sign * s;
                    *pair = [pair[0] * c - pair[1] * s, pair[1] * c + pair[0] * s];
                }
            }
        }
    }
}

/// The norm before the rotation.
#[derive(Debug, Clone, Copy)]
pub(crate) enum HeadNorm<'a> {
    None,
    /// Over each head: factors `[dim]` and eps.
    Each(&'a [f32], f32),
    /// Over all heads of a token: factors `[heads · dim]` and eps.
    All(&'a [f32], f32),
}

simd_fn! {
    /// Normalises and rotates every head of the rows of `x`, the first of which is row `first` of its windows: head `h`
    /// is `x[row · stride + columns[h]..][..dim]`, the result `(rows, heads · dim)`.
    pub(crate) fn rotate<'a>(
        out: &'a mut [f32],
        x: &'a [f32],
        stride: usize,
        first: usize,
        columns: &'a [usize],
        dim: usize,
        rotation: Rotation<'a>,
        norm: HeadNorm<'a>,
    ) {
        for (index, (out, x)) in out.chunks_exact_mut(columns.len() * dim).zip(x.chunks_exact(stride)).enumerate() {
            let (cos, sin) = rotation.of_row(first + index);
            let all = match norm {
                HeadNorm::All(_, eps) => all_factor(x, columns, dim, eps),
                _ => 0.0,
            };
            for (head, (out, &column)) in out.chunks_exact_mut(dim).zip(columns).enumerate() {
                let x = &x[column..column + dim];
                match norm {
                    HeadNorm::Each(weight, eps) => norm_row(out, x, weight, eps),
                    HeadNorm::None => out.copy_from_slice(x),
                    HeadNorm::All(weight, _) => {
                        for ((o, v), w) in out.iter_mut().zip(x).zip(&weight[head * dim..]) {
                            *o = w * (v * all);
                        }
                    }
                }
                rotation.turn(out, cos, sin, 1.0);
            }
        }
    }
}

/// The factor of a norm over all heads of a row.
#[inline(always)]
fn all_factor(x: &[f32], columns: &[usize], dim: usize, eps: f32) -> f32 {
    let mut sum = 0.0;
    for &column in columns {
        let x = &x[column..column + dim];
        sum += sum_by(dim, |i| x[i] * x[i]);
    }
    1.0 / (sum / (columns.len() * dim) as f32 + eps).sqrt()
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
        norm: HeadNorm<'a>,
    ) {
        let tokens = rotation.tokens;
        for (index, (dx, x)) in dx.chunks_exact_mut(stride).zip(x.chunks_exact(stride)).enumerate() {
            let row = first + index;
            let (cos, sin) = rotation.of_row(row);
            for (head, &column) in columns.iter().enumerate() {
                let dx = &mut dx[column..column + dim];
                let from = ((row / tokens * columns.len() + head) * tokens + row % tokens) * dim;
                dx.copy_from_slice(&dy[from..from + dim]);
                rotation.turn(dx, cos, sin, -1.0);
                if let HeadNorm::Each(weight, eps) = norm {
                    let x = &x[column..column + dim];
                    let (factor, along) = norm_row_slopes(dx, x, weight, eps);
                    for ((dx, x), w) in dx.iter_mut().zip(x).zip(weight) {
                        *dx = factor * (w * *dx) - x * along;
                    }
                }
            }
            if let HeadNorm::All(weight, eps) = norm {
                all_gradient(dx, x, columns, dim, weight, eps);
            }
        }
    }
}

/// The gradient of a norm over all heads of a row, in place; see [`norm_row_slopes`].
#[inline(always)]
fn all_gradient(dx: &mut [f32], x: &[f32], columns: &[usize], dim: usize, weight: &[f32], eps: f32) {
    let factor = all_factor(x, columns, dim, eps);
    let mut along = 0.0;
    for (&column, weight) in columns.iter().zip(weight.chunks_exact(dim)) {
        let (x, dx) = (&x[column..column + dim], &dx[column..column + dim]);
        along += sum_by(dim, |i| x[i] * (weight[i] * dx[i]));
    }
    let along = factor * factor * factor * along / (columns.len() * dim) as f32;
    for (&column, weight) in columns.iter().zip(weight.chunks_exact(dim)) {
        let (x, dx) = (&x[column..column + dim], &mut dx[column..column + dim]);
        for ((dx, x), w) in dx.iter_mut().zip(x).zip(weight) {
            *dx = factor * (w * *dx) - x * along;
        }
    }
}
