//! The engines that read checkpoints, and what each refuses or misreads.
//!
//! Rules are read from the engines' sources (vLLM 0.33, LMDeploy 0.16, transformers 5.17); each
//! violation carries the place it comes from. An engine that would load a checkpoint wrongly without
//! saying so is treated like one that refuses it.

mod fused_only;
mod lmdeploy_pytorch;
mod mixed;
mod rules;
mod small_types;
mod transformers;
mod turbomind;
mod vllm;

use lite_quant::{GroupSize, LinearScheme, WeightScheme};

use self::rules::Rules;
pub use self::rules::check_scales;
pub(crate) use self::small_types::plain_layout;
use crate::{Layout, default_layout};

/// An engine that loads checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// vLLM.
    Vllm,
    /// LMDeploy's TurboMind engine.
    TurboMind,
    /// LMDeploy's PyTorch engine.
    LmdeployPytorch,
    /// Hugging Face transformers.
    Transformers,
    /// TensorRT-LLM.
    TrtLlm,
}

impl Target {
    /// Every engine, in the order of the documentation.
    pub const ALL: [Self; 5] = [Self::Vllm, Self::TurboMind, Self::LmdeployPytorch, Self::Transformers, Self::TrtLlm];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::TurboMind => "turbomind",
            Self::LmdeployPytorch => "lmdeploy-pytorch",
            Self::Transformers => "transformers",
            Self::TrtLlm => "trtllm",
        }
    }

    /// The engine of this name, as [`name`](Self::name) spells it.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|target| target.name() == name)
    }

    /// The layout to write for this engine.
    ///
    /// Each engine gets one that it loads wherever it loads any: vLLM the default, TurboMind `awq`
    /// only with its 4 bits and groups of 128, LMDeploy's PyTorch engine always `awq`, transformers
    /// always `compressed-tensors`, which needs no GPU kernel, TensorRT-LLM `awq` or `gptq`. Small floats and quantized
    /// inputs go to `compressed-tensors`, for LMDeploy's engines to `lmdeploy-w8a8` or `fp8`, for TensorRT-LLM to `modelopt`.
    pub fn default_layout(self, scheme: &LinearScheme) -> &'static str {
        let (WeightScheme::Int(integers), None) = (&scheme.weights, scheme.activations) else {
            return small_types::default_layout(self, scheme);
        };
        match self {
            Self::Vllm | Self::TurboMind => default_layout(scheme),
            Self::LmdeployPytorch => "awq",
            Self::Transformers => "compressed-tensors",
            Self::TrtLlm if integers.symmetric => "gptq",
            Self::TrtLlm => "awq",
        }
    }
}

/// One linear of the model, quantized or not. Rules on mixed precision need both kinds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SiteFacts {
    /// Full module name in the checkpoint.
    pub name: String,
    /// The linears that an engine fuses into one share this name, `<parent>.qkv`, `<parent>.gate_up`
    /// and so on; the last component tells gate and up projections (`gate_up`) from the others.
    pub fused_group: Option<String>,
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Whether it is quantized.
    pub quantized: bool,
    /// Its scheme, if it is quantized with another than the common one.
    pub scheme: Option<LinearScheme>,
}

/// How bad a broken rule is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Severity {
    /// The engine loads the checkpoint and computes the right thing, under a condition.
    Warning,
    /// The engine refuses the checkpoint, or reads something else than was written.
    Refused,
}

/// One rule of an engine that a plan breaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleViolation {
    /// A stable identifier, `<engine>-<subject>`.
    pub rule: &'static str,
    /// Whether the engine refuses.
    pub severity: Severity,
    /// What was found, what the engine wants, what to do.
    pub message: String,
    /// Where the rule comes from.
    pub source: &'static str,
    /// Names of the linears concerned; empty if the rule is about the whole model.
    pub sites: Vec<String>,
}

/// Whether an engine loads a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It does, under these conditions.
    Loads(Vec<RuleViolation>),
    /// It does not, or misreads it, for these reasons (warnings left out).
    Refuses(Vec<RuleViolation>),
}

/// Every rule of `target` that a plan breaks, refusals first. Where the engine cannot read the family's experts one by
/// one, that refusal alone: no other advice would make it load them.
///
/// `scheme` is that of all quantized `sites` without their own; `architectures` are the names in `config.json` (for a
/// wrapper model the text model's too; empty skips rules about them); `tp` is the number of
/// tensor-parallel ranks the checkpoint must load on, at least 1.
pub fn check(
    target: Target,
    layout: &dyn Layout,
    scheme: &LinearScheme,
    sites: &[SiteFacts],
    architectures: &[String],
    tp: usize,
) -> Vec<RuleViolation> {
    let tp = tp.max(1);
    let mut rules = Rules::new(layout, scheme, sites, architectures, tp);
    let fused_only = fused_only::check(target, &rules);
    if let Some(refusal) = fused_only.as_ref().filter(|found| found.severity == Severity::Refused) {
        return vec![refusal.clone()];
    }
    rules.layout_holds_everything();
    if !rules.found.is_empty() {
        return rules.found;
    }
    for own in mixed::schemes(sites, scheme) {
        let part = mixed::of_scheme(sites, scheme, &own);
        let mut apart = Rules::new(layout, &own, &part, architectures, tp);
        if let (WeightScheme::Int(scheme), None) = (&own.weights, own.activations) {
            match target {
                Target::Vllm => vllm::check(&mut apart, scheme),
                Target::TurboMind => turbomind::check(&mut apart, scheme),
                Target::LmdeployPytorch => lmdeploy_pytorch::check(&mut apart, scheme),
                Target::Transformers => transformers::check(&mut apart, scheme),
                Target::TrtLlm => small_types::trtllm_integers(&mut apart, scheme),
            }
        } else {
            small_types::check(target, &mut apart, &own);
        }
        for mut violation in apart.found {
            if rules.found.contains(&violation) {
                continue;
            }
            if own != *scheme && violation.sites.is_empty() {
                violation.sites = part.iter().filter(|site| site.quantized).map(|site| site.name.clone()).collect();
                violation.message = format!("{}: {}", rules::listed(&violation.sites), violation.message);
            }
            rules.found.push(violation);
        }
    }
    mixed::check(target, &mut rules);
    rules.found.extend(fused_only);
    rules.found.sort_by_key(|violation| violation.severity != Severity::Refused);
    rules.found
}

/// What each engine makes of a checkpoint on one GPU.
pub fn engines_for(
    layout: &dyn Layout,
    scheme: &LinearScheme,
    sites: &[SiteFacts],
    architectures: &[String],
) -> Vec<(Target, Verdict)> {
    let verdict = |target| {
        let mut found = check(target, layout, scheme, sites, architectures, 1);
        if found.iter().any(|violation| violation.severity == Severity::Refused) {
            found.retain(|violation| violation.severity == Severity::Refused);
            Verdict::Refuses(found)
        } else {
            Verdict::Loads(found)
        }
    };
    Target::ALL.into_iter().map(|target| (target, verdict(target))).collect()
}

/// The number configs use, in words where it is −1.
fn group_text(group: GroupSize) -> String {
    match group {
        GroupSize::Channel => "one group per output channel".to_owned(),
        GroupSize::Channels(width) => format!("group size {width}"),
    }
}
