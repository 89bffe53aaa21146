//! Float tensors as f32.

use half::slice::{HalfBitsSliceExt as _, HalfFloatSliceExt as _};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

/// Elements per step of the half conversions: small enough for the innermost cache, whole cache lines long.
const STEP: usize = 1024;
/// Elements per task.
const TASK: usize = 64 * STEP;

/// Bytes per element of the dtypes that convert.
pub(crate) fn float_bytes(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F32 => Some(4),
        Dtype::F16 | Dtype::BF16 => Some(2),
        _ => None,
    }
}

/// Converts little-endian `data` of a float dtype into `out`, exactly. `data` may start at any address and must hold
/// [`float_bytes`] for every element of `out`. Large tensors are spread over the rayon pool; the result does not
/// depend on it.
pub(crate) fn to_f32(dtype: Dtype, data: &[u8], out: &mut [f32]) {
    let Some(bytes) = float_bytes(dtype) else { return };
    if out.len() <= TASK {
        return serial(dtype, data, out);
    }
    data.par_chunks(TASK * bytes).zip(out.par_chunks_mut(TASK)).for_each(|(data, out)| serial(dtype, data, out));
}

fn serial(dtype: Dtype, data: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (out, bytes) in out.iter_mut().zip(data.as_chunks().0) {
                *out = f32::from_le_bytes(*bytes);
            }
        }
        Dtype::F16 => halves(data, out, |bits, out| bits.reinterpret_cast::<f16>().convert_to_f32_slice(out)),
        _ => halves(data, out, |bits, out| bits.reinterpret_cast::<bf16>().convert_to_f32_slice(out)),
    }
}

/// Goes through a small aligned buffer, so that one path serves mapped tensors at even and odd addresses alike; the
/// copy stays in the cache.
fn halves(data: &[u8], out: &mut [f32], convert: impl Fn(&[u16], &mut [f32])) {
    let mut bits = [0_u16; STEP];
    for (data, out) in data.chunks(2 * STEP).zip(out.chunks_mut(STEP)) {
        let bits = &mut bits[..out.len()];
        for (bits, bytes) in bits.iter_mut().zip(data.as_chunks().0) {
            *bits = u16::from_le_bytes(*bytes);
        }
        convert(bits, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Value of an IEEE 754 binary16 pattern from its definition.
    fn half_value(bits: u16) -> f32 {
        let (sign, exponent, mantissa) = (bits >> 15, i32::from(bits >> 10 & 31), f32::from(bits & 1023));
        let magnitude = match exponent {
            0 => mantissa * 2f32.powi(-24),
            31 if mantissa == 0.0 => f32::INFINITY,
            31 => f32::NAN,
            _ => (1.0 + mantissa / 1024.0) * 2f32.powi(exponent - 15),
        };
        if sign == 1 { -magnitude } else { magnitude }
    }

    /// All 65,536 patterns twice over, so that the parallel path is taken, at an odd address.
    fn all_patterns() -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend((0..=u16::MAX).chain(0..=u16::MAX).flat_map(u16::to_le_bytes));
        bytes
    }

    fn assert_same(found: &[f32], wanted: impl Fn(u16) -> f32) {
        for (i, found) in found.iter().enumerate() {
            let wanted = wanted(i as u16);
            assert!(found.to_bits() == wanted.to_bits() || (found.is_nan() && wanted.is_nan()), "pattern {i:#x}");
        }
    }

    #[test]
    fn f16_by_definition() {
        let mut out = vec![0.0; 2 << 16];
        to_f32(Dtype::F16, &all_patterns()[1..], &mut out);
        assert_same(&out, half_value);
    }

    #[test]
    fn bf16_is_the_upper_half_of_f32() {
        let mut out = vec![0.0; 2 << 16];
        to_f32(Dtype::BF16, &all_patterns()[1..], &mut out);
        assert_same(&out, |bits| f32::from_bits(u32::from(bits) << 16));
    }

    #[test]
    fn f32_bit_for_bit() {
        let values: Vec<f32> = (0..100_001_u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761))).collect();
        let mut bytes = vec![0];
        bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        let mut out = vec![0.0; values.len()];
        to_f32(Dtype::F32, &bytes[1..], &mut out);
        assert!(out.iter().zip(&values).all(|(a, b)| a.to_bits() == b.to_bits()));
    }

    #[test]
    fn lengths_around_the_steps() {
        for len in [0, 1, STEP - 1, STEP, STEP + 1, TASK, TASK + 1] {
            let bytes: Vec<u8> = std::iter::repeat_n(0x3f80_u16.to_le_bytes(), len).flatten().collect();
            let mut out = vec![0.0; len];
            to_f32(Dtype::BF16, &bytes, &mut out);
            assert!(out.iter().all(|v| *v == 1.0), "{len}");
        }
    }
}
