//! NVIDIA ModelOpt's unified Hugging Face layout, which TensorRT-LLM and vLLM read.

use lite_quant::floats::{FloatFormat, FloatScheme, Grain, ScaleKind};
use lite_quant::{ActivationFormat, ActivationScale, ActivationScheme, LinearScheme, ScaleDtype, WeightScheme};
use serde_json::{Map, Value, json};

use crate::config::{distinct_overrides, missing, names, unsupported, wrong};
use crate::floats::grid;
use crate::form::{Form, Single};
use crate::formed::Formed;
use crate::{ConfigFacts, KvCacheScheme, PackError, ParsedConfig};

/// `quant_algo` FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, NVFP4 and W4A16_NVFP4. All scales are multipliers; those of
/// fp8 and of whole tensors are f32, and the latter have no dimensions
/// (modelopt 0.47, `torch/export/quant_utils.py`; vLLM 0.33, `quantization/modelopt.py`).
pub(crate) struct ModelOpt;

const NAME: &str = "modelopt";

/// The schemes that the tool writes and both engines read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Algo {
    Fp8,
    ChannelToken,
    Block,
    Nvfp4,
    Nvfp4WeightOnly,
}

impl Algo {
    const ALL: [Self; 5] = [Self::Fp8, Self::ChannelToken, Self::Block, Self::Nvfp4, Self::Nvfp4WeightOnly];

    fn name(self) -> &'static str {
        match self {
            Self::Fp8 => "FP8",
            Self::ChannelToken => "FP8_PER_CHANNEL_PER_TOKEN",
            Self::Block => "FP8_PB_WO",
            Self::Nvfp4 => "NVFP4",
            Self::Nvfp4WeightOnly => "W4A16_NVFP4",
        }
    }

    fn scheme(self, dtype: ScaleDtype) -> LinearScheme {
        let e4m3 = |grain| FloatScheme { format: FloatFormat::E4M3, grain, scale: ScaleKind::Float(dtype) };
        let nvfp4 =
            FloatScheme { format: FloatFormat::E2M1, grain: Grain::Group(16), scale: ScaleKind::E4M3WithGlobal };
        let inputs = |format, scale| Some(ActivationScheme { format: ActivationFormat::Float(format), scale });
        let (weights, activations) = match self {
            Self::Fp8 => (e4m3(Grain::Tensor), inputs(FloatFormat::E4M3, ActivationScale::StaticTensor)),
            Self::ChannelToken => (e4m3(Grain::Channel), inputs(FloatFormat::E4M3, ActivationScale::DynamicToken)),
            Self::Block => (e4m3(Grain::Block { rows: 128, columns: 128 }), None),
            Self::Nvfp4 => (nvfp4, inputs(FloatFormat::E2M1, ActivationScale::StaticTensorLocal(16))),
            Self::Nvfp4WeightOnly => (nvfp4, None),
        };
        LinearScheme { weights: weights.into(), activations }
    }

    fn of(scheme: &LinearScheme) -> Result<Self, PackError> {
        let dtype = crate::schemes::scale_dtype(scheme).unwrap_or(ScaleDtype::F32);
        Self::ALL.into_iter().find(|algo| algo.scheme(dtype) == *scheme).ok_or(PackError::Scheme {
            layout: NAME,
            what: "this scheme",
            wanted: "static FP8 per tensor, FP8 per channel and token, FP8 weights in blocks of 128×128, or NVFP4 with or \
                     without quantized inputs",
        })
    }
}

