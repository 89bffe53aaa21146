//! Quantized linears found by the names, types and shapes of their tensors, in any checkpoint.

use lite_model::{Checkpoint, Dtype, TensorInfo};
use lite_quant::floats::{FloatFormat, Grain};
use serde::Serialize;

use crate::float_source::format_of;

/// Names after `<module>.` of the tensors that one quantized linear may have, whatever wrote it. `weight` is among
/// them where it holds codes.
const PARTS: [&str; 22] = [
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "weight_global_scale",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "input_scale_ub",
    "activation_scale",
    "pre_quant_scale",
    "scale",
    "zero_point",
    "output_scale",
    "weight_scales",
];

/// How the codes of a linear lie in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Storage {
    /// `qweight` `[K, N/8]`, words along N.
    Awq,
    /// `qweight` `[K·b/32, N]`, words along K.
    Gptq,
    /// `weight_packed` I32 `[N, ⌈K·b/32⌉]`.
    PackedInt,
    /// `weight_packed` or `weight` U8 `[N, K/2]`, or `weight` F4 `[N, K]`: two fp4 codes in a byte.
    PackedFp4,
    /// `weight` I8 `[N, K]`.
    Int8,
    /// `weight` F8_E4M3 or F8_E5M2 `[N, K]`.
    Fp8,
}

/// A quantized linear, as the headers describe it.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredLinear {
    /// Module name, without suffix.
    pub module: String,
    /// N.
    pub out_features: usize,
    /// K.
    pub in_features: usize,
    /// Where the codes are.
    pub storage: Storage,
    /// Bits of one code.
    pub bits: u8,
    /// What shares a scale; `None` where the scales are absent or of a shape nobody writes.
    pub grain: Option<Grain>,
    /// Names of all of its tensors but the bias, codes first.
    pub tensors: Vec<String>,
    /// Their bytes.
    pub bytes: u64,
    /// A float `<module>.weight` lies beside the codes.
    pub twin: bool,
}

impl StoredLinear {
    /// The fp8 or fp4 type of the codes, if they are floats.
    pub fn float_format(&self, checkpoint: &Checkpoint) -> Option<FloatFormat> {
        match self.storage {
            Storage::PackedFp4 => Some(FloatFormat::E2M1),
            Storage::Fp8 => checkpoint.info(self.tensors.first()?).and_then(|info| format_of(info.dtype)),
            _ => None,
        }
    }
}

/// All quantized linears of a checkpoint in the order of its tensors, and the names of code tensors that are not
/// understood. Reads headers, and 16 bytes of each `weight_shape`.
pub fn stored_linears(checkpoint: &Checkpoint) -> (Vec<StoredLinear>, Vec<String>) {
    let (mut linears, mut unknown) = (Vec::new(), Vec::new());
    for info in checkpoint.names().filter_map(|name| checkpoint.info(name)) {
        let Some((module, leaf)) = info.name.rsplit_once('.') else { continue };
        let part = |suffix: &str| checkpoint.info(&format!("{module}.{suffix}"));
        let scaled = || ["weight_scale", "weight_scale_inv", "scale"].into_iter().any(|suffix| part(suffix).is_some());
        let codes = match (leaf, info.dtype) {
            ("qweight" | "weight_packed", _) => true,
            ("weight", Dtype::F8_E4M3 | Dtype::F8_E5M2) => true,
            ("weight", Dtype::I8 | Dtype::U8 | Dtype::F4) => scaled(),
            _ => false,
        };
        if !codes {
            continue;
        }
        let found = match leaf {
            "qweight" => words(info, &part),
            "weight_packed" => packed(checkpoint, info, &part),
            _ => bytes(info, &part),
        };
        let Some((storage, n, k, bits, grain)) = found.filter(|(_, n, k, _, _)| *n > 0 && *k > 0) else {
            unknown.push(info.name.clone());
            continue;
        };
        let parts: Vec<&TensorInfo> =
            std::iter::once(info).chain(PARTS.into_iter().filter(|suffix| *suffix != leaf).filter_map(part)).collect();
        linears.push(StoredLinear {
            module: module.to_owned(),
            out_features: n,
            in_features: k,
            storage,
            bits,
            grain,
            bytes: parts.iter().map(|part| part.bytes).sum(),
            tensors: parts.iter().map(|part| part.name.clone()).collect(),
            twin: leaf != "weight" && part("weight").is_some(),
        });
    }
    (linears, unknown)
}

type Found = (Storage, usize, usize, u8, Option<Grain>);

