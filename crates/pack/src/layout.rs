use lite_quant::{ActivationScheme, GroupSize, InputQuantization, LinearScheme, Weights};
use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::awq::Awq;
use crate::compressed_tensors::CompressedTensors;
use crate::fp8::Fp8;
use crate::gptq::Gptq;
use crate::lmdeploy_w8a8::LmdeployW8a8;
use crate::modelopt::ModelOpt;
use crate::{ConfigFacts, PackError, ParsedConfig};

/// Name, type and shape of one tensor of a packed linear, known before any maths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// The name after `<module>.`.
    pub suffix: &'static str,
    /// Element type in the file.
    pub dtype: Dtype,
    /// Row-major shape.
    pub shape: Vec<usize>,
}

/// One tensor of a packed linear, ready to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedTensor {
    /// The name after `<module>.`.
    pub suffix: &'static str,
    /// Element type in the file.
    pub dtype: Dtype,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Little-endian elements.
    pub data: Vec<u8>,
}

/// A borrowed view of one tensor of a checkpoint. Nothing about it is trusted.
#[derive(Debug, Clone, Copy)]
pub struct TensorRef<'a> {
    /// Element type.
    pub dtype: Dtype,
    /// Row-major shape.
    pub shape: &'a [usize],
    /// Little-endian elements.
    pub data: &'a [u8],
}

/// What the tensors of one linear hold.
#[derive(Debug, Clone, PartialEq)]
pub struct Unpacked {
    /// The weight.
    pub weights: Weights,
    /// The scale of its inputs, with static activations.
    pub input: Option<InputQuantization>,
}

impl From<Weights> for Unpacked {
    fn from(weights: Weights) -> Self {
        Self { weights, input: None }
    }
}

/// A way to store a quantized linear in a checkpoint. N is the number of output features, K of
/// input features, G of groups in a row.
pub trait Layout: Sync {
    /// The name on the command line.
    fn name(&self) -> &'static str;

    /// `quant_method` in the config.
    fn quant_method(&self) -> &'static str;

