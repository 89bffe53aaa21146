//! What the tests of engines' rules share.

use lite_pack::layout;
use lite_pack::targets::{Severity, SiteFacts, Target, check};
use lite_quant::{ScaleDtype, Scheme};

pub(crate) fn scheme(bits: i64, group: i64, symmetric: bool) -> Scheme {
    Scheme::new(bits, group, symmetric, ScaleDtype::F16).unwrap()
}

pub(crate) fn site(name: &str, group: Option<&str>, n: usize, k: usize) -> SiteFacts {
    SiteFacts { name: name.to_owned(), fused_group: group.map(str::to_owned), n, k, quantized: true, scheme: None }
}

/// Two experts, one by one.
pub(crate) fn expert_linears() -> Vec<SiteFacts> {
    let of = |expert| {
        let parent = format!("model.layers.0.mlp.experts.{expert}");
        let group = format!("{parent}.gate_up");
        [
            site(&format!("{parent}.gate_proj"), Some(&group), 256, 512),
            site(&format!("{parent}.up_proj"), Some(&group), 256, 512),
            site(&format!("{parent}.down_proj"), None, 512, 256),
        ]
    };
    (0..2).flat_map(of).collect()
}

/// `(refused, warned)` rule names.
pub(crate) fn rules(
    target: Target,
    layout_name: &str,
    scheme: &Scheme,
    sites: &[SiteFacts],
    architecture: &str,
    tp: usize,
) -> (Vec<&'static str>, Vec<&'static str>) {
    let found = check(target, layout(layout_name).unwrap(), &(*scheme).into(), sites, &[architecture.to_owned()], tp);
    for violation in &found {
        assert!(!violation.message.is_empty() && !violation.source.is_empty());
        for name in &violation.sites {
            let known = sites
                .iter()
                .any(|site| site.name.starts_with(name.as_str()) || site.fused_group.as_ref() == Some(name));
            assert!(known, "{name}");
        }
    }
    let of = |severity| found.iter().filter(|found| found.severity == severity).map(|found| found.rule).collect();
    (of(Severity::Refused), of(Severity::Warning))
}
