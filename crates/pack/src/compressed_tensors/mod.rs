//! The `compressed-tensors` layout.

mod args;
mod config;
mod format;

use lite_quant::{ActivationScheme, InputQuantization, LinearScheme, QuantizedLinear, Scheme, WeightScheme, Weights};
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Map, Value};

use self::format::{Format, check_scheme, form};
use crate::bits::{pack_row, unpack_row, words};
use crate::form::{checked_input, is_static};
use crate::layout::{Layout, PackedTensor, TensorRef, TensorSpec, Unpacked};
use crate::tensors::{
    Dtypes, Reader, SCALE_DTYPES, WORD_DTYPES, check_symmetry, check_weight, decode_scales, dtype_of, encode_scales,
    groups,
};
use crate::{ConfigFacts, PackError, ParsedConfig};

/// The formats of compressed-tensors: `pack-quantized`, which is here, and those of a byte or a pair of codes each
/// (see [`format`]). They are told apart by the scheme when writing, and by the tensors that are there when reading.
///
/// In `pack-quantized` (2 to 8 bits, per group or per channel) codes are dense bit streams along K, zero points along N. The library stores signed values plus
/// `2^(bits−1)`, which is exactly the unsigned code and zero point of [`QuantizedLinear`]. Zero points
/// of a symmetric scheme are not stored: vLLM registers no parameter for them.
pub(crate) struct CompressedTensors;

const NAME: &str = "compressed-tensors";
const SHAPE_DTYPES: Dtypes = (&[Dtype::I64, Dtype::I32], "I64 (or I32, as old releases wrote)");

