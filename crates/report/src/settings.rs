//! The settings that decide a result, as keys and values to show. Paths, limits on memory and numbers of threads are not
//! among them: they change no byte.

use lite_job::{Method, Plan, Recipe, Rounding, SmoothScales, scheme_words};
use lite_pack::KvCacheScheme;
use lite_quant::floats::ScaleKind;
use lite_quant::{Range, ScaleDtype, WeightScheme};
use serde_json::{Map, Value, json};

use crate::OtherScheme;

/// What the method is called, with its rounding.
pub(crate) fn method(plan: &Plan) -> String {
    let rounding = match plan.solver.rounding {
        Rounding::Nearest => "round to nearest",
        Rounding::Gptq => "GPTQ",
        Rounding::Refine => "GPTQ with refinement",
    };
    let scales = match plan.method {
        Method::Plain => return rounding.to_owned(),
        Method::Awq { .. } => "AWQ",
        Method::SmoothQuant { .. } => "SmoothQuant",
    };
    match plan.solver.rounding {
        Rounding::Nearest => scales.to_owned(),
        _ => format!("{scales}, then {rounding}"),
    }
}

pub(crate) fn settings(recipe: &Recipe, plan: &Plan) -> Map<String, Value> {
    let mut map = Map::new();
    let mut set = |key: &str, value: Value| {
        map.insert(key.to_owned(), value);
    };
    set("method", method(plan).into());
    if let Some(digest) = plan.spec.as_ref().and_then(|spec| spec.definition.as_deref()) {
        set("architecture_described_by_sha256", digest.into());
    }
    set("scheme", scheme_words(&plan.scheme).into());
    set("layout", plan.layout.name().into());
    if let Some(dtype) = scale_dtype(&plan.scheme.weights) {
        set("scale_dtype", dtype.into());
    }
    if plan.power_of_two_scales {
        set("power_of_two_scales", true.into());
    }
    if let Some((_, name)) = plan.dtype {
        set("plain_tensors_converted_to", name.into());
    }
    match plan.method {
        Method::Plain => {}
        Method::Awq { search_scale: true } => set("scales", "searched by output error".into()),
        Method::Awq { search_scale: false } => set("scales", "ratio 0.5 on max |x|".into()),
        Method::SmoothQuant { scales } => set("scales", smooth_scales(scales).into()),
    }
    let range = match plan.range {
        Range::MinMax => "smallest and largest weight",
        Range::Search => "searched by error",
    };
    set("range", range.into());
    if plan.solver.rounding != Rounding::Nearest {
        set("error_aware", plan.solver.error_aware.into());
        set("tuned", plan.solver.tune.into());
        set("act_order", plan.solver.act_order.into());
        set("damp", json!(plan.solver.damp));
    }
    if let Some(cache) = plan.kv_cache {
        let words = match cache {
            KvCacheScheme::Fp8Tensor => "fp8 e4m3, one scale per layer",
            KvCacheScheme::Fp8Head => "fp8 e4m3, one scale per head",
        };
        set("kv_cache", words.into());
    }
    let others = other_schemes(plan);
    if !others.is_empty() {
        set("other_schemes", json!(others));
    }
    if !recipe.ignore.is_empty() {
        set("ignore", json!(recipe.ignore));
    }
    if !recipe.overrides.is_empty() {
        set("overrides", recipe.overrides.iter().map(|rule| rule.pattern.clone()).collect());
    }
    set("quantized_linears", plan.sites.len().into());
    if !plan.plain_sites.is_empty() {
        set("linears_left_plain", plan.plain_sites.len().into());
    }
    if let Some(target) = recipe.target {
        set("target", target.name().into());
        set("tensor_parallel", recipe.tensor_parallel.into());
    }
    if plan.windows > 0 && plan.statistics.is_none() {
        set("seed", recipe.calib.seed.into());
    }
    map
}

/// Schemes beside the common one, in the order they are met.
fn other_schemes(plan: &Plan) -> Vec<OtherScheme> {
    let mut found: Vec<OtherScheme> = Vec::new();
    for site in plan.sites.iter().filter(|site| site.scheme != plan.scheme) {
        let scheme = scheme_words(&site.scheme);
        match found.iter_mut().find(|other| other.scheme == scheme) {
            Some(other) => other.linears += 1,
            None => found.push(OtherScheme { scheme, linears: 1 }),
        }
    }
    found
}

fn smooth_scales(scales: SmoothScales) -> String {
    match scales {
        SmoothScales::Alpha(alpha) => format!("alpha {alpha}"),
        SmoothScales::SearchedAlpha => "alpha searched by output error".to_owned(),
        SmoothScales::LogEqualization => "max |x| / log2(2 + max |x|)".to_owned(),
        SmoothScales::Awq => "AWQ, searched by output error".to_owned(),
    }
}

fn scale_dtype(weights: &WeightScheme) -> Option<&'static str> {
    let dtype = match weights {
        WeightScheme::Int(int) => int.scale_dtype,
        WeightScheme::Float(float) => match float.scale {
            ScaleKind::Float(dtype) => dtype,
            ScaleKind::E8M0 | ScaleKind::E4M3WithGlobal => return None,
        },
    };
    Some(match dtype {
        ScaleDtype::F16 => "float16",
        ScaleDtype::BF16 => "bfloat16",
        ScaleDtype::F32 => "float32",
    })
}

/// A value as text.
pub(crate) fn shown(value: &Value) -> String {
    match value {
        Value::Null => "none".to_owned(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::String(text) => text.clone(),
        Value::Number(number) => number.as_f64().filter(|_| number.is_f64()).map_or_else(
            || number.to_string(),
            // `damp` is an f32: its shortest decimal, not that of the f64 it became.
            |value| (value as f32).to_string(),
        ),
        Value::Array(items) => items.iter().map(shown).collect::<Vec<_>>().join("; "),
        Value::Object(keys) => match (keys.get("scheme").and_then(Value::as_str), keys.get("linears")) {
            (Some(scheme), Some(linears)) => {
                format!("{scheme} ({linears} linear{})", if linears == 1 { "" } else { "s" })
            }
            _ => value.to_string(),
        },
    }
}

/// A key as words: `act_order` as `act order`.
pub(crate) fn label(key: &str) -> String {
    key.replace('_', " ")
}
