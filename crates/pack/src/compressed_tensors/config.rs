//! The config of the `compressed-tensors` layout.

use std::collections::BTreeSet;

use lite_quant::LinearScheme;
use serde_json::{Map, Value, json};

use super::args;
use super::format::{Format, check_scheme};
use super::{CompressedTensors, NAME};
use crate::config::{distinct_overrides, join, missing, names, object, unsupported};
use crate::{ConfigFacts, PackError, ParsedConfig};

/// The release whose format is written; readers only look at it in messages.
const VERSION: &str = "0.19.0";
/// `format` where groups have several.
const MIXED: &str = "mixed-precision";
/// The class that the common group targets.
const LINEAR: &str = "Linear";

/// The config: one group per scheme of its own, with the names of its modules, then `group_0` for every
/// other linear.
///
/// Readers match names before classes whatever the order (compressed-tensors, `match_targets`; vLLM,
/// `find_matched_target`), but compressed-tensors warns of names that come after a class that matches
/// too. TurboMind reads `group_0` only, by its name.
pub(super) fn write(layout: &CompressedTensors, facts: &ConfigFacts) -> Result<Value, PackError> {
    check_scheme(&facts.scheme)?;
    let overrides = distinct_overrides(layout, facts)?;
    overrides.iter().try_for_each(|(_, scheme)| check_scheme(scheme))?;
    // vLLM's head is not a `Linear`: it is quantized only if named.
    let head = facts.lm_head.as_deref().filter(|head| overrides.iter().all(|(name, _)| name != head));
    let targets: Vec<&str> = std::iter::once(LINEAR).chain(head).collect();
    let mut by_scheme: Vec<(LinearScheme, Vec<&str>)> = vec![(facts.scheme, targets)];
    for (name, scheme) in overrides {
        match by_scheme.iter_mut().skip(1).find(|(known, _)| *known == scheme) {
            Some((_, names)) => names.push(name),
            None => by_scheme.push((scheme, vec![name])),
        }
    }
    let mut numbered: Vec<_> = by_scheme.iter().enumerate().collect();
    numbered.rotate_left(1);
    let groups: Map<String, Value> = numbered
        .into_iter()
        .map(|(i, (scheme, targets))| (format!("group_{i}"), group(scheme, targets, facts.act_order)))
        .collect();
    let formats: BTreeSet<Format> = by_scheme.iter().map(|(scheme, _)| Format::of(scheme)).collect();
    let format = match formats.first() {
        Some(only) if formats.len() == 1 => only.name(),
        _ => MIXED,
    };
    Ok(json!({
        "config_groups": groups,
        "format": format,
        "global_compression_ratio": null,
        "ignore": facts.ignored,
        "kv_cache_scheme": facts.kv_cache.map(args::kv_cache),
        "quant_method": NAME,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }))
}

fn group(scheme: &LinearScheme, targets: &[&str], act_order: bool) -> Value {
    json!({
        "format": Format::of(scheme).name(),
        "input_activations": scheme.activations.as_ref().map(args::activations),
        "output_activations": null,
        "targets": targets,
        "weights": args::weights(&scheme.weights, act_order),
    })
}

/// Reads a config of one group, whatever it targets, or of several: one with the target `Linear`, the
/// others with names of modules.
pub(super) fn parse(config: &Map<String, Value>) -> Result<ParsedConfig, PackError> {
    match config.get("quantization_status") {
        None | Some(Value::Null) => {}
        Some(Value::String(status)) if status == "compressed" => {}
        Some(other) => return Err(unsupported("quantization_status", other, "\"compressed\"")),
    }
    for key in ["sparsity_config", "transform_config"] {
        nothing(config, "", key)?;
    }
    let kv_cache = match config.get("kv_cache_scheme") {
        None | Some(Value::Null) => None,
        Some(_) => Some(args::parse_kv_cache(object(config, "", "kv_cache_scheme")?, "kv_cache_scheme")?),
    };
    let mut groups = Vec::new();
    for (name, group) in object(config, "", "config_groups")? {
        let path = join("config_groups", name);
        let Value::Object(group) = group else {
            return Err(unsupported(&path, group, "a group with its own `weights`"));
        };
        groups.push((parse_group(config, group, &path)?, group, path));
    }
    let ignored = names(config, "", "ignore")?;
    if let [(scheme, ..)] = groups[..] {
        return Ok(ParsedConfig { ignored, kv_cache, ..ParsedConfig::new(scheme) });
    }
    let mut common = None;
    let (mut named, mut seen) = (Vec::<(String, LinearScheme)>::new(), BTreeSet::new());
    for (scheme, group, path) in &groups {
        let key = join(path, "targets");
        for target in names(group, path, "targets")? {
            match target.as_str() {
                LINEAR if common.is_none() => common = Some(*scheme),
                pattern if pattern == LINEAR || pattern.starts_with("re:") => {
                    let wanted = "names of modules, beside one group with the target \"Linear\"";
                    return Err(unsupported(&key, &json!(target), wanted));
                }
                // The first that matches wins.
                _ if seen.insert(target.clone()) => named.push((target, *scheme)),
                _ => {}
            }
        }
    }
    let Some(scheme) = common else {
        let found = json!(format!("{} groups", groups.len()));
        return Err(unsupported("config_groups", &found, "one group, or several of which one targets \"Linear\""));
    };
    named.retain(|(_, other)| *other != scheme);
    Ok(ParsedConfig { scheme, ignored, overrides: named, kv_cache })
}

/// Reads a group.
fn parse_group(config: &Map<String, Value>, group: &Map<String, Value>, path: &str) -> Result<LinearScheme, PackError> {
    nothing(group, path, "output_activations")?;
    let activations = match group.get("input_activations") {
        None | Some(Value::Null) => None,
        Some(_) => {
            let args = object(group, path, "input_activations")?;
            Some(args::parse_activations(args, &join(path, "input_activations"))?)
        }
    };
    let weights = args::parse_weights(object(group, path, "weights")?, &join(path, "weights"))?;
    let scheme = LinearScheme { weights, activations };
    check_scheme(&scheme)?;
    // A group's own format wins over the common one.
    let common = config.get("format").map(|format| ("format".to_owned(), format));
    let own = group.get("format").filter(|own| !own.is_null()).map(|own| (join(path, "format"), own));
    match own.or(common) {
        Some((_, Value::String(format))) if format == MIXED => Ok(scheme),
        Some((_, Value::String(format))) if Format::from_name(format).is_some_and(|format| format.holds(&scheme)) => {
            Ok(scheme)
        }
        Some((key, other)) => Err(unsupported(&key, other, &format!("{:?}", Format::of(&scheme).name()))),
        None => Err(missing("format", "the name of a format")),
    }
}

/// Refuses a value that is neither absent, null nor an empty object.
fn nothing(config: &Map<String, Value>, path: &str, key: &str) -> Result<(), PackError> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Object(empty)) if empty.is_empty() => Ok(()),
        Some(other) => Err(unsupported(&join(path, key), other, "null")),
    }
}
