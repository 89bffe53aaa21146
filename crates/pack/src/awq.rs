use lite_quant::{ActivationScheme, InputQuantization, LinearScheme, QuantizedLinear, Scheme, Weights};
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::config::{boolean, distinct_overrides, integer, names, no_kv_cache, unsupported};
use crate::layout::{Layout, PackedTensor, TensorRef, TensorSpec, Unpacked};
use crate::schemes::{weight_only, weight_only_linear};
use crate::tensors::{
    Reader, SCALE_DTYPES, WORD_DTYPES, check_symmetry, check_weight, decode_scales, dtype_of, encode_scales, groups,
    word,
};
use crate::{ConfigFacts, PackError, ParsedConfig};

/// AutoAWQ's `gemm` layout: 4-bit codes of eight neighbouring **output** channels in one word, input
/// channels as rows.
///
/// Zero points are always written (8 when the scheme is symmetric) and `zero_point` is always true:
/// LMDeploy has no synthesis of absent `qzeros`, and vLLM's Marlin kernel for this layout has only the
/// type with zero points. A symmetric scheme therefore reads back as an asymmetric one whose zero
/// points happen to be 8; the dequantized weights are the same.
pub(crate) struct Awq;

const NAME: &str = "awq";
const PER_WORD: usize = 8;
/// Nibble `i` of a word holds the output channel `8c + ORDER[i]` (AutoAWQ, `WQLinear_GEMM.from_linear`).
const ORDER: [usize; PER_WORD] = [0, 2, 4, 6, 1, 3, 5, 7];
/// Input channels packed at a time: one cache line of a row of codes.
const TILE: usize = 64;
/// Output channels unpacked at a time: the words of one cache line.
const BAND: usize = 16 * PER_WORD;

impl Layout for Awq {
    fn name(&self) -> &'static str {
        NAME
    }

    fn quant_method(&self) -> &'static str {
        NAME
    }

    fn suffixes(&self) -> &'static [&'static str] {
        &["qweight", "scales", "qzeros"]
    }

    fn check(&self, scheme: &LinearScheme, n: usize, k: usize) -> Result<(), PackError> {
        let scheme = weight_only(NAME, scheme)?;
        check(scheme, n, k).map(|_| ())
    }

    fn describe(&self, scheme: &LinearScheme, n: usize, k: usize) -> Result<Vec<TensorSpec>, PackError> {
        let scheme = weight_only(NAME, scheme)?;
        let g = check(scheme, n, k)?;
        Ok(vec![
            TensorSpec { suffix: "qweight", dtype: Dtype::I32, shape: vec![k, n / PER_WORD] },
            TensorSpec { suffix: "scales", dtype: dtype_of(scheme.scale_dtype), shape: vec![g, n] },
            TensorSpec { suffix: "qzeros", dtype: Dtype::I32, shape: vec![g, n / PER_WORD] },
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
            pack_words(&weight.codes, n, k),
            encode_scales(scales, scheme.scale_dtype, n * g),
            pack_words(&weight.zeros, n, g),
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
        let qweight = reader.tensor("qweight", WORD_DTYPES, &[k, n / PER_WORD])?;
        let qzeros = reader.tensor("qzeros", WORD_DTYPES, &[g, n / PER_WORD])?;
        let (scale_dtype, by_group) = decode_scales("scales", reader.tensor("scales", SCALE_DTYPES, &[g, n])?)?;
        let zeros = unpack_words(qzeros.data, n, g);
        check_symmetry("qzeros", scheme, &zeros, g)?;
        let scales = (0..n).flat_map(|row| (0..g).map(move |group| group * n + row)).map(|at| by_group[at]).collect();
        let linear = QuantizedLinear {
            scheme: Scheme { scale_dtype, ..*scheme },
            out_features: n,
            in_features: k,
            codes: unpack_words(qweight.data, n, k),
            scales,
            zeros,
        };
        Ok(Weights::Int(linear).into())
    }

    fn mixes(&self, _common: &LinearScheme, _other: &LinearScheme) -> Result<(), &'static str> {
        Err("its config has one number of bits and one group size for all of them")
    }

    fn quantization_config(&self, facts: &ConfigFacts) -> Result<Value, PackError> {
        let scheme = weight_only(NAME, &facts.scheme)?;
        no_kv_cache(NAME, facts)?;
        distinct_overrides(self, facts)?;
        let mut config = json!({
            "quant_method": NAME,
            "version": "gemm",
            "bits": scheme.bits,
            "group_size": scheme.group_size.to_flag(),
            "zero_point": true,
        });
        if facts.lm_head.is_some() {
            // vLLM quantizes the head only if told to.
            config["lm_head"] = Value::Bool(true);
        }
        if !facts.ignored.is_empty() {
            config["modules_to_not_convert"] = json!(facts.ignored);
        }
        Ok(config)
    }

    fn parse_config(&self, config: &Map<String, Value>) -> Result<ParsedConfig, PackError> {
        // Transformers takes an absent version for `gemm`.
        match config.get("version") {
            None | Some(Value::Null) => {}
            Some(Value::String(version)) if version.eq_ignore_ascii_case("gemm") => {}
            Some(other) => return Err(unsupported("version", other, "\"gemm\"")),
        }
        // The second names are those of llm-awq's own files.
        let bits = integer(config, "", &["bits", "w_bit"])?;
        if bits != 4 {
            return Err(unsupported("bits", &json!(bits), "4"));
        }
        let group_size = integer(config, "", &["group_size", "q_group_size"])?;
        let symmetric = !boolean(config, "", "zero_point", None)?;
        let scheme = Scheme::new(bits, group_size, symmetric, ParsedConfig::UNKNOWN_SCALE_DTYPE)?;
        let ignored = names(config, "", "modules_to_not_convert")?;
        Ok(ParsedConfig { ignored, ..ParsedConfig::new(scheme.into()) })
    }
}

