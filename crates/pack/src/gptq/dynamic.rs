//! `dynamic`: regular expressions over module names. `-:` leaves a module plain, `+:` (or nothing)
//! changes its scheme, and the first that matches from the start of the name wins (GPTQModel,
//! `dynamic_get`; vLLM, `get_dynamic_override`).

use std::collections::BTreeMap;

/// Characters that mean something in Python's `re`, `regex` and PCRE outside of a class.
const META: &str = ".^$*+?{}[]()|\\";

/// vLLM's fused linears: older releases look a fused linear up by this name only, newer ones by this
/// name first (`packed_modules_mapping` of its models).
const FUSED: [(&str, &[&str]); 5] = [
    ("qkv_proj", &["q_proj", "k_proj", "v_proj"]),
    ("gate_up_proj", &["gate_proj", "up_proj"]),
    ("in_proj_qkvz", &["in_proj_qkv", "in_proj_z"]),
    ("in_proj_ba", &["in_proj_b", "in_proj_a"]),
    ("fused_qkv_a_proj", &["q_a_proj", "kv_a_proj_with_mqa"]),
];

/// A pattern that matches exactly this name.
pub(super) fn exactly(name: &str) -> String {
    let mut pattern = String::from("^");
    for c in name.chars() {
        if META.contains(c) {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern.push('$');
    pattern
}

/// The one name that a pattern matches, if there is only one.
pub(super) fn only_match(pattern: &str) -> Option<String> {
    let mut chars = pattern.strip_prefix('^')?.strip_suffix('$')?.chars();
    let mut name = String::new();
    while let Some(c) = chars.next() {
        match c {
            // Before a letter or digit a backslash makes a class, `\d`.
            '\\' => name.push(chars.next().filter(|next| !next.is_alphanumeric())?),
            c if META.contains(c) => return None,
            c => name.push(c),
        }
    }
    Some(name)
}

/// The names under which vLLM looks up what it fuses out of these modules: fused linears whose parts
/// are all listed with one value, and blocks of experts.
pub(super) fn fused_names<T: Copy + PartialEq>(modules: &[(&str, T)]) -> Vec<(String, T)> {
    let mut parents = BTreeMap::<&str, Vec<(&str, T)>>::new();
    let mut experts = BTreeMap::<&str, Vec<T>>::new();
    for &(name, value) in modules {
        if let Some((parent, own)) = name.rsplit_once('.') {
            parents.entry(parent).or_default().push((own, value));
        }
        if let Some(at) = name.find(".experts.") {
            experts.entry(&name[..at + ".experts".len()]).or_default().push(value);
        }
    }
    let mut fused = Vec::new();
    for (parent, parts) in parents.iter().filter(|(parent, _)| !parent.contains(".experts.")) {
        for (name, wanted) in FUSED {
            let value = |part: &&str| parts.iter().find(|(own, _)| own == part).map(|(_, value)| *value);
            let values: Option<Vec<T>> = wanted.iter().map(value).collect();
            fused.extend(common(&values.unwrap_or_default()).map(|value| (format!("{parent}.{name}"), value)));
        }
    }
    fused.extend(experts.iter().filter_map(|(block, values)| Some(((*block).to_owned(), common(values)?))));
    fused
}

fn common<T: Copy + PartialEq>(values: &[T]) -> Option<T> {
    let first = *values.first()?;
    values.iter().all(|value| *value == first).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_from_their_patterns() {
        assert_eq!(exactly("model.layers.0.mlp.up_proj"), r"^model\.layers\.0\.mlp\.up_proj$");
        for name in ["model.layers.0.mlp.up_proj", "h.0.c-attn", "a+b(c)|[d]{e}\\f", ""] {
            assert_eq!(only_match(&exactly(name)).as_deref(), Some(name));
        }
        for several in [r"^model\.layers\.\d\.x$", ".*mlp.*", r"^a.b$", r"^a\.b", r"a\.b$", "^a\\$"] {
            assert_eq!(only_match(several), None, "{several}");
        }
    }

    #[test]
    fn fused_names_need_every_part_and_one_value() {
        let fused = |modules: &[(&str, u8)]| fused_names(modules);
        let qkv = [("l.0.attn.q_proj", 8), ("l.0.attn.k_proj", 8), ("l.0.attn.v_proj", 8)];
        assert_eq!(fused(&qkv), [("l.0.attn.qkv_proj".to_owned(), 8)]);
        assert_eq!(fused(&qkv[..2]), []);
        assert_eq!(fused(&[qkv[0], qkv[1], ("l.0.attn.v_proj", 4)]), []);
        let experts = [("l.0.mlp.experts.0.gate_proj", 8), ("l.0.mlp.experts.0.up_proj", 8)];
        assert_eq!(fused(&experts), [("l.0.mlp.experts".to_owned(), 8)]);
    }
}
