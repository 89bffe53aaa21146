//! What engines make of small floats, and of integers under quantized inputs.

use lite_quant::floats::{FloatFormat, FloatScheme, Grain, ScaleKind};
use lite_quant::{ActivationFormat, ActivationScale, GroupSize, LinearScheme, Scheme, WeightScheme};

use super::rules::{Rules, Split, expert_block, last, split};
use super::{Severity, Target, turbomind};

const VLLM: &str = "vllm compressed_tensors/compressed_tensors.py: `_get_scheme_from_parts`";
const VLLM_W4A8: &str =
    "vllm compressed_tensors/schemes/compressed_tensors_w4a8_fp8.py; kernels/linear/mixed_precision/cutlass.py";
const VLLM_BLOCK: &str = "vllm quantization/utils/fp8_utils.py: `validate_fp8_block_shape`";
const VLLM_LAYOUTS: &str = "vllm/model_executor/layers/quantization/__init__.py: registered methods";
const VLLM_FUSED: &str = "vllm compressed_tensors/utils.py and quant_utils.py: \"some but not all shards\"";
const VLLM_MOE: &str = "vllm compressed_tensors/compressed_tensors_moe: scheme of `experts.0` for all experts";
const VLLM_FP8: &str = "vllm/model_executor/layers/quantization/fp8.py: `weight` is float8_e4m3fn";
const TM: &str = "lmdeploy/turbomind/converter.py and weight_format.py: `fp8` is 128×128 blocks of e4m3";
const PYTORCH: &str = "lmdeploy/pytorch/config.py: `QuantizationConfig`; nn/linear/__init__.py";
const TRANSFORMERS: &str = "transformers/quantizers/auto.py: registered quantizers; quantizer_finegrained_fp8.py";
const TRTLLM: &str =
    "TensorRT-LLM 1.0 documentation: list of quantizations; modelopt/torch/export/convert_hf_config.py";

/// The block that every kernel of DeepSeek's format is written for.
const BLOCK: Grain = Grain::Block { rows: 128, columns: 128 };

/// The rules for every scheme that is not integer weights alone.
pub(super) fn check(target: Target, rules: &mut Rules<'_>, scheme: &LinearScheme) {
    match target {
        Target::Vllm => vllm(rules, scheme),
        Target::TurboMind => turbomind(rules, scheme),
        Target::LmdeployPytorch => lmdeploy_pytorch(rules, scheme),
        Target::Transformers => transformers(rules, scheme),
        Target::TrtLlm => trtllm(rules, scheme),
    }
}

/// The layout to write for an engine, where it loads the scheme in any.
pub(super) fn default_layout(target: Target, scheme: &LinearScheme) -> &'static str {
    let blocks = matches!(scheme.weights, WeightScheme::Float(float) if matches!(float.grain, Grain::Block { .. }));
    match target {
        Target::TurboMind => "fp8",
        Target::LmdeployPytorch if blocks || is_static_tensor(scheme) => "fp8",
        Target::LmdeployPytorch => "lmdeploy-w8a8",
        Target::TrtLlm => "modelopt",
        Target::Vllm | Target::Transformers => plain_layout(scheme),
    }
}

/// The layout to write when no engine is named.
pub(crate) fn plain_layout(scheme: &LinearScheme) -> &'static str {
    match scheme.weights {
        // compressed-tensors has no e5m2.
        WeightScheme::Float(FloatScheme { format: FloatFormat::E5M2, grain: Grain::Block { .. }, .. }) => "fp8",
        WeightScheme::Float(FloatScheme { format: FloatFormat::E5M2, .. }) => "lmdeploy-w8a8",
        _ => "compressed-tensors",
    }
}

fn is_static_tensor(scheme: &LinearScheme) -> bool {
    scheme.activations.is_some_and(|inputs| inputs.scale == ActivationScale::StaticTensor)
}

/// The fp8 weights of a scheme with plain scales.
fn fp8(scheme: &LinearScheme) -> Option<(FloatFormat, Grain)> {
    match scheme.weights {
        WeightScheme::Float(FloatScheme { format, grain, scale: ScaleKind::Float(_) }) => Some((format, grain)),
        _ => None,
    }
}

fn refuse(rules: &mut Rules<'_>, rule: &'static str, source: &'static str, message: &str) {
    rules.whole(Severity::Refused, rule, source, message.to_owned());
}

fn layout_is_not_read(rules: &mut Rules<'_>, rule: &'static str, source: &'static str, wanted: &str) {
    let message = format!("layout `{}` is not read; use {wanted}", rules.layout.name());
    rules.whole(Severity::Refused, rule, source, message);
}

