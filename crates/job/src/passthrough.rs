//! Tensors that are not quantized: copied byte for byte, or written in another float type.

use half::slice::HalfFloatSliceExt;
use lite_model::{Dtype, printable};
use rayon::prelude::*;

use crate::JobError;

/// Elements converted at a time by one thread.
const CHUNK: usize = 1 << 16;

/// `values` as little-endian bytes of `dtype` (F16, BF16 or F32).
///
/// # Errors
/// [`JobError::Input`] if a finite value becomes infinite, or a value is NaN or Inf.
pub(crate) fn encode(name: &str, values: &[f32], dtype: Dtype) -> Result<Vec<u8>, JobError> {
    let broken: usize = values.par_chunks(CHUNK).map(|chunk| chunk.iter().filter(|v| !v.is_finite()).count()).sum();
    if broken > 0 {
        return Err(not_finite(name, broken));
    }
    let size = dtype.bitsize() / 8;
    let mut out = vec![0u8; values.len() * size];
    let overflow: usize = out
        .par_chunks_mut(CHUNK * size)
        .zip(values.par_chunks(CHUNK))
        .map(|(out, values)| match dtype {
            Dtype::F16 => {
                let mut halves = vec![half::f16::ZERO; values.len()];
                halves.convert_from_f32_slice(values);
                out.chunks_exact_mut(2).zip(&halves).for_each(|(o, h)| o.copy_from_slice(&h.to_le_bytes()));
                halves.iter().filter(|h| !h.is_finite()).count()
            }
            Dtype::BF16 => {
                let mut halves = vec![half::bf16::ZERO; values.len()];
                halves.convert_from_f32_slice(values);
                out.chunks_exact_mut(2).zip(&halves).for_each(|(o, h)| o.copy_from_slice(&h.to_le_bytes()));
                halves.iter().filter(|h| !h.is_finite()).count()
            }
            _ => {
                out.chunks_exact_mut(4).zip(values).for_each(|(o, v)| o.copy_from_slice(&v.to_le_bytes()));
                0
            }
        })
        .sum();
    if overflow > 0 {
        return Err(JobError::Input(format!(
            "`{}`: {overflow} values are too large for {dtype:?} (largest {:e}); use --dtype bfloat16",
            printable(name),
            values.iter().fold(0f32, |m, v| m.max(v.abs())),
        )));
    }
    Ok(out)
}

/// Number of NaN and Inf among the little-endian floats of `data`; 0 for other types.
pub(crate) fn count_not_finite(data: &[u8], dtype: Dtype) -> usize {
    // A float is NaN or Inf where all exponent bits are set.
    let halves = |mask: u16| {
        let count = |c: &[u8]| c.chunks_exact(2).filter(|b| u16::from_le_bytes([b[0], b[1]]) & mask == mask).count();
        data.par_chunks(CHUNK * 2).map(count).sum()
    };
    match dtype {
        Dtype::F16 => halves(0x7c00),
        Dtype::BF16 => halves(0x7f80),
        Dtype::F32 => {
            let mask = 0x7f80_0000u32;
            let count = |c: &[u8]| {
                c.chunks_exact(4).filter(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) & mask == mask).count()
            };
            data.par_chunks(CHUNK * 4).map(count).sum()
        }
        _ => 0,
    }
}

pub(crate) fn not_finite(name: &str, count: usize) -> JobError {
    JobError::Input(format!(
        "`{}` holds {count} values that are NaN or Inf; the checkpoint is damaged: compare its hash with the published one, or download it again",
        printable(name)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversion_rounds_and_refuses_what_does_not_fit() {
        let bytes = encode("t", &[1.0, -2.5, 0.1], Dtype::BF16).unwrap();
        assert_eq!(bytes, [0x80, 0x3f, 0x20, 0xc0, 0xcd, 0x3d]);
        assert!(encode("t", &[70000.0], Dtype::F16).unwrap_err().to_string().contains("bfloat16"));
        assert!(encode("t", &[f32::NAN], Dtype::BF16).unwrap_err().to_string().contains("NaN"));
    }

    #[test]
    fn nan_and_inf_are_counted_in_every_float_type() {
        let f16: Vec<u8> =
            [half::f16::INFINITY, half::f16::MAX, half::f16::NAN].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(count_not_finite(&f16, Dtype::F16), 2);
        let bf16: Vec<u8> = [half::bf16::NEG_INFINITY, half::bf16::MAX].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(count_not_finite(&bf16, Dtype::BF16), 1);
        let f32s: Vec<u8> = [f32::NAN, f32::MAX, f32::INFINITY].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(count_not_finite(&f32s, Dtype::F32), 2);
        assert_eq!(count_not_finite(&[0xff; 8], Dtype::I64), 0);
    }
}
