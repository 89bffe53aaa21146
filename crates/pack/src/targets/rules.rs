//! What the rules of all engines share.

use std::collections::{BTreeMap, BTreeSet};

use lite_quant::{LinearScheme, ScaleDtype, Scheme};

use super::{RuleViolation, Severity, SiteFacts, Target};
use crate::Layout;
use crate::schemes::same_codes;

/// How an engine cuts a linear over tensor-parallel ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Split {
    /// Along N.
    Column,
    /// Along N, but key and value heads are replicated when there are fewer of them than ranks.
    KeyValue,
    /// Along K.
    Row,
    /// Not at all, or unknown.
    Whole,
}

/// What is being checked, and what was found.
pub(super) struct Rules<'a> {
    pub(super) layout: &'a dyn Layout,
    pub(super) scheme: &'a LinearScheme,
    pub(super) sites: &'a [SiteFacts],
    pub(super) architectures: &'a [String],
    pub(super) tp: usize,
    pub(super) found: Vec<RuleViolation>,
}

impl<'a> Rules<'a> {
    pub(super) fn new(
        layout: &'a dyn Layout,
        scheme: &'a LinearScheme,
        sites: &'a [SiteFacts],
        architectures: &'a [String],
        tp: usize,
    ) -> Self {
        Self { layout, scheme, sites, architectures, tp, found: Vec::new() }
    }

    pub(super) fn is(&self, layout: &str) -> bool {
        self.layout.name() == layout
    }

    /// The quantized linears.
    pub(super) fn quantized(&self) -> impl Iterator<Item = &'a SiteFacts> + use<'a> {
        self.sites.iter().filter(|site| site.quantized)
    }

    /// A violation that concerns the whole model.
    pub(super) fn whole(&mut self, severity: Severity, rule: &'static str, source: &'static str, message: String) {
        self.found.push(RuleViolation { rule, severity, message, source, sites: Vec::new() });
    }

    /// A violation that concerns `sites`, if there are any. `message` follows their names.
    pub(super) fn at<'s>(
        &mut self,
        severity: Severity,
        rule: &'static str,
        source: &'static str,
        sites: impl Iterator<Item = &'s str>,
        message: &str,
    ) {
        let sites: Vec<String> = sites.map(str::to_owned).collect();
        if !sites.is_empty() {
            let message = format!("{}: {message}", listed(&sites));
            self.found.push(RuleViolation { rule, severity, message, source, sites });
        }
    }

    /// The layout's own limits, for every quantized linear.
    pub(super) fn layout_holds_everything(&mut self) {
        let mut by_error = BTreeMap::<String, Vec<&str>>::new();
        for site in self.quantized() {
            let scheme = site.scheme.as_ref().unwrap_or(self.scheme);
            if let Err(error) = self.layout.check(scheme, site.n, site.k) {
                by_error.entry(error.to_string()).or_default().push(&site.name);
            } else if !same_codes(scheme, self.scheme)
                && let Err(why) = self.layout.mixes(self.scheme, scheme)
            {
                let error = format!("layout `{}` cannot hold a scheme of their own: {why}", self.layout.name());
                by_error.entry(error).or_default().push(&site.name);
            }
        }
        for (error, sites) in by_error {
            self.at(Severity::Refused, "layout-limits", "lite: `Layout::check`", sites.into_iter(), &error);
        }
    }

    /// Fused groups of which some members are quantized and some are not, in order of name.
    pub(super) fn mixed_groups(&self) -> Vec<&'a str> {
        mixed(self.sites, |site| site.fused_group.as_deref())
    }

    /// Expert blocks (`….experts`) of which some linears are quantized and some are not.
    pub(super) fn mixed_experts(&self) -> Vec<&'a str> {
        mixed(self.sites, |site| expert_block(&site.name))
    }

    /// Quantized linears for which an unquantized one makes an engine that reads the ignore list by
    /// substring take them for unquantized: `(ignored, quantized)` must be a match.
    pub(super) fn misread_by(&self, matches: impl Fn(&str, &str) -> bool) -> Vec<&'a str> {
        let ignored: Vec<&str> = self.sites.iter().filter(|site| !site.quantized).map(|site| &*site.name).collect();
        let misread = |site: &&'a SiteFacts| ignored.iter().any(|ignored| matches(ignored, &site.name));
        self.quantized().filter(misread).map(|site| &*site.name).collect()
    }

    /// Plain linears in the blocks that hold the quantized ones.
    pub(super) fn plain_in_blocks(&self) -> Vec<&'a SiteFacts> {
        let roots: BTreeSet<&str> = self.quantized().filter_map(|site| blocks(&site.name)).collect();
        let inside = |site: &&SiteFacts| blocks(&site.name).is_some_and(|root| roots.contains(root));
        self.sites.iter().filter(|site| !site.quantized).filter(inside).collect()
    }

    /// The names of the quantized linears that fulfil `bad`.
    pub(super) fn names(&self, bad: impl Fn(&SiteFacts) -> bool) -> std::vec::IntoIter<&'a str> {
        self.quantized().filter(|site| bad(site)).map(|site| &*site.name).collect::<Vec<_>>().into_iter()
    }

    /// Scales in a type that the engine converts to IEEE half when it loads them.
    pub(super) fn scales_become_f16(&mut self, scheme: &Scheme, rule: &'static str, source: &'static str) {
        let what = match scheme.scale_dtype {
            ScaleDtype::F16 => return,
            ScaleDtype::BF16 => "bf16 scales are converted to fp16: exact inside its normal range, 6.1e-5 to 65504",
            ScaleDtype::F32 => {
                "f32 scales are rounded to fp16, so the engine computes with other weights than were verified"
            }
        };
        self.whole(Severity::Warning, rule, source, format!("{what}; write fp16 scales for this engine"));
    }

    /// Routers stay dense in every published checkpoint, and most models build them without
    /// quantization whatever the config says.
    pub(super) fn routers_are_dense(&mut self, rule: &'static str, source: &'static str) {
        let routers = self.names(|site| is_router(&site.name));
        let message = "routers are built without quantization by most models of this engine; leave them unquantized";
        self.at(Severity::Warning, rule, source, routers, message);
    }
}

