//! vLLM 0.33.

use lite_quant::{GroupSize, ScaleDtype, Scheme};

use super::rules::{Rules, Split, expert_block, split};
use super::{Severity, group_text};

const AWQ: &str = "vllm/model_executor/layers/quantization/auto_awq.py";
const AWQ_KERNEL: &str = "vllm csrc/quantization/awq/gemm_kernels.cu: `awq_gemm`";
const GPTQ: &str = "vllm/model_executor/layers/quantization/auto_gptq.py: `TYPE_MAP`, `verify_marlin_supported`";
const WNA16: &str = "vllm compressed_tensors/schemes/compressed_tensors_wNa16.py: `create_weights`";
const KERNELS: &str = "vllm/model_executor/kernels/linear: `can_implement` of Machete, Marlin, Exllama, Triton";
const FUSED: &str = "vllm compressed_tensors/utils.py and quant_utils.py: \"some but not all shards\"";
const MOE: &str = "vllm compressed_tensors/compressed_tensors_moe: scheme of `experts.0` for all experts";
const MOE_MARLIN: &str = "vllm quantization/utils/marlin_utils.py: `check_moe_marlin_supports_layer`";
const PARALLEL: &str = "vllm/model_executor/layers/linear.py: `divide`; compressed_tensors_wNa16.py";
const DTYPES: &str = "vllm: scale parameters are created in the model's dtype";

/// Group sizes of the Marlin kernels; −1 is a whole row.
const MARLIN_GROUPS: [i64; 4] = [-1, 32, 64, 128];

pub(super) fn check(rules: &mut Rules<'_>, scheme: &Scheme) {
    let marlin_group = MARLIN_GROUPS.contains(&scheme.group_size.to_flag());
    if rules.is("awq") {
        awq_kernels(rules, scheme, marlin_group);
        let misread = rules.misread_by(|ignored, quantized| quantized.contains(ignored)).into_iter();
        let message = "vLLM matches `modules_to_not_convert` by substring and the name of an unquantized linear is part \
                       of this one, which would be loaded unquantized; quantize both or neither, or use \
                       compressed-tensors";
        rules.at(Severity::Refused, "vllm-awq-ignore-substring", AWQ, misread, message);
    } else if rules.is("gptq") {
        gptq_kernels(rules, scheme, marlin_group);
    } else {
        integer_kernels(rules, scheme, marlin_group);
    }
    let mixed = rules.mixed_groups().into_iter();
    let message = "only some of the linears that vLLM fuses here are quantized; quantize all of them or none";
    rules.at(Severity::Refused, "vllm-fused-mixed", FUSED, mixed, message);
    experts(rules, scheme, marlin_group);
    whole_words(rules, scheme);
    parallel(rules, scheme);
    if scheme.scale_dtype == ScaleDtype::F32 {
        let message = "f32 scales are rounded to the model's dtype, so vLLM computes with other weights than were \
                       verified; write scales in the dtype of the model";
        rules.whole(Severity::Warning, "vllm-scale-dtype", DTYPES, message.to_owned());
    }
    rules.routers_are_dense("vllm-router", "vllm/model_executor/models: `ReplicatedLinear(..., quant_config=None)`");
}

/// Marlin, or else the plain kernel, which takes less.
fn awq_kernels(rules: &mut Rules<'_>, scheme: &Scheme, marlin_group: bool) {
    if marlin_group {
        return;
    }
    let group = group_text(scheme.group_size);
    let width = match scheme.group_size {
        GroupSize::Channels(width) => width.max(1),
        GroupSize::Channel => return,
    };
    if width % 32 != 0 {
        let message = format!("{group}: the only AWQ kernel left takes multiples of 32; use 32, 64 or 128");
        rules.whole(Severity::Refused, "vllm-awq-group-size", AWQ_KERNEL, message);
        return;
    }
    let message = format!("{group}: Marlin takes 32, 64, 128 and whole rows, so the slow AWQ kernel runs; use 128");
    rules.whole(Severity::Warning, "vllm-awq-group-size", AWQ_KERNEL, message);
    let narrow = rules.names(|site| site.n % 64 != 0 || site.n % width != 0);
    let message = format!("N must be a multiple of 64 and of {width} for the plain AWQ kernel; use group size 128");
    rules.at(Severity::Refused, "vllm-awq-plain-shape", AWQ_KERNEL, narrow, &message);
}

/// The GPTQ method has the types of Marlin and nothing else; `desc_act` is never written.
fn gptq_kernels(rules: &mut Rules<'_>, scheme: &Scheme, marlin_group: bool) {
    let (bits, symmetric, group) = (scheme.bits, scheme.symmetric, scheme.group_size);
    if !symmetric {
        let message = "layout `gptq` is read symmetric only; use a symmetric scheme, or compressed-tensors".to_owned();
        rules.whole(Severity::Refused, "vllm-gptq-asymmetric", GPTQ, message);
    }
    if !matches!(bits, 4 | 8) {
        let message = format!("{bits} bits: layout `gptq` is read with 4 or 8 bits; use those, or compressed-tensors");
        rules.whole(Severity::Refused, "vllm-gptq-bits", GPTQ, message);
    }
    if !marlin_group {
        let message = format!("{}: layout `gptq` is read with 32, 64, 128 or −1; use those", group_text(group));
        rules.whole(Severity::Refused, "vllm-gptq-group-size", GPTQ, message);
    }
}

