//! What every layout does with scales, shapes and tensors that come from a file.

use lite_quant::{QuantizedLinear, ScaleDtype, Scheme};
use rayon::prelude::*;
use safetensors::Dtype;

use crate::{PackError, TensorRef};

/// The element type of scales in the file.
pub(crate) fn dtype_of(scale: ScaleDtype) -> Dtype {
    match scale {
        ScaleDtype::F16 => Dtype::F16,
        ScaleDtype::BF16 => Dtype::BF16,
        ScaleDtype::F32 => Dtype::F32,
    }
}

/// Groups in a row, after the checks that every layout shares: bits 2..=8, nothing empty, K a whole
/// number of groups, and room for `N·K` codes and `N·G` scales.
pub(crate) fn groups(layout: &'static str, scheme: &Scheme, n: usize, k: usize) -> Result<usize, PackError> {
    if !(2..=8).contains(&scheme.bits) {
        return Err(PackError::Bits { layout, found: scheme.bits, wanted: "2 to 8 bits" });
    }
    if n == 0 || k == 0 {
        return Err(PackError::Shape { layout, n, k, rule: "it is empty" });
    }
    let groups = scheme.groups(k)?;
    // Eight bytes is the widest element of any tensor here, and no tensor has more than N·K elements
    // rounded up to a word.
    n.checked_mul(k).and_then(|all| all.checked_mul(8)).ok_or(PackError::TooLarge { n, k })?;
    Ok(groups)
}

/// Refuses a weight that breaks its own invariants.
pub(crate) fn check_weight(weight: &QuantizedLinear) -> Result<(), PackError> {
    weight.check()?;
    let max = weight.scheme.max_code();
    let (k, groups) = (weight.in_features.max(1), weight.groups().max(1));
    // The usual answer, none, at the speed of memory; only a broken weight is searched.
    let above = |values: &[u8]| {
        let sound = |chunk: &[u8]| chunk.iter().fold(0, |most, &value| value.max(most)) <= max;
        let all_sound = values.par_chunks(1 << 16).all(sound);
        if all_sound { None } else { values.iter().position(|&value| value > max) }
    };
    for (what, values, width) in [("codes", &weight.codes, k), ("zeros", &weight.zeros, groups)] {
        if let Some(at) = above(values) {
            return Err(value(what, values[at].to_string(), at, width, format!("0 to {max}")));
        }
    }
    check_symmetry("zeros", &weight.scheme, &weight.zeros, groups)?;
    let dtype = weight.scheme.scale_dtype;
    if let Some(at) = weight.scales.iter().position(|&scale| !scale.is_finite() || dtype.round(scale) != scale) {
        let wanted = format!("a finite number that {:?} holds exactly", dtype_of(dtype));
        return Err(value("scales", weight.scales[at].to_string(), at, groups, wanted));
    }
    Ok(())
}

/// Refuses zero points of a symmetric scheme that are not in the middle.
pub(crate) fn check_symmetry(
    what: &'static str,
    scheme: &Scheme,
    zeros: &[u8],
    groups: usize,
) -> Result<(), PackError> {
    let middle = scheme.middle_code();
    match zeros.iter().position(|&zero| scheme.symmetric && zero != middle) {
        Some(at) => {
            Err(value(what, zeros[at].to_string(), at, groups, format!("{middle}, since the scheme is symmetric")))
        }
        None => Ok(()),
    }
}

pub(crate) fn value(what: &'static str, found: String, at: usize, width: usize, wanted: String) -> PackError {
    PackError::Value { what, found, row: at / width, column: at % width, wanted }
}

/// Scales as little-endian bytes of `dtype`, in the order of the iterator.
pub(crate) fn encode_scales(scales: impl Iterator<Item = f32>, dtype: ScaleDtype, count: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(count * dtype.size_bytes());
    for scale in scales {
        match dtype {
            ScaleDtype::F16 => out.extend(half::f16::from_f32(scale).to_le_bytes()),
            ScaleDtype::BF16 => out.extend(half::bf16::from_f32(scale).to_le_bytes()),
            ScaleDtype::F32 => out.extend(scale.to_le_bytes()),
        }
    }
    out
}

