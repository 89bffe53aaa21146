//! `scheme`, `config_groups` and `targets` of a modifier.

use crate::compressor::regex;
use crate::error::{Fault, Place};
use crate::fields::Fields;
use crate::node::{Node, Value};

/// What a modifier quantizes to.
#[derive(Default)]
pub(super) struct Schemes {
    /// Of all linears.
    pub(super) scheme: Option<Node>,
    /// Of those of some names.
    pub(super) overrides: Vec<Node>,
    /// Whether ranges are searched.
    pub(super) mse: bool,
}

/// What is quantized.
enum Targets<'n> {
    Linears,
    Names(Vec<(Place, &'n str)>),
}

pub(super) fn read(fields: &Fields<'_>) -> Result<Schemes, Fault> {
    let mut found = Schemes::default();
    let common = targets(fields)?;
    if let Some(observer) = fields.text("observer")? {
        found.mse |= observer.contains("mse");
    }
    match fields.get("scheme") {
        None => {}
        Some(Node { at, value: Value::Scalar { text, .. } }) => {
            // Without targets, linears are meant.
            let only = match common {
                Targets::Linears => None,
                Targets::Names(names) => Some(names),
            };
            put(&mut found, *at, Node::text(*at, text), only)?;
        }
        Some(map) => {
            for (key, value) in Fields::new(map, "scheme").map(|_| map.entries())? {
                let names: Vec<(Place, &str)> = match &value.value {
                    Value::Scalar { text, .. } => vec![(value.at, text.as_str())],
                    Value::List(items) => items
                        .iter()
                        .filter_map(|item| match &item.value {
                            Value::Scalar { text, .. } => Some((item.at, text.as_str())),
                            _ => None,
                        })
                        .collect(),
                    Value::Map(_) => {
                        return Err(Fault::value(value.at, "`scheme` holds a map, wanted names of targets"));
                    }
                };
                put(&mut found, key.at, Node::text(key.at, &key.name), names_only(names))?;
            }
        }
    }
    if let Some(groups) = fields.get("config_groups") {
        Fields::new(groups, "config_groups")?;
        for (key, group) in groups.entries() {
            let group = Fields::new(group, &key.name)?;
            let only = match targets(&group)? {
                Targets::Linears => None,
                Targets::Names(names) => Some(names),
            };
            let scheme = arguments(&group, &mut found)?;
            put(&mut found, key.at, scheme, only)?;
        }
    }
    if found.scheme.is_none()
        && let Some(first) = found.overrides.first()
    {
        let message = "targets that are not all of `Linear`: quantizing only the linears of some names is not here; target `Linear` and `ignore` the others";
        return Err(Fault::unsupported(first.at, message));
    }
    Ok(found)
}

fn targets<'n>(fields: &Fields<'n>) -> Result<Targets<'n>, Fault> {
    Ok(match names_only(fields.texts("targets")?) {
        None => Targets::Linears,
        Some(names) => Targets::Names(names),
    })
}

/// `None` where every linear is meant.
fn names_only(names: Vec<(Place, &str)>) -> Option<Vec<(Place, &str)>> {
    (!names.is_empty() && !names.iter().any(|(_, name)| *name == "Linear")).then_some(names)
}

fn put(found: &mut Schemes, at: Place, scheme: Node, only: Option<Vec<(Place, &str)>>) -> Result<(), Fault> {
    match only {
        None if found.scheme.is_some() => Err(Fault::value(at, "two schemes for all linears; keep one of them")),
        None => {
            found.scheme = Some(scheme);
            Ok(())
        }
        Some(names) => {
            for (at, name) in names {
                let rule = Node::single(at, "match", Node::text(at, regex(name))).with("scheme", scheme.clone());
                found.overrides.push(rule);
            }
            Ok(())
        }
    }
}

/// `weights` and `input_activations` of a group.
fn arguments(group: &Fields<'_>, found: &mut Schemes) -> Result<Node, Fault> {
    if group.get("output_activations").is_some() {
        let message = "`output_activations`: no engine here quantizes the outputs of linears";
        return Err(Fault::unsupported(group.place("output_activations"), message));
    }
    group.get("format");
    let Some(weights) = group.map("weights")? else {
        return Err(Fault::unsupported(
            group.at(),
            "a group without `weights`: only linears with quantized weights are here",
        ));
    };
    found.mse |= weights.text("observer")?.is_some_and(|observer| observer.contains("mse"));
    let mut node = Node::single(group.at(), "weights", weight(&weights)?);
    if let Some(inputs) = group.map("input_activations")? {
        node = node.with("activations", activation(&inputs)?);
    }
    Ok(node)
}

