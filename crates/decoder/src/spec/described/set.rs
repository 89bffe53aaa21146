//! From the words of a file to the data of a family.

use std::ops::RangeInclusive;

use super::ArchitectureError;
use super::words::{
    BiasRule, GateUpRule, InterleaveRule, MlaRule, MoeRule, NameRules, PartOrNone, RopeRule, RopeType, RoutingRule,
    SharedWidthRule, SparseRule, WindowRule,
};
use crate::error::clean;
use crate::spec::families::{Bias, Names, RopeRules, Window};
use crate::spec::mla::MlaRules;
use crate::spec::moe::{MoeRules, Routing, SharedWidth, Sparse};

/// Longest name, bytes.
pub(super) const LONGEST: usize = 200;
/// What the number of a block stands as in names.
const BLOCK: &str = "{i}";
/// What names of a routed expert begin with.
const EXPERT: &str = "experts.{e}.";

/// Bounds of numbers, as of the same values in config.json.
pub(super) const WIDTHS: RangeInclusive<usize> = 1..=1 << 20;
pub(super) const POSITIONS: RangeInclusive<usize> = 2..=1 << 32;
const THETAS: RangeInclusive<f64> = 1.0 + 1e-6..=1e15;
pub(super) const FACTORS: RangeInclusive<f64> = 1e-6..=1e6;

pub(super) fn wrong(key: &str, reason: String) -> ArchitectureError {
    ArchitectureError { key: key.to_owned(), reason }
}

pub(super) fn leak(text: String) -> &'static str {
    Box::leak(text.into_boxed_str())
}

pub(super) fn leak_list<T>(list: Vec<T>) -> &'static [T] {
    Box::leak(list.into_boxed_slice())
}

/// `value`, if it is there and in `range`.
pub(super) fn bounded<T: PartialOrd + Copy + std::fmt::Display>(
    key: &str,
    value: Option<T>,
    range: RangeInclusive<T>,
) -> Result<Option<T>, ArchitectureError> {
    match value {
        Some(value) if !range.contains(&value) => {
            Err(wrong(key, format!("is {value}, wanted {} to {}", range.start(), range.end())))
        }
        other => Ok(other),
    }
}

/// A key of config.json.
pub(super) fn config_key(key: &str, name: String) -> Result<&'static str, ArchitectureError> {
    if name.is_empty() || name.len() > LONGEST || name.chars().any(char::is_control) {
        return Err(wrong(key, format!("is `{}`, wanted a key of config.json", clean(&name))));
    }
    Ok(leak(name))
}

pub(super) fn optional_key(key: &str, name: Option<String>) -> Result<Option<&'static str>, ArchitectureError> {
    name.map(|name| config_key(key, name)).transpose()
}

/// A dotted part of a tensor name, without placeholders.
pub(super) fn part(key: &str, name: String) -> Result<&'static str, ArchitectureError> {
    let fits = |part: &str| !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c));
    if name.len() > LONGEST || !name.split('.').all(fits) {
        return Err(wrong(
            key,
            format!(
                "is `{}`, wanted a module's name without `.weight`: letters, digits, `_`, `-`, parted by `.`",
                clean(&name)
            ),
        ));
    }
    if name.ends_with(".weight") || name.ends_with(".bias") {
        return Err(wrong(
            key,
            format!("is `{}`, wanted the module's name without `.weight` or `.bias`", clean(&name)),
        ));
    }
    Ok(leak(name))
}

pub(super) fn parts(key: &str, names: Vec<String>) -> Result<&'static [&'static str], ArchitectureError> {
    Ok(leak_list(names.into_iter().map(|name| part(key, name)).collect::<Result<Vec<_>, _>>()?))
}

pub(super) fn set_part(slot: &mut &'static str, key: &str, name: Option<String>) -> Result<(), ArchitectureError> {
    if let Some(name) = name {
        *slot = part(key, name)?;
    }
    Ok(())
}

pub(super) fn set_part_or_none(
    slot: &mut Option<&'static str>,
    key: &str,
    name: Option<PartOrNone>,
) -> Result<(), ArchitectureError> {
    if let Some(PartOrNone(name)) = name {
        *slot = name.map(|name| part(key, name)).transpose()?;
    }
    Ok(())
}

/// Refuses names that latent attention, whose linears have fixed ones, would not read.
pub(super) fn refuse_unread(rules: &NameRules, base: &str) -> Result<(), ArchitectureError> {
    let given = [
        ("names.qkv", rules.qkv.is_some()),
        ("names.q_norm", rules.q_norm.is_some()),
        ("names.k_norm", rules.k_norm.is_some()),
        ("names.o", rules.o.is_some()),
    ];
    match given.into_iter().find(|(_, given)| *given) {
        Some((key, _)) => Err(wrong(
            key,
            format!("is here, and {base} has latent attention, whose linears and norms have fixed names: leave it out"),
        )),
        None => Ok(()),
    }
}

