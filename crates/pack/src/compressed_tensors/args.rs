//! `QuantizationArgs`, the object that says how weights, inputs or the key/value cache are quantized, both ways
//! (compressed-tensors 0.19, `quantization/quant_args.py`).

use lite_quant::floats::{FloatFormat, FloatScheme, Grain, ScaleKind};
use lite_quant::{ActivationFormat, ActivationScale, ActivationScheme, GroupSize, Scheme, WeightScheme};
use serde_json::{Map, Value, json};

use crate::config::{boolean, integer, join, unsupported, wrong};
use crate::{KvCacheScheme, PackError, ParsedConfig};

const E4M3: &str = "torch.float8_e4m3fn";
const E8M0: &str = "torch.uint8";
const INT8: &str = "torch.int8";

/// What differs between one object and the next.
struct Args {
    bits: u8,
    kind: &'static str,
    symmetric: bool,
    strategy: &'static str,
    group_size: Option<usize>,
    block: Option<[usize; 2]>,
    dynamic: Value,
    scale_dtype: Option<&'static str>,
    observer: Option<&'static str>,
    actorder: Option<&'static str>,
}

impl Args {
    fn new(bits: u8, kind: &'static str, strategy: &'static str) -> Self {
        Self {
            bits,
            kind,
            symmetric: true,
            strategy,
            group_size: None,
            block: None,
            dynamic: Value::Bool(false),
            scale_dtype: None,
            observer: None,
            actorder: None,
        }
    }

    fn json(&self) -> Value {
        json!({
            "actorder": self.actorder,
            "block_structure": self.block,
            "dynamic": self.dynamic,
            "group_size": self.group_size,
            "num_bits": self.bits,
            "observer": self.observer,
            "observer_kwargs": {},
            "scale_dtype": self.scale_dtype,
            "strategy": self.strategy,
            "symmetric": self.symmetric,
            "type": self.kind,
            "zp_dtype": (!self.symmetric).then_some(INT8),
        })
    }
}

pub(super) fn weights(scheme: &WeightScheme, act_order: bool) -> Value {
    let mut args = match *scheme {
        WeightScheme::Int(Scheme { bits, group_size, symmetric, .. }) => {
            let args = match group_size {
                GroupSize::Channel => Args::new(bits, "int", "channel"),
                GroupSize::Channels(width) => Args { group_size: Some(width), ..Args::new(bits, "int", "group") },
            };
            Args { symmetric, ..args }
        }
        WeightScheme::Float(FloatScheme { format, grain, scale }) => {
            let args = |strategy| Args::new(format.bits(), "float", strategy);
            let args = match grain {
                Grain::Tensor => args("tensor"),
                Grain::Channel => args("channel"),
                Grain::Group(width) if scale == ScaleKind::E4M3WithGlobal => {
                    Args { group_size: Some(width), ..args("tensor_group") }
                }
                Grain::Group(width) => Args { group_size: Some(width), ..args("group") },
                Grain::Block { rows, columns } => Args { block: Some([rows, columns]), ..args("block") },
            };
            let scale_dtype = match scale {
                ScaleKind::Float(_) => None,
                ScaleKind::E8M0 => Some(E8M0),
                ScaleKind::E4M3WithGlobal => Some(E4M3),
            };
            Args { scale_dtype, ..args }
        }
    };
    args.actorder = act_order.then_some("static");
    args.json()
}

pub(super) fn activations(scheme: &ActivationScheme) -> Value {
    let (bits, kind, symmetric) = match scheme.format {
        ActivationFormat::Int { bits, symmetric } => (bits, "int", symmetric),
        ActivationFormat::Float(format) => (format.bits(), "float", true),
    };
    let args = |strategy| Args { symmetric, ..Args::new(bits, kind, strategy) };
    let dynamic = Value::Bool(true);
    let found = Some("static_minmax");
    match scheme.scale {
        ActivationScale::DynamicToken => Args { dynamic, ..args("token") },
        ActivationScale::DynamicGroup(width) => Args { dynamic, group_size: Some(width), ..args("group") },
        ActivationScale::DynamicMx(width) => {
            Args { dynamic, group_size: Some(width), scale_dtype: Some(E8M0), ..args("group") }
        }
        ActivationScale::StaticTensor => Args { observer: found, ..args("tensor") },
        ActivationScale::StaticTensorLocal(width) => Args {
            dynamic: json!("local"),
            group_size: Some(width),
            scale_dtype: Some(E4M3),
            observer: found,
            ..args("tensor_group")
        },
    }
    .json()
}

