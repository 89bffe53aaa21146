//! Lists of modules that are not quantized, as the tools write them.

use regex::Regex;

/// A list of ignored modules: names, `re:` of compressed-tensors, patterns of gptq, globs of ModelOpt.
pub(crate) struct Ignored<'c> {
    names: Vec<&'c str>,
    patterns: Vec<Regex>,
}

impl<'c> Ignored<'c> {
    /// Entries that are no valid pattern cover nothing.
    pub(crate) fn new(rules: &'c [String]) -> Self {
        let (mut names, mut patterns) = (Vec::new(), Vec::new());
        for rule in rules {
            let pattern = if let Some(pattern) = rule.strip_prefix("re:") {
                // Python's `re.match`: from the start.
                format!("^(?:{pattern})")
            } else if rule.starts_with('^') {
                rule.clone()
            } else if rule.contains('*') {
                format!("^{}$", rule.split('*').map(regex::escape).collect::<Vec<_>>().join(".*"))
            } else {
                names.push(rule.as_str());
                continue;
            };
            patterns.extend(Regex::new(&pattern));
        }
        Self { names, patterns }
    }

    /// Whether an entry means exactly this module.
    pub(crate) fn names(&self, module: &str) -> bool {
        self.names.contains(&module) || self.matches(module)
    }

    /// Whether an entry means this module or, by whole parts of the dotted name, something that holds it: `lm_head`,
    /// `model.visual`, `mlp.gate`.
    pub(crate) fn holds(&self, module: &str) -> bool {
        let at_bounds = |(start, name): (usize, &str)| {
            let end = start + name.len();
            (start == 0 || module[..start].ends_with('.')) && (end == module.len() || module[end..].starts_with('.'))
        };
        let named = |name: &&str| !name.is_empty() && module.match_indices(*name).any(at_bounds);
        self.names.iter().any(named) || self.matches(module)
    }

    /// Whether any engine would take an entry to cover the module: by name, by the name of what holds it, or by a part
    /// of its name.
    pub(crate) fn covers(&self, module: &str) -> bool {
        self.names.iter().any(|name| !name.is_empty() && module.contains(name)) || self.matches(module)
    }

    fn matches(&self, module: &str) -> bool {
        self.patterns.iter().any(|pattern| pattern.is_match(module))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_as_the_tools_mean_them() {
        let rules = ["lm_head", "re:.*mlp.gate$", "^model\\.x$", "model.visual*", "re:(", "k_proj"].map(str::to_owned);
        let ignored = Ignored::new(&rules);
        for module in ["lm_head", "model.layers.0.mlp.gate", "model.x", "model.visual.blocks.0"] {
            assert!(ignored.names(module) && ignored.covers(module), "{module}");
        }
        assert!(!ignored.names("model.layers.0.self_attn.k_proj") && ignored.covers("model.layers.0.self_attn.k_proj"));
        assert!(!ignored.covers("model.layers.0.mlp.gate_proj"));
    }
}
