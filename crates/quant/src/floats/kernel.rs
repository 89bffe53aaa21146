//! Rounding of whole slices: no branches, so that compilers make vectors of it.

use super::FloatFormat;

/// What a loop over a slice needs to know of a format.
#[derive(Debug, Clone, Copy)]
struct Shape {
    /// Bits of the f32 mantissa that are rounded away in the normal range.
    shift: u32,
    /// The bits of the smallest normal number.
    smallest_normal: u32,
    /// `2^23` times the spacing of subnormals: adding it rounds to that spacing, ties to even.
    magic: f32,
    largest: f32,
    sign_bit: u32,
}

const fn shape(exponent_bits: u32, mantissa_bits: u32, bias: i32, largest: f32) -> Shape {
    Shape {
        shift: 23 - mantissa_bits,
        smallest_normal: ((128 - bias) as u32) << 23,
        magic: f32::from_bits(((127 + 23 + 1 - bias - mantissa_bits as i32) as u32) << 23),
        largest,
        sign_bit: exponent_bits + mantissa_bits,
    }
}

const E4M3: Shape = shape(4, 3, 7, 448.0);
const E5M2: Shape = shape(5, 2, 15, 57344.0);
const E2M1: Shape = shape(2, 1, 1, 6.0);

/// The code of `x`, which is no NaN.
#[inline(always)]
fn code(x: f32, s: Shape) -> u8 {
    let sign = (x.to_bits() >> 31) << s.sign_bit;
    let x = x.abs().min(s.largest);
    let bits = x.to_bits();
    let even = (bits >> s.shift) & 1;
    let rounded = (bits + ((1 << (s.shift - 1)) - 1) + even) >> s.shift;
    // Exponents start at 1 in the first normal binade.
    let normal = rounded.wrapping_sub((s.smallest_normal - (1 << 23)) >> s.shift);
    let subnormal = (x + s.magic).to_bits().wrapping_sub(s.magic.to_bits());
    (sign | if bits < s.smallest_normal { subnormal } else { normal }) as u8
}

/// `x`, which is no NaN, rounded to the format.
#[inline(always)]
fn nearest(x: f32, s: Shape) -> f32 {
    let magnitude = x.abs().min(s.largest);
    let bits = magnitude.to_bits();
    let even = (bits >> s.shift) & 1;
    let normal = (bits + ((1 << (s.shift - 1)) - 1) + even) & !((1 << s.shift) - 1);
    let subnormal = ((magnitude + s.magic) - s.magic).to_bits();
    f32::from_bits(if bits < s.smallest_normal { subnormal } else { normal }).copysign(x)
}

/// The largest magnitude of finite values, as bits; at least `0x7f80_0000` if one is NaN or infinite.
pub(super) fn largest_bits(values: &[f32]) -> u32 {
    values.iter().fold(0, |most, value| most.max(value.to_bits() & 0x7fff_ffff))
}

/// Codes of `values / scale`. Negative zeros among the values lose their sign, as in compressed-tensors, which adds a
/// zero point of 0; those that come of rounding keep it.
pub(super) fn encode(format: FloatFormat, values: &[f32], scale: f32, codes: &mut [u8]) {
    let pairs = codes.iter_mut().zip(values);
    match format {
        FloatFormat::E4M3 => pairs.for_each(|(to, value)| *to = code(value / scale + 0.0, E4M3)),
        FloatFormat::E5M2 => pairs.for_each(|(to, value)| *to = code(value / scale + 0.0, E5M2)),
        FloatFormat::E2M1 => pairs.for_each(|(to, value)| *to = code(value / scale + 0.0, E2M1)),
    }
}

/// `Σ (value − scale · round(value / scale))²`, in f32 within runs of 16 values and in f64 over them.
pub(super) fn squared_error(format: FloatFormat, values: &[f32], scale: f32) -> f64 {
    let sum = |s: Shape| {
        let mut total = 0f64;
        for run in values.chunks(16) {
            let mut part = 0f32;
            for &value in run {
                let error = value - nearest(value / scale, s) * scale;
                part += error * error;
            }
            total += f64::from(part);
        }
        total
    };
    match format {
        FloatFormat::E4M3 => sum(E4M3),
        FloatFormat::E5M2 => sum(E5M2),
        FloatFormat::E2M1 => sum(E2M1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_round_like_single_values() {
        for (format, s) in [(FloatFormat::E4M3, E4M3), (FloatFormat::E5M2, E5M2), (FloatFormat::E2M1, E2M1)] {
            for bits in 0..=u16::MAX {
                // Every bf16 value, and one with a long mantissa beside it.
                for bits in [u32::from(bits) << 16, u32::from(bits) << 16 | 0x4321] {
                    let x = f32::from_bits(bits);
                    if x.is_nan() {
                        continue;
                    }
                    assert_eq!(code(x, s), format.encode(x), "{format:?} {x:e}");
                    assert_eq!(nearest(x, s).to_bits(), format.round(x).to_bits(), "{format:?} {x:e}");
                }
            }
        }
    }
}
