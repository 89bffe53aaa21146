//! Dequantized weights as a float type.

use half::slice::HalfFloatSliceExt as _;
use lite_model::{Checkpoint, Dtype};
use rayon::prelude::*;
use serde_json::Value;

/// Elements converted at a time by one thread.
const CHUNK: usize = 1 << 16;

/// The float type that the config names for the model (`dtype` or `torch_dtype`, at the top or in the language model's
/// own config); bf16 where it names none.
pub(crate) fn model_dtype(checkpoint: &Checkpoint) -> Dtype {
    let config = checkpoint.config();
    let inner = ["text_config", "llm_config", "language_config"].into_iter().filter_map(|key| config.get(key));
    let named = |config: &Value| {
        let name = config.get("dtype").or_else(|| config.get("torch_dtype"))?.as_str()?;
        match name.strip_prefix("torch.").unwrap_or(name) {
            "bfloat16" => Some(Dtype::BF16),
            "float16" | "half" => Some(Dtype::F16),
            "float32" | "float" => Some(Dtype::F32),
            _ => None,
        }
    };
    let top = Value::Object(config.clone());
    std::iter::once(&top).chain(inner).find_map(named).unwrap_or(Dtype::BF16)
}

/// The config's name of a float type.
pub(crate) fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F16 => "float16",
        Dtype::F32 => "float32",
        _ => "bfloat16",
    }
}

/// `values` as little-endian elements of BF16, F16 or F32, rounded to nearest, and the same in f32; `None` where a value
/// is too large for the type.
pub(crate) fn encode(values: &[f32], dtype: Dtype) -> Option<(Vec<u8>, Vec<f32>)> {
    let size = dtype.bitsize() / 8;
    let (mut bytes, mut rounded) = (vec![0u8; values.len() * size], vec![0f32; values.len()]);
    let chunks = bytes.par_chunks_mut(CHUNK * size).zip(rounded.par_chunks_mut(CHUNK)).zip(values.par_chunks(CHUNK));
    let finite = chunks.map(|((bytes, rounded), values)| {
        match dtype {
            Dtype::F16 => {
                let mut halves = vec![half::f16::ZERO; values.len()];
                halves.convert_from_f32_slice(values);
                halves.convert_to_f32_slice(rounded);
                bytes.chunks_exact_mut(2).zip(&halves).for_each(|(out, half)| out.copy_from_slice(&half.to_le_bytes()));
            }
            Dtype::BF16 => {
                let mut halves = vec![half::bf16::ZERO; values.len()];
                halves.convert_from_f32_slice(values);
                halves.convert_to_f32_slice(rounded);
                bytes.chunks_exact_mut(2).zip(&halves).for_each(|(out, half)| out.copy_from_slice(&half.to_le_bytes()));
            }
            _ => {
                rounded.copy_from_slice(values);
                bytes
                    .chunks_exact_mut(4)
                    .zip(values)
                    .for_each(|(out, value)| out.copy_from_slice(&value.to_le_bytes()));
            }
        }
        rounded.iter().all(|value| value.is_finite())
    });
    finite.reduce(|| true, |a, b| a && b).then_some((bytes, rounded))
}

/// `‖b − a‖ / ‖a‖`: 0 for equal values. Fixed chunks, added in order: the same figure for any number of threads.
pub(crate) fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    let square = |value: f32| f64::from(value) * f64::from(value);
    let sums: Vec<(f64, f64)> = a
        .par_chunks(CHUNK)
        .zip(b.par_chunks(CHUNK))
        .map(|(a, b)| a.iter().zip(b).fold((0.0, 0.0), |(e, s), (a, b)| (e + square(b - a), s + square(*a))))
        .collect();
    let (error, size) = sums.into_iter().fold((0.0, 0.0), |(e, s), (error, size)| (e + error, s + size));
    if size > 0.0 { (error / size).sqrt() } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_round_to_the_nearest_and_overflow_is_seen() {
        let (bytes, rounded) = encode(&[1.0, -2.5, 0.1], Dtype::BF16).unwrap();
        assert_eq!(bytes, [0x80, 0x3f, 0x20, 0xc0, 0xcd, 0x3d]);
        assert_eq!(rounded, [1.0, -2.5, 0.100_097_656]);
        assert!(encode(&[70_000.0], Dtype::F16).is_none());
        assert_eq!(encode(&[70_000.0], Dtype::F32).unwrap().1, [70_000.0]);
        assert_eq!(relative_error(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert!((relative_error(&[3.0, 4.0], &[3.0, 4.5]) - 0.1).abs() < 1e-12);
    }
}
