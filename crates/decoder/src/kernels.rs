//! Elementwise and row kernels on CPU slices. Each is compiled for AVX-512, AVX2 and the baseline and picked
//! at run time; none uses fused multiply-add, so all of them give the same bits. Work is cut by shape alone.

use rayon::prelude::*;

use crate::RopePairing;

/// Values that one task handles: large enough to hide the cost of a task, small enough for the L2 cache.
pub(crate) const TASK: usize = 1 << 15;
/// Partial sums of a reduction; a multiple of every vector width.
const LANES: usize = 32;

/// Declares a function whose body is compiled once per instruction set. (A closure would do, but nothing
/// makes the compiler inline it into the functions that may use those instructions.)
macro_rules! simd_fn {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$life:lifetime>($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        $vis fn $name<$life>($($arg: $ty),*) {
            struct Kernel<$life> { $($arg: $ty),* }
            impl<$life> pulp::WithSimd for Kernel<$life> {
                type Output = ();
                #[inline(always)]
                fn with_simd<S: pulp::Simd>(self, _: S) {
                    let Self { $($arg),* } = self;
                    $body
                }
            }
            pulp::Arch::new().dispatch(Kernel { $($arg),* });
        }
    };
}
pub(crate) use simd_fn;

/// e^x within 2 units in the last place for results that are normal numbers; results below 2⁻¹²⁶ or above
/// 2.4e38 are held there. NaN stays NaN.
///
/// Cephes' reduction and polynomial: `x = n·ln 2 + r`, `e^x = 2ⁿ · p(r)`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// 1.5 · 2²³: adding it rounds to a whole number, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts, the first exact in 11 bits, so that `n · LN2_HIGH` is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.336_54, 88.376_26);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4f32;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    let power = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    p * f32::from_bits(power)
}

/// Sum of `f` over `values` in one fixed order.
#[inline(always)]
fn sum_by(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let chunks = values.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += f(chunk[i]);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(tail) {
        *lane += f(*value);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Largest of `values`, NaN ignored (`exp` brings NaN back).
#[inline(always)]
fn max_of(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = values.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    let max = |a: f32, b: f32| if b > a { b } else { a };
    let most = lanes.into_iter().fold(f32::NEG_INFINITY, max);
    tail.iter().copied().fold(most, max)
}

#[inline(always)]
fn rms_norm_row(out: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let mean = sum_by(x, |v| v * v) / x.len() as f32;
    let factor = 1.0 / (mean + eps).sqrt();
    for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
        *o = w * (v * factor);
    }
}

#[inline(always)]
fn layer_norm_row(out: &mut [f32], x: &[f32], weight: &[f32], bias: &[f32], eps: f32) {
    let mean = sum_by(x, |v| v) / x.len() as f32;
    let variance = sum_by(x, |v| (v - mean) * (v - mean)) / x.len() as f32;
    let factor = 1.0 / (variance + eps).sqrt();
    for (((o, v), w), b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
        *o = w * ((v - mean) * factor) + b;
    }
}

/// Rows of `width` values per task.
pub(crate) fn rows_per_task(width: usize) -> usize {
    (TASK / width.max(1)).max(1)
}

simd_fn! {
    fn rms_norm_rows<'a>(out: &'a mut [f32], x: &'a [f32], weight: &'a [f32], eps: f32) {
        let width = weight.len();
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            rms_norm_row(out, x, weight, eps);
        }
    }
}

/// `w · x / sqrt(mean(x²) + eps)` for each row of `x` (`(rows, weight.len())`).
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = vec![0f32; x.len()];
    let task = rows_per_task(weight.len()) * weight.len().max(1);
    out.par_chunks_mut(task).zip(x.par_chunks(task)).for_each(|(out, x)| rms_norm_rows(out, x, weight, eps));
    out
}

simd_fn! {
    fn layer_norm_rows<'a>(out: &'a mut [f32], x: &'a [f32], weight: &'a [f32], bias: &'a [f32], eps: f32) {
        let width = weight.len();
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            layer_norm_row(out, x, weight, bias, eps);
        }
    }
}

/// `w · (x − mean(x)) / sqrt(var(x) + eps) + b` for each row of `x` (`(rows, weight.len())`).
pub(crate) fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32) -> Vec<f32> {
    let mut out = vec![0f32; x.len()];
    let task = rows_per_task(weight.len()) * weight.len().max(1);
    out.par_chunks_mut(task).zip(x.par_chunks(task)).for_each(|(out, x)| layer_norm_rows(out, x, weight, bias, eps));
    out
}

simd_fn! {
    fn add_slices<'a>(out: &'a mut [f32], a: &'a [f32], b: &'a [f32]) {
        for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
            *o = a + b;
        }
    }
}

/// `a + b`, both of one length.
pub(crate) fn add(a: &[f32], b: &[f32]) -> Vec<f32> {
    let mut out = vec![0f32; a.len()];
    let tasks = out.par_chunks_mut(TASK).zip(a.par_chunks(TASK)).zip(b.par_chunks(TASK));
    tasks.for_each(|((out, a), b)| add_slices(out, a, b));
    out
}

/// `x · factor`.
pub(crate) fn scaled(x: &[f32], factor: f32) -> Vec<f32> {
    let mut out = vec![0f32; x.len()];
    let tasks = out.par_chunks_mut(TASK).zip(x.par_chunks(TASK));
    tasks.for_each(|(out, x)| out.iter_mut().zip(x).for_each(|(o, v)| *o = v * factor));
    out
}