fn vllm(rules: &mut Rules<'_>, scheme: &LinearScheme) {
    match rules.layout.name() {
        "compressed-tensors" => vllm_schemes(rules, scheme),
        "fp8" if fp8(scheme).is_some_and(|(format, _)| format != FloatFormat::E4M3) => {
            refuse(rules, "vllm-fp8-type", VLLM_FP8, "e5m2 weights are not read; use e4m3");
        }
        "fp8" | "modelopt" => {}
        _ => return layout_is_not_read(rules, "vllm-layout", VLLM_LAYOUTS, "`compressed-tensors`"),
    }
    if let Some((_, Grain::Block { rows, columns })) = fp8(scheme) {
        vllm_blocks(rules, rows, columns);
    }
    let mixed = rules.mixed_groups().into_iter();
    let message = "only some of the linears that vLLM fuses here are quantized; quantize all of them or none";
    rules.at(Severity::Refused, "vllm-fused-mixed", VLLM_FUSED, mixed, message);
    let mixed = rules.mixed_experts().into_iter();
    let message = "only some linears of the experts are quantized, vLLM reads one scheme for all of them; quantize all \
                   experts of a layer or none";
    rules.at(Severity::Refused, "vllm-experts-mixed", VLLM_MOE, mixed, message);
    rules.routers_are_dense("vllm-router", "vllm/model_executor/models: `ReplicatedLinear(..., quant_config=None)`");
}

/// vLLM's table of schemes of compressed-tensors.
fn vllm_schemes(rules: &mut Rules<'_>, scheme: &LinearScheme) {
    let inputs = scheme.activations.map(|inputs| (inputs.format, inputs.scale));
    let message = match (&scheme.weights, inputs) {
        (WeightScheme::Float(FloatScheme { scale: ScaleKind::E4M3WithGlobal, .. }), inputs) => match inputs {
            None | Some((_, ActivationScale::StaticTensorLocal(_))) => return,
            Some(_) => "NVFP4 weights are read with NVFP4 inputs or none",
        },
        (WeightScheme::Float(FloatScheme { scale: ScaleKind::E8M0, .. }), _) => return,
        (WeightScheme::Float(FloatScheme { grain: Grain::Group(_), .. }), _) => {
            "fp8 weights in groups of channels are not read; use one scale per channel or blocks"
        }
        (WeightScheme::Float(_), Some((ActivationFormat::Float(FloatFormat::E4M3), _)) | None) => return,
        (WeightScheme::Float(_), _) => "fp8 weights are read with fp8 inputs or none",
        (WeightScheme::Int(int), Some((ActivationFormat::Float(_), scale))) => {
            return vllm_w4a8_fp8(rules, int, scale);
        }
        (WeightScheme::Int(Scheme { bits: 8, symmetric: true, group_size: GroupSize::Channel, .. }), inputs) => {
            match inputs {
                Some((
                    ActivationFormat::Int { bits: 8, .. },
                    ActivationScale::StaticTensor | ActivationScale::DynamicToken,
                )) => {
                    return;
                }
                _ => "int8 weights are read with int8 inputs per token or static per tensor",
            }
        }
        (
            WeightScheme::Int(Scheme { bits: 4, symmetric: true, .. }),
            Some((ActivationFormat::Int { bits: 8, symmetric: true }, ActivationScale::DynamicToken)),
        ) => {
            let message = "4-bit weights under int8 inputs: on a GPU only the optional Humming package runs them; use W8A8, \
                           W4A16 or W4AFP8";
            return rules.whole(Severity::Warning, "vllm-kernel", VLLM, message.to_owned());
        }
        (WeightScheme::Int(_), _) => {
            "integers under quantized inputs are read as W8A8 (symmetric, one scale per channel) or W4A8; use one of them"
        }
    };
    refuse(rules, "vllm-scheme", VLLM, message);
}

fn vllm_w4a8_fp8(rules: &mut Rules<'_>, int: &Scheme, inputs: ActivationScale) {
    let fits = int.bits == 4 && int.symmetric && int.group_size == GroupSize::Channels(128);
    if !fits || inputs != ActivationScale::DynamicToken {
        let message =
            "integers under fp8 inputs are read with 4 bits, symmetric, in groups of 128, and inputs per token";
        return refuse(rules, "vllm-scheme", VLLM_W4A8, message);
    }
    let message = "4-bit weights under fp8 inputs run on compute capability 9.0 only, in bf16";
    rules.whole(Severity::Warning, "vllm-w4afp8-gpu", VLLM_W4A8, message.to_owned());
    let odd = rules.names(|site| site.n % 128 != 0 || site.k % 128 != 0);
    let message = "N and K must be multiples of 128 for the kernel of 4-bit weights under fp8 inputs";
    rules.at(Severity::Refused, "vllm-w4afp8-shape", VLLM_W4A8, odd, message);
}

