//! LMDeploy's TurboMind engine, 0.16.

use lite_quant::{GroupSize, Scheme};

use super::rules::{Rules, Split, is_head, is_router, is_tower, last, split, turbomind_scales};
use super::{Severity, group_text};

const CONVERTER: &str = "lmdeploy/turbomind/converter.py: `get_tm_config`";
const GROUPS: &str = "lmdeploy/turbomind/converter.py: `_SUPPORTED_GROUP_SIZES`";
const ARCHS: &str = "lmdeploy/turbomind/supported_models.py: `SUPPORTED_ARCHS`";
const PACK: &str = "lmdeploy/turbomind/weight_format.py: `pack_u4_row`";
const KERNEL: &str = "lmdeploy src/turbomind/kernels/gemm/kernel.cu: CTA_K";
const FFN: &str = "lmdeploy/turbomind/builders/ffn.py: `fuse_w1w3`";
const ATTENTION: &str = "lmdeploy/turbomind/linear.py: `dequant_mixed`";
const MLA: &str = "lmdeploy/turbomind/builders/mla.py";
const TOWER: &str = "lmdeploy/turbomind/converter.py: vision weights keep the checkpoint's dtype";
const SPLIT: &str = "lmdeploy/turbomind/builders/_base.py: split dimensions divide by tp";

/// `architectures` with a converter.
const SERVED: [&str; 19] = [
    "LlamaForCausalLM",
    "InternLM2ForCausalLM",
    "InternLM3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "InternS2PreviewForConditionalGeneration",
    "InternS2MobiusForConditionalGeneration",
    "MixtralForCausalLM",
    "InternVLChatModel",
    "InternVLForConditionalGeneration",
    "InternS1ForConditionalGeneration",
    "Glm4MoeLiteForCausalLM",
    "GptOssForCausalLM",
];

pub(super) fn check(rules: &mut Rules<'_>, scheme: &Scheme) {
    weights(rules, scheme);
    let narrow = rules.names(|site| site.n % 8 != 0);
    rules.at(Severity::Refused, "turbomind-n", PACK, narrow, "N must be a multiple of 8; leave this layer unquantized");
    let short = rules.names(|site| site.k % 32 != 0);
    rules.at(
        Severity::Refused,
        "turbomind-k",
        KERNEL,
        short,
        "K must be a multiple of 32; leave this layer unquantized",
    );

    rules.scales_become_f16(scheme, "turbomind-scale-dtype", turbomind_scales());
    parallel(rules, scheme);
    model(rules);
}

/// The rules that do not depend on the scheme.
pub(super) fn model(rules: &mut Rules<'_>) {
    architectures(rules);
    let (gate_up, others): (Vec<_>, Vec<_>) =
        rules.mixed_groups().into_iter().partition(|group| last(group) == "gate_up");
    let message = "gate and up are fused and cannot have different formats; quantize both or neither";
    rules.at(Severity::Refused, "turbomind-gate-up", FFN, gate_up.into_iter(), message);
    let (severity, message) = if rules.is("gptq") {
        (
            Severity::Refused,
            "only some of the linears that are fused here are quantized, which is not implemented for layout `gptq`; \
             quantize all of them or none",
        )
    } else {
        (
            Severity::Warning,
            "only some of the linears that are fused here are quantized: all are expanded to 16 bits on loading, \
             which costs memory and speed; quantize all of them or none",
        )
    };
    rules.at(severity, "turbomind-fused-mixed", ATTENTION, others.into_iter(), message);

    let towers = rules.names(|site| is_tower(&site.name));
    let message = "vision and audio towers must not be quantized; leave them out";
    rules.at(Severity::Refused, "turbomind-tower", TOWER, towers, message);
    let dense = rules.names(|site| is_router(&site.name) || is_head(&site.name));
    let message = "routers and the output head are dense in every checkpoint this engine is tested with; leave them \
                   unquantized";
    rules.at(Severity::Warning, "turbomind-dense", CONVERTER, dense, message);
}

fn weights(rules: &mut Rules<'_>, scheme: &Scheme) {
    if scheme.bits != 4 {
        let message = format!("{} bits: TurboMind reads 4-bit integers only; use 4 bits or vLLM", scheme.bits);
        rules.whole(Severity::Refused, "turbomind-bits", CONVERTER, message);
    }
    let (allowed, wanted): (&[usize], _) = match rules.layout.name() {
        "awq" | "gptq" => (&[128], "128"),
        "compressed-tensors" => (&[32, 128], "32 or 128"),
        other => {
            let message = format!("layout `{other}` is not read; use `awq`, `compressed-tensors` or `gptq`");
            return rules.whole(Severity::Refused, "turbomind-layout", CONVERTER, message);
        }
    };
    if rules.is("gptq") && !scheme.symmetric {
        let message = "layout `gptq` is read symmetric only; use a symmetric scheme, or another layout".to_owned();
        rules.whole(Severity::Refused, "turbomind-gptq-asymmetric", CONVERTER, message);
    }
    if !matches!(scheme.group_size, GroupSize::Channels(width) if allowed.contains(&width)) {
        let (layout, group) = (rules.layout.name(), group_text(scheme.group_size));
        let message = format!("{group}: TurboMind takes {wanted} in layout `{layout}`; use that");
        rules.whole(Severity::Refused, "turbomind-group-size", GROUPS, message);
    }
}

fn architectures(rules: &mut Rules<'_>) {
    for name in rules.architectures {
        if !SERVED.contains(&name.as_str()) {
            let message = format!("TurboMind does not serve `{name}`; use target lmdeploy-pytorch or vllm");
            rules.whole(Severity::Refused, "turbomind-architecture", ARCHS, message);
        }
    }
    let has = |wanted: &str| rules.architectures.iter().any(|name| name == wanted);
    if has("InternS2MobiusForConditionalGeneration") {
        let message = "the converter of this architecture looks for plain `.weight` names; try the checkpoint before \
                       relying on it"
            .to_owned();
        rules.whole(Severity::Warning, "turbomind-mobius", ARCHS, message);
    } else if has("Glm4MoeLiteForCausalLM") {
        let folded = rules.names(|site| matches!(last(&site.name), "q_b_proj" | "kv_b_proj" | "o_proj"));
        let message = "latent attention folds these from plain 16-bit weights; leave them unquantized";
        rules.at(Severity::Refused, "turbomind-mla", MLA, folded, message);
    }
}

/// Feed-forward layers are padded, attention is not.
fn parallel(rules: &mut Rules<'_>, scheme: &Scheme) {
    let tp = rules.tp;
    if tp == 1 {
        return;
    }
    let group = scheme.group_size;
    let uneven = rules.names(|site| match (last(&site.name), split(&site.name)) {
        ("o_proj" | "wo", _) => {
            let groups = group.width(site.k).map_or(1, |width| site.k / width.max(1));
            !site.k.is_multiple_of(tp) || !groups.is_multiple_of(tp)
        }
        ("q_proj" | "wqkv", Split::Column) => site.n % tp != 0,
        _ => false,
    });
    let message = format!("heads and groups must divide evenly over {tp} ranks; use fewer ranks or smaller groups");
    rules.at(Severity::Refused, "turbomind-tp", SPLIT, uneven, &message);
}
