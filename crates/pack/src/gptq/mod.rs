//! The `gptq` layout of AutoGPTQ and GPTQModel.

mod config;
mod dynamic;

use lite_quant::{ActivationScheme, InputQuantization, LinearScheme, QuantizedLinear, Scheme, Weights};
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::bits::{pack_row, unpack_row};
use crate::layout::{Layout, PackedTensor, TensorRef, TensorSpec, Unpacked};
use crate::schemes::{weight_only, weight_only_linear};
use crate::tensors::{
    Reader, SCALE_DTYPES, WORD_DTYPES, check_weight, decode_scales, dtype_of, encode_scales, groups, word,
};
use crate::{ConfigFacts, PackError, ParsedConfig};

/// The layout of AutoGPTQ and GPTQModel: 2, 3, 4 or 8 bits, codes in dense streams along **K**, zero
/// points in dense streams along N, and the group of every input channel in `g_idx`.
///
/// The 3-bit packing of these tools, 32 values in three words with two of them straddling, is the same
/// dense stream. N and K must be multiples of 32.
///
/// # Zero points
///
/// Two formats exist. v1 (`checkpoint_format: "gptq"`, and AutoGPTQ before there was a label) stores
/// every zero point minus one; v2 (`"gptq_v2"`) stores it as it is. Labels cannot be trusted: v2 files
/// labelled v1 are published. **Written** is v1 for symmetric schemes, which every reader knows, and v2
/// for asymmetric ones, since v1 has no room for a zero point of 0. **Read** is:
///
/// 1. symmetric: by value, whatever the label. All `2^(b−1) − 1` is v1, all `2^(b−1)` is v2, anything
///    else is an error.
/// 2. asymmetric, labelled v2: as stored.
/// 3. asymmetric, labelled v1 or without a label (AutoGPTQ before there was one, AutoRound; engines take it for v1): plus
///    one. A stored `2^b − 1` is an error: it would be the zero point
///    `2^b`, which does not exist, so either the label is wrong or a 0 was wrapped. Writers wrap it
///    differently (one field, or with a borrow from the next), and readers undo it differently.
#[derive(Debug)]
pub(crate) struct Gptq {
    label: Label,
}

/// What `checkpoint_format` says of the zero points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Label {
    V1,
    V2,
    Absent,
}

const NAME: &str = "gptq";
/// Codes that fill whole words at every width.
const UNIT: usize = 32;
/// Input channels packed at a time: one cache line of a row of codes.
const TILE: usize = 2 * UNIT;
/// Output channels unpacked at a time: the words of one cache line.
const BAND: usize = 16;

impl Gptq {
    /// Reads what it writes: asymmetric zero points are v2.
    pub(crate) const WRITTEN: Self = Self { label: Label::V2 };
    const V1: Self = Self { label: Label::V1 };
    const UNLABELLED: Self = Self { label: Label::Absent };
}

