//! Hugging Face transformers 5.17.

use lite_quant::Scheme;

use super::Severity;
use super::rules::{Rules, expert_block, is_head, last};

const AWQ: &str = "transformers/quantizers/quantizer_awq.py: `validate_environment`";
const SKIPS: &str = "transformers/quantizers/quantizer_awq.py: `add_default_skips=True`";
const CONVERT: &str = "transformers/quantizers/quantizers_utils.py: `should_convert_module`";
const CT: &str = "compressed_tensors/compressors/pack_quantized/helpers.py: dense packing";
const EXPERTS: &str = "transformers 5: experts are one 3-D parameter, not `Linear` modules";

const GPTQ: &str = "transformers/quantizers/quantizer_gptq.py: `validate_environment`";
const BLOCKS: &str = "optimum/gptq/quantizer.py: `convert_model` replaces the linears of the blocks";

pub(super) fn check(rules: &mut Rules<'_>, scheme: &Scheme) {
    if rules.is("awq") {
        let message = "layout `awq` needs the gptqmodel package and its GPU kernels; compressed-tensors runs anywhere";
        rules.whole(Severity::Warning, "transformers-awq-kernel", AWQ, message.to_owned());
        let head = rules.names(|site| is_head(&site.name));
        let message = "the output head is always taken for unquantized in layout `awq`; leave it unquantized";
        rules.at(Severity::Refused, "transformers-awq-head", SKIPS, head, message);
        // Python's `re.match(key, name)` or `name.endswith(key)`; a dot in a module name matches itself.
        let misread = rules
            .misread_by(|ignored, quantized| quantized.starts_with(ignored) || quantized.ends_with(ignored))
            .into_iter();
        let message = "this name starts or ends with that of an unquantized linear, so it would be loaded unquantized; \
                       quantize both or neither";
        rules.at(Severity::Refused, "transformers-awq-ignore-prefix", CONVERT, misread, message);
    } else if rules.is("gptq") {
        gptq(rules);
    } else if matches!(scheme.bits, 3 | 5 | 6 | 7) {
        let message = format!(
            "{} bits are packed densely: compressed-tensors releases before 0.18 misread them; install a newer one",
            scheme.bits
        );
        rules.whole(Severity::Warning, "transformers-dense-packing", CT, message);
    }
    experts(rules);
}

/// Experts in a layout of their own tensors.
pub(super) fn experts(rules: &mut Rules<'_>) {
    let experts = rules.names(|site| expert_block(&site.name).is_some());
    let message = "transformers 5 keeps experts as one parameter, which its quantizers may not fill from packed ones; \
                   use vLLM or TurboMind, or leave the experts unquantized";
    rules.at(Severity::Warning, "transformers-experts", EXPERTS, experts, message);
}

fn gptq(rules: &mut Rules<'_>) {
    let message = "layout `gptq` needs the packages gptqmodel and optimum; compressed-tensors runs anywhere";
    rules.whole(Severity::Warning, "transformers-gptq-package", GPTQ, message.to_owned());
    let head = rules.names(|site| is_head(&site.name));
    let message = "only linears of the blocks are loaded packed in layout `gptq`; leave the output head unquantized";
    rules.at(Severity::Refused, "transformers-gptq-head", BLOCKS, head, message);
    // The routers of most models are modules of their own in transformers 5, not `Linear`.
    let router = |name: &str| matches!(last(name), "gate" | "router");
    let plain = rules.plain_in_blocks();
    let (routers, linears): (Vec<_>, Vec<_>) = plain.into_iter().map(|site| &*site.name).partition(|name| router(name));
    let message = "every linear of the blocks is taken for packed in layout `gptq`, and this one is not; quantize it \
                   or use compressed-tensors";
    rules.at(Severity::Refused, "transformers-gptq-plain", BLOCKS, linears.into_iter(), message);
    let message = "every `Linear` of the blocks is taken for packed in layout `gptq`; if the model's routers are such, \
                   use compressed-tensors";
    rules.at(Severity::Warning, "transformers-gptq-router", BLOCKS, routers.into_iter(), message);
}
