//! Nearest rounding of a whole weight matrix to small floats.

use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;

use super::kernel::{encode, largest_bits, squared_error};
use super::{FloatFormat, FloatLinear, FloatScheme, Grain, ScaleKind, e8m0};
use crate::{QuantError, ScaleDtype, shrink_factor};

/// How the scale of each group is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatRange {
    /// The largest weight becomes the largest code.
    MinMax,
    /// The least squared error of the weights among the scale of [`MinMax`](Self::MinMax) and 0.975, … 0.5 times it;
    /// with E8M0 among that power of two and its neighbours.
    Mse,
}

/// Steps of the search: 1, 0.975, … 0.5.
const STEPS: usize = crate::SHRINK_STEPS;
/// Weights handled together where one scale covers the whole matrix.
const CHUNK: usize = 1 << 14;
/// `448 · 6`, the largest e4m3 scale times the largest e2m1 code.
const NVFP4_RANGE: f32 = 2688.0;

/// The global scale of NVFP4 for a tensor, or for several that an engine fuses, of this largest magnitude:
/// `absmax / 2688`. An f64, because its reciprocal must round to the f32 that compressed-tensors writes, `2688 / absmax`.
/// A tensor of zeros, or one so small that the quotient overflows, gets 1 (compressed-tensors, `generate_gparam`).
pub fn nvfp4_global(absmax: f32) -> f64 {
    // In this order, as torch divides a number by a tensor.
    let divisor = absmax.abs().recip() * NVFP4_RANGE;
    if divisor.is_normal() { 1.0 / f64::from(divisor) } else { 1.0 }
}

/// Rounds every weight to the nearest code under the scale of its group.
///
/// Scales are those of compressed-tensors (`calculate_qparams`): `absmax / largest code`, rounded to their type before codes
/// are chosen; powers of two as in [`mx_code`]; for NVFP4 under `global`, by default [`nvfp4_global`] of this matrix
/// alone, which other scale kinds ignore. A group of zeros gets the epsilon of the scale's type (`1/8` in e4m3,
/// `2^−127` in E8M0).
///
/// Deterministic for any number of threads.
///
/// # Errors
/// A length that does not fit `[n, k]`, K not a multiple of the group, NaN or Inf in the weight.
pub fn quantize_float(
    weight: &[f32],
    n: usize,
    k: usize,
    scheme: &FloatScheme,
    range: FloatRange,
    global: Option<f64>,
) -> Result<FloatLinear, QuantError> {
    let (rows, columns) = scheme.grain.grid(n, k)?;
    let wanted = n.saturating_mul(k);
    if weight.len() != wanted {
        return Err(QuantError::Length { what: "weight", found: weight.len(), wanted });
    }
    let mut out = FloatLinear {
        scheme: *scheme,
        out_features: n,
        in_features: k,
        codes: vec![0; wanted],
        scales: vec![0.0; rows * columns],
        global_scale: 1.0,
    };
    let absmax = |values: &[f32]| values.par_chunks(CHUNK).map(largest_bits).max().unwrap_or(0);
    if scheme.scale == ScaleKind::E4M3WithGlobal {
        out.global_scale = global.unwrap_or_else(|| nvfp4_global(f32::from_bits(absmax(weight))));
    }
    let scales = Scales { format: scheme.format, kind: scheme.scale, range, divisor: (1.0 / out.global_scale) as f32 };
    if wanted == 0 {
        out.scales.fill(scales.of(0.0));
        return Ok(out);
    }
    let finite = AtomicBool::new(true);
    let known = |bits: u32| {
        let sound = bits < f32::INFINITY.to_bits();
        if !sound {
            finite.store(false, Ordering::Relaxed);
        }
        sound.then(|| f32::from_bits(bits))
    };
    if scheme.grain == Grain::Tensor {
        if let Some(absmax) = known(absmax(weight)) {
            let parts = || weight.par_chunks(CHUNK);
            let error = |scale| {
                let errors: Vec<f64> = parts().map(|part| squared_error(scheme.format, part, scale)).collect();
                errors.iter().sum()
            };
            let scale = scales.best(absmax, error);
            out.scales.fill(scale);
            let effective = scales.effective(scale);
            let pairs = parts().zip(out.codes.par_chunks_mut(CHUNK));
            pairs.for_each(|(values, codes)| encode(scheme.format, values, effective, codes));
        }
    } else {
        let (tall, wide) = scheme.grain.cover(n, k);
        let bands = weight.par_chunks(tall * k).zip(out.codes.par_chunks_mut(tall * k));
        bands.zip(out.scales.par_chunks_mut(columns)).for_each(|((values, codes), out)| {
            for (column, out) in out.iter_mut().enumerate() {
                let span = column * wide..((column + 1) * wide).min(k);
                let parts = || values.chunks_exact(k).map(|row| &row[span.clone()]);
                let Some(absmax) = known(parts().map(largest_bits).max().unwrap_or(0)) else { return };
                *out = scales.best(absmax, |scale| parts().map(|part| squared_error(scheme.format, part, scale)).sum());
                let effective = scales.effective(*out);
                for (codes, part) in codes.chunks_exact_mut(k).zip(parts()) {
                    encode(scheme.format, part, effective, &mut codes[span.clone()]);
                }
            }
        });
    }
    if finite.into_inner() { Ok(out) } else { Err(not_finite(weight, k)) }
}