impl Layout for Gptq {
    fn name(&self) -> &'static str {
        NAME
    }

    fn quant_method(&self) -> &'static str {
        NAME
    }

    fn suffixes(&self) -> &'static [&'static str] {
        &["qweight", "qzeros", "scales", "g_idx"]
    }

    fn check(&self, scheme: &LinearScheme, n: usize, k: usize) -> Result<(), PackError> {
        let scheme = weight_only(NAME, scheme)?;
        check(scheme, n, k).map(|_| ())
    }

    fn describe(&self, scheme: &LinearScheme, n: usize, k: usize) -> Result<Vec<TensorSpec>, PackError> {
        let scheme = weight_only(NAME, scheme)?;
        let g = check(scheme, n, k)?;
        Ok(vec![
            TensorSpec { suffix: "qweight", dtype: Dtype::I32, shape: vec![words(k, scheme), n] },
            TensorSpec { suffix: "qzeros", dtype: Dtype::I32, shape: vec![g, words(n, scheme)] },
            TensorSpec { suffix: "scales", dtype: dtype_of(scheme.scale_dtype), shape: vec![g, n] },
            TensorSpec { suffix: "g_idx", dtype: Dtype::I32, shape: vec![k] },
        ])
    }

    fn pack(
        &self,
        weights: &Weights,
        activations: Option<&ActivationScheme>,
        input: Option<&InputQuantization>,
    ) -> Result<Vec<PackedTensor>, PackError> {
        let weight = weight_only_linear(NAME, weights, activations, input)?;
        let (scheme, n, k) = (&weight.scheme, weight.out_features, weight.in_features);
        let specs = self.describe(&(*scheme).into(), n, k)?;
        check_weight(weight)?;
        let g = weight.groups();
        let scales = (0..g).flat_map(|group| (0..n).map(move |row| weight.scales[row * g + group]));
        let data = [
            pack_codes(&weight.codes, n, k, scheme.bits),
            pack_zeros(&weight.zeros, n, g, scheme),
            encode_scales(scales, scheme.scale_dtype, n * g),
            // At most K, which is far below 2³¹ for anything that fits in memory N times.
            (0..k).flat_map(|column| ((column / (k / g)) as i32).to_le_bytes()).collect(),
        ];
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
        let scheme = weight_only(NAME, scheme)?;
        let g = check(scheme, n, k)?;
        let reader = Reader { layout: NAME, get };
        let qweight = reader.tensor("qweight", WORD_DTYPES, &[words(k, scheme), n])?;
        let qzeros = reader.tensor("qzeros", WORD_DTYPES, &[g, words(n, scheme)])?;
        let (scale_dtype, by_group) = decode_scales("scales", reader.tensor("scales", SCALE_DTYPES, &[g, n])?)?;
        check_order(reader.tensor("g_idx", WORD_DTYPES, &[k])?, k, g)?;
        let zeros = self.zero_points(unpack_zeros(qzeros.data, n, g, scheme), scheme, g)?;
        let scales = (0..n).flat_map(|row| (0..g).map(move |group| group * n + row)).map(|at| by_group[at]).collect();
        let linear = QuantizedLinear {
            scheme: Scheme { scale_dtype, ..*scheme },
            out_features: n,
            in_features: k,
            codes: unpack_codes(qweight.data, n, k, scheme.bits),
            scales,
            zeros,
        };
        Ok(Weights::Int(linear).into())
    }

    fn mixes(&self, common: &LinearScheme, other: &LinearScheme) -> Result<(), &'static str> {
        match (common.weights.int(), other.weights.int()) {
            (Some(common), Some(other)) if common.symmetric == other.symmetric => Ok(()),
            (Some(_), Some(_)) => {
                Err("symmetric and asymmetric zero points have different formats, and `checkpoint_format` names one")
            }
            _ => Err("it holds integer codes only"),
        }
    }

    fn quantization_config(&self, facts: &ConfigFacts) -> Result<Value, PackError> {
        config::write(self, facts)
    }

    /// `quantize_config.json`, where AutoGPTQ and GPTQModel look first.
    fn side_files(&self, facts: &ConfigFacts) -> Result<Vec<(&'static str, Value)>, PackError> {
        Ok(vec![("quantize_config.json", config::write(self, facts)?)])
    }

    fn parse_config(&self, config: &Map<String, Value>) -> Result<ParsedConfig, PackError> {
        config::parse(config)
    }

    fn reader(&self, config: &Map<String, Value>) -> Result<Option<&'static dyn Layout>, PackError> {
        Ok(Some(match config::label(config)? {
            Label::V1 => &Self::V1,
            Label::V2 => &Self::WRITTEN,
            Label::Absent => &Self::UNLABELLED,
        }))
    }
}

