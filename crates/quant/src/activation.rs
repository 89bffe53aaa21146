//! What engines do to the inputs of a quantized linear: quantize at run time, multiply, dequantize. Here both steps at
//! once, in f32, so that methods can measure what it costs.
//!
//! The run-time rules are those of vLLM's kernels (`int8_quant_kernels.cu`, `fp8/common.cu`), the static parameters those
//! of compressed-tensors' `calculate_qparams`. They disagree about one divisor, and so do the two halves of this file:
//!
//! ```text
//!                     dynamic, by the engine                          static, in the file
//! int symmetric       scale = absmax / (2^(b−1) − 1)                  scale = absmax / (2^(b−1) − ½)
//! int asymmetric      scale = (max − min) / (2^b − 1), zero = round(−2^(b−1) − min / scale)        (both)
//! float               scale = absmax / largest                                                     (both)
//! ```
//!
//! Codes are rounded half to even and saturate. Ranges are widened to hold 0, as compressed-tensors does; vLLM's dynamic
//! asymmetric kernel does not, which matters only to a token whose channels all have one sign.

use rayon::prelude::*;

use crate::floats::FloatFormat;
use crate::{ActivationFormat, ActivationScale, ActivationScheme, InputQuantization, QuantError};

/// Values handled together by one thread, rounded to whole groups.
const CHUNK: usize = 1 << 14;

/// Replaces `x` (`[T, width]` row-major) by what a linear computes with once its inputs are quantized by `scheme`:
/// `(code − zero) · scale`.
///
/// `found` is what calibration found; only the static scales need it. Groups without a value keep their zeros. MX scales
/// follow compressed-tensors' `generate_mx_scales`; under NVFP4's scheme a group's scale is `absmax / 6` in multiples of the
/// global scale, rounded to e4m3. Deterministic for any number of threads.
///
/// # Errors
/// [`QuantError::Length`] and [`QuantError::NotDivisible`] for shapes that do not fit,
/// [`QuantError::ActivationNotFinite`] for NaN and Inf, [`QuantError::Activation`] for a scheme that no engine runs and for
/// a static scale that is missing or unusable. On error `x` is as it was.
pub fn fake_quantize_tokens(
    x: &mut [f32],
    width: usize,
    scheme: &ActivationScheme,
    found: Option<&InputQuantization>,
) -> Result<(), QuantError> {
    check_finite(x, width)?;
    let group = match scheme.scale {
        ActivationScale::DynamicToken | ActivationScale::StaticTensor => width,
        ActivationScale::DynamicGroup(group)
        | ActivationScale::DynamicMx(group)
        | ActivationScale::StaticTensorLocal(group) => group,
    };
    if x.is_empty() {
        return Ok(());
    }
    if group == 0 || !width.is_multiple_of(group) {
        return Err(QuantError::NotDivisible { in_features: width, group_size: group });
    }
    let kernel = Kernel::new(scheme, found)?;
    let chunk = (CHUNK / group).max(1) * group;
    x.par_chunks_mut(chunk).for_each(|values| values.chunks_exact_mut(group).for_each(|group| kernel.apply(group)));
    Ok(())
}

/// Whole rows of finite values.
fn check_finite(x: &[f32], width: usize) -> Result<(), QuantError> {
    if !x.len().is_multiple_of(width) {
        let wanted = x.len().checked_div(width).map_or(0, |rows| (rows + 1) * width);
        return Err(QuantError::Length { what: "activations", found: x.len(), wanted });
    }
    let count: usize = x.par_chunks(CHUNK).map(|part| part.iter().filter(|v| !v.is_finite()).count()).sum();
    if count == 0 {
        return Ok(());
    }
    let first = x.iter().position(|v| !v.is_finite()).unwrap_or(0);
    Err(QuantError::ActivationNotFinite { count, token: first / width, channel: first % width })
}

/// The codes activations may have.
#[derive(Debug, Clone, Copy)]
enum Codes {
    Int { low: f32, high: f32, symmetric: bool },
    Float(FloatGrid),
}