fn vllm_blocks(rules: &mut Rules<'_>, rows: usize, columns: usize) {
    if (rows, columns) != (128, 128) {
        let message = format!("blocks of {rows}×{columns}: the kernels are written for 128×128; use that");
        rules.whole(Severity::Warning, "vllm-block-size", VLLM_BLOCK, message);
    }
    let tp = rules.tp;
    let ragged = rules.names(|site| {
        let kind = split(&site.name);
        let cut = tp > 1 && matches!(kind, Split::Column | Split::KeyValue);
        let n = if cut && site.n.is_multiple_of(tp) { site.n / tp } else { site.n };
        let k = if tp > 1 && kind == Split::Row { site.k / tp } else { site.k };
        // The last of the linears that are fused may end within a block; which one that is the engine decides.
        let inner = site.fused_group.is_some() && !matches!(last(&site.name), "v_proj" | "up_proj" | "w3");
        ((cut || inner || expert_block(&site.name).is_some()) && n % rows != 0) || (k != site.k && k % columns != 0)
    });
    let message = format!(
        "on {tp} rank(s) what is fused or cut here must end at whole blocks of {rows}×{columns}; use fewer ranks, or one \
         scale per channel"
    );
    rules.at(Severity::Refused, "vllm-block-shape", VLLM_BLOCK, ragged, &message);
}

fn turbomind(rules: &mut Rules<'_>, scheme: &LinearScheme) {
    if !rules.is("fp8") || fp8(scheme) != Some((FloatFormat::E4M3, BLOCK)) {
        let message = "TurboMind reads 4-bit integers, and e4m3 in blocks of 128×128 in layout `fp8`; others are refused or \
                       read without their scales";
        refuse(rules, "turbomind-scheme", TM, message);
    }
    turbomind::model(rules);
}

fn lmdeploy_pytorch(rules: &mut Rules<'_>, scheme: &LinearScheme) {
    let message = match rules.layout.name() {
        "lmdeploy-w8a8" => None,
        "fp8" if is_static_tensor(scheme) => None,
        "fp8" if fp8(scheme).is_some_and(|(_, grain)| grain == BLOCK) => None,
        "fp8" => Some("layout `fp8` is read in blocks of 128×128, or per tensor with static inputs"),
        _ => {
            let wanted = "`lmdeploy-w8a8` with one scale per channel, or `fp8` with blocks of 128×128";
            return layout_is_not_read(rules, "lmdeploy-pytorch-layout", PYTORCH, wanted);
        }
    };
    if let Some(message) = message {
        refuse(rules, "lmdeploy-pytorch-scheme", PYTORCH, message);
    }
    super::lmdeploy_pytorch::model(rules);
}

fn transformers(rules: &mut Rules<'_>, scheme: &LinearScheme) {
    match rules.layout.name() {
        "compressed-tensors" => {}
        "fp8" if fp8(scheme) == Some((FloatFormat::E4M3, BLOCK)) => {
            let message = "layout `fp8` needs a GPU; compressed-tensors runs anywhere".to_owned();
            rules.whole(Severity::Warning, "transformers-fp8-gpu", TRANSFORMERS, message);
        }
        "fp8" => {
            let message = "layout `fp8` is read as e4m3 in blocks of 128×128; use that, or compressed-tensors";
            refuse(rules, "transformers-scheme", TRANSFORMERS, message);
        }
        _ => layout_is_not_read(rules, "transformers-layout", TRANSFORMERS, "`compressed-tensors`"),
    }
    super::transformers::experts(rules);
}

fn trtllm(rules: &mut Rules<'_>, scheme: &LinearScheme) {
    if !rules.is("modelopt") {
        return layout_is_not_read(rules, "trtllm-layout", TRTLLM, "`modelopt`");
    }
    let weight_only_fp4 = scheme.activations.is_none() && fp8(scheme).is_none();
    if weight_only_fp4 {
        let message = "NVFP4 is read with NVFP4 inputs; use NVFP4, FP8, or FP8 in blocks of 128×128";
        refuse(rules, "trtllm-scheme", TRTLLM, message);
    }
    let mixed = rules.mixed_groups().into_iter();
    let message = "only some of the linears that are fused here are quantized; quantize all of them or none";
    rules.at(Severity::Refused, "trtllm-fused-mixed", TRTLLM, mixed, message);
}

/// TensorRT-LLM and integer weights alone.
pub(super) fn trtllm_integers(rules: &mut Rules<'_>, scheme: &Scheme) {
    let message = match rules.layout.name() {
        "awq" => None,
        "gptq" if scheme.bits == 4 && scheme.symmetric => None,
        "gptq" => Some("layout `gptq` is read with 4 bits, symmetric".to_owned()),
        other => Some(format!("layout `{other}` is not read; use `awq` or `gptq` with 4 bits, or `modelopt`")),
    };
    match (message, scheme.group_size) {
        (Some(message), _) => rules.whole(Severity::Refused, "trtllm-layout", TRTLLM, message),
        (None, GroupSize::Channels(64 | 128)) => {}
        (None, _) => {
            refuse(rules, "trtllm-group-size", TRTLLM, "4-bit integers are read in groups of 64 or 128; use 128");
        }
    }
}