/// Refuses or warns about the scales of one linear for an engine that computes in fp16 (TurboMind,
/// LMDeploy's PyTorch engine); other engines keep the type in the file.
///
/// fp16 has nothing above 65504 and nothing below 2⁻²⁴; below 2⁻¹⁴ it loses bits.
pub fn check_scales(target: Target, name: &str, scales: &[f32]) -> Option<RuleViolation> {
    let (rule, source) = match target {
        Target::TurboMind => ("turbomind-scale-range", turbomind_scales()),
        Target::LmdeployPytorch => {
            ("lmdeploy-pytorch-scale-range", "lmdeploy/pytorch/nn/linear/awq.py: `dtype=torch.float16`")
        }
        Target::Vllm | Target::Transformers | Target::TrtLlm => return None,
    };
    let half = |scale: f32| half::f16::from_f32(scale);
    let lost =
        scales.iter().filter(|&&scale| half(scale).is_infinite() || (scale != 0.0 && half(scale) == half::f16::ZERO));
    let small = scales.iter().filter(|&&scale| scale != 0.0 && scale.abs() < half::f16::MIN_POSITIVE.to_f32());
    let (severity, message) = match (lost.count(), small.count()) {
        (0, 0) => return None,
        (0, few) => (
            Severity::Warning,
            format!(
                "{few} scales of `{name}` are below 6.1e-5 and lose bits in fp16; use larger groups or fp16 scales"
            ),
        ),
        (lost, _) => (
            Severity::Refused,
            format!("{lost} scales of `{name}` become zero or infinite in fp16; leave this layer unquantized"),
        ),
    };
    Some(RuleViolation { rule, severity, message, source, sites: vec![name.to_owned()] })
}

/// Where TurboMind converts scales.
pub(super) fn turbomind_scales() -> &'static str {
    "lmdeploy/turbomind/weight_format.py: scales and zeros `.half()`"
}