impl Codes {
    fn new(format: ActivationFormat) -> Result<Self, QuantError> {
        match format {
            ActivationFormat::Int { bits: bits @ (4 | 8), symmetric } => {
                let half = f32::from(1u8 << (bits - 1));
                Ok(Self::Int { low: -half, high: half - 1.0, symmetric })
            }
            ActivationFormat::Int { bits, .. } => {
                Err(unusable(format!("{bits} bits: integer activations have 4 or 8")))
            }
            ActivationFormat::Float(format) => Ok(Self::Float(FloatGrid::new(format))),
        }
    }
}

fn unusable(what: String) -> QuantError {
    QuantError::Activation { what }
}

/// How one group of values that share a scale is quantized.
#[derive(Debug, Clone, Copy)]
enum Kernel {
    DynamicSymmetric { low: f32, high: f32 },
    DynamicAsymmetric { low: f32, high: f32 },
    DynamicFloat { grid: FloatGrid, smallest_scale: f32 },
    Mx(FloatGrid),
    StaticSymmetric { low: f32, high: f32, scale: f32 },
    StaticAsymmetric { low: f32, high: f32, scale: f32, zero: f32 },
    StaticFloat { grid: FloatGrid, scale: f32 },
    Local { grid: FloatGrid, global: f32 },
}

impl Kernel {
    fn new(scheme: &ActivationScheme, found: Option<&InputQuantization>) -> Result<Self, QuantError> {
        use ActivationScale::{DynamicGroup, DynamicMx, DynamicToken, StaticTensor, StaticTensorLocal};
        let codes = Codes::new(scheme.format)?;
        Ok(match (scheme.scale, codes) {
            (DynamicToken | DynamicGroup(_), Codes::Int { low, high, symmetric: true }) => {
                Self::DynamicSymmetric { low, high }
            }
            (DynamicToken | DynamicGroup(_), Codes::Int { low, high, .. }) => Self::DynamicAsymmetric { low, high },
            // The kernels' own guards against a zero scale: 1 / (largest · 512) per token, absmax ≥ 1e-10 per group.
            (DynamicToken, Codes::Float(grid)) => {
                Self::DynamicFloat { grid, smallest_scale: 1.0 / (grid.largest * 512.0) }
            }
            (DynamicGroup(_), Codes::Float(grid)) => Self::DynamicFloat { grid, smallest_scale: 1e-10 / grid.largest },
            (DynamicMx(_), Codes::Float(grid)) => Self::Mx(grid),
            (StaticTensorLocal(_), Codes::Float(grid)) => Self::Local { grid, global: usable(found, true)?.scale },
            (StaticTensor, Codes::Float(grid)) => Self::StaticFloat { grid, scale: usable(found, true)?.scale },
            (StaticTensor, Codes::Int { low, high, symmetric: true }) => {
                Self::StaticSymmetric { low, high, scale: usable(found, true)?.scale }
            }
            (StaticTensor, Codes::Int { low, high, .. }) => {
                let found = usable(found, false)?;
                if !(low as i32..=high as i32).contains(&found.zero_point) {
                    return Err(unusable(format!("zero point {}, wanted {low} to {high}", found.zero_point)));
                }
                Self::StaticAsymmetric { low, high, scale: found.scale, zero: found.zero_point as f32 }
            }
            (DynamicMx(_) | StaticTensorLocal(_), Codes::Int { .. }) => {
                return Err(unusable(
                    "integer codes under E8M0 or e4m3 scales: use a float format, or scales per token or group"
                        .to_owned(),
                ));
            }
        })
    }