pub(super) fn kv_cache(scheme: KvCacheScheme) -> Value {
    let strategy = match scheme {
        KvCacheScheme::Fp8Tensor => "tensor",
        KvCacheScheme::Fp8Head => "attn_head",
    };
    Args::new(8, "float", strategy).json()
}

/// An object as it was read, with the library's defaults for what is absent.
struct Found<'c> {
    bits: i64,
    float: bool,
    symmetric: bool,
    strategy: String,
    group_size: Option<i64>,
    /// `true`, `false` or `"local"`.
    dynamic: &'c str,
    scale_dtype: Option<&'c str>,
}

fn read<'c>(args: &'c Map<String, Value>, path: &str) -> Result<Found<'c>, PackError> {
    let text = |key: &str| match args.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str())),
        Some(other) => Err(wrong(&join(path, key), other, "a string")),
    };
    let float = match text("type")?.map(str::to_ascii_lowercase).as_deref() {
        None | Some("int") => false,
        Some("float") => true,
        Some(other) => return Err(unsupported(&join(path, "type"), &json!(other), "\"int\" or \"float\"")),
    };
    match args.get("actorder") {
        None | Some(Value::Null | Value::Bool(false)) => {}
        // These reorder columns while solving only; the stored order is the natural one.
        Some(Value::String(order)) if order == "weight" || order == "static" => {}
        Some(other) => return Err(unsupported(&join(path, "actorder"), other, "null, \"weight\" or \"static\"")),
    }
    let dynamic = match args.get("dynamic") {
        None | Some(Value::Null | Value::Bool(false)) => "false",
        Some(Value::Bool(true)) => "true",
        Some(Value::String(local)) if local == "local" => "local",
        Some(other) => return Err(wrong(&join(path, "dynamic"), other, "true, false or \"local\"")),
    };
    let group_size = match args.get("group_size") {
        None | Some(Value::Null) => None,
        Some(value) => {
            Some(value.as_i64().ok_or_else(|| wrong(&join(path, "group_size"), value, "an integer or null"))?)
        }
    };
    let strategy = match (text("strategy")?, group_size) {
        (Some(strategy), _) => strategy.to_ascii_lowercase(),
        (None, Some(-1)) => "channel".to_owned(),
        (None, Some(_)) => "group".to_owned(),
        (None, None) if dynamic == "true" => "token".to_owned(),
        (None, None) => "tensor".to_owned(),
    };
    let bits = if args.contains_key("num_bits") { integer(args, path, &["num_bits"])? } else { 8 };
    // Old releases write the name without the module.
    let scale_dtype = text("scale_dtype")?.map(|dtype| dtype.trim_start_matches("torch."));
    let symmetric = boolean(args, path, "symmetric", Some(true))?;
    Ok(Found { bits, float, symmetric, strategy, group_size, dynamic, scale_dtype })
}

impl Found<'_> {
    /// The positive group size that the strategy asks for.
    fn width(&self, path: &str) -> Result<usize, PackError> {
        let found = self.group_size.and_then(|width| usize::try_from(width).ok()).filter(|width| *width > 0);
        found.ok_or_else(|| wrong(&join(path, "group_size"), &json!(self.group_size), "a positive number"))
    }

    /// e4m3 for 8 bits and e2m1 for 4.
    fn float_format(&self, path: &str) -> Result<FloatFormat, PackError> {
        if !self.symmetric {
            return Err(unsupported(&join(path, "symmetric"), &json!(false), "true, since the codes are floats"));
        }
        match self.bits {
            8 => Ok(FloatFormat::E4M3),
            4 => Ok(FloatFormat::E2M1),
            other => Err(unsupported(&join(path, "num_bits"), &json!(other), "8 or 4, since the codes are floats")),
        }
    }
}