/// Refuses one name for two norms of a block, at the last key that gives it.
fn distinct_norms(names: &Names, given: [bool; 6]) -> Result<(), ArchitectureError> {
    let own = |name: &str| format!("{}.{name}", names.attn);
    let all = [
        ("names.attn_norm", names.attn_norm.map(str::to_owned)),
        ("names.attn_out_norm", names.attn_out_norm.map(str::to_owned)),
        ("names.mlp_norm", names.mlp_norm.map(str::to_owned)),
        ("names.mlp_out_norm", names.mlp_out_norm.map(str::to_owned)),
        ("names.q_norm", Some(own(names.qk_norms[0]))),
        ("names.k_norm", Some(own(names.qk_norms[1]))),
    ];
    for (i, (key, name)) in all.iter().enumerate() {
        for (j, (earlier, other)) in all.iter().enumerate().take(i) {
            if let (Some(name), true) = (name, name == other) {
                let (key, other) = if given[i] || !given[j] { (key, earlier) } else { (earlier, key) };
                let reason = format!("gives the norm `{name}`, which is that of `{other}` too; each has its own");
                return Err(wrong(key, reason));
            }
        }
    }
    Ok(())
}

pub(super) fn set_names(names: &mut Names, rules: NameRules) -> Result<(), ArchitectureError> {
    let given = [
        rules.attn_norm.is_some(),
        rules.attn_out_norm.is_some(),
        rules.mlp_norm.is_some(),
        rules.mlp_out_norm.is_some(),
        rules.q_norm.is_some(),
        rules.k_norm.is_some(),
    ];
    if let Some(block) = rules.block {
        let Some(prefix) = block.strip_suffix(BLOCK).and_then(|rest| rest.strip_suffix('.')) else {
            let found = clean(&block);
            let reason = format!(
                "is `{found}`, wanted the module of a block with its number as `{BLOCK}` at the end: `model.layers.{BLOCK}`"
            );
            return Err(wrong("names.block", reason));
        };
        names.blocks = part("names.block", prefix.to_owned())?;
    }
    set_part(&mut names.embed, "names.embed", rules.embed)?;
    set_part(&mut names.final_norm, "names.final_norm", rules.final_norm)?;
    set_part(&mut names.head, "names.head", rules.head)?;
    set_part_or_none(&mut names.attn_norm, "names.attn_norm", rules.attn_norm)?;
    set_part_or_none(&mut names.attn_out_norm, "names.attn_out_norm", rules.attn_out_norm)?;
    set_part_or_none(&mut names.mlp_norm, "names.mlp_norm", rules.mlp_norm)?;
    set_part_or_none(&mut names.mlp_out_norm, "names.mlp_out_norm", rules.mlp_out_norm)?;
    set_part(&mut names.attn, "names.attn", rules.attn)?;
    set_part(&mut names.mlp, "names.mlp", rules.mlp)?;
    set_part(&mut names.qk_norms[0], "names.q_norm", rules.q_norm)?;
    set_part(&mut names.qk_norms[1], "names.k_norm", rules.k_norm)?;
    set_part(&mut names.o, "names.o", rules.o)?;
    set_part(&mut names.down, "names.down", rules.down)?;
    if let Some(rule) = rules.qkv {
        let (layout, own) = rule.parts();
        (names.qkv, names.qkv_names) = (layout, parts("names.qkv", own)?);
    }
    if let Some(rule) = rules.gate_up.map(GateUpRule::parts) {
        (names.gate_up, names.gate_up_names) = (rule.0, parts("names.gate_up", rule.1)?);
    }
    distinct_norms(names, given)
}

pub(super) fn bias(rule: BiasRule, key: &str) -> Result<Bias, ArchitectureError> {
    Ok(match rule {
        BiasRule::Never => Bias::Never,
        BiasRule::Always => Bias::Always,
        BiasRule::Key(flag) => Bias::Key(config_key(key, flag.name)?, flag.default),
        BiasRule::AnyOf(names) => {
            Bias::AnyOf(leak_list(names.into_iter().map(|name| config_key(key, name)).collect::<Result<Vec<_>, _>>()?))
        }
    })
}

pub(super) fn window(rule: WindowRule) -> Result<Window, ArchitectureError> {
    Ok(match rule {
        WindowRule::Never => Window::Never,
        WindowRule::Refused => Window::Refused,
        WindowRule::SomeLayers => Window::SomeLayers { first: 28 },
        WindowRule::AllLayers(all) => Window::AllLayers(bounded("window.all_layers", all.default, POSITIONS)?),
        WindowRule::Alternating(rule) => Window::Alternating {
            period: bounded("window.alternating.period", Some(rule.period), 1..=10_000)?.unwrap_or(1),
            period_key: optional_key("window.alternating.period_key", rule.period_key)?,
            default: bounded("window.alternating.default", Some(rule.default), POSITIONS)?.unwrap_or(1),
        },
    })
}

