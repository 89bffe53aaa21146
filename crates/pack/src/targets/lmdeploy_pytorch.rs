//! LMDeploy's PyTorch engine, 0.16.

use lite_quant::{GroupSize, Scheme};

use super::rules::{Rules, expert_block, is_head};
use super::{Severity, group_text};

const CONFIG: &str = "lmdeploy/pytorch/config.py: `QuantizationConfig`";
const LINEAR: &str = "lmdeploy/pytorch/nn/linear/awq.py: `create_weights`";
const KERNEL: &str = "lmdeploy/pytorch/kernels/cuda/awq_kernels.py: groups are tiles of K";
const MOE: &str = "lmdeploy/pytorch/nn/moe/__init__.py: `build_fused_moe`";
const FUSED: &str = "lmdeploy/pytorch/models/utils/model.py: fused names";

pub(super) fn check(rules: &mut Rules<'_>, scheme: &Scheme) {
    if !rules.is("awq") {
        let message = format!("layout `{}` is refused (\"Unsupported quant method\"); use `awq`", rules.layout.name());
        return rules.whole(Severity::Refused, "lmdeploy-pytorch-layout", CONFIG, message);
    }
    match scheme.group_size {
        GroupSize::Channels(width) if width.is_power_of_two() => {}
        GroupSize::Channels(_) => {
            let message = format!("{}: it must be a power of two; use 128", group_text(scheme.group_size));
            rules.whole(Severity::Refused, "lmdeploy-pytorch-group-size", KERNEL, message);
        }
        GroupSize::Channel => {
            let message = "one group per output channel: `group_size` −1 gives negative shapes; use 128".to_owned();
            rules.whole(Severity::Refused, "lmdeploy-pytorch-group-size", LINEAR, message);
        }
    }
    let experts = rules.names(|site| expert_block(&site.name).is_some());
    let message = "experts in the AWQ layout are refused; leave them unquantized, or use TurboMind or vLLM";
    rules.at(Severity::Refused, "lmdeploy-pytorch-experts", MOE, experts, message);
    rules.scales_become_f16(scheme, "lmdeploy-pytorch-scale-dtype", LINEAR);
    model(rules);
}

/// The rules that do not depend on the scheme.
pub(super) fn model(rules: &mut Rules<'_>) {
    let mixed = rules.mixed_groups().into_iter();
    let message = "only some of the linears that are fused here are quantized; quantize all of them or none";
    rules.at(Severity::Refused, "lmdeploy-pytorch-fused-mixed", FUSED, mixed, message);
    // The other way round than vLLM: a module is skipped if its name is part of an entry.
    let misread = rules.misread_by(|ignored, quantized| ignored.contains(quantized)).into_iter();
    let message = "this name is part of the name of an unquantized linear, so the engine would skip it; quantize both \
                   or neither";
    rules.at(Severity::Refused, "lmdeploy-pytorch-ignore-substring", CONFIG, misread, message);
    let head = rules.names(|site| is_head(&site.name));
    let message = "models of this engine build the output head without quantization; leave it unquantized";
    rules.at(Severity::Warning, "lmdeploy-pytorch-head", CONFIG, head, message);
    rules.routers_are_dense("lmdeploy-pytorch-router", CONFIG);
}