/// The last component of a module name.
pub(super) fn last(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// How a linear is cut, by the last component of its name.
pub(super) fn split(name: &str) -> Split {
    match last(name) {
        "k_proj" | "v_proj" => Split::KeyValue,
        "o_proj" | "wo" | "down_proj" | "w2" => Split::Row,
        "q_proj" | "qkv_proj" | "wqkv" | "gate_proj" | "up_proj" | "gate_up_proj" | "w1" | "w3" => Split::Column,
        _ => Split::Whole,
    }
}

/// `model.layers.3.mlp.experts` of `model.layers.3.mlp.experts.17.up_proj`.
pub(super) fn expert_block(name: &str) -> Option<&str> {
    name.find(".experts.").map(|at| &name[..at + ".experts".len()])
}

/// `model.layers` of `model.layers.3.mlp.up_proj`: what is before the first number.
pub(super) fn blocks(name: &str) -> Option<&str> {
    let mut end = 0usize;
    for part in name.split('.') {
        if !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()) {
            return name.get(..end.saturating_sub(1));
        }
        end += part.len() + 1;
    }
    None
}

/// Whether this is a router, or the gate of a shared expert.
pub(super) fn is_router(name: &str) -> bool {
    matches!(last(name), "gate" | "router" | "shared_expert_gate")
}

/// Whether this is the output head.
pub(super) fn is_head(name: &str) -> bool {
    matches!(last(name), "lm_head" | "output" | "output_layer") && !name.contains(".layers.")
}

/// Whether this belongs to a vision or audio tower, or to the projector behind it.
pub(super) fn is_tower(name: &str) -> bool {
    const TOWERS: [&str; 8] = [
        "visual",
        "vision_tower",
        "vision_model",
        "audio_tower",
        "multi_modal_projector",
        "mlp1",
        "time_series",
        "vision_embedder",
    ];
    name.split('.').any(|part| TOWERS.contains(&part))
}

fn mixed<'a>(sites: &'a [SiteFacts], group: impl Fn(&'a SiteFacts) -> Option<&'a str>) -> Vec<&'a str> {
    let mut seen = BTreeMap::<&str, [bool; 2]>::new();
    for site in sites {
        if let Some(group) = group(site) {
            seen.entry(group).or_default()[usize::from(site.quantized)] = true;
        }
    }
    seen.into_iter().filter(|(_, kinds)| kinds[0] && kinds[1]).map(|(group, _)| group).collect()
}

/// "`a`, `b`, `c` and 5 more".
pub(super) fn listed(names: &[String]) -> String {
    let shown: Vec<String> = names.iter().take(3).map(|name| format!("`{name}`")).collect();
    match names.len().checked_sub(3) {
        Some(more) if more > 0 => format!("{} and {more} more", shown.join(", ")),
        _ => shown.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_understood() {
        assert_eq!(split("model.layers.0.mlp.down_proj"), Split::Row);
        assert_eq!(split("model.layers.0.self_attn.k_proj"), Split::KeyValue);
        assert_eq!(split("lm_head"), Split::Whole);
        assert_eq!(expert_block("model.layers.3.mlp.experts.17.up_proj"), Some("model.layers.3.mlp.experts"));
        assert_eq!(expert_block("model.layers.3.mlp.shared_experts.up_proj"), None);
        assert_eq!(blocks("model.layers.3.mlp.experts.17.up_proj"), Some("model.layers"));
        assert_eq!((blocks("0.up_proj"), blocks("lm_head")), (Some(""), None));
        assert!(is_router("model.layers.3.mlp.gate") && !is_router("model.layers.3.mlp.gate_proj"));
        assert!(is_head("lm_head") && is_head("output") && !is_head("model.layers.0.attention.output"));
        assert!(is_tower("visual.blocks.0.attn.qkv") && !is_tower("model.layers.0.mlp.up_proj"));
    }

    #[test]
    fn scales_outside_half_are_found() {
        assert_eq!(check_scales(Target::TurboMind, "a", &[0.01, 65504.0, 0.0]), None);
        let severity = |scales| check_scales(Target::TurboMind, "a", scales).map(|violation| violation.severity);
        assert_eq!(severity(&[0.01, 1e-6]), Some(Severity::Warning));
        assert_eq!(severity(&[0.01, 1e-9]), Some(Severity::Refused));
        assert_eq!(severity(&[7e4, 1.0]), Some(Severity::Refused));
        assert_eq!(check_scales(Target::Vllm, "a", &[1e-9]), None);
    }
}
