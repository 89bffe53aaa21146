//! The rules of engines, on what is really stored.

use lite_pack::targets::{Severity, SiteFacts, check as rules};

use super::findings::Findings;
use super::{Judged, VerifyOptions};

/// Every rule of the targets that the checkpoint breaks.
pub(super) fn check(judged: &Judged<'_>, options: &VerifyOptions<'_>, findings: &mut Findings) {
    let Some(quantized) = judged.quantized else {
        if !options.targets.is_empty() {
            findings.note("not-quantized", None, "no layout that is known, so no engine's rules were checked");
        }
        return;
    };
    let config = quantized.config();
    let fused = |module: &str| {
        let site = judged.spec.and_then(|spec| spec.sites().find(|site| site.module == module));
        site.filter(|site| site.fused_group != site.module).map(|site| site.fused_group.clone())
    };
    let mut sites: Vec<SiteFacts> = judged
        .linears
        .iter()
        // Plain experts that are stored in one tensor are so as engines know them.
        .filter(|linear| {
            judged.is_packed(&linear.module)
                || !judged.checkpoint.info(&format!("{}.weight", linear.module)).is_some_and(|info| info.is_fused())
        })
        .map(|linear| SiteFacts {
            name: linear.module.clone(),
            fused_group: fused(&linear.module),
            n: linear.n,
            k: linear.k,
            quantized: judged.is_packed(&linear.module),
            scheme: Some(*config.scheme_of(&linear.module)).filter(|scheme| *scheme != config.scheme),
        })
        .collect();
    if let Some(spec) = judged.spec
        && sites.iter().all(|site| site.name != spec.head.module)
    {
        let (n, k) = (spec.vocab, spec.hidden);
        let name = spec.head.module.clone();
        sites.push(SiteFacts { name, fused_group: None, n, k, quantized: false, scheme: None });
    }
    let names = judged.checkpoint.config().get("architectures").and_then(|names| names.as_array());
    let names: Vec<String> = names.into_iter().flatten().filter_map(|name| name.as_str().map(str::to_owned)).collect();
    for target in options.targets {
        for broken in rules(*target, quantized.layout(), &config.scheme, &sites, &names, options.tp.max(1)) {
            let message = format!("{}: {} ({})", target.name(), broken.message, broken.source);
            let place = broken.sites.first().map(String::as_str);
            match broken.severity {
                Severity::Refused => findings.error(broken.rule, place, message),
                Severity::Warning => findings.warning(broken.rule, place, message),
            }
        }
    }
}