impl Gptq {
    /// Zero points from stored ones, `[n, G]`, by the rules above.
    fn zero_points(&self, mut stored: Vec<u8>, scheme: &Scheme, g: usize) -> Result<Vec<u8>, PackError> {
        let (middle, max) = (scheme.middle_code(), scheme.max_code());
        let place = |at: usize| (at / g.max(1), at % g.max(1));
        if scheme.symmetric {
            let first = stored.first().copied().unwrap_or(middle);
            let expected = if first == middle - 1 { first } else { middle };
            if let Some(at) = stored.iter().position(|&zero| zero != expected) {
                let (row, column) = place(at);
                let (v1, found) = (middle - 1, stored[at].to_string());
                let wanted = format!("{v1} everywhere (v1) or {middle} everywhere (v2), since the scheme is symmetric");
                return Err(PackError::Value { what: "qzeros", found, row, column, wanted });
            }
            stored.fill(middle);
            return Ok(stored);
        }
        let ambiguous = |why| Err(PackError::AmbiguousZeros { suffix: "qzeros", why });
        match self.label {
            Label::V2 => Ok(stored),
            // The same to engines.
            Label::V1 | Label::Absent => match stored.iter().position(|&zero| zero == max) {
                Some(at) => {
                    let (row, column) = place(at);
                    ambiguous(format!(
                        "`checkpoint_format` is {}, so {max} at row {row}, group {column} would be the zero \
                         point {}, which does not exist; if zero points are stored as they are, set \
                         `checkpoint_format` to \"gptq_v2\", else save the model as \"gptq_v2\" with the tool that \
                         made it",
                        if self.label == Label::V1 { "\"gptq\"" } else { "not given, which means \"gptq\"" },
                        u16::from(max) + 1
                    ))
                }
                None => {
                    stored.iter_mut().for_each(|zero| *zero += 1);
                    Ok(stored)
                }
            },
        }
    }
}

/// Groups in a row, if the layout can hold the weight.
fn check(scheme: &Scheme, n: usize, k: usize) -> Result<usize, PackError> {
    let groups = groups(NAME, scheme, n, k)?;
    if !matches!(scheme.bits, 2 | 3 | 4 | 8) {
        return Err(PackError::Bits { layout: NAME, found: scheme.bits, wanted: "2, 3, 4 or 8 bits" });
    }
    if !n.is_multiple_of(UNIT) || !k.is_multiple_of(UNIT) {
        return Err(PackError::Shape { layout: NAME, n, k, rule: "N and K must be multiples of 32" });
    }
    Ok(groups)
}

/// Words of `count` values, a multiple of [`UNIT`].
fn words(count: usize, scheme: &Scheme) -> usize {
    count / UNIT * usize::from(scheme.bits)
}

/// Refuses columns that are not in groups of neighbours.
fn check_order(g_idx: TensorRef<'_>, k: usize, g: usize) -> Result<(), PackError> {
    let group = |column: usize| word(g_idx.data, column) as usize;
    // A negative index is far above every G here.
    if let Some(column) = (0..k).find(|&column| group(column) >= g) {
        let found = (word(g_idx.data, column) as i32).to_string();
        return Err(PackError::Value { what: "g_idx", found, row: 0, column, wanted: format!("0 to {}", g - 1) });
    }
    let width = k / g.max(1);
    if (0..k).all(|column| group(column) == column / width.max(1)) {
        return Ok(());
    }
    let why = "its columns are in activation order (`desc_act`), and only groups of neighbouring columns are read; \
               quantize again with `desc_act` false";
    Err(PackError::Unexpected { layout: NAME, suffix: "g_idx", why })
}

/// `[n, k]` codes, row-major, as little-endian words `[k·b/32, n]`.
fn pack_codes(codes: &[u8], n: usize, k: usize, bits: u8) -> Vec<u8> {
    let b = usize::from(bits);
    let mut out = vec![0u8; k / UNIT * b * n * 4];
    out.par_chunks_mut((TILE / UNIT * b * n * 4).max(1)).enumerate().for_each(|(tile, out)| {
        let start = tile * TILE;
        let len = (k - start).min(TILE);
        // A tile of 8-bit codes has as many bytes as codes.
        let mut stream = [0u8; TILE];
        let stream = &mut stream[..len / UNIT * b * 4];
        for row in 0..n {
            stream.fill(0);
            pack_row(&codes[row * k + start..][..len], bits, stream);
            for (line, word) in stream.chunks_exact(4).enumerate() {
                out[(line * n + row) * 4..][..4].copy_from_slice(word);
            }
        }
    });
    out
}