impl Formed for ModelOpt {
    const NAME: &'static str = NAME;
    const QUANT_METHOD: &'static str = NAME;
    const SUFFIXES: &'static [&'static str] = &["weight", "weight_scale", "weight_scale_2", "input_scale"];
    const ONE_SCHEME: &'static str = "its config has one `quant_algo` for all of them (MIXED_PRECISION is not written)";
    /// AWQ and SVDQuant variants multiply the inputs by it.
    const MEANING_CHANGER: Option<(&'static str, &'static str)> =
        Some(("pre_quant_scale", "it scales the inputs, which is not read; export the model without it"));

    fn form(scheme: &LinearScheme, n: usize, k: usize) -> Result<Form, PackError> {
        let algo = Algo::of(scheme)?;
        let WeightScheme::Float(weights) = scheme.weights else {
            return Err(PackError::Scheme { layout: NAME, what: "integer codes", wanted: "fp8 or fp4 codes" });
        };
        let (rows, columns) = grid(NAME, &weights, n, k)?;
        if algo == Algo::Block && !k.is_multiple_of(128) {
            return Err(PackError::Shape { layout: NAME, n, k, rule: "K must be a multiple of 128 in FP8_PB_WO" });
        }
        let single = |suffix| Single { suffix, scalar: true, divisor: false };
        let shapes = match algo {
            Algo::Fp8 => vec![Vec::new(), vec![1]],
            Algo::ChannelToken => vec![vec![n], vec![n, 1]],
            Algo::Block => vec![vec![rows, 1, columns, 1], vec![rows, columns]],
            Algo::Nvfp4 | Algo::Nvfp4WeightOnly => vec![vec![rows, columns]],
        };
        Ok(Form {
            layout: NAME,
            n,
            k,
            codes: "weight",
            scales: "weight_scale",
            shapes,
            wide: Some(ScaleDtype::F32),
            zeros: "weight_zero_point",
            global: single("weight_scale_2"),
            input: matches!(algo, Algo::Fp8 | Algo::Nvfp4).then_some(single("input_scale")),
            input_zero: None,
        })
    }

    fn config(&self, facts: &ConfigFacts) -> Result<Value, PackError> {
        distinct_overrides(self, facts)?;
        let algo = Algo::of(&facts.scheme)?;
        let kv_cache = kv_cache(facts)?;
        let mut config = json!({
            "ignore": facts.ignored,
            "quant_algo": algo.name(),
            "producer": producer(),
            "quant_method": NAME,
        });
        if kv_cache.is_some() {
            config["kv_cache_scheme"] = json!({ "dynamic": false, "num_bits": 8, "type": "float" });
        }
        let args = |bits: u8| match bits {
            4 => json!({ "dynamic": false, "num_bits": 4, "type": "float", "group_size": 16 }),
            _ => json!({ "dynamic": false, "num_bits": 8, "type": "float" }),
        };
        let bits = if algo == Algo::Fp8 { 8 } else { 4 };
        if !matches!(algo, Algo::ChannelToken | Algo::Block) {
            let mut group = json!({ "weights": args(bits), "targets": ["Linear"] });
            if algo != Algo::Nvfp4WeightOnly {
                group["input_activations"] = args(bits);
            }
            config["config_groups"] = json!({ "group_0": group });
        }
        Ok(config)
    }

    /// `hf_quant_config.json`, where TensorRT-LLM looks.
    fn files(&self, facts: &ConfigFacts) -> Result<Vec<(&'static str, Value)>, PackError> {
        distinct_overrides(self, facts)?;
        let algo = Algo::of(&facts.scheme)?;
        let mut quantization = json!({
            "quant_algo": algo.name(),
            "kv_cache_quant_algo": kv_cache(facts)?,
            "exclude_modules": facts.ignored,
        });
        if matches!(algo, Algo::Nvfp4 | Algo::Nvfp4WeightOnly) {
            quantization["group_size"] = json!(16);
        }
        Ok(vec![("hf_quant_config.json", json!({ "producer": producer(), "quantization": quantization }))])
    }

    /// Reads both forms: that of `config.json` and that of `hf_quant_config.json`, whose keys are in `quantization`.
    fn parse(config: &Map<String, Value>) -> Result<ParsedConfig, PackError> {
        let inner = config.get("quantization").and_then(Value::as_object).unwrap_or(config);
        let known = || Algo::ALL.map(|algo| format!("{:?}", algo.name())).join(" or ");
        let algo = match inner.get("quant_algo") {
            Some(Value::String(name)) => Algo::ALL
                .into_iter()
                .find(|algo| algo.name().eq_ignore_ascii_case(name))
                .ok_or_else(|| unsupported("quant_algo", &json!(name), &known()))?,
            Some(other) => return Err(wrong("quant_algo", other, &known())),
            None => return Err(missing("quant_algo", &known())),
        };
        let mut ignored = names(inner, "", "ignore")?;
        if ignored.is_empty() {
            ignored = names(inner, "", "exclude_modules")?;
        }
        let kv_cache = match (inner.get("kv_cache_quant_algo"), inner.get("kv_cache_scheme")) {
            (None | Some(Value::Null), None | Some(Value::Null)) => None,
            (Some(Value::String(name)), _) if name.eq_ignore_ascii_case("FP8") => Some(KvCacheScheme::Fp8Tensor),
            (Some(found), _) if !found.is_null() => return Err(unsupported("kv_cache_quant_algo", found, "\"FP8\"")),
            (_, Some(args)) => {
                let is = |key: &str, wanted: Value| args.get(key).is_none_or(|found| *found == wanted);
                if !(is("num_bits", json!(8)) && is("type", json!("float")) && is("dynamic", json!(false))) {
                    return Err(unsupported("kv_cache_scheme", args, "static fp8"));
                }
                Some(KvCacheScheme::Fp8Tensor)
            }
            _ => None,
        };
        let scheme = algo.scheme(ParsedConfig::UNKNOWN_SCALE_DTYPE);
        Ok(ParsedConfig { ignored, kv_cache, ..ParsedConfig::new(scheme) })
    }
}

fn producer() -> Value {
    json!({ "name": "lite", "version": env!("CARGO_PKG_VERSION") })
}

/// `kv_cache_quant_algo`.
fn kv_cache(facts: &ConfigFacts) -> Result<Option<&'static str>, PackError> {
    match facts.kv_cache {
        None => Ok(None),
        Some(KvCacheScheme::Fp8Tensor) => Ok(Some("FP8")),
        Some(KvCacheScheme::Fp8Head) => Err(PackError::Scheme {
            layout: NAME,
            what: "a key/value cache with scales per head",
            wanted: "one scale per tensor",
        }),
    }
}
