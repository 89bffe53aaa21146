//! gpt-oss: engines read its experts as they were published, all of a layer in one tensor.

use super::rules::{Rules, expert_block};
use super::{Severity, Target};

const VLLM: &str = "vllm/model_executor/models/gpt_oss.py: `load_weights`, as of September 2026";
const PYTORCH: &str = "lmdeploy/pytorch/nn/moe/__init__.py: `build_fused_moe`";
const TRANSFORMERS: &str = "transformers/conversion_mapping.py: no entry for `gpt_oss`";
const UNSEEN: &str = "lite: not seen to load";

/// What the engines make of experts that are stored one by one. (TurboMind reads this family in MXFP4 only.)
pub(super) fn check(target: Target, rules: &mut Rules<'_>) {
    if !rules.architectures.iter().any(|name| name == "GptOssForCausalLM") {
        return;
    }
    let experts: Vec<&str> =
        rules.sites.iter().map(|site| site.name.as_str()).filter(|name| expert_block(name).is_some()).collect();
    let (severity, rule, source, message) = match target {
        Target::TurboMind => return,
        Target::Vllm => (
            Severity::Refused,
            "vllm-gpt-oss",
            VLLM,
            "vLLM's loader of `GptOssForCausalLM` knows experts one by one in other tools' layouts only and passes over \
             these; no setting of this tool helps, serve the published MXFP4 checkpoint",
        ),
        Target::Transformers => (
            Severity::Refused,
            "transformers-gpt-oss",
            TRANSFORMERS,
            "transformers does not fuse this family's experts from tensors of each; judge the result with `lite eval`",
        ),
        Target::LmdeployPytorch if rules.is("lmdeploy-w8a8") => (
            Severity::Refused,
            "lmdeploy-pytorch-gpt-oss",
            PYTORCH,
            "this layout's experts have neither biases nor this family's gated units in the engine; leave them plain",
        ),
        Target::LmdeployPytorch => (
            Severity::Warning,
            "lmdeploy-pytorch-gpt-oss",
            UNSEEN,
            "experts of gpt-oss one by one were not seen to load in this engine; try the checkpoint before relying on it",
        ),
        Target::TrtLlm => (
            Severity::Warning,
            "trtllm-gpt-oss",
            UNSEEN,
            "experts of gpt-oss one by one were not seen to load in this engine; try the checkpoint before relying on it",
        ),
    };
    rules.at(severity, rule, source, experts.into_iter(), message);
}
