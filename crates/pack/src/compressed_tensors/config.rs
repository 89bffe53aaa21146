//! The config of the `compressed-tensors` layout.

use std::collections::BTreeSet;

use lite_quant::{GroupSize, Scheme};
use serde_json::{Map, Value, json};

use super::{CompressedTensors, NAME};
use crate::config::{boolean, distinct_overrides, integer, join, missing, names, object, unsupported, wrong};
use crate::{ConfigFacts, PackError, ParsedConfig};

const FORMAT: &str = "pack-quantized";
/// The release whose format is written; readers only look at it in messages.
const VERSION: &str = "0.19.0";
/// The class that the common group targets.
const LINEAR: &str = "Linear";

/// The config: one group per scheme of its own, with the names of its modules, then `group_0` for every
/// other linear.
///
/// Readers match names before classes whatever the order (compressed-tensors, `match_targets`; vLLM,
/// `find_matched_target`), but compressed-tensors warns of names that come after a class that matches
/// too. TurboMind reads `group_0` only, by its name.
pub(super) fn write(layout: &CompressedTensors, facts: &ConfigFacts) -> Result<Value, PackError> {
    let overrides = distinct_overrides(layout, facts)?;
    // vLLM's head is not a `Linear`: it is quantized only if named.
    let head = facts.lm_head.as_deref().filter(|head| overrides.iter().all(|(name, _)| name != head));
    let targets: Vec<&str> = std::iter::once(LINEAR).chain(head).collect();
    let mut by_scheme: Vec<(Scheme, Vec<&str>)> = vec![(facts.scheme, targets)];
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
    Ok(json!({
        "config_groups": groups,
        "format": FORMAT,
        "global_compression_ratio": null,
        "ignore": facts.ignored,
        "kv_cache_scheme": null,
        "quant_method": NAME,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }))
}

fn group(scheme: &Scheme, targets: &[&str], act_order: bool) -> Value {
    let (strategy, group_size) = match scheme.group_size {
        GroupSize::Channel => ("channel", Value::Null),
        GroupSize::Channels(width) => ("group", json!(width)),
    };
    json!({
        "format": FORMAT,
        "input_activations": null,
        "output_activations": null,
        "targets": targets,
        "weights": {
            "actorder": act_order.then_some("static"),
            "block_structure": null,
            "dynamic": false,
            "group_size": group_size,
            "num_bits": scheme.bits,
            "observer": null,
            "observer_kwargs": {},
            "strategy": strategy,
            "symmetric": scheme.symmetric,
            "type": "int",
        },
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
    for key in ["kv_cache_scheme", "sparsity_config", "transform_config"] {
        nothing(config, "", key)?;
    }
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
        return Ok(ParsedConfig { scheme, ignored, overrides: Vec::new() });
    }
    let mut common = None;
    let (mut named, mut seen) = (Vec::<(String, Scheme)>::new(), BTreeSet::new());
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
    Ok(ParsedConfig { scheme, ignored, overrides: named })
}

/// Reads a group: weights only, packed.
fn parse_group(config: &Map<String, Value>, group: &Map<String, Value>, path: &str) -> Result<Scheme, PackError> {
    for key in ["input_activations", "output_activations"] {
        nothing(group, path, key)?;
    }
    // A group's own format wins over the common one.
    let common = config.get("format").map(|format| ("format".to_owned(), format));
    let own = group.get("format").filter(|own| !own.is_null()).map(|own| (join(path, "format"), own));
    match own.or(common) {
        Some((_, Value::String(format))) if format == FORMAT => {}
        Some((key, other)) => return Err(unsupported(&key, other, "\"pack-quantized\"")),
        None => return Err(missing("format", "\"pack-quantized\"")),
    }
    parse_weights(object(group, path, "weights")?, &join(path, "weights"))
}

/// Reads the `weights` of a group. Absent keys have the library's defaults.
fn parse_weights(weights: &Map<String, Value>, path: &str) -> Result<Scheme, PackError> {
    match weights.get("type") {
        None => {}
        Some(Value::String(kind)) if kind.eq_ignore_ascii_case("int") => {}
        Some(other) => return Err(unsupported(&join(path, "type"), other, "\"int\"")),
    }
    match weights.get("actorder") {
        None | Some(Value::Null | Value::Bool(false)) => {}
        // These reorder columns while solving only; the stored order is the natural one.
        Some(Value::String(order)) if order == "weight" || order == "static" => {}
        Some(other) => return Err(unsupported(&join(path, "actorder"), other, "null, \"weight\" or \"static\"")),
    }
    if boolean(weights, path, "dynamic", Some(false))? {
        return Err(unsupported(&join(path, "dynamic"), &json!(true), "false"));
    }
    let key = join(path, "group_size");
    let group_size = match weights.get("group_size") {
        None | Some(Value::Null) => None,
        Some(value) => Some(value.as_i64().ok_or_else(|| wrong(&key, value, "an integer or null"))?),
    };
    let strategy = match (weights.get("strategy"), group_size) {
        (Some(Value::String(strategy)), _) => strategy.to_ascii_lowercase(),
        (Some(Value::Null) | None, Some(-1)) => "channel".to_owned(),
        (Some(Value::Null) | None, Some(_)) => "group".to_owned(),
        (Some(Value::Null) | None, None) => "tensor".to_owned(),
        (Some(other), _) => return Err(wrong(&join(path, "strategy"), other, "a string")),
    };
    let group_size = match (strategy.as_str(), group_size) {
        ("channel", None | Some(-1)) => -1,
        ("group", Some(width)) if width > 0 => width,
        ("channel" | "group", found) => {
            let wanted = "a positive number for groups, null or -1 for channels";
            return Err(wrong(&key, &json!(found), wanted));
        }
        (other, _) => return Err(unsupported(&join(path, "strategy"), &json!(other), "\"group\" or \"channel\"")),
    };
    let symmetric = boolean(weights, path, "symmetric", Some(true))?;
    let bits = integer(weights, path, &["num_bits"])?;
    Ok(Scheme::new(bits, group_size, symmetric, ParsedConfig::UNKNOWN_SCALE_DTYPE)?)
}

/// Refuses a value that is neither absent, null nor an empty object.
fn nothing(config: &Map<String, Value>, path: &str, key: &str) -> Result<(), PackError> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Object(empty)) if empty.is_empty() => Ok(()),
        Some(other) => Err(unsupported(&join(path, key), other, "null")),
    }
}