pub(super) fn set_rope(rope: &mut RopeRules, rule: RopeRule) -> Result<(), ArchitectureError> {
    if let Some(types) = rule.types {
        rope.types = leak_list(types.into_iter().map(|kind| kind.name()).collect());
    }
    if let Some(aliases) = rule.aliases {
        let alias = |(name, kind): (String, RopeType)| Ok((config_key("rope.aliases", name)?, kind.name()));
        rope.aliases = leak_list(aliases.into_iter().map(alias).collect::<Result<Vec<_>, _>>()?);
    }
    rope.partial = bounded("rope.partial", rule.partial, 1e-6..=1.0)?.or(rope.partial);
    rope.pairing = rule.pairing.map_or(rope.pairing, Into::into);
    rope.theta = bounded("rope.theta", rule.theta, THETAS)?.unwrap_or(rope.theta);
    rope.local_theta = bounded("rope.local_theta", rule.local_theta, THETAS)?.or(rope.local_theta);
    rope.original_positions =
        bounded("rope.original_positions", rule.original_positions, POSITIONS)?.or(rope.original_positions);
    rope.ratio = optional_key("rope.ratio_key", rule.ratio_key)?.or(rope.ratio);
    Ok(())
}

pub(super) fn set_moe(moe: &mut MoeRules, rule: MoeRule) -> Result<(), ArchitectureError> {
    set_part(&mut moe.module, "moe.module", rule.module)?;
    for (slot, name, key) in moe
        .parts
        .iter_mut()
        .zip([rule.gate, rule.up, rule.down])
        .zip(["gate", "up", "down"])
        .map(|((s, n), k)| (s, n, k))
    {
        let Some(name) = name else { continue };
        let key = format!("moe.{key}");
        let Some(own) = name.strip_prefix(EXPERT) else {
            let reason = format!(
                "is `{}`, wanted the module of an expert's linear with its number as `{{e}}`: `{EXPERT}gate_proj`",
                clean(&name)
            );
            return Err(wrong(&key, reason));
        };
        *slot = part(&key, own.to_owned())?;
    }
    set_part_or_none(&mut moe.shared, "moe.shared", rule.shared)?;
    moe.shared_gate = rule.shared_gate.unwrap_or(moe.shared_gate);
    if let Some(keys) = rule.experts_keys {
        if keys.is_empty() {
            return Err(wrong("moe.experts_keys", "is empty, wanted the key of the number of experts".to_owned()));
        }
        let keys = keys.into_iter().map(|key| config_key("moe.experts_keys", key));
        moe.experts = leak_list(keys.collect::<Result<Vec<_>, _>>()?);
    }
    moe.intermediate = optional_key("moe.intermediate_key", rule.intermediate_key)?.unwrap_or(moe.intermediate);
    match rule.shared_width {
        None => {}
        Some(SharedWidthRule::Key(key)) => moe.shared_width = SharedWidth::Key(config_key("moe.shared_width", key)?),
        Some(SharedWidthRule::Times(times)) => {
            let most = bounded("moe.shared_width.times.default", Some(times.default), 0..=1 << 14)?;
            moe.shared_width = SharedWidth::Times(config_key("moe.shared_width", times.key)?, most.unwrap_or(0));
        }
    }
    match rule.routing {
        None => {}
        Some(RoutingRule::Softmax(softmax)) => moe.routing = Routing::Softmax { normalize: softmax.normalize },
        Some(RoutingRule::SoftmaxGroups) => moe.routing = Routing::SoftmaxGroups,
        Some(RoutingRule::SigmoidGroups(sigmoid)) => {
            let key = "moe.routing.sigmoid_groups";
            for number in [sigmoid.groups, sigmoid.kept] {
                bounded(key, Some(number), 1..=1 << 14)?;
            }
            bounded(key, Some(sigmoid.scale), FACTORS)?;
            moe.routing = Routing::SigmoidGroups { groups: (sigmoid.groups, sigmoid.kept), scale: sigmoid.scale };
        }
    }
    match rule.layers {
        None => {}
        Some(SparseRule::All) => moe.sparse = Sparse::All,
        Some(SparseRule::Steps) => moe.sparse = Sparse::Steps,
        Some(SparseRule::AfterFirst(first)) => moe.sparse = Sparse::AfterFirst(first),
    }
    Ok(())
}

pub(super) fn set_mla(mla: &mut MlaRules, rule: MlaRule) -> Result<(), ArchitectureError> {
    mla.interleave = match rule.interleave {
        InterleaveRule::Always => None,
        InterleaveRule::Key(key) => Some(config_key("mla.interleave", key)?),
    };
    Ok(())
}