impl Layout for CompressedTensors {
    fn name(&self) -> &'static str {
        NAME
    }

    fn quant_method(&self) -> &'static str {
        NAME
    }

    fn suffixes(&self) -> &'static [&'static str] {
        &[
            "weight_packed",
            "weight",
            "weight_scale",
            "weight_zero_point",
            "weight_shape",
            "weight_global_scale",
            "input_scale",
            "input_zero_point",
            "input_global_scale",
        ]
    }

    fn check(&self, scheme: &LinearScheme, n: usize, k: usize) -> Result<(), PackError> {
        match packed(scheme)? {
            Some(scheme) => Dims::new(scheme, n, k).map(|_| ()),
            None => form(scheme, n, k).map(|_| ()),
        }
    }

    fn describe(&self, scheme: &LinearScheme, n: usize, k: usize) -> Result<Vec<TensorSpec>, PackError> {
        let Some(scheme) = packed(scheme)? else { return Ok(form(scheme, n, k)?.describe(scheme)) };
        let dims = Dims::new(scheme, n, k)?;
        let mut specs = vec![
            TensorSpec { suffix: "weight_packed", dtype: Dtype::I32, shape: vec![n, dims.row_words] },
            TensorSpec { suffix: "weight_scale", dtype: dtype_of(scheme.scale_dtype), shape: vec![n, dims.groups] },
        ];
        if !scheme.symmetric {
            let shape = vec![dims.zero_words, dims.groups];
            specs.push(TensorSpec { suffix: "weight_zero_point", dtype: Dtype::I32, shape });
        }
        specs.push(TensorSpec { suffix: "weight_shape", dtype: Dtype::I64, shape: vec![2] });
        Ok(specs)
    }

    fn pack(
        &self,
        weights: &Weights,
        activations: Option<&ActivationScheme>,
        input: Option<&InputQuantization>,
    ) -> Result<Vec<PackedTensor>, PackError> {
        let scheme = LinearScheme { weights: weights.scheme(), activations: activations.copied() };
        let (n, k) = weights.shape();
        let weight = match (packed(&scheme)?, weights) {
            (Some(_), Weights::Int(weight)) => weight,
            _ => return form(&scheme, n, k)?.pack(weights, activations, input),
        };
        checked_input(activations, input)?;
        let specs = self.describe(&scheme, n, k)?;
        let scheme = &weight.scheme;
        check_weight(weight)?;
        let dims = Dims::new(scheme, n, k)?;
        let mut packed = vec![0u8; n * dims.row_words * 4];
        packed
            .par_chunks_mut(dims.row_words * 4)
            .zip(weight.codes.par_chunks(k))
            .for_each(|(out, codes)| pack_row(codes, scheme.bits, out));
        let scales = encode_scales(weight.scales.iter().copied(), scheme.scale_dtype, weight.scales.len());
        let mut data = vec![packed, scales];
        if !scheme.symmetric {
            data.push(pack_zeros(&weight.zeros, n, scheme.bits, &dims));
        }
        data.push([n, k].iter().flat_map(|&dim| (dim as i64).to_le_bytes()).collect());
        Ok(specs
            .into_iter()
            .zip(data)
            .map(|(TensorSpec { suffix, dtype, shape }, data)| PackedTensor { suffix, dtype, shape, data })
            .collect())
    }

    fn unpack<'a>(
        &self,
        scheme: &LinearScheme,
        n: usize,
        k: usize,
        get: &dyn Fn(&str) -> Option<TensorRef<'a>>,
    ) -> Result<Unpacked, PackError> {
        let scheme = match &scheme.weights {
            // Whatever the format is called: some tools store packed schemes a byte each, and the other way round.
            WeightScheme::Int(int) if packed(scheme)?.is_some() && get("weight").is_none() => int,
            WeightScheme::Int(int) if get("weight_packed").is_some() && !is_static(scheme.activations.as_ref()) => int,
            _ => return form(scheme, n, k)?.unpack(scheme, get),
        };
        let dims = Dims::new(scheme, n, k)?;
        refuse_meaning_changers(scheme, get)?;
        let reader = Reader { layout: NAME, get };
        check_shape(reader.tensor("weight_shape", SHAPE_DTYPES, &[2])?, n, k)?;
        let packed = reader
            .tensor("weight_packed", WORD_DTYPES, &[n, dims.row_words])
            .map_err(|error| name_padded_packing(error, scheme.bits, k))?;
        let scales = reader.tensor("weight_scale", SCALE_DTYPES, &[n, dims.groups])?;
        let (scale_dtype, scales) = decode_scales("weight_scale", scales)?;
        let zeros = if scheme.symmetric {
            vec![scheme.middle_code(); n * dims.groups]
        } else {
            let zeros = reader.tensor("weight_zero_point", WORD_DTYPES, &[dims.zero_words, dims.groups])?;
            unpack_zeros(zeros.data, n, scheme.bits, &dims)
        };
        check_symmetry("weight_zero_point", scheme, &zeros, dims.groups)?;
        let mut codes = vec![0u8; n * k];
        codes
            .par_chunks_mut(k)
            .zip(packed.data.par_chunks(dims.row_words * 4))
            .for_each(|(codes, bytes)| unpack_row(bytes, scheme.bits, codes));
        let scheme = Scheme { scale_dtype, ..*scheme };
        Ok(Weights::Int(QuantizedLinear { scheme, out_features: n, in_features: k, codes, scales, zeros }).into())
    }

    fn mixes(&self, _common: &LinearScheme, _other: &LinearScheme) -> Result<(), &'static str> {
        Ok(())
    }

    fn quantization_config(&self, facts: &ConfigFacts) -> Result<Value, PackError> {
        config::write(self, facts)
    }

    fn parse_config(&self, config: &Map<String, Value>) -> Result<ParsedConfig, PackError> {
        config::parse(config)
    }
}

/// The integer scheme of a linear that is written packed.
fn packed(scheme: &LinearScheme) -> Result<Option<&Scheme>, PackError> {
    check_scheme(scheme)?;
    Ok(scheme.weights.int().filter(|_| Format::of(scheme) == Format::Pack))
}

/// Sizes of the packed tensors.
struct Dims {
    groups: usize,
    /// Words in a row of codes.
    row_words: usize,
    /// Words in a column of zero points.
    zero_words: usize,
}

impl Dims {
    fn new(scheme: &Scheme, n: usize, k: usize) -> Result<Self, PackError> {
        let groups = groups(NAME, scheme, n, k)?;
        let too_large = PackError::TooLarge { n, k };
        let sizes = words(k, scheme.bits).zip(words(n, scheme.bits)).filter(|&(row_words, zero_words)| {
            let fits = |a: usize, b: usize| a.checked_mul(b).and_then(|all| all.checked_mul(4)).is_some();
            fits(n, row_words) && fits(zero_words, groups)
        });
        let (row_words, zero_words) = sizes.ok_or(too_large)?;
        Ok(Self { groups, row_words, zero_words })
    }
}