fn not_finite(weight: &[f32], k: usize) -> QuantError {
    let count = weight.par_iter().filter(|value| !value.is_finite()).count();
    let first = weight.iter().position(|value| !value.is_finite()).unwrap_or(0);
    QuantError::NotFinite { count, row: first / k.max(1), column: first % k.max(1) }
}

/// How scales are found.
#[derive(Debug, Clone, Copy)]
struct Scales {
    format: FloatFormat,
    kind: ScaleKind,
    range: FloatRange,
    /// The reciprocal of the global scale.
    divisor: f32,
}

impl Scales {
    /// The scale, as it is stored, of a group of this largest magnitude.
    fn of(&self, absmax: f32) -> f32 {
        let scale = absmax / self.format.largest();
        match self.kind {
            ScaleKind::Float(_) if scale == 0.0 => self.empty(),
            ScaleKind::Float(dtype) => dtype.round(scale.clamp(dtype.smallest_scale(), dtype.largest())),
            ScaleKind::E8M0 => e8m0::decode(mx_code(self.format, absmax)),
            ScaleKind::E4M3WithGlobal => match FloatFormat::E4M3.round(self.divisor * scale) {
                0.0 => self.empty(),
                scale => scale,
            },
        }
    }

    /// The scale of a group of zeros.
    fn empty(&self) -> f32 {
        match self.kind {
            ScaleKind::Float(ScaleDtype::F16) => half::f16::EPSILON.to_f32(),
            ScaleKind::Float(ScaleDtype::BF16) => half::bf16::EPSILON.to_f32(),
            ScaleKind::Float(ScaleDtype::F32) => f32::EPSILON,
            ScaleKind::E8M0 => e8m0::decode(0),
            ScaleKind::E4M3WithGlobal => 0.125,
        }
    }

    /// What weights are divided by.
    fn effective(&self, scale: f32) -> f32 {
        if self.kind == ScaleKind::E4M3WithGlobal { scale / self.divisor } else { scale }
    }

    /// The stored scale of least `error`, which is given the effective one.
    fn best(&self, absmax: f32, error: impl Fn(f32) -> f64) -> f32 {
        let plain = self.of(absmax);
        if self.range == FloatRange::MinMax || absmax == 0.0 {
            return plain;
        }
        let candidate = |step: usize| match self.kind {
            ScaleKind::E8M0 => {
                let code = e8m0::encode(plain).unwrap_or(0);
                [code, code.saturating_sub(1), code.saturating_add(1).min(254)].get(step).map(|&c| e8m0::decode(c))
            }
            _ => Some(self.of(absmax * shrink_factor(step))),
        };
        let (mut best, mut least, mut last) = (plain, f64::INFINITY, f32::NAN);
        for scale in (0..STEPS).map_while(candidate) {
            // Coarse types give the same scale twice.
            if scale == last {
                continue;
            }
            last = scale;
            let found = error(self.effective(scale));
            if found < least {
                (best, least) = (scale, found);
            }
        }
        best
    }
}

/// The E8M0 code for a group of this largest magnitude: its power of two, or the next one where the mantissa is 1.75 or
/// more, divided by that of the largest code (compressed-tensors, `generate_mx_scales`). Code 255 is never returned.
pub fn mx_code(format: FloatFormat, absmax: f32) -> u8 {
    let exponent = ((absmax.to_bits() & 0x7fff_ffff) + (1 << 21)) >> 23;
    let offset = match format {
        FloatFormat::E4M3 => 8,
        FloatFormat::E5M2 => 15,
        FloatFormat::E2M1 => 2,
    };
    exponent.saturating_sub(offset).min(254) as u8
}