/// Type, bits and symmetry.
fn codes(args: &Fields<'_>) -> Result<Node, Fault> {
    let at = args.at();
    let bits = args.int("num_bits")?.unwrap_or(8);
    let place = args.place("num_bits");
    match (args.text("type")?.unwrap_or("int"), bits) {
        ("int", _) => Ok(Node::single(at, "type", Node::text(at, "int"))
            .with("bits", Node::scalar(place, bits))
            .with("symmetric", Node::scalar(place, args.bool("symmetric")?.unwrap_or(true)))),
        ("float", 8) => Ok(Node::single(at, "type", Node::text(at, "e4m3"))),
        ("float", 4) => Ok(Node::single(at, "type", Node::text(at, "e2m1"))),
        ("float", bits) => Err(Fault::unsupported(place, format!("floats of {bits} bits are not here; use 8 or 4"))),
        (other, _) => {
            let message = format!("`type` is `{}`, wanted int or float", lite_model::printable(other));
            Err(Fault::value(args.place("type"), message))
        }
    }
}

/// `strategy`, or what the group size says.
fn strategy<'n>(args: &Fields<'n>) -> Result<(&'n str, Option<i64>), Fault> {
    let width = args.int("group_size")?;
    let strategy = match (args.text("strategy")?, width) {
        (Some(strategy), _) => strategy,
        (None, Some(-1)) => "channel",
        (None, Some(_)) => "group",
        (None, None) => "tensor",
    };
    Ok((strategy, width.filter(|&width| width > 0)))
}

fn power_of_two(args: &Fields<'_>) -> Result<bool, Fault> {
    Ok(args.text("scale_dtype")?.is_some_and(|dtype| dtype.contains("uint8") || dtype.contains("e8m0")))
}

fn weight(args: &Fields<'_>) -> Result<Node, Fault> {
    let at = args.place("strategy");
    let node = codes(args)?;
    let integers = args.text("type")?.is_none_or(|kind| kind == "int");
    let (strategy, width) = strategy(args)?;
    let group = |node: Node| match width {
        Some(width) => Ok(node.with("group_size", Node::scalar(at, width))),
        None => Err(Fault::value(at, "`strategy: group` needs a `group_size`")),
    };
    let mut node = match strategy {
        "channel" => node.with("group_size", Node::scalar(at, -1)),
        "group" => group(node)?,
        "tensor_group" if !integers => group(node)?.with("scales", Node::text(at, "e4m3")),
        "tensor" if !integers => node.with("per_tensor", Node::scalar(at, true)),
        "block" if !integers => {
            let sides = match args.texts("block_structure")?.as_slice() {
                [(at, rows), (_, columns)] => vec![Node::scalar(*at, rows), Node::scalar(*at, columns)],
                [(at, text)] if text.contains('x') => text.split('x').map(|side| Node::scalar(*at, side)).collect(),
                _ => return Err(Fault::value(at, "`strategy: block` needs a `block_structure` such as [128, 128]")),
            };
            node.with("block", Node::list(at, sides))
        }
        other => {
            let shown = lite_model::printable(other);
            return Err(Fault::unsupported(
                at,
                format!("`strategy: {shown}` of such weights: no layout here holds it"),
            ));
        }
    };
    if !integers && strategy == "group" && power_of_two(args)? {
        node = node.with("scales", Node::text(at, "power_of_two"));
    }
    if args.text("actorder")?.is_some_and(|order| !["weight", "static", "false"].contains(&order)) {
        return Err(Fault::unsupported(
            args.place("actorder"),
            "groups that follow the order are not here; use `actorder: static`",
        ));
    }
    Ok(node)
}

fn activation(args: &Fields<'_>) -> Result<Node, Fault> {
    let at = args.at();
    let node = codes(args)?;
    let (strategy, width) = strategy(args)?;
    let width = |node: Node| node.with("group_size", Node::scalar(at, width.unwrap_or(128)));
    let dynamic = args.text("dynamic")?.unwrap_or("false").to_lowercase();
    Ok(match (strategy, dynamic.as_str()) {
        ("token", "true") => node.with("scale", Node::text(at, "token")),
        ("tensor", "false") => node.with("scale", Node::text(at, "static")),
        ("group", "true") if power_of_two(args)? => width(node.with("scale", Node::text(at, "power_of_two"))),
        ("group", "true") => width(node.with("scale", Node::text(at, "group"))),
        ("tensor_group", "local") => width(node.with("scale", Node::text(at, "local"))),
        (strategy, dynamic) => {
            let strategy = lite_model::printable(strategy);
            let message = format!(
                "activations with `strategy: {strategy}` and `dynamic: {}`: no engine here runs them; use token with true, or tensor with false",
                lite_model::printable(dynamic)
            );
            return Err(Fault::unsupported(at, message));
        }
    })
}

/// The one cache that has calibrated scales here.
pub(super) fn kv_cache(args: &Fields<'_>) -> Result<Node, Fault> {
    let float = args.text("type")? == Some("float") && args.int("num_bits")?.unwrap_or(8) == 8;
    let fixed = !args.bool("dynamic")?.unwrap_or(false) && args.bool("symmetric")?.unwrap_or(true);
    match args.text("strategy")?.unwrap_or("tensor") {
        "tensor" if float && fixed => Ok(Node::text(args.at(), "fp8")),
        "attn_head" if float && fixed => Ok(Node::text(args.at(), "fp8-head")),
        _ => Err(Fault::unsupported(
            args.at(),
            "`kv_cache_scheme`: only static symmetric fp8, per tensor or per attn_head, has calibrated scales here; engines quantize integer caches by themselves",
        )),
    }
}