/// `[n, G]` zero points as words `[⌈n·b/32⌉, G]`, each column a dense stream along N.
fn pack_zeros(zeros: &[u8], n: usize, bits: u8, dims: &Dims) -> Vec<u8> {
    let mut out = vec![0u8; dims.zero_words * dims.groups * 4];
    for group in 0..dims.groups {
        let column: Vec<u8> = (0..n).map(|row| zeros[row * dims.groups + group]).collect();
        let mut stream = vec![0u8; dims.zero_words * 4];
        pack_row(&column, bits, &mut stream);
        for (row, word) in stream.chunks_exact(4).enumerate() {
            out[(row * dims.groups + group) * 4..][..4].copy_from_slice(word);
        }
    }
    out
}

/// The inverse of [`pack_zeros`], of `4 · ⌈n·b/32⌉ · G` bytes.
fn unpack_zeros(data: &[u8], n: usize, bits: u8, dims: &Dims) -> Vec<u8> {
    let mut out = vec![0u8; n * dims.groups];
    let mut column = vec![0u8; n];
    for group in 0..dims.groups {
        let stream: Vec<u8> =
            (0..dims.zero_words).flat_map(|row| &data[(row * dims.groups + group) * 4..][..4]).copied().collect();
        unpack_row(&stream, bits, &mut column);
        for (row, &zero) in column.iter().enumerate() {
            out[row * dims.groups + group] = zero;
        }
    }
    out
}

/// Refuses tensors that say the others mean something else.
fn refuse_meaning_changers<'a>(scheme: &Scheme, get: &dyn Fn(&str) -> Option<TensorRef<'a>>) -> Result<(), PackError> {
    let unexpected = |suffix, why| Err(PackError::Unexpected { layout: NAME, suffix, why });
    if get("weight_g_idx").is_some() {
        return unexpected("weight_g_idx", "reordered groups (`actorder: group`) are not read; quantize again without");
    }
    if scheme.symmetric && get("weight_zero_point").is_some() {
        return unexpected("weight_zero_point", "a symmetric scheme has none; `symmetric` in the config is wrong");
    }
    Ok(())
}

/// Checks that `weight_shape` says `[n, k]`.
fn check_shape(tensor: TensorRef<'_>, n: usize, k: usize) -> Result<(), PackError> {
    // Two elements; the reader has checked the length.
    for (column, (bytes, wanted)) in tensor.data.chunks_exact(tensor.data.len() / 2).zip([n, k]).enumerate() {
        let found = match *bytes {
            [a, b, c, d] => i64::from(i32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => i64::from_le_bytes([a, b, c, d, e, f, g, h]),
            _ => -1,
        };
        if usize::try_from(found) != Ok(wanted) {
            let (what, found) = ("weight_shape", found.to_string());
            return Err(PackError::Value { what, found, row: 0, column, wanted: wanted.to_string() });
        }
    }
    Ok(())
}

/// Before it packed densely, the library put `⌊32/b⌋` codes in a word and left the rest empty.
fn name_padded_packing(error: PackError, bits: u8, k: usize) -> PackError {
    match &error {
        PackError::TensorShape { suffix, found, wanted } => match (found.as_slice(), wanted.as_slice()) {
            (&[rows, found], &[n, wanted]) if rows == n && found == k.div_ceil(32 / usize::from(bits)) => {
                PackError::PaddedPacking { suffix, bits, found, wanted }
            }
            _ => error,
        },
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The zero-point column −8..7 of compressed-tensors 0.20: `[16, 1]` becomes `[2, 1]`.
    #[test]
    fn zero_points_are_packed_along_n() {
        let zeros: Vec<u8> = (0..16).collect();
        let dims = Dims { groups: 1, row_words: 0, zero_words: 2 };
        let packed = pack_zeros(&zeros, 16, 4, &dims);
        assert_eq!(packed, [0x7654_3210u32.to_le_bytes(), 0xfedc_ba98u32.to_le_bytes()].concat());
        assert_eq!(unpack_zeros(&packed, 16, 4, &dims), zeros);
    }

    #[test]
    fn padded_packing_is_named() {
        let shape =
            |found| PackError::TensorShape { suffix: "weight_packed", found: vec![4, found], wanted: vec![4, 12] };
        let named = PackError::PaddedPacking { suffix: "weight_packed", bits: 3, found: 13, wanted: 12 };
        assert_eq!(name_padded_packing(shape(13), 3, 128), named);
        assert_eq!(name_padded_packing(shape(14), 3, 128), shape(14));
    }
}