/// The scales of a tensor in the order of the file, and their type. Every one is finite.
pub(crate) fn decode_scales(suffix: &'static str, tensor: TensorRef<'_>) -> Result<(ScaleDtype, Vec<f32>), PackError> {
    let pairs = || tensor.data.chunks_exact(2).map(|b| [b[0], b[1]]);
    let (dtype, scales): (_, Vec<f32>) = match tensor.dtype {
        Dtype::F16 => (ScaleDtype::F16, pairs().map(|b| half::f16::from_le_bytes(b).to_f32()).collect()),
        Dtype::BF16 => (ScaleDtype::BF16, pairs().map(|b| half::bf16::from_le_bytes(b).to_f32()).collect()),
        Dtype::F32 => {
            let quads = tensor.data.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
            (ScaleDtype::F32, quads.map(f32::from_le_bytes).collect())
        }
        found => return Err(PackError::Dtype { suffix, found, wanted: SCALE_DTYPES.1 }),
    };
    if let Some(at) = scales.iter().position(|scale| !scale.is_finite()) {
        let width = tensor.shape.last().copied().unwrap_or(1).max(1);
        return Err(value(suffix, scales[at].to_string(), at, width, "a finite number".to_owned()));
    }
    Ok((dtype, scales))
}

/// Element types, and how a message names them.
pub(crate) type Dtypes = (&'static [Dtype], &'static str);
pub(crate) const SCALE_DTYPES: Dtypes = (&[Dtype::F16, Dtype::BF16, Dtype::F32], "F16, BF16 or F32");
pub(crate) const WORD_DTYPES: Dtypes = (&[Dtype::I32], "I32");

/// Finds tensors by suffix and checks their type, shape and length.
pub(crate) struct Reader<'f, 'a> {
    pub(crate) layout: &'static str,
    pub(crate) get: &'f dyn Fn(&str) -> Option<TensorRef<'a>>,
}

impl<'a> Reader<'_, 'a> {
    /// The tensor, with one of `dtypes`, exactly this shape and as many bytes as that takes.
    pub(crate) fn tensor(
        &self,
        suffix: &'static str,
        dtypes: Dtypes,
        shape: &[usize],
    ) -> Result<TensorRef<'a>, PackError> {
        self.tensor_of(suffix, dtypes, &[shape])
    }

    /// The tensor, with one of `dtypes`, one of these shapes and as many bytes as that takes.
    pub(crate) fn tensor_of(
        &self,
        suffix: &'static str,
        dtypes: Dtypes,
        shapes: &[impl AsRef<[usize]>],
    ) -> Result<TensorRef<'a>, PackError> {
        let tensor = (self.get)(suffix).ok_or(PackError::Missing { layout: self.layout, suffix })?;
        if !dtypes.0.contains(&tensor.dtype) {
            return Err(PackError::Dtype { suffix, found: tensor.dtype, wanted: dtypes.1 });
        }
        let Some(shape) = shapes.iter().map(AsRef::as_ref).find(|shape| *shape == tensor.shape) else {
            let wanted = shapes.first().map(|shape| shape.as_ref().to_vec()).unwrap_or_default();
            return Err(PackError::TensorShape { suffix, found: tensor.shape.to_vec(), wanted });
        };
        // `shape` is ours, checked by `groups`; saturation can only make the comparison fail.
        let wanted = shape.iter().fold(tensor.dtype.bitsize() / 8, |bytes, &dim| bytes.saturating_mul(dim));
        if tensor.data.len() != wanted {
            return Err(PackError::ByteLength { suffix, found: tensor.data.len(), wanted });
        }
        Ok(tensor)
    }
}

/// The little-endian word at `index` of a tensor of 32-bit words whose length has been checked.
pub(crate) fn word(data: &[u8], index: usize) -> u32 {
    data.get(4 * index..4 * index + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}