    fn apply(&self, x: &mut [f32]) {
        match *self {
            Self::DynamicSymmetric { low, high } => {
                let largest = absmax(x);
                let (scale, inverse) = (largest / high, high / largest);
                // An absmax so small that its inverse overflows: the group is as good as zero.
                if inverse.is_finite() {
                    x.iter_mut().for_each(|v| *v = nearest(*v * inverse).clamp(low, high) * scale);
                } else {
                    x.fill(0.0);
                }
            }
            Self::DynamicAsymmetric { low, high } => {
                let (scale, zero) = asymmetric(min_max(x), low, high);
                let inverse = 1.0 / scale;
                if inverse.is_finite() {
                    let zero = zero.round_ties_even();
                    x.iter_mut().for_each(|v| *v = ((nearest(*v * inverse) + zero).clamp(low, high) - zero) * scale);
                } else {
                    x.fill(0.0);
                }
            }
            Self::DynamicFloat { grid, smallest_scale } => {
                grid.apply(x, (absmax(x) / grid.largest).max(smallest_scale))
            }
            Self::Mx(grid) => grid.apply(x, grid.mx_scale(absmax(x))),
            Self::StaticSymmetric { low, high, scale } => {
                x.iter_mut().for_each(|v| *v = nearest(*v / scale).clamp(low, high) * scale);
            }
            Self::StaticAsymmetric { low, high, scale, zero } => {
                let inverse = 1.0 / scale;
                x.iter_mut().for_each(|v| *v = ((nearest(*v * inverse) + zero).clamp(low, high) - zero) * scale);
            }
            Self::StaticFloat { grid, scale } => {
                let inverse = 1.0 / scale;
                x.iter_mut().for_each(|v| *v = grid.round(*v * inverse) * scale);
            }
            Self::Local { grid, global } => {
                let own = FloatGrid::new(FloatFormat::E4M3).round(absmax(x) / grid.largest / global);
                let scale = own * global;
                if scale.is_normal() { grid.apply(x, scale) } else { x.fill(0.0) }
            }
        }
    }
}

/// Parameters from a file or a calibration, fit to divide by.
fn usable(found: Option<&InputQuantization>, symmetric: bool) -> Result<InputQuantization, QuantError> {
    let found = found.ok_or_else(|| unusable("no static scale: gather one from calibration tokens".to_owned()))?;
    if !found.scale.is_normal() || found.scale < 0.0 || !(1.0 / found.scale).is_finite() {
        return Err(unusable(format!("static scale {}, wanted a positive normal number", found.scale)));
    }
    if symmetric && found.zero_point != 0 {
        return Err(unusable(format!("zero point {} in a scheme without zero points, wanted 0", found.zero_point)));
    }
    Ok(*found)
}

/// The values of a small float type, and rounding to them without branches.
#[derive(Debug, Clone, Copy)]
struct FloatGrid {
    format: FloatFormat,
    largest: f32,
    /// Bits of the smallest normal number.
    smallest: u32,
    /// Added to the bits of `2^e`, gives the bits of `2^(e + 23 − mantissa bits)`.
    shift: u32,
}

impl FloatGrid {
    fn new(format: FloatFormat) -> Self {
        let (mantissa, smallest_exponent) = match format {
            FloatFormat::E4M3 => (3, -6i32),
            FloatFormat::E5M2 => (2, -14),
            FloatFormat::E2M1 => (1, 0),
        };
        let smallest = ((smallest_exponent + 127) as u32) << 23;
        Self { format, largest: format.largest(), smallest, shift: (23 - mantissa) << 23 }
    }

    /// [`FloatFormat::round`], for loops over millions of values: adding a power of two whose last place is the spacing
    /// of the type around `x` rounds to that spacing, ties to even.
    #[inline(always)]
    fn round(&self, x: f32) -> f32 {
        let magnitude = x.abs().min(self.largest);
        let power = f32::from_bits((magnitude.to_bits() & 0x7f80_0000).max(self.smallest) + self.shift);
        ((magnitude + power) - power).copysign(x)
    }

    fn apply(&self, x: &mut [f32], scale: f32) {
        let grid = *self;
        x.iter_mut().for_each(|v| *v = grid.round(*v / scale) * scale);
    }

    /// `2^(floor(log2 absmax) − offset)`, the exponent one more where the mantissa is 1.75 or above; at least `2^−126`.
    fn mx_scale(&self, absmax: f32) -> f32 {
        let offset = match self.format {
            FloatFormat::E4M3 => 8,
            FloatFormat::E5M2 => 15,
            FloatFormat::E2M1 => 2,
        };
        let exponent = (absmax.to_bits().saturating_add(1 << 21) >> 23) as i32 - offset;
        f32::from_bits((exponent.clamp(1, 254) as u32) << 23)
    }
}

/// The nearest integer, ties to even, of anything that is not far outside eight bits; saturates at ±1024.
#[inline(always)]
fn nearest(value: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    (value.clamp(-1024.0, 1024.0) + ROUND) - ROUND
}

fn absmax(x: &[f32]) -> f32 {
    x.iter().fold(0f32, |m, v| m.max(v.abs()))
}