/// `qweight` of AutoAWQ or GPTQ, told apart by the width of `scales` `[G, N]`.
fn words<'a>(qweight: &TensorInfo, part: &dyn Fn(&str) -> Option<&'a TensorInfo>) -> Option<Found> {
    let &[rows, columns] = qweight.shape.as_slice() else { return None };
    let &[groups, n] = part("scales")?.shape.as_slice() else { return None };
    let grain = |k: usize| grain_of(n, k, (n, groups));
    if qweight.dtype != Dtype::I32 {
        return None;
    }
    if n == columns {
        let bits = part("qzeros").and_then(|zeros| match zeros.shape.as_slice() {
            &[_, words] => words.checked_mul(32).filter(|bits| n > 0 && bits.is_multiple_of(n)).map(|bits| bits / n),
            _ => None,
        })?;
        let bits = u8::try_from(bits).ok().filter(|bits| (2..=8).contains(bits))?;
        let k = match part("g_idx").map(|g_idx| g_idx.shape.as_slice()) {
            Some(&[k]) => k,
            _ => rows.checked_mul(32)? / usize::from(bits),
        };
        return Some((Storage::Gptq, n, k, bits, grain(k)));
    }
    (columns.checked_mul(8)? == n).then(|| (Storage::Awq, n, rows, 4, grain(rows)))
}

/// `weight_packed` of compressed-tensors.
fn packed<'a>(
    checkpoint: &Checkpoint,
    packed: &TensorInfo,
    part: &dyn Fn(&str) -> Option<&'a TensorInfo>,
) -> Option<Found> {
    let &[n, columns] = packed.shape.as_slice() else { return None };
    let scales = part("weight_scale");
    if packed.dtype == Dtype::U8 {
        let k = columns.checked_mul(2)?;
        return Some((Storage::PackedFp4, n, k, 4, scales.and_then(|scales| grain_in(scales, n, k))));
    }
    let shape = part("weight_shape")?;
    let view = checkpoint.tensor(&shape.name).ok()?;
    let size = view.dtype.bitsize() / 8;
    let dims: Vec<usize> = view
        .data
        .chunks_exact(size.max(1))
        .filter_map(|bytes| match *bytes {
            [a, b, c, d] => usize::try_from(i32::from_le_bytes([a, b, c, d])).ok(),
            [a, b, c, d, e, f, g, h] => usize::try_from(i64::from_le_bytes([a, b, c, d, e, f, g, h])).ok(),
            _ => None,
        })
        .collect();
    let &[rows, k] = dims.as_slice() else { return None };
    let words = |bits: u8| k.checked_mul(usize::from(bits)).map(|bits| bits.div_ceil(32));
    let bits = (2..=8).find(|bits| words(*bits) == Some(columns))?;
    let grain = scales.and_then(|scales| grain_in(scales, n, k));
    (rows == n && packed.dtype == Dtype::I32).then_some((Storage::PackedInt, n, k, bits, grain))
}

/// A `weight` that holds codes.
fn bytes<'a>(weight: &TensorInfo, part: &dyn Fn(&str) -> Option<&'a TensorInfo>) -> Option<Found> {
    let &[n, columns] = weight.shape.as_slice() else { return None };
    let (storage, k, bits) = match weight.dtype {
        Dtype::I8 => (Storage::Int8, columns, 8),
        Dtype::U8 => (Storage::PackedFp4, columns.checked_mul(2)?, 4),
        Dtype::F4 => (Storage::PackedFp4, columns, 4),
        _ => (Storage::Fp8, columns, 8),
    };
    let scales = ["weight_scale", "weight_scale_inv", "scale"].into_iter().find_map(part);
    Some((storage, n, k, bits, scales.and_then(|scales| grain_in(scales, n, k))))
}

/// The grain of scales `[N, G]` or of blocks.
fn grain_in(scales: &TensorInfo, n: usize, k: usize) -> Option<Grain> {
    match scales.shape.as_slice() {
        [] | [1] => Some(Grain::Tensor),
        &[rows] => grain_of(n, k, (rows, 1)),
        &[rows, columns] | &[rows, 1, columns, 1] => grain_of(n, k, (rows, columns)),
        _ => None,
    }
}

/// The grain whose grid of scales this is. Blocks are taken for squares of 128, the only ones that are published; one
/// of another size is given as what the grid divides evenly into, if it does.
fn grain_of(n: usize, k: usize, grid: (usize, usize)) -> Option<Grain> {
    let (rows, columns) = grid;
    let square = Grain::Block { rows: 128, columns: 128 };
    let even = |size: usize, parts: usize| (parts > 0 && size.is_multiple_of(parts)).then(|| size / parts.max(1));
    match grid {
        (1, 1) if n != 1 => Some(Grain::Tensor),
        (rows, 1) if rows == n => Some(Grain::Channel),
        (rows, _) if rows == n => even(k, columns).map(Grain::Group),
        _ if square.grid(n, k) == Ok(grid) => Some(square),
        _ => Some(Grain::Block { rows: even(n, rows)?, columns: even(k, columns)? }),
    }
}
