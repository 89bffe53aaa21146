//! The `fp8` layout: DeepSeek's blocks, and one static or dynamic scale per tensor.

use lite_quant::floats::{FloatFormat, FloatScheme, Grain, ScaleKind};
use lite_quant::{ActivationFormat, ActivationScale, ActivationScheme, LinearScheme, ScaleDtype, WeightScheme};
use serde_json::{Map, Value, json};

use crate::config::{distinct_overrides, names, no_kv_cache, unsupported, wrong};
use crate::floats::grid;
use crate::form::{Form, Single, is_static};
use crate::formed::Formed;
use crate::{ConfigFacts, PackError, ParsedConfig};

/// fp8 codes under f32 scales: `weight_scale_inv` (a multiplier, despite its name) per block, with inputs quantized by the
/// engine per token and block of channels; or one `weight_scale` per tensor, with an `input_scale` if
/// activations are static (vLLM 0.33, `quantization/fp8.py`; lmdeploy 0.16, `pytorch/nn/linear/blocked_fp8.py`).
pub(crate) struct Fp8;

const NAME: &str = "fp8";

impl Formed for Fp8 {
    const NAME: &'static str = NAME;
    const QUANT_METHOD: &'static str = NAME;
    const SUFFIXES: &'static [&'static str] = &["weight", "weight_scale_inv", "weight_scale", "input_scale"];
    const ONE_SCHEME: &'static str = "its config has one type and one block size for all of them";

    fn form(scheme: &LinearScheme, n: usize, k: usize) -> Result<Form, PackError> {
        let refused = |what, wanted| Err(PackError::Scheme { layout: NAME, what, wanted });
        let WeightScheme::Float(weights) = scheme.weights else { return refused("integer codes", "fp8 codes") };
        let FloatScheme { format, grain, scale: ScaleKind::Float(_) } = weights else {
            return refused("scales of this kind", "f32 scales");
        };
        let Some(ActivationScheme { format: ActivationFormat::Float(inputs), scale }) = scheme.activations else {
            return refused("inputs of 16 bits or integers", "fp8 inputs, since readers always quantize them");
        };
        let blocks = match (grain, scale) {
            (Grain::Block { columns, .. }, ActivationScale::DynamicGroup(width)) if columns == width => true,
            (Grain::Tensor, ActivationScale::StaticTensor | ActivationScale::DynamicToken) => false,
            _ => {
                let wanted = "blocks with inputs per token and as many channels, or one scale per tensor with inputs per token \
                              or static";
                return refused("scales shared like this", wanted);
            }
        };
        if inputs != format || format == FloatFormat::E2M1 || (format == FloatFormat::E5M2 && !blocks) {
            return refused("codes of this type", "e4m3, or e5m2 in blocks, for weights and inputs alike");
        }
        let (rows, columns) = grid(NAME, &weights, n, k)?;
        Ok(Form {
            layout: NAME,
            n,
            k,
            codes: "weight",
            scales: if blocks { "weight_scale_inv" } else { "weight_scale" },
            shapes: if blocks { vec![vec![rows, columns]] } else { vec![vec![1], Vec::new(), vec![1, 1]] },
            wide: Some(ScaleDtype::F32),
            zeros: "weight_zero_point",
            global: Single { suffix: "weight_global_scale", scalar: false, divisor: false },
            input: is_static(scheme.activations.as_ref()).then_some(Single {
                suffix: "input_scale",
                scalar: false,
                divisor: false,
            }),
            input_zero: None,
        })
    }

    fn config(&self, facts: &ConfigFacts) -> Result<Value, PackError> {
        no_kv_cache(NAME, facts)?;
        distinct_overrides(self, facts)?;
        Self::form(&facts.scheme, 1, 1)?;
        let WeightScheme::Float(weights) = facts.scheme.weights else {
            return Err(PackError::Scheme { layout: NAME, what: "integer codes", wanted: "fp8 codes" });
        };
        let mut config = json!({
            "quant_method": NAME,
            "fmt": if weights.format == FloatFormat::E5M2 { "e5m2" } else { "e4m3" },
            "activation_scheme": if is_static(facts.scheme.activations.as_ref()) { "static" } else { "dynamic" },
        });
        if let Grain::Block { rows, columns } = weights.grain {
            config["weight_block_size"] = json!([rows, columns]);
        }
        if !facts.ignored.is_empty() {
            // Transformers reads the first, vLLM and LMDeploy either.
            config["modules_to_not_convert"] = json!(facts.ignored);
            config["ignored_layers"] = json!(facts.ignored);
        }
        Ok(config)
    }

    fn parse(config: &Map<String, Value>) -> Result<ParsedConfig, PackError> {
        let choice = |key: &str, first: &'static str, second: &'static str| match config.get(key) {
            None | Some(Value::Null) => Ok(true),
            Some(Value::String(found)) if found == first => Ok(true),
            Some(Value::String(found)) if found == second => Ok(false),
            Some(other) => Err(unsupported(key, other, &format!("\"{first}\" or \"{second}\""))),
        };
        let format = if choice("fmt", "e4m3", "e5m2")? { FloatFormat::E4M3 } else { FloatFormat::E5M2 };
        let dynamic = choice("activation_scheme", "dynamic", "static")?;
        let (grain, scale) = match config.get("weight_block_size") {
            None | Some(Value::Null) if dynamic => (Grain::Tensor, ActivationScale::DynamicToken),
            None | Some(Value::Null) => (Grain::Tensor, ActivationScale::StaticTensor),
            Some(found) => {
                let size = |at: usize| found.get(at)?.as_u64().and_then(|size| usize::try_from(size).ok());
                match (size(0), size(1), found.get(2)) {
                    (Some(rows), Some(columns), None) if rows > 0 && columns > 0 => {
                        (Grain::Block { rows, columns }, ActivationScale::DynamicGroup(columns))
                    }
                    _ => return Err(wrong("weight_block_size", found, "two positive numbers")),
                }
            }
        };
        let weights = FloatScheme { format, grain, scale: ScaleKind::Float(ParsedConfig::UNKNOWN_SCALE_DTYPE) };
        let activations = Some(ActivationScheme { format: ActivationFormat::Float(format), scale });
        let scheme = LinearScheme { weights: weights.into(), activations };
        Self::form(&scheme, 1, 1)?;
        let mut ignored = names(config, "", "ignored_layers")?;
        if ignored.is_empty() {
            ignored = names(config, "", "modules_to_not_convert")?;
        }
        Ok(ParsedConfig { ignored, ..ParsedConfig::new(scheme) })
    }
}
