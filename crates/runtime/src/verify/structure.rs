//! Which tensors there are, against the decoder and the layout.

use std::collections::BTreeSet;

use lite_decoder::DecoderSpec;
use lite_model::{Dtype, printable};

use super::findings::Findings;
use super::original::Original;
use super::{Judged, Linear};
use crate::QuantizedCheckpoint;
use crate::ignored::Ignored;
use crate::inspect::is_kv_scale;
use crate::stored::StoredLinear;

/// Ends of names of tensors that old checkpoints have and nothing reads.
const UNREAD: [&str; 4] = ["rotary_emb.inv_freq", ".masked_bias", ".attn.bias", ".rotary_emb.cos_cached"];

/// The linears to judge: those of the decoder and a packed head, or without a decoder those that are stored packed.
pub(super) fn linears(
    spec: Option<&DecoderSpec>,
    quantized: Option<&QuantizedCheckpoint>,
    stored: &[StoredLinear],
) -> Vec<Linear> {
    let Some(spec) = spec else {
        let linear = |l: &StoredLinear| Linear { module: l.module.clone(), n: l.out_features, k: l.in_features };
        return stored.iter().map(linear).collect();
    };
    let site =
        |site: &lite_decoder::Site| Linear { module: site.module.clone(), n: site.out_features, k: site.in_features };
    let head = Linear { module: spec.head.module.clone(), n: spec.vocab, k: spec.hidden };
    let packed_head = quantized.is_some_and(|quantized| quantized.is_packed(&head.module));
    spec.sites().map(site).chain(packed_head.then_some(head)).collect()
}

/// Missing, extra, doubled and misdeclared tensors.
pub(super) fn check(judged: &Judged<'_>, unknown: &[String], original: Option<&Original>, findings: &mut Findings) {
    for name in unknown {
        let message = "holds codes whose other tensors are missing or do not fit them";
        findings.error("tensor-shape", Some(name), message);
    }
    for linear in judged.linears {
        placed(judged, linear, findings);
    }
    plain_needs(judged, findings);
    undeclared(judged, findings);
    extra(judged, original, findings);
}

/// One linear: stored once, in the form that the config declares.
fn placed(judged: &Judged<'_>, linear: &Linear, findings: &mut Findings) {
    let module = linear.module.as_str();
    let weight = format!("{module}.weight");
    let plain = judged.checkpoint.info(&weight);
    let stored = judged.stored.iter().find(|stored| stored.module == module);
    let Some(quantized) = judged.quantized else {
        if plain.is_none() && stored.is_none() {
            findings.error("tensor-missing", Some(&weight), "the decoder needs it; the checkpoint is incomplete");
        }
        return;
    };
    let ignored = Ignored::new(&quantized.config().ignored);
    if judged.is_packed(module) {
        if ignored.names(module) {
            let message = "the config lists it among the modules that are not quantized, but it is stored packed: engines \
                           would look for a plain weight; remove it from the list";
            findings.error("ignored-but-packed", Some(module), message);
        }
        let coded =
            matches!(plain.map(|info| info.dtype), Some(Dtype::I8 | Dtype::U8 | Dtype::F8_E4M3 | Dtype::F8_E5M2));
        if plain.is_some() && !coded {
            let message = "a full-precision weight lies beside the packed one, and readers differ in which they use; \
                           remove it";
            findings.error("stale-twin", Some(&weight), message);
        }
        return;
    }
    match (plain, stored) {
        (Some(weight), _) if !is_float(weight.dtype) => {
            let message = format!("holds codes of dtype {}, but its scales are missing", weight.dtype);
            findings.error("tensor-missing", Some(&weight.name), message);
        }
        (_, Some(stored)) => {
            let message = format!(
                "is stored as {:?} of {} bits, but the config declares layout `{}`; correct `quant_method`",
                stored.storage,
                stored.bits,
                quantized.layout().name()
            );
            findings.error("layout-mismatch", Some(module), message);
        }
        (Some(_), None) if !ignored.covers(module) => {
            let message = "the config declares it quantized (it is not in the list of ignored modules), but it is stored \
                           plain: add it to the list";
            findings.error("declared-but-plain", Some(module), message);
        }
        (Some(_), None) => {}
        (None, None) => {
            findings.error("tensor-missing", Some(module), "neither a plain nor a packed weight is stored");
        }
    }
}

/// Plain tensors that the decoder reads: present, of the right shape, floats.
fn plain_needs(judged: &Judged<'_>, findings: &mut Findings) {
    let Some(spec) = judged.spec else { return };
    let packed = |name: &str| name.strip_suffix(".weight").is_some_and(|module| judged.is_packed(module));
    let sites: BTreeSet<String> = spec.sites().map(|site| format!("{}.weight", site.module)).collect();
    for need in spec.tensors() {
        if packed(&need.name) || need.optional {
            continue;
        }
        let head = format!("{}.weight", spec.head.module);
        // A tied checkpoint may hold only the head.
        let other = (spec.head.tied && need.name == spec.embed.weight).then(|| judged.checkpoint.info(&head)).flatten();
        match judged.checkpoint.info(&need.name).or(other) {
            None if sites.contains(&need.name) => {}
            None => {
                let message = "the decoder needs it; the checkpoint is incomplete: copy it from the original";
                findings.error("tensor-missing", Some(&need.name), message);
            }
            Some(info) if info.shape != need.shape => {
                let message =
                    format!("has shape {:?}, wanted {:?} by {} in config.json", info.shape, need.shape, need.keys);
                findings.error("tensor-shape", Some(&need.name), message);
            }
            Some(info) if !sites.contains(&need.name) && !is_float(info.dtype) => {
                let message = format!("has dtype {}, wanted F32, F16 or BF16", info.dtype);
                findings.error("tensor-dtype", Some(&need.name), message);
            }
            Some(_) => {}
        }
    }
}