    /// Every suffix that a packed linear may have in this layout.
    fn suffixes(&self) -> &'static [&'static str];

    /// Whether the layout can hold a weight `[n, k]` of this scheme.
    ///
    /// # Errors
    /// [`PackError::Scheme`], [`PackError::Bits`], [`PackError::Shape`], [`PackError::Quant`] (K is not a
    /// whole number of groups) or [`PackError::TooLarge`].
    fn check(&self, scheme: &LinearScheme, n: usize, k: usize) -> Result<(), PackError>;

    /// The tensors that [`pack`](Self::pack) makes, in the same order.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    fn describe(&self, scheme: &LinearScheme, n: usize, k: usize) -> Result<Vec<TensorSpec>, PackError>;

    /// Packs codes, scales and zero points, and the scale of the inputs where `activations` are static. Rows are packed in parallel; the bytes do not depend on
    /// the number of threads.
    ///
    /// # Errors
    /// As [`check`](Self::check), [`PackError::Input`] if static activations have no `input` or others have
    /// one, and [`PackError::Quant`] or [`PackError::Value`] if the weight breaks its own invariants: lengths, codes above `2^bits − 1`, zero points of a symmetric scheme that
    /// are not in the middle, scales that are not finite or not representable in the scale type.
    fn pack(
        &self,
        weights: &Weights,
        activations: Option<&ActivationScheme>,
        input: Option<&InputQuantization>,
    ) -> Result<Vec<PackedTensor>, PackError>;

    /// Unpacks a weight `[n, k]` from tensors found by suffix. The scale type of the result is the
    /// one in the file; that of `scheme` is not read.
    ///
    /// # Errors
    /// As [`check`](Self::check), and [`PackError::Missing`], [`PackError::Unexpected`],
    /// [`PackError::Dtype`], [`PackError::TensorShape`], [`PackError::ByteLength`],
    /// [`PackError::PaddedPacking`], [`PackError::AmbiguousZeros`] or [`PackError::Value`], each naming
    /// the suffix.
    fn unpack<'a>(
        &self,
        scheme: &LinearScheme,
        n: usize,
        k: usize,
        get: &dyn Fn(&str) -> Option<TensorRef<'a>>,
    ) -> Result<Unpacked, PackError>;

    /// Whether one checkpoint can hold linears of `other` beside those of the `common` scheme.
    ///
    /// # Errors
    /// What is in the way, in words.
    fn mixes(&self, common: &LinearScheme, other: &LinearScheme) -> Result<(), &'static str>;

    /// The value of `quantization_config` for `config.json`.
    ///
    /// # Errors
    /// [`PackError::Override`] if a module has another scheme and the layout takes one only.
    fn quantization_config(&self, facts: &ConfigFacts) -> Result<Value, PackError>;

    /// Files beside `config.json` that readers of this layout look for: name and content.
    ///
    /// # Errors
    /// As [`quantization_config`](Self::quantization_config).
    fn side_files(&self, facts: &ConfigFacts) -> Result<Vec<(&'static str, Value)>, PackError> {
        let _ = facts;
        Ok(Vec::new())
    }

    /// Reads a `quantization_config` of this layout.
    ///
    /// # Errors
    /// [`PackError::Config`] or [`PackError::UnsupportedConfig`], naming the key.
    fn parse_config(&self, config: &Map<String, Value>) -> Result<ParsedConfig, PackError>;

    /// The same layout with what this config says of the tensors, `None` if it says nothing that
    /// [`unpack`](Self::unpack) needs. [`detect`](crate::detect) returns it.
    ///
    /// # Errors
    /// As [`parse_config`](Self::parse_config).
    fn reader(&self, config: &Map<String, Value>) -> Result<Option<&'static dyn Layout>, PackError> {
        let _ = config;
        Ok(None)
    }
}

impl std::fmt::Debug for dyn Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

static LAYOUTS: [&dyn Layout; 6] = [&Awq, &CompressedTensors, &Gptq::WRITTEN, &LmdeployW8a8, &Fp8, &ModelOpt];

/// Every layout, in the order of the documentation.
pub fn all() -> &'static [&'static dyn Layout] {
    &LAYOUTS
}

/// The layout of this name.
pub fn layout(name: &str) -> Option<&'static dyn Layout> {
    LAYOUTS.iter().copied().find(|layout| layout.name() == name)
}

/// The layout for a scheme when no engine is named: `awq` where every engine reads it (4 bits,
/// groups of 128, asymmetric), else `compressed-tensors`, or
/// the one that has e5m2.
pub fn default_layout(scheme: &LinearScheme) -> &'static str {
    match (scheme.weights.int(), scheme.activations) {
        (Some(int), None) if int.bits == 4 && int.group_size == GroupSize::Channels(128) && !int.symmetric => "awq",
        _ => crate::targets::plain_layout(scheme),
    }
}

#[cfg(test)]
mod tests {
    use lite_quant::{ScaleDtype, Scheme};

    use super::*;

    #[test]
    fn layouts_are_found_by_name() {
        for known in all() {
            assert_eq!(layout(known.name()).map(Layout::name), Some(known.name()));
        }
        assert!(layout("gptq-v9").is_none());
    }

    #[test]
    fn awq_is_the_default_only_for_its_native_scheme() {
        let scheme = |bits, group, symmetric| Scheme::new(bits, group, symmetric, ScaleDtype::F16).unwrap().into();
        assert_eq!(default_layout(&scheme(4, 128, false)), "awq");
        for other in [scheme(4, 128, true), scheme(4, 64, false), scheme(8, 128, false), scheme(4, -1, false)] {
            assert_eq!(default_layout(&other), "compressed-tensors", "{other:?}");
        }
    }
}
