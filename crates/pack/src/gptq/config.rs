//! The config of the `gptq` layout, as GPTQModel, transformers 5.17, vLLM 0.33 and TurboMind read it.

use std::collections::{BTreeMap, BTreeSet};

use lite_quant::{LinearScheme, Scheme};
use serde_json::{Map, Value, json};

use super::dynamic::{exactly, fused_names, only_match};
use super::{Gptq, Label, NAME};
use crate::config::{boolean, distinct_overrides, integer, join, no_kv_cache, object, unsupported, wrong};
use crate::schemes::weight_only;
use crate::{ConfigFacts, PackError, ParsedConfig};

/// Where the format of the zero points is named; GPTQModel calls it `format` too.
const LABELS: [&str; 2] = ["checkpoint_format", "format"];

/// The config. `damp_percent` is left to the readers' defaults: it says how a checkpoint was made, and
/// none of them needs it to load one.
pub(super) fn write(layout: &Gptq, facts: &ConfigFacts) -> Result<Value, PackError> {
    no_kv_cache(NAME, facts)?;
    let scheme = weight_only(NAME, &facts.scheme)?;
    let mut config = json!({
        "quant_method": NAME,
        "bits": scheme.bits,
        "group_size": scheme.group_size.to_flag(),
        "desc_act": false,
        "sym": scheme.symmetric,
        "lm_head": facts.lm_head.is_some(),
        "true_sequential": true,
        "checkpoint_format": if scheme.symmetric { "gptq" } else { "gptq_v2" },
        "pack_dtype": "int32",
        "meta": { "quantizer": [concat!("lite:", env!("CARGO_PKG_VERSION"))] },
    });
    let mut dynamic = Map::new();
    // Readers quantize every linear of the blocks unless told otherwise, and nothing outside them.
    let plain: Vec<(&str, ())> =
        facts.ignored.iter().filter(|name| in_a_block(name)).map(|name| (name.as_str(), ())).collect();
    let fused = fused_names(&plain);
    for name in plain.iter().map(|(name, ())| *name).chain(fused.iter().map(|(name, ())| name.as_str())) {
        dynamic.insert(format!("-:{}", exactly(name)), json!({}));
    }
    let overrides = integer_overrides(layout, facts)?;
    let fused = fused_names(&overrides);
    let fused = fused.iter().map(|(name, scheme)| (name.as_str(), *scheme));
    for (name, scheme) in overrides.iter().copied().chain(fused) {
        let value = json!({ "bits": scheme.bits, "group_size": scheme.group_size.to_flag() });
        dynamic.insert(format!("+:{}", exactly(name)), value);
    }
    if !dynamic.is_empty() {
        config["dynamic"] = Value::Object(dynamic);
    }
    Ok(config)
}

/// The distinct overrides, all of them integers.
fn integer_overrides<'f>(layout: &Gptq, facts: &'f ConfigFacts) -> Result<Vec<(&'f str, Scheme)>, PackError> {
    let overrides = distinct_overrides(layout, facts)?.into_iter();
    overrides.map(|(name, scheme)| Ok((name, *weight_only(NAME, &scheme)?))).collect()
}

/// Reads a config. `desc_act` is not looked at: `g_idx` says in which order columns are.
pub(super) fn parse(config: &Map<String, Value>) -> Result<ParsedConfig, PackError> {
    label(config)?;
    match config.get("pack_dtype") {
        None | Some(Value::Null) => {}
        Some(Value::String(dtype)) if dtype.eq_ignore_ascii_case("int32") => {}
        Some(other) => return Err(unsupported("pack_dtype", other, "\"int32\"")),
    }
    let scheme = parse_scheme(config, "", None)?;
    let mut parsed = ParsedConfig::new(scheme.into());
    if config.get("dynamic").is_none_or(Value::is_null) {
        return Ok(parsed);
    }
    let mut seen = BTreeSet::new();
    for (rule, value) in object(config, "", "dynamic")? {
        let path = join("dynamic", rule);
        if let Some(pattern) = rule.strip_prefix("-:") {
            parsed.ignored.push(only_match(pattern).unwrap_or_else(|| pattern.to_owned()));
            continue;
        }
        let pattern = rule.strip_prefix("+:").unwrap_or(rule);
        let Some(name) = only_match(pattern) else {
            return Err(unsupported(&path, value, "a pattern of one module name, `^model\\.layers\\.0\\.…$`"));
        };
        let Value::Object(changes) = value else { return Err(wrong(&path, value, "an object")) };
        let scheme = LinearScheme::from(parse_scheme(changes, &path, Some(&scheme))?);
        // The first that matches wins.
        if seen.insert(name.clone()) && scheme != parsed.scheme {
            parsed.overrides.push((name, scheme));
        }
    }
    // Names that only vLLM's fused linears have.
    let plain: Vec<(&str, ())> = parsed.ignored.iter().map(|name| (name.as_str(), ())).collect();
    let fused: BTreeMap<String, ()> = fused_names(&plain).into_iter().collect();
    parsed.ignored.retain(|name| !fused.contains_key(name));
    let overrides: Vec<(&str, LinearScheme)> =
        parsed.overrides.iter().map(|(name, scheme)| (&**name, *scheme)).collect();
    let fused: BTreeMap<String, LinearScheme> = fused_names(&overrides).into_iter().collect();
    parsed.overrides.retain(|(name, _)| !fused.contains_key(name));
    Ok(parsed)
}

/// Bits, group size and symmetry, with those of `common` where they are absent.
fn parse_scheme(config: &Map<String, Value>, path: &str, common: Option<&Scheme>) -> Result<Scheme, PackError> {
    let number = |key, default: Option<i64>| match default {
        Some(default) if !config.contains_key(key) => Ok(default),
        _ => integer(config, path, &[key]),
    };
    let bits = number("bits", common.map(|scheme| i64::from(scheme.bits)))?;
    if !matches!(bits, 2 | 3 | 4 | 8) {
        return Err(unsupported(&join(path, "bits"), &json!(bits), "2, 3, 4 or 8"));
    }
    let group_size = number("group_size", common.map(|scheme| scheme.group_size.to_flag()))?;
    let symmetric = boolean(config, path, "sym", common.map(|scheme| scheme.symmetric))?;
    Ok(Scheme::new(bits, group_size, symmetric, ParsedConfig::UNKNOWN_SCALE_DTYPE)?)
}

/// What the config says of the format of the zero points.
pub(super) fn label(config: &Map<String, Value>) -> Result<Label, PackError> {
    for key in LABELS {
        match config.get(key) {
            None | Some(Value::Null) => {}
            Some(Value::String(format)) if format.eq_ignore_ascii_case("gptq") => return Ok(Label::V1),
            Some(Value::String(format)) if format.eq_ignore_ascii_case("gptq_v2") => return Ok(Label::V2),
            Some(other) => return Err(unsupported(key, other, "\"gptq\" or \"gptq_v2\"")),
        }
    }
    Ok(Label::Absent)
}

/// Whether a module belongs to a numbered block.
fn in_a_block(name: &str) -> bool {
    name.split('.').any(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
}
