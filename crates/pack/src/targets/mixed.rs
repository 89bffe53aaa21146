//! What engines make of linears with schemes of their own.

use std::collections::BTreeMap;

use lite_quant::LinearScheme;

use super::rules::{Rules, expert_block};
use super::{Severity, SiteFacts, Target};
use crate::schemes::same_codes;

const VLLM_FUSED: &str = "vllm gptq_utils.py and compressed_tensors/utils.py: shards must agree";
const VLLM_MOE: &str = "vllm compressed_tensors/compressed_tensors_moe: scheme of `experts.0` for all experts";
const VLLM_NAMES: &str = "vllm auto_gptq.py: `apply_vllm_mapper` does not rename `dynamic`";
const TURBOMIND: &str = "lmdeploy/turbomind/converter.py: one group size, `config_groups.group_0` only";
const OPTIMUM: &str = "optimum/gptq/quantizer.py: one `bits` and `group_size`, `dynamic` is not read";

/// The common scheme, then every other one of a quantized linear, in their order.
pub(super) fn schemes(sites: &[SiteFacts], common: &LinearScheme) -> Vec<LinearScheme> {
    let mut schemes = vec![*common];
    for own in sites.iter().filter(|site| site.quantized).filter_map(|site| site.scheme) {
        if !schemes.contains(&own) {
            schemes.push(own);
        }
    }
    schemes
}

/// The quantized linears of one scheme, and all plain ones.
pub(super) fn of_scheme(sites: &[SiteFacts], common: &LinearScheme, scheme: &LinearScheme) -> Vec<SiteFacts> {
    sites.iter().filter(|site| !site.quantized || site.scheme.unwrap_or(*common) == *scheme).cloned().collect()
}

pub(super) fn check(target: Target, rules: &mut Rules<'_>) {
    let common = *rules.scheme;
    let own: Vec<&str> = rules
        .quantized()
        .filter(|site| site.scheme.is_some_and(|scheme| !same_codes(&scheme, &common)))
        .map(|site| &*site.name)
        .collect();
    if own.is_empty() {
        return;
    }
    match target {
        Target::Vllm => {
            let fused = unequal(rules, |site| site.fused_group.as_deref()).into_iter();
            let message = "vLLM fuses these linears and they have different schemes; give them one";
            rules.at(Severity::Refused, "vllm-fused-schemes", VLLM_FUSED, fused, message);
            let experts = unequal(rules, |site| expert_block(&site.name)).into_iter();
            let message = "vLLM reads one scheme for all experts of a layer; give them one";
            rules.at(Severity::Refused, "vllm-experts-schemes", VLLM_MOE, experts, message);
            if rules.is("gptq") {
                let renamed = own.into_iter().filter(|name| !name.starts_with("model.layers."));
                let message = "in layout `gptq` vLLM looks schemes up by its own names of modules, which for this \
                               model may not be those of the checkpoint; prefer compressed-tensors";
                rules.at(Severity::Warning, "vllm-gptq-names", VLLM_NAMES, renamed, message);
            }
        }
        Target::TurboMind => {
            let message = "TurboMind reads one number of bits and one group size for the whole model; use one scheme";
            rules.at(Severity::Refused, "turbomind-schemes", TURBOMIND, own.into_iter(), message);
        }
        Target::Transformers if rules.is("gptq") => {
            let message = "in layout `gptq` transformers reads one scheme for all linears; use compressed-tensors";
            rules.at(Severity::Refused, "transformers-gptq-schemes", OPTIMUM, own.into_iter(), message);
        }
        // The layouts that the others read hold one scheme.
        Target::Transformers | Target::LmdeployPytorch | Target::TrtLlm => {}
    }
}

/// Groups of linears of which the quantized members do not have one scheme, in order of name.
fn unequal<'a>(rules: &Rules<'a>, group: impl Fn(&'a SiteFacts) -> Option<&'a str>) -> Vec<&'a str> {
    let mut seen = BTreeMap::<&str, (LinearScheme, bool)>::new();
    for site in rules.quantized() {
        if let Some(group) = group(site) {
            let scheme = site.scheme.unwrap_or(*rules.scheme);
            let (first, differs) = seen.entry(group).or_insert((scheme, false));
            *differs |= !same_codes(first, &scheme);
        }
    }
    seen.into_iter().filter(|(_, (_, differs))| *differs).map(|(group, _)| group).collect()
}