simd_fn! {
    fn add_row_to_all<'a>(x: &'a mut [f32], row: &'a [f32]) {
        for x in x.chunks_exact_mut(row.len()) {
            for (x, r) in x.iter_mut().zip(row) {
                *x += r;
            }
        }
    }
}

/// Adds `row` to each row of `x` (`(rows, row.len())`).
pub(crate) fn add_row(x: &mut [f32], row: &[f32]) {
    let task = rows_per_task(row.len()) * row.len().max(1);
    x.par_chunks_mut(task).for_each(|x| add_row_to_all(x, row));
}

/// Heads inside the rows of a projection: head `h` of row `r` is `data[r · stride + columns[h]..][..dim]`.
#[derive(Clone, Copy)]
pub(crate) struct Heads<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) columns: &'a [usize],
    pub(crate) dim: usize,
}

/// Cosines and sines, `(tokens, half)` each, and how positions follow from rows: `row % tokens`.
#[derive(Clone, Copy)]
pub(crate) struct Rotation<'a> {
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
    pub(crate) half: usize,
    pub(crate) tokens: usize,
    pub(crate) pairing: RopePairing,
}

simd_fn! {
    fn rotate_rows<'a>(
        out: &'a mut [f32],
        first_row: usize,
        heads: Heads<'a>,
        rotation: Rotation<'a>,
        norm: Option<(&'a [f32], f32)>,
    ) {
        let (dim, half) = (heads.dim, rotation.half);
        for (index, out) in out.chunks_exact_mut(heads.columns.len() * dim).enumerate() {
            let row = first_row + index;
            let position = row % rotation.tokens * half;
            let (cos, sin) = (&rotation.cos[position..][..half], &rotation.sin[position..][..half]);
            for (out, column) in out.chunks_exact_mut(dim).zip(heads.columns) {
                let x = &heads.data[row * heads.stride + column..][..dim];
                match norm {
                    Some((weight, eps)) => rms_norm_row(out, x, weight, eps),
                    None => out.copy_from_slice(x),
                }
                match rotation.pairing {
                    RopePairing::Halves => {
                        let (low, high) = out[..2 * half].split_at_mut(half);
                        for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                            (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                        }
                    }
                    RopePairing::Neighbours => {
                        for ((pair, c), s) in out[..2 * half].chunks_exact_mut(2).zip(cos).zip(sin) {
                            (pair[0], pair[1]) = (pair[0] * c - pair[1] * s, pair[1] * c + pair[0] * s);
                        }
                    }
                }
            }
        }
    }
}

/// Normalises (if `norm` gives weight and eps) and rotates every head of `rows` rows: `(rows, heads · dim)`.
pub(crate) fn rotate(rows: usize, heads: Heads, rotation: Rotation, norm: Option<(&[f32], f32)>) -> Vec<f32> {
    let width = heads.columns.len() * heads.dim;
    let mut out = vec![0f32; rows * width];
    let task = rows_per_task(width);
    let tasks = out.par_chunks_mut(task * width).enumerate();
    tasks.for_each(|(i, out)| rotate_rows(out, i * task, heads, rotation, norm));
    out
}

simd_fn! {
    /// Turns each row of `scores` (`(rows, keys)`) into `exp(score − largest)` inside its span `[start, end)`
    /// of keys and 0 outside, and puts one over the row's sum into `scale`. A `sink` is one more score of each row.
    pub(crate) fn softmax_rows<'a>(
        scores: &'a mut [f32],
        keys: usize,
        spans: &'a [(usize, usize)],
        sink: Option<f32>,
        scale: &'a mut [f32],
    ) {
        for ((row, (start, end)), scale) in scores.chunks_exact_mut(keys).zip(spans).zip(scale) {
            row[..*start].fill(0.0);
            row[*end..].fill(0.0);
            let row = &mut row[*start..*end];
            let largest = match (max_of(row), sink) {
                (largest, Some(sink)) if sink > largest => sink,
                (largest, _) => largest,
            };
            for value in row.iter_mut() {
                *value = exp(*value - largest);
            }
            let sum = sum_by(row, |v| v);
            *scale = 1.0 / sink.map_or(sum, |sink| sum + exp(sink - largest));
        }
    }
}

simd_fn! {
    /// Turns each value inside its row's span into `cap · tanh(value / cap)`; rows of `keys` values.
    pub(crate) fn softcap_rows<'a>(scores: &'a mut [f32], keys: usize, spans: &'a [(usize, usize)], cap: f32) {
        let twice = 2.0 / cap;
        for (row, (start, end)) in scores.chunks_exact_mut(keys).zip(spans) {
            for value in &mut row[*start..*end] {
                *value = cap - 2.0 * cap / (1.0 + exp(*value * twice));
            }
        }
    }
}

simd_fn! {
    /// Multiplies columns `[column, column + width)` of each row of `x` (rows of `stride` values) by the row's scale.
    pub(crate) fn scale_rows<'a>(x: &'a mut [f32], stride: usize, column: usize, width: usize, scale: &'a [f32]) {
        for (row, scale) in x.chunks_mut(stride).zip(scale) {
            for value in &mut row[column..column + width] {
                *value *= scale;
            }
        }
    }
}

#[cfg(test)]
#[path = "kernels_tests.rs"]
mod tests;
