//! LMDeploy's own 8-bit layout (`lmdeploy lite smooth_quant`).

use lite_quant::floats::{FloatFormat, FloatScheme, Grain, ScaleKind};
use lite_quant::{
    ActivationFormat, ActivationScale, ActivationScheme, GroupSize, LinearScheme, ScaleDtype, Scheme, WeightScheme,
};
use serde_json::{Map, Value, json};

use crate::config::{distinct_overrides, names, no_kv_cache, unsupported};
use crate::floats::grid;
use crate::form::{Form, Single};
use crate::formed::Formed;
use crate::tensors::groups;
use crate::{ConfigFacts, PackError, ParsedConfig};

/// int8, e4m3 or e5m2 codes, one f32 scale per output channel, inputs quantized per token by the engine
/// (lmdeploy 0.16, `pytorch/models/q_modules.py`: `QLinear`). Only LMDeploy's PyTorch engine reads it.
pub(crate) struct LmdeployW8a8;

const NAME: &str = "lmdeploy-w8a8";

/// `quant_dtype` and what it means.
fn dtype_name(scheme: &LinearScheme) -> Option<&'static str> {
    let dynamic =
        |wanted| scheme.activations == Some(ActivationScheme { format: wanted, scale: ActivationScale::DynamicToken });
    match scheme.weights {
        WeightScheme::Int(Scheme { bits: 8, group_size: GroupSize::Channel, symmetric: true, .. }) => {
            dynamic(ActivationFormat::Int { bits: 8, symmetric: true }).then_some("int8")
        }
        WeightScheme::Float(FloatScheme { format, grain: Grain::Channel, scale: ScaleKind::Float(_) }) => {
            let name = match format {
                FloatFormat::E4M3 => "float8_e4m3fn",
                FloatFormat::E5M2 => "float8_e5m2",
                FloatFormat::E2M1 => return None,
            };
            dynamic(ActivationFormat::Float(format)).then_some(name)
        }
        _ => None,
    }
}

impl Formed for LmdeployW8a8 {
    const NAME: &'static str = NAME;
    const QUANT_METHOD: &'static str = "smooth_quant";
    const SUFFIXES: &'static [&'static str] = &["weight", "scale"];
    const ONE_SCHEME: &'static str = "its config has one `quant_dtype` for all of them";

    fn form(scheme: &LinearScheme, n: usize, k: usize) -> Result<Form, PackError> {
        if dtype_name(scheme).is_none() {
            let wanted = "symmetric int8, e4m3 or e5m2 weights with one scale per output channel, and inputs of the same \
                          type per token";
            return Err(PackError::Scheme { layout: NAME, what: "this scheme", wanted });
        }
        match &scheme.weights {
            WeightScheme::Int(int) => groups(NAME, int, n, k).map(|_| ())?,
            WeightScheme::Float(float) => grid(NAME, float, n, k).map(|_| ())?,
        }
        Ok(Form {
            layout: NAME,
            n,
            k,
            codes: "weight",
            scales: "scale",
            shapes: vec![vec![n, 1], vec![n]],
            wide: Some(ScaleDtype::F32),
            zeros: "zero_point",
            global: Single { suffix: "global_scale", scalar: false, divisor: false },
            input: None,
            input_zero: None,
        })
    }

    fn config(&self, facts: &ConfigFacts) -> Result<Value, PackError> {
        no_kv_cache(NAME, facts)?;
        distinct_overrides(self, facts)?;
        Self::form(&facts.scheme, 1, 1)?;
        let mut config = json!({ "quant_method": "smooth_quant", "quant_dtype": dtype_name(&facts.scheme) });
        if !facts.ignored.is_empty() {
            config["modules_to_not_convert"] = json!(facts.ignored);
        }
        Ok(config)
    }

    fn parse(config: &Map<String, Value>) -> Result<ParsedConfig, PackError> {
        let found = config.get("quant_dtype").filter(|value| !value.is_null());
        let scale_dtype = ParsedConfig::UNKNOWN_SCALE_DTYPE;
        let float = |format| {
            let weights = FloatScheme { format, grain: Grain::Channel, scale: ScaleKind::Float(scale_dtype) };
            (WeightScheme::Float(weights), ActivationFormat::Float(format))
        };
        let (weights, format) = match found.map(|value| value.as_str().unwrap_or("?")) {
            None | Some("int8") => {
                let weights = Scheme { bits: 8, group_size: GroupSize::Channel, symmetric: true, scale_dtype };
                (weights.into(), ActivationFormat::Int { bits: 8, symmetric: true })
            }
            Some("fp8" | "float8_e4m3fn") => float(FloatFormat::E4M3),
            Some("float8_e5m2") => float(FloatFormat::E5M2),
            Some(_) => {
                let wanted = "\"int8\", \"float8_e4m3fn\" or \"float8_e5m2\"";
                return Err(unsupported("quant_dtype", found.unwrap_or(&Value::Null), wanted));
            }
        };
        let activations = Some(ActivationScheme { format, scale: ActivationScale::DynamicToken });
        let ignored = names(config, "", "modules_to_not_convert")?;
        Ok(ParsedConfig { ignored, ..ParsedConfig::new(LinearScheme { weights, activations }) })
    }
}