/// Groups in a row, if the layout can hold the weight.
fn check(scheme: &Scheme, n: usize, k: usize) -> Result<usize, PackError> {
    let groups = groups(NAME, scheme, n, k)?;
    if scheme.bits != 4 {
        return Err(PackError::Bits { layout: NAME, found: scheme.bits, wanted: "4 bits only" });
    }
    if !n.is_multiple_of(PER_WORD) {
        return Err(PackError::Shape { layout: NAME, n, k, rule: "N must be a multiple of 8" });
    }
    Ok(groups)
}

/// `[n, width]` nibbles, row-major, as little-endian words `[width, n / 8]`.
fn pack_words(values: &[u8], n: usize, width: usize) -> Vec<u8> {
    let columns = n / PER_WORD;
    let mut out = vec![0u8; width * columns * 4];
    out.par_chunks_mut((TILE * columns * 4).max(1)).enumerate().for_each(|(tile, out)| {
        let start = tile * TILE;
        let len = (width - start).min(TILE);
        for column in 0..columns {
            let rows = ORDER.map(|channel| {
                let at = (column * PER_WORD + channel) * width + start;
                &values[at..at + len]
            });
            for i in 0..len {
                let word = rows.iter().rev().fold(0u32, |word, row| word << 4 | u32::from(row[i]));
                out[(i * columns + column) * 4..][..4].copy_from_slice(&word.to_le_bytes());
            }
        }
    });
    out
}

/// The inverse of [`pack_words`], of `4 · width · n / 8` bytes.
fn unpack_words(data: &[u8], n: usize, width: usize) -> Vec<u8> {
    let columns = n / PER_WORD;
    let mut out = vec![0u8; n * width];
    out.par_chunks_mut((BAND * width).max(1)).enumerate().for_each(|(band, out)| {
        let first = band * BAND / PER_WORD;
        for i in 0..width {
            for column in 0..out.len() / width / PER_WORD {
                let word = word(data, i * columns + first + column);
                for (nibble, channel) in ORDER.iter().enumerate() {
                    out[(column * PER_WORD + channel) * width + i] = (word >> (4 * nibble) & 15) as u8;
                }
            }
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Output channels 0..8 hold codes 0..8; AutoAWQ interleaves even channels below odd ones.
    #[test]
    fn eight_channels_interleave_as_in_autoawq() {
        let codes: Vec<u8> = (0..8).collect();
        assert_eq!(word(&pack_words(&codes, 8, 1), 0), 0x7531_6420);
        assert_eq!(unpack_words(&0x7531_6420u32.to_le_bytes(), 8, 1), codes);
    }

    #[test]
    fn words_come_back_across_tiles_and_bands() {
        for (n, width) in [(8, 1), (16, 63), (136, 65), (264, 130)] {
            let values: Vec<u8> = (0..n * width).map(|i| (i * 7 % 16) as u8).collect();
            assert_eq!(unpack_words(&pack_words(&values, n, width), n, width), values, "{n}×{width}");
        }
    }
}
