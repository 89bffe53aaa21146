//! `config.json` against what is stored.

use lite_decoder::{DecoderError, DecoderSpec};
use lite_model::{Checkpoint, printable};
use serde_json::{Map, Value};

use super::findings::Findings;
use super::{Judged, side};
use crate::attention_module;
use crate::ignored::Ignored;
use crate::inspect::is_kv_scale;

/// The decoder that the config describes.
pub(super) fn decoder(checkpoint: &Checkpoint, findings: &mut Findings) -> Option<DecoderSpec> {
    match DecoderSpec::of(checkpoint) {
        Ok(spec) => Some(spec),
        Err(error @ (DecoderError::UnknownArchitecture { .. } | DecoderError::UnclearArchitecture { .. })) => {
            let message = format!("{error}; tensors are judged by their names, and missing ones are not noticed");
            findings.warning("architecture-unknown", Some("config.json"), message);
            None
        }
        Err(error) => {
            findings.error("decoder-config", Some("config.json"), error.to_string());
            None
        }
    }
}

/// What the config declares against what is stored, but for single linears.
pub(super) fn check(judged: &Judged<'_>, findings: &mut Findings) {
    let config = Some("config.json");
    if judged.quantized.is_none() && !findings.has_error(&["quantization-config"]) {
        if judged.stored.is_empty() {
            findings.note("not-quantized", config, "no linear is stored quantized and none is declared: a plain model");
        } else {
            let message = format!(
                "{} linears are stored quantized, but there is no `quantization_config`: engines would read codes as \
                 weights; add the one of the tool that made the checkpoint",
                judged.stored.len()
            );
            findings.error("quantization-undeclared", config, message);
        }
    }
    if let Some(quantized) = judged.quantized {
        if judged.stored.is_empty() {
            let message = "a quantization is declared, but no linear is stored quantized; remove \
                           `quantization_config`, or quantize again";
            findings.error("declared-but-plain", config, message);
        }
        for (module, _) in &quantized.config().overrides {
            // A pattern or a fused name is not looked for.
            let plain = !judged.is_packed(module) && judged.has(&format!("{module}.weight"));
            if plain {
                let message = "the config gives it a scheme of its own, but it is stored plain";
                findings.error("override-absent", Some(module), message);
            }
        }
        head(judged, quantization(judged.checkpoint.config()), &Ignored::new(&quantized.config().ignored), findings);
        cache(judged, quantized.config().kv_cache.is_some(), findings);
    }
    tied(judged, findings);
    side::quantize_config(judged, findings);
}

/// The output head, declared and stored.
fn head(judged: &Judged<'_>, declared: Option<&Map<String, Value>>, ignored: &Ignored<'_>, findings: &mut Findings) {
    let Some(spec) = judged.spec else { return };
    let module = spec.head.module.as_str();
    let packed = judged.is_packed(module);
    let flag = declared.and_then(|declared| declared.get("lm_head")).and_then(Value::as_bool);
    // The layouts of compressed-tensors target every linear that is not ignored; others leave the head alone unless told.
    let targets_all = declared.is_some_and(|declared| declared.contains_key("config_groups"));
    match packed {
        false if flag == Some(true) => {
            let message = "`lm_head` is true in `quantization_config`, but the head is stored plain: set it to false";
            findings.error("head-declared-plain", Some(module), message);
        }
        false if targets_all && !ignored.covers(module) => {
            let message = "the head is stored plain, but not in the `ignore` list: add it";
            findings.error("head-declared-plain", Some(module), message);
        }
        true if !targets_all && flag != Some(true) => {
            let message = "the head is stored packed, but `lm_head` is not true in `quantization_config`: engines would \
                           look for a plain one; set it";
            findings.error("head-undeclared", Some(module), message);
        }
        _ => {}
    }
}

/// Scales of a quantized key/value cache.
fn cache(judged: &Judged<'_>, declared: bool, findings: &mut Findings) {
    let found: Vec<&str> = judged.checkpoint.names().filter(|name| is_kv_scale(name)).collect();
    for name in &found {
        let values = judged.checkpoint.tensor_f32(name);
        // Written so that NaN fails.
        if !values.is_ok_and(|values| values.iter().all(|scale| *scale > 0.0 && scale.is_normal())) {
            let message = "a cache scale is not a positive normal number; calibrate the cache again";
            findings.error("kv-scale-value", Some(name), message);
        }
    }
    if !declared {
        if let Some(first) = found.first() {
            let message = format!(
                "{} cache scales are stored, but `quantization_config` declares no quantized cache: engines leave them \
                 out; add `kv_cache_scheme`, or remove them",
                found.len()
            );
            findings.warning("kv-scales-undeclared", Some(first), message);
        }
        return;
    }
    for block in judged.spec.iter().flat_map(|spec| &spec.blocks) {
        let module = attention_module(block);
        for part in ["k", "v"] {
            let own = format!("{module}.{part}_scale");
            // ModelOpt has them in the projections.
            if !judged.has(&own) && !judged.has(&format!("{module}.{part}_proj.{part}_scale")) {
                let message = "the config declares a quantized cache, but this scale is missing: engines would take 1.0 \
                               for it; calibrate the cache again, or remove the declaration";
                findings.error("kv-scales-missing", Some(&own), message);
            }
        }
    }
}

/// A head that is declared tied and stored all the same.
fn tied(judged: &Judged<'_>, findings: &mut Findings) {
    let Some(spec) = judged.spec.filter(|spec| spec.head.tied) else { return };
    let name = format!("{}.weight", spec.head.module);
    let stored = |name: &str| judged.has(name) && !judged.checkpoint.is_alias(name);
    if !stored(&name) || !stored(&spec.embed.weight) {
        return;
    }
    let data = |name: &str| judged.checkpoint.tensor(name).ok().map(|view| (view.dtype, view.data));
    if data(&name) == data(&spec.embed.weight) {
        findings.note("tied-head", Some(&name), "a copy of the embedding that `tie_word_embeddings` makes needless");
    } else {
        let message = format!(
            "`tie_word_embeddings` is true, but this differs from `{}`: engines would use one of the two; set it to false \
             or remove the tensor",
            printable(&spec.embed.weight)
        );
        findings.error("tied-head", Some(&name), message);
    }
}

/// `quantization_config`, at the top or in the language model's own config.
pub(super) fn quantization(config: &Map<String, Value>) -> Option<&Map<String, Value>> {
    const INNER: [&str; 3] = ["text_config", "llm_config", "language_config"];
    let inner = INNER.iter().filter_map(|key| config.get(*key)?.as_object());
    std::iter::once(config).chain(inner).find_map(|config| config.get("quantization_config")?.as_object())
}
