//! Families whose experts an engine reads in one tensor per layer only. This tool writes experts one by one.

use super::rules::{Rules, expert_block, listed};
use super::{RuleViolation, Severity, Target};

const VLLM: &str = "vllm/model_executor/models/gpt_oss.py: `load_weights`, as of September 2026";
const TURBOMIND: &str = "lmdeploy/turbomind/supported_models.py: `SUPPORTED_ARCHS`";
const PYTORCH: &str = "lmdeploy/pytorch/models/gpt_oss.py: `_load_weight_experts`";
const TRANSFORMERS: &str = "transformers/conversion_mapping.py: no entry for `gpt_oss`";
const QWEN3_VL: &str = "transformers/conversion_mapping.py: `qwen3_vl_moe` transposes fused tensors only";
const UNSEEN: &str = "lite: not seen to load";

/// What the engine makes of experts that are stored one by one, packed or plain; `None` where it reads them, or where
/// there are none.
///
/// A refusal here is one that no other scheme, layout or choice of linears cures, so advice of other rules would mislead.
pub(super) fn check(target: Target, rules: &Rules<'_>) -> Option<RuleViolation> {
    let is = |wanted: &str| rules.architectures.iter().any(|name| name == wanted);
    if is("GptOssForCausalLM") {
        gpt_oss(target, rules)
    } else if target == Target::Transformers && (is("Qwen3VLMoeForConditionalGeneration") || is("Qwen3VLMoeTextModel"))
    {
        let message = "transformers has this family's experts in one tensor per layer and does not fuse them from tensors \
                       of each: it would leave them unread and make up new ones; use vLLM, or judge the result with \
                       `lite eval`";
        of_experts(rules, Severity::Refused, "transformers-qwen3-vl-moe", QWEN3_VL, message)
    } else {
        None
    }
}

fn gpt_oss(target: Target, rules: &Rules<'_>) -> Option<RuleViolation> {
    let refused = Severity::Refused;
    match target {
        // In any other format the rest of the model is not read either.
        Target::TurboMind => Some(RuleViolation {
            rule: "turbomind-gpt-oss",
            severity: refused,
            message: "TurboMind reads `GptOssForCausalLM` in mxfp4 only; serve the published checkpoint".to_owned(),
            source: TURBOMIND,
            sites: Vec::new(),
        }),
        Target::Vllm => {
            let message = "vLLM's loader of `GptOssForCausalLM` knows experts one by one in other tools' layouts only and \
                           passes over these; no setting of this tool helps, serve the published MXFP4 checkpoint";
            of_experts(rules, refused, "vllm-gpt-oss", VLLM, message)
        }
        Target::LmdeployPytorch => {
            let message = "LMDeploy's loader of `GptOssForCausalLM` takes every expert tensor for one of a whole layer: it \
                           passes over gate and up and fails at down; no setting of this tool helps, serve the published \
                           MXFP4 checkpoint with TurboMind or vLLM";
            of_experts(rules, refused, "lmdeploy-pytorch-gpt-oss", PYTORCH, message)
        }
        Target::Transformers => {
            let message = "transformers does not fuse this family's experts from tensors of each; no setting of this tool \
                           helps, judge the result with `lite eval`";
            of_experts(rules, refused, "transformers-gpt-oss", TRANSFORMERS, message)
        }
        Target::TrtLlm => {
            let message = "experts of gpt-oss one by one were not seen to load in this engine; try the checkpoint before \
                           relying on it";
            of_experts(rules, Severity::Warning, "trtllm-gpt-oss", UNSEEN, message)
        }
    }
}

/// A violation that concerns every linear of the experts, quantized or not, if there are any.
fn of_experts(
    rules: &Rules<'_>,
    severity: Severity,
    rule: &'static str,
    source: &'static str,
    message: &str,
) -> Option<RuleViolation> {
    let experts = rules.sites.iter().filter(|site| expert_block(&site.name).is_some());
    let sites: Vec<String> = experts.map(|site| site.name.clone()).collect();
    let message = format!("{}: {message}", listed(&sites));
    (!sites.is_empty()).then_some(RuleViolation { rule, severity, message, source, sites })
}
