//! What every layout does with small floats: their codes and scales as bytes, and checks of both.

use lite_quant::floats::{FloatFormat, FloatLinear, FloatScheme, ScaleKind, e8m0};
use rayon::prelude::*;
use safetensors::Dtype;

use crate::tensors::{decode_scales, dtype_of, value};
use crate::{PackError, TensorRef};

/// Bytes looked at together.
const CHUNK: usize = 1 << 16;

/// The element type of codes of a byte each; fp4 is stored in pairs, as U8.
pub(crate) fn code_dtype(format: FloatFormat) -> Dtype {
    match format {
        FloatFormat::E4M3 => Dtype::F8_E4M3,
        FloatFormat::E5M2 => Dtype::F8_E5M2,
        FloatFormat::E2M1 => Dtype::U8,
    }
}

/// Rows and columns of the scales, after the checks that every layout shares: nothing empty, K a whole number of
/// groups, fp4 in whole bytes, and room for the codes.
pub(crate) fn grid(
    layout: &'static str,
    scheme: &FloatScheme,
    n: usize,
    k: usize,
) -> Result<(usize, usize), PackError> {
    if n == 0 || k == 0 {
        return Err(PackError::Shape { layout, n, k, rule: "it is empty" });
    }
    n.checked_mul(k).and_then(|all| all.checked_mul(8)).ok_or(PackError::TooLarge { n, k })?;
    if scheme.format == FloatFormat::E2M1 && !k.is_multiple_of(2) {
        return Err(PackError::Shape { layout, n, k, rule: "K must be even, since two codes share a byte" });
    }
    Ok(scheme.grain.grid(n, k)?)
}

/// Refuses codes that mean NaN or infinity, or are no codes at all.
pub(crate) fn check_codes(
    what: &'static str,
    format: FloatFormat,
    codes: &[u8],
    width: usize,
) -> Result<(), PackError> {
    let bad = |code: u8| match format {
        FloatFormat::E4M3 => code & 0x7f == 0x7f,
        FloatFormat::E5M2 => code & 0x7f >= 0x7c,
        FloatFormat::E2M1 => code > 15,
    };
    // The usual answer, none, at the speed of memory.
    let any = |chunk: &[u8]| chunk.iter().fold(false, |found, &code| found | bad(code));
    if !codes.par_chunks(CHUNK).any(any) {
        return Ok(());
    }
    let at = codes.iter().position(|&code| bad(code)).unwrap_or(0);
    Err(value(what, format!("the code {:#04x}", codes[at]), at, width, format!("a finite {format:?} number")))
}

/// Refuses a weight that breaks its own invariants.
pub(crate) fn check_float(weight: &FloatLinear) -> Result<(), PackError> {
    weight.check()?;
    let scheme = &weight.scheme;
    check_codes("codes", scheme.format, &weight.codes, weight.in_features.max(1))?;
    let (sound, wanted): (fn(&FloatScheme, f32) -> bool, _) = match scheme.scale {
        ScaleKind::Float(dtype) => (
            |scheme, scale| matches!(scheme.scale, ScaleKind::Float(dtype) if dtype.round(scale) == scale),
            format!("a finite number that {:?} holds exactly", dtype_of(dtype)),
        ),
        ScaleKind::E8M0 => (|_, scale| e8m0::encode(scale).is_some(), "a power of two".to_owned()),
        ScaleKind::E4M3WithGlobal => {
            (|_, scale| FloatFormat::E4M3.round(scale) == scale, "a number that F8_E4M3 holds exactly".to_owned())
        }
    };
    let (_, columns) = scheme.grain.grid(weight.out_features, weight.in_features)?;
    match weight.scales.iter().position(|&scale| !scale.is_finite() || !sound(scheme, scale)) {
        Some(at) => Err(value("scales", weight.scales[at].to_string(), at, columns.max(1), wanted)),
        None => Ok(()),
    }
}

/// Codes of four bits, two in a byte, the even column in the low half (compressed-tensors, `pack_fp4_to_uint8`).
pub(crate) fn pack_nibbles(codes: &[u8]) -> Vec<u8> {
    let mut out = vec![0u8; codes.len() / 2];
    out.par_chunks_mut(CHUNK).zip(codes.par_chunks(2 * CHUNK)).for_each(|(out, codes)| {
        out.iter_mut().zip(codes.chunks_exact(2)).for_each(|(byte, pair)| *byte = pair[0] | pair[1] << 4);
    });
    out
}

/// The inverse of [`pack_nibbles`].
pub(crate) fn unpack_nibbles(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![0u8; bytes.len() * 2];
    out.par_chunks_mut(2 * CHUNK).zip(bytes.par_chunks(CHUNK)).for_each(|(out, bytes)| {
        for (pair, byte) in out.chunks_exact_mut(2).zip(bytes) {
            pair.copy_from_slice(&[byte & 15, byte >> 4]);
        }
    });
    out
}

/// Scales of one byte each, which [`check_float`] found to be exact.
pub(crate) fn scale_bytes(kind: ScaleKind, scales: &[f32]) -> Vec<u8> {
    match kind {
        ScaleKind::E8M0 => scales.iter().map(|&scale| e8m0::encode(scale).unwrap_or(0)).collect(),
        _ => scales.iter().map(|&scale| FloatFormat::E4M3.encode(scale)).collect(),
    }
}

/// Scales of a tensor in the order of the file, and their kind. Every one is finite.
pub(crate) fn read_scales(
    suffix: &'static str,
    kind: ScaleKind,
    tensor: TensorRef<'_>,
) -> Result<(ScaleKind, Vec<f32>), PackError> {
    let decode: fn(u8) -> f32 = match kind {
        ScaleKind::Float(_) => {
            let (dtype, scales) = decode_scales(suffix, tensor)?;
            return Ok((ScaleKind::Float(dtype), scales));
        }
        ScaleKind::E8M0 => e8m0::decode,
        ScaleKind::E4M3WithGlobal => |code| FloatFormat::E4M3.decode(code),
    };
    let scales: Vec<f32> = tensor.data.iter().map(|&code| decode(code)).collect();
    if let Some(at) = scales.iter().position(|scale| !scale.is_finite()) {
        let width = tensor.shape.last().copied().unwrap_or(1).max(1);
        return Err(value(suffix, "NaN".to_owned(), at, width, "a finite number".to_owned()));
    }
    Ok((kind, scales))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// compressed-tensors: [0, ½, 1, 1½, 2, 3, 4, 6, −0, …, −6] packs to these bytes.
    #[test]
    fn nibbles_are_packed_low_first() {
        let codes: Vec<u8> = (0..16).collect();
        let packed = pack_nibbles(&codes);
        assert_eq!(packed, [0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe]);
        assert_eq!(unpack_nibbles(&packed), codes);
    }

    #[test]
    fn codes_that_are_no_numbers_are_found() {
        for (format, bad) in [(FloatFormat::E4M3, 2), (FloatFormat::E5M2, 8), (FloatFormat::E2M1, 240)] {
            let refused = |code: u8| check_codes("weight", format, &[0, 0, 0, code], 2).is_err();
            assert_eq!((0..=255).filter(|&code| refused(code)).count(), bad, "{format:?}");
            assert!(
                (0..=255)
                    .filter(|&code| refused(code))
                    .all(|code| code > 15 && format == FloatFormat::E2M1 || !format.decode(code).is_finite())
            );
        }
        let error = check_codes("weight", FloatFormat::E4M3, &[0, 0, 0x7f, 0], 2).unwrap_err();
        assert!(matches!(error, PackError::Value { what: "weight", row: 1, column: 0, .. }), "{error}");
    }
}