/// Without a decoder: plain matrices inside numbered blocks that the config declares quantized.
fn undeclared(judged: &Judged<'_>, findings: &mut Findings) {
    /// What is never quantized, listed or not.
    const PLAIN: [&str; 5] = ["norm", "embed", "router", "rotary", "conv"];
    let (None, Some(quantized)) = (judged.spec, judged.quantized) else { return };
    let ignored = Ignored::new(&quantized.config().ignored);
    for info in judged.checkpoint.names().filter_map(|name| judged.checkpoint.info(name)) {
        let Some(module) = info.name.strip_suffix(".weight") else { continue };
        let exempt = PLAIN.iter().any(|word| module.contains(word)) || module.ends_with(".gate");
        let packed = judged.is_packed(module);
        if packed && ignored.names(module) {
            findings.error("ignored-but-packed", Some(module), "listed as not quantized, but stored packed");
        }
        if block_number(module).is_some()
            && !exempt
            && !packed
            && info.shape.len() == 2
            && is_float(info.dtype)
            && !ignored.covers(module)
        {
            let message = "declared quantized (not in the list of ignored modules), but stored plain";
            findings.error("declared-but-plain", Some(module), message);
        }
    }
}

/// Tensors that nothing reads.
fn extra(judged: &Judged<'_>, original: Option<&Original>, findings: &mut Findings) {
    let Some(spec) = judged.spec else { return };
    let mut known: BTreeSet<String> = spec.tensors().into_iter().map(|need| need.name).collect();
    known.insert(format!("{}.weight", spec.head.module));
    let suffixes = judged.quantized.map_or(&[] as &[&str], |quantized| quantized.layout().suffixes());
    for linear in judged.linears {
        known.extend(suffixes.iter().map(|suffix| format!("{}.{suffix}", linear.module)));
        known.insert(format!("{}.weight", linear.module));
    }
    let of_stored: BTreeSet<&str> = judged.stored.iter().flat_map(|s| &s.tensors).map(String::as_str).collect();
    let ignored = judged.quantized.map(|quantized| Ignored::new(&quantized.config().ignored));
    for name in judged.checkpoint.names().filter(|name| !known.contains(*name) && !is_kv_scale(name)) {
        let module = name.strip_suffix(".weight");
        let beyond = block_number(name).is_some_and(|number| number >= spec.blocks.len());
        let speculative = name.starts_with("mtp.") || name.contains(".mtp.") || name.contains("nextn");
        let declared = module.zip(ignored.as_ref()).is_none_or(|(module, ignored)| ignored.covers(module));
        let matrix = judged.checkpoint.info(name).is_some_and(|info| info.shape.len() == 2);
        if UNREAD.iter().any(|end| name.ends_with(end)) {
            findings.note("tensor-extra", Some(name), "nothing reads it");
        } else if speculative && matrix && !declared {
            let message = "a layer for speculative decoding is stored plain, but not in the list of ignored modules: \
                           engines would take it for quantized; add it";
            findings.error("mtp-undeclared", Some(name), message);
        } else if original.is_some_and(|original| original.holds_same(judged.checkpoint, name)) {
            findings.note("tensor-extra", Some(name), "the decoder does not read it; the same as in the original");
        } else if beyond {
            let message = format!(
                "belongs to a block that the config does not have: `num_hidden_layers` is {}",
                spec.blocks.len()
            );
            findings.error("tensor-extra", Some(name), message);
        } else if !of_stored.contains(name) || judged.quantized.is_some() {
            let message = format!(
                "is read by nothing in `{}`: engines refuse it or leave it out; remove it",
                printable(&spec.arch)
            );
            findings.error("tensor-extra", Some(name), message);
        }
    }
}

/// Types and sizes of the tensors of packed linears, from headers alone.
pub(super) fn headers(judged: &Judged<'_>, findings: &mut Findings) {
    let Some(quantized) = judged.quantized else { return };
    for Linear { module, n, k } in judged.linears.iter().filter(|linear| judged.is_packed(&linear.module)) {
        let specs = match quantized.layout().describe(quantized.config().scheme_of(module), *n, *k) {
            Ok(specs) => specs,
            Err(error) => {
                findings.error("tensor-shape", Some(module), error.to_string());
                continue;
            }
        };
        for spec in specs {
            let name = format!("{module}.{}", spec.suffix);
            let Some(info) = judged.checkpoint.info(&name) else {
                findings.error("tensor-missing", Some(&name), "the layout needs it; the checkpoint is incomplete");
                continue;
            };
            let both = |is: fn(Dtype) -> bool| is(info.dtype) && is(spec.dtype);
            let wide = |dtype| matches!(dtype, Dtype::I32 | Dtype::I64);
            if info.dtype != spec.dtype && !both(is_float) && !both(wide) && !both(is_byte) {
                let message = format!("has dtype {}, wanted {}", info.dtype, spec.dtype);
                findings.error("tensor-dtype", Some(&name), message);
            }
            // Scales of one value are written with and without dimensions of 1.
            if info.elements() != spec.shape.iter().product::<usize>() {
                let message = format!(
                    "has shape {:?}, wanted {:?}; check the model's dimensions, bits and group size",
                    info.shape, spec.shape
                );
                findings.error("tensor-shape", Some(&name), message);
            }
        }
    }
}

/// Whether plain tensors may have this type.
pub(super) fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

fn is_byte(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::U8 | Dtype::F8_E8M0)
}

/// The first component of a name that is a number.
fn block_number(name: &str) -> Option<usize> {
    name.split('.').find_map(|part| part.parse().ok())
}