/// Which kernels take codes of compressed-tensors. Everything that only an optional package runs is a
/// warning: vLLM loads it once that is installed.
fn integer_kernels(rules: &mut Rules<'_>, scheme: &Scheme, marlin_group: bool) {
    let group = group_text(scheme.group_size);
    let message = match (scheme.bits, scheme.symmetric) {
        (4, _) | (8, true) if marlin_group => return,
        (4, _) if scheme.group_size == GroupSize::Channels(256) => {
            format!("4 bits with {group}: Marlin does not take it, the slower Triton kernel does; use group size 128")
        }
        (4 | 8, true) => format!(
            "{} bits with {group}: only Exllama (fp16 activations) and the optional Humming package run it; use 32, \
             64 or 128",
            scheme.bits
        ),
        (8, false) if marlin_group && scheme.group_size != GroupSize::Channels(32) => {
            "asymmetric 8 bits: only Machete (compute capability 9.0) and the optional Conch and Humming packages run \
             it; use a symmetric scheme"
                .to_owned()
        }
        (bits, symmetric) => {
            let kind = if symmetric { "symmetric" } else { "asymmetric" };
            format!(
                "{kind} {bits} bits with {group}: only the optional Humming package runs it; use 4 bits, or symmetric \
                 8 bits, with groups of 32, 64 or 128"
            )
        }
    };
    rules.whole(Severity::Warning, "vllm-kernel", KERNELS, message);
}

fn experts(rules: &mut Rules<'_>, scheme: &Scheme, marlin_group: bool) {
    let mixed = rules.mixed_experts().into_iter();
    let message = "only some linears of the experts are quantized, vLLM reads one scheme for all of them; quantize all \
                   experts of a layer or none";
    rules.at(Severity::Refused, "vllm-experts-mixed", MOE, mixed, message);
    let channel = scheme.group_size == GroupSize::Channel;
    // Gate and up read the hidden state: their K is the hidden size.
    let slow = rules.names(|site| {
        expert_block(&site.name).is_some() && split(&site.name) == Split::Column && (site.k % 128 != 0 || !marlin_group)
    });
    let (severity, message) = if channel {
        (
            Severity::Refused,
            "the hidden size is no multiple of 128 and the other expert kernels need groups; use a group size",
        )
    } else {
        (
            Severity::Warning,
            "Marlin's expert kernel needs a hidden size that is a multiple of 128 and groups of 32, 64 or \
             128; a slower one runs",
        )
    };
    rules.at(severity, "vllm-experts-marlin", MOE_MARLIN, slow, message);
}

/// Shards of a fused linear, and the pieces of ranks, are concatenated in packed words.
fn whole_words(rules: &mut Rules<'_>, scheme: &Scheme) {
    let (bits, tp) = (usize::from(scheme.bits), rules.tp);
    // Layout `gptq` has zero points even where the scheme is symmetric.
    if rules.is("compressed-tensors") && scheme.symmetric {
        return;
    }
    let ragged = rules.names(|site| {
        let n = match split(&site.name) {
            Split::Column if site.n % tp == 0 => site.n / tp,
            _ => site.n,
        };
        // A row stops being a whole word only where something follows it.
        (site.fused_group.is_some() || n != site.n || expert_block(&site.name).is_some())
            && n.saturating_mul(bits) % 32 != 0
    });
    let message = format!(
        "zero points (in layout `awq` codes too) are packed along N: on {tp} rank(s), N per rank × {bits} bits must be \
         a multiple of 32; use fewer ranks or a symmetric scheme in compressed-tensors"
    );
    rules.at(Severity::Refused, "vllm-zero-point-words", WNA16, ragged, &message);
}

fn parallel(rules: &mut Rules<'_>, scheme: &Scheme) {
    let (bits, tp) = (usize::from(scheme.bits), rules.tp);
    if tp == 1 {
        return;
    }
    let columns = rules.names(|site| split(&site.name) == Split::Column && site.n % tp != 0);
    let message = format!("N is not a multiple of the {tp} ranks; use fewer");
    rules.at(Severity::Refused, "vllm-tp-columns", PARALLEL, columns, &message);
    let (group, awq) = (scheme.group_size, rules.is("awq"));
    let rows = rules.names(|site| {
        let per_rank = site.k / tp;
        // For experts in the AWQ layout vLLM halves the groups until they fit.
        let halved = awq && expert_block(&site.name).is_some();
        let whole_groups = halved || group.width(site.k).is_ok_and(|width| width == site.k || per_rank % width == 0);
        split(&site.name) == Split::Row
            && (site.k % tp != 0 || !whole_groups || (!awq && per_rank.saturating_mul(bits) % 32 != 0))
    });
    let message = format!(
        "K per rank must be a whole number of groups and of packed words on {tp} ranks; use fewer, or smaller groups"
    );
    rules.at(Severity::Refused, "vllm-tp-rows", PARALLEL, rows, &message);
    if awq && group == GroupSize::Channel {
        let rows = rules.names(|site| split(&site.name) == Split::Row);
        let message = "one group per output channel cannot be cut along K in the AWQ layout; use group size 128";
        rules.at(Severity::Refused, "vllm-tp-awq-channel", AWQ, rows, message);
    }
}