/// The inverse of [`pack_codes`], of `4 · k·b/32 · n` bytes.
fn unpack_codes(data: &[u8], n: usize, k: usize, bits: u8) -> Vec<u8> {
    let b = usize::from(bits);
    let mut out = vec![0u8; n * k];
    out.par_chunks_mut((BAND * k).max(1)).enumerate().for_each(|(band, out)| {
        let mut stream = [0u8; UNIT];
        for unit in 0..k / UNIT {
            for (i, codes) in out.chunks_exact_mut(k).enumerate() {
                let row = band * BAND + i;
                for (line, word) in stream[..b * 4].chunks_exact_mut(4).enumerate() {
                    word.copy_from_slice(&data[((unit * b + line) * n + row) * 4..][..4]);
                }
                unpack_row(&stream[..b * 4], bits, &mut codes[unit * UNIT..][..UNIT]);
            }
        }
    });
    out
}

/// `[n, G]` zero points as words `[G, n·b/32]`, minus one where the scheme is symmetric.
fn pack_zeros(zeros: &[u8], n: usize, g: usize, scheme: &Scheme) -> Vec<u8> {
    let row_bytes = words(n, scheme) * 4;
    let mut out = vec![0u8; g * row_bytes];
    // A symmetric zero point is 2^(b−1), never 0.
    let minus = u8::from(scheme.symmetric);
    for (group, out) in out.chunks_exact_mut(row_bytes.max(1)).enumerate() {
        let column: Vec<u8> = (0..n).map(|row| zeros[row * g + group] - minus).collect();
        pack_row(&column, scheme.bits, out);
    }
    out
}

/// Stored zero points `[n, G]` from words `[G, n·b/32]`.
fn unpack_zeros(data: &[u8], n: usize, g: usize, scheme: &Scheme) -> Vec<u8> {
    let row_bytes = words(n, scheme) * 4;
    let mut out = vec![0u8; n * g];
    let mut column = vec![0u8; n];
    for (group, bytes) in data.chunks_exact(row_bytes.max(1)).enumerate() {
        unpack_row(bytes, scheme.bits, &mut column);
        for (row, &zero) in column.iter().enumerate() {
            out[row * g + group] = zero;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The 3-bit words as GPTQModel documents them: v0…v9 and two bits of v10; the third bit of v10,
    /// v11…v20 and one bit of v21; two bits of v21 and v22…v31.
    #[test]
    fn three_bits_straddle_as_in_gptqmodel() {
        let codes: Vec<u8> = (0..32).map(|i| (i * 5 + 3) % 8).collect();
        let v = |i: usize| u32::from(codes[i]);
        let first = (0..10).fold(v(10) << 30, |word, i| word | v(i) << (3 * i));
        let second = (0..10).fold(v(10) >> 2 | v(21) << 31, |word, i| word | v(11 + i) << (3 * i + 1));
        let third = (0..10).fold(v(21) >> 1, |word, i| word | v(22 + i) << (3 * i + 2));
        let packed = pack_codes(&codes, 1, 32, 3);
        assert_eq!([0, 1, 2].map(|at| word(&packed, at)), [first, second, third]);
        assert_eq!(unpack_codes(&packed, 1, 32, 3), codes);
    }

    #[test]
    fn words_come_back_across_tiles_and_bands() {
        for bits in [2, 3, 4, 8] {
            for (n, k) in [(32, 32), (64, 96), (32, 160)] {
                let codes: Vec<u8> = (0..n * k).map(|i| (i * 7 % (1 << bits)) as u8).collect();
                assert_eq!(unpack_codes(&pack_codes(&codes, n, k, bits), n, k, bits), codes, "{bits} bits, {n}×{k}");
            }
        }
    }
}
