//! Which linears are quantized, and with what: `--override` and `--ignore`.

use lite_model::printable;
use regex::Regex;

use crate::schemes::changed;
use crate::{JobError, QuantSite, Recipe};

/// Applies the recipe's rules; returns the linears that stay plain.
///
/// # Errors
/// A pattern that is no regex or matches nothing, or numbers that no scheme has.
pub(crate) fn apply(recipe: &Recipe, sites: &mut Vec<QuantSite>) -> Result<Vec<QuantSite>, JobError> {
    for rule in &recipe.overrides {
        let regex = compile("--override", &rule.pattern, sites)?;
        for site in sites.iter_mut().filter(|s| regex.is_match(&s.module)) {
            site.scheme = changed(site.scheme, rule)?;
        }
    }
    let mut plain = Vec::new();
    for pattern in &recipe.ignore {
        let everything: Vec<QuantSite> = sites.iter().chain(&plain).cloned().collect();
        let regex = compile("--ignore", pattern, &everything)?;
        let (left, kept): (Vec<_>, Vec<_>) = sites.drain(..).partition(|s| regex.is_match(&s.module));
        plain.extend(left);
        *sites = kept;
    }
    if sites.is_empty() {
        return Err(JobError::Usage(
            "--ignore leaves no linear to quantize; give patterns that match fewer".to_owned(),
        ));
    }
    Ok(plain)
}

fn compile(flag: &str, pattern: &str, sites: &[QuantSite]) -> Result<Regex, JobError> {
    let regex = Regex::new(pattern).map_err(|error| {
        JobError::Usage(format!("{flag} `{}` is no regular expression: {error}", printable(pattern)))
    })?;
    if sites.iter().any(|site| regex.is_match(&site.module)) {
        return Ok(regex);
    }
    Err(JobError::Usage(format!(
        "{flag} `{}` matches none of {} linears; names near it: {}",
        printable(pattern),
        sites.len(),
        nearest(pattern, sites).join(", ")
    )))
}

/// The module names that share most with a pattern: by the longest run of characters in common.
fn nearest(pattern: &str, sites: &[QuantSite]) -> Vec<String> {
    let mut names: Vec<(usize, &str)> =
        sites.iter().map(|s| (longest_common(pattern, &s.module), s.module.as_str())).collect();
    names.sort_by_key(|(common, _)| std::cmp::Reverse(*common));
    names.iter().take(4).map(|(_, name)| format!("`{}`", printable(name))).collect()
}

/// Length of the longest substring of both.
fn longest_common(a: &str, b: &str) -> usize {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut row = vec![0usize; b.len() + 1];
    let mut best = 0;
    for &x in a {
        let mut diagonal = 0;
        for (j, &y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { 0 };
            best = best.max(row[j + 1]);
            diagonal = above;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_share_the_longest_run() {
        assert_eq!(longest_common("down_prj", "model.layers.0.mlp.down_proj"), "down_pr".len());
        assert_eq!(longest_common("", "x"), 0);
        assert_eq!(longest_common("xyz", "abc"), 0);
    }
}