/// Smallest and largest value, zero included.
fn min_max(x: &[f32]) -> (f32, f32) {
    x.iter().fold((0f32, 0f32), |(min, max), v| (min.min(*v), max.max(*v)))
}

/// Scale and unrounded zero point of codes `low ..= high` over a range that holds 0; a zero scale for an empty range.
fn asymmetric((min, max): (f32, f32), low: f32, high: f32) -> (f32, f32) {
    let steps = high - low;
    let span = max - min;
    // Halves first where the span overflows.
    let scale = if span.is_finite() { span / steps } else { max / steps - min / steps };
    let zero = if scale > 0.0 { (low - min / scale).clamp(low, high) } else { 0.0 };
    (scale, zero)
}

/// The smallest and largest activation seen so far, for one scale per tensor. The order of the batches does not matter.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StaticRange {
    min: f32,
    max: f32,
}

impl StaticRange {
    /// The range that spans `min`, `max` and 0.
    ///
    /// # Errors
    /// [`QuantError::ActivationNotFinite`] for NaN and Inf.
    pub fn from_bounds(min: f32, max: f32) -> Result<Self, QuantError> {
        check_finite(&[min, max], 2)?;
        Ok(Self { min: min.min(max).min(0.0), max: max.max(min).max(0.0) })
    }

    /// Widens the range by a batch `x`, `[T, width]` row-major.
    ///
    /// # Errors
    /// [`QuantError::Length`] if `x` is not whole rows, [`QuantError::ActivationNotFinite`] for NaN and Inf.
    pub fn update(&mut self, x: &[f32], width: usize) -> Result<(), QuantError> {
        check_finite(x, width)?;
        let join = |a: (f32, f32), b: (f32, f32)| (a.0.min(b.0), a.1.max(b.1));
        (self.min, self.max) = x.par_chunks(CHUNK).map(min_max).reduce(|| (self.min, self.max), join);
        Ok(())
    }

    /// Smallest and largest value seen, 0 included.
    pub fn bounds(&self) -> (f32, f32) {
        (self.min, self.max)
    }

    /// The scale and zero point of a static scheme by compressed-tensors' formulas (see the top of this file); `None`
    /// where the engine finds the scale.
    ///
    /// [`ActivationScale::StaticTensorLocal`] gets its outer multiplier, `absmax / (largest · 448)`. A scale that would
    /// be zero is f32's epsilon, or 1 as an outer multiplier; no scale is subnormal.
    ///
    /// # Errors
    /// [`QuantError::Activation`] for integers of other than 4 or 8 bits, or under local scales.
    pub fn quantization(&self, scheme: &ActivationScheme) -> Result<Option<InputQuantization>, QuantError> {
        let absmax = self.max.max(-self.min);
        let (scale, zero, of_nothing) = match (scheme.scale, Codes::new(scheme.format)?) {
            (ActivationScale::DynamicToken | ActivationScale::DynamicGroup(_) | ActivationScale::DynamicMx(_), _) => {
                return Ok(None);
            }
            (ActivationScale::StaticTensor, Codes::Int { high, symmetric: true, .. }) => {
                (absmax / (high + 0.5), 0.0, f32::EPSILON)
            }
            (ActivationScale::StaticTensor, Codes::Int { low, high, .. }) => {
                let (scale, zero) = asymmetric((self.min, self.max), low, high);
                (scale, zero, f32::EPSILON)
            }
            (ActivationScale::StaticTensor, Codes::Float(grid)) => (absmax / grid.largest, 0.0, f32::EPSILON),
            (ActivationScale::StaticTensorLocal(_), Codes::Float(grid)) => {
                (absmax / (grid.largest * FloatFormat::E4M3.largest()), 0.0, 1.0)
            }
            (ActivationScale::StaticTensorLocal(_), Codes::Int { .. }) => {
                return Err(unusable("integer codes under e4m3 scales: use a float format".to_owned()));
            }
        };
        let scale = if scale == 0.0 { of_nothing } else { scale.max(f32::MIN_POSITIVE) };
        Ok(Some(InputQuantization { scale, zero_point: zero.round_ties_even() as i32 }))
    }
}

#[cfg(test)]
#[path = "activation_tests.rs"]
mod tests;