pub(super) fn parse_weights(args: &Map<String, Value>, path: &str) -> Result<WeightScheme, PackError> {
    let found = read(args, path)?;
    if found.dynamic != "false" {
        return Err(unsupported(&join(path, "dynamic"), &args["dynamic"], "false"));
    }
    let strategy = |wanted: &str| unsupported(&join(path, "strategy"), &json!(found.strategy), wanted);
    let dtype = ParsedConfig::UNKNOWN_SCALE_DTYPE;
    if !found.float {
        let group_size = match (found.strategy.as_str(), found.group_size) {
            ("channel", None | Some(-1)) => -1,
            ("group", _) => found.width(path)? as i64,
            ("channel", other) => return Err(wrong(&join(path, "group_size"), &json!(other), "null or -1")),
            _ => return Err(strategy("\"group\" or \"channel\"")),
        };
        return Ok(Scheme::new(found.bits, group_size, found.symmetric, dtype)?.into());
    }
    let format = found.float_format(path)?;
    let grain = match found.strategy.as_str() {
        "tensor" => Grain::Tensor,
        "channel" => Grain::Channel,
        "group" | "tensor_group" => Grain::Group(found.width(path)?),
        "block" => block(args, path)?,
        _ => return Err(strategy("\"tensor\", \"channel\", \"group\", \"tensor_group\" or \"block\"")),
    };
    let scale = match (format, grain, found.scale_dtype) {
        (FloatFormat::E2M1, Grain::Group(16), None | Some("float8_e4m3fn")) => ScaleKind::E4M3WithGlobal,
        (FloatFormat::E2M1, Grain::Group(32), None | Some("uint8")) => ScaleKind::E8M0,
        (FloatFormat::E4M3, Grain::Group(32), Some("uint8")) => ScaleKind::E8M0,
        (FloatFormat::E4M3, _, dtype) if dtype.is_none_or(|dtype| dtype.contains("float") && !dtype.contains('8')) => {
            ScaleKind::Float(ParsedConfig::UNKNOWN_SCALE_DTYPE)
        }
        (FloatFormat::E2M1, Grain::Group(16 | 32), Some(other)) | (FloatFormat::E4M3, _, Some(other)) => {
            let wanted = "the type of fp8 (null), MX (\"torch.uint8\") or NVFP4 (\"torch.float8_e4m3fn\")";
            return Err(unsupported(&join(path, "scale_dtype"), &json!(other), wanted));
        }
        _ => {
            let wanted = "16 (NVFP4) or 32 (MXFP4), since the codes have the type float of 4 bits";
            return Err(unsupported(&join(path, "group_size"), &json!(found.group_size), wanted));
        }
    };
    Ok(FloatScheme { format, grain, scale }.into())
}

/// `[rows, columns]`, or `"128x128"` as old releases wrote it.
fn block(args: &Map<String, Value>, path: &str) -> Result<Grain, PackError> {
    let found = args.get("block_structure").unwrap_or(&Value::Null);
    let sizes: Option<Vec<usize>> = match found {
        Value::Array(sizes) => {
            sizes.iter().map(|size| size.as_u64().and_then(|size| usize::try_from(size).ok())).collect()
        }
        Value::String(sizes) => sizes.split('x').map(|size| size.trim().parse().ok()).collect(),
        _ => None,
    };
    match sizes.as_deref() {
        Some(&[rows, columns]) if rows > 0 && columns > 0 => Ok(Grain::Block { rows, columns }),
        _ => Err(wrong(&join(path, "block_structure"), found, "two positive numbers")),
    }
}

pub(super) fn parse_activations(args: &Map<String, Value>, path: &str) -> Result<ActivationScheme, PackError> {
    let found = read(args, path)?;
    let format = match (found.float, found.bits) {
        (true, _) => ActivationFormat::Float(found.float_format(path)?),
        (false, bits @ (4 | 8)) => ActivationFormat::Int { bits: bits as u8, symmetric: found.symmetric },
        (false, bits) => return Err(unsupported(&join(path, "num_bits"), &json!(bits), "8 or 4")),
    };
    let scale = match (found.strategy.as_str(), found.dynamic) {
        ("token", "true") => ActivationScale::DynamicToken,
        ("group", "true") if found.scale_dtype == Some("uint8") => ActivationScale::DynamicMx(found.width(path)?),
        ("group", "true") => ActivationScale::DynamicGroup(found.width(path)?),
        ("tensor", "false") => ActivationScale::StaticTensor,
        ("tensor_group", "local") => ActivationScale::StaticTensorLocal(found.width(path)?),
        (strategy, dynamic) => {
            let found = json!(format!("{strategy} with dynamic {dynamic}"));
            let wanted = "\"token\" or \"group\" if dynamic, \"tensor\" if static, \"tensor_group\" if local";
            return Err(unsupported(&join(path, "strategy"), &found, wanted));
        }
    };
    Ok(ActivationScheme { format, scale })
}

pub(super) fn parse_kv_cache(args: &Map<String, Value>, path: &str) -> Result<KvCacheScheme, PackError> {
    let found = read(args, path)?;
    match (found.float, found.bits, found.symmetric, found.dynamic, found.strategy.as_str()) {
        (true, 8, true, "false", "tensor") => Ok(KvCacheScheme::Fp8Tensor),
        (true, 8, true, "false", "attn_head") => Ok(KvCacheScheme::Fp8Head),
        _ => Err(unsupported(path, &Value::Object(args.clone()), "static, symmetric fp8 per tensor or per head")),
    }
}
