//! Values: finite, and codes that a quantizer would write.

use std::collections::BTreeSet;

use lite_decoder::NormKind;
use lite_model::printable;
use lite_pack::PackError;
use lite_pack::targets::{Severity, check_scales};
use lite_quant::Weights;
use rayon::prelude::*;

use super::findings::Findings;
use super::structure::is_float;
use super::{Judged, VerifyOptions, codes};
use crate::RuntimeError;
use crate::compare::CompareProgress;

/// Values read at a time.
const CHUNK: usize = 1 << 22;

/// All tensors of floats: no NaN, no Inf; norms that are not all zero. Returns how many were judged that are no part of
/// a packed linear.
pub(super) fn plain(
    judged: &Judged<'_>,
    progress: CompareProgress<'_>,
    findings: &mut Findings,
) -> Result<usize, RuntimeError> {
    let parts: BTreeSet<&str> = judged.stored.iter().flat_map(|s| &s.tensors).map(String::as_str).collect();
    let norms: BTreeSet<&str> = judged
        .spec
        .iter()
        .flat_map(|spec| {
            // Stored distances from 1 may all be zero.
            let blocks = spec.blocks.iter().flat_map(|block| block.norms.all());
            let norms = blocks.chain([&spec.final_norm]).filter(|norm| norm.kind != NormKind::RmsPlusOne);
            norms.map(|norm| &norm.weight)
        })
        .map(String::as_str)
        .collect();
    let names: Vec<&str> = judged.checkpoint.names().collect();
    let mut count = 0;
    let mut buffer = Vec::new();
    for (done, name) in names.iter().enumerate() {
        if !progress("values", done, names.len()) {
            return Err(RuntimeError::Interrupted);
        }
        let Some(info) = judged.checkpoint.info(name).filter(|info| is_float(info.dtype)) else { continue };
        count += usize::from(!parts.contains(name));
        let (mut bad, mut live) = (0usize, false);
        let mut first = 0;
        while first < info.elements() {
            buffer.resize(CHUNK.min(info.elements() - first), 0f32);
            judged.checkpoint.tensor_f32_part(name, first, &mut buffer)?;
            bad += buffer.par_chunks(1 << 16).map(|c| c.iter().filter(|v| !v.is_finite()).count()).sum::<usize>();
            live |= buffer.par_chunks(1 << 16).any(|c| c.iter().any(|v| *v != 0.0));
            first += buffer.len();
        }
        judged.checkpoint.release([*name]);
        if bad > 0 {
            let message = format!("holds {bad} values that are NaN or Inf; the file is damaged: make it again");
            findings.error("value-not-finite", Some(name), message);
        }
        if !live && norms.contains(name) {
            findings.error(
                "norm-zero",
                Some(name),
                "all of its values are zero: nothing passes it; make the file again",
            );
        }
    }
    Ok(count)
}

/// All packed linears: they unpack, and their codes and scales look like those of a quantizer. Returns how many do
/// unpack.
pub(super) fn packed(
    judged: &Judged<'_>,
    options: &VerifyOptions<'_>,
    progress: CompareProgress<'_>,
    findings: &mut Findings,
) -> Result<usize, RuntimeError> {
    let Some(quantized) = judged.quantized else { return Ok(0) };
    let mut count = 0;
    for (done, linear) in judged.linears.iter().enumerate() {
        if !progress("codes", done, judged.linears.len()) {
            return Err(RuntimeError::Interrupted);
        }
        let module = linear.module.as_str();
        if !quantized.is_packed(module) {
            continue;
        }
        match quantized.linear(module, linear.n, linear.k) {
            Ok(found) => {
                count += 1;
                codes::judge(module, &found.weights, quantized.layout().name(), findings);
                if let Some(input) = found.input.filter(|input| !(input.scale > 0.0 && input.scale.is_normal())) {
                    let message =
                        format!("the scale of its inputs is {}, wanted a positive normal number", input.scale);
                    findings.error("scale-zero", Some(module), message);
                }
                for_engines(module, &found.weights, options, findings);
            }
            Err(RuntimeError::Linear { source, .. }) => {
                let name = suffix_of(&source).map_or_else(|| module.to_owned(), |suffix| format!("{module}.{suffix}"));
                findings.error(code_of(&source), Some(&name), source.to_string());
            }
            Err(RuntimeError::Model(error)) => return Err(error.into()),
            Err(other) => findings.error("unpack", Some(module), other.to_string()),
        }
        release(judged, module);
    }
    Ok(count)
}

/// Lets go of the mapped pages of a packed linear.
pub(super) fn release(judged: &Judged<'_>, module: &str) {
    let suffixes = judged.quantized.map_or(&[] as &[&str], |quantized| quantized.layout().suffixes());
    let names: Vec<String> = suffixes.iter().map(|suffix| format!("{module}.{suffix}")).collect();
    judged.checkpoint.release(names.iter().map(String::as_str));
}

fn for_engines(module: &str, weights: &Weights, options: &VerifyOptions<'_>, findings: &mut Findings) {
    let Weights::Int(linear) = weights else { return };
    for target in options.targets {
        let Some(found) = check_scales(*target, &printable(module), &linear.scales) else { continue };
        match found.severity {
            Severity::Refused => findings.error(found.rule, Some(module), found.message),
            Severity::Warning => findings.warning(found.rule, Some(module), found.message),
        }
    }
}

/// The finding that a failure to unpack is.
fn code_of(error: &PackError) -> &'static str {
    match error {
        PackError::Missing { .. } => "tensor-missing",
        PackError::Unexpected { .. } => "unpack",
        PackError::Dtype { .. } => "tensor-dtype",
        PackError::AmbiguousZeros { .. } => "zero-points",
        PackError::Value { what, .. } if what.contains("zero") => "zero-points",
        PackError::Value { what: "weight_shape", .. } => "tensor-shape",
        PackError::Value { what, wanted, .. } if what.contains("scale") || wanted.contains("finite") => {
            "value-not-finite"
        }
        PackError::TensorShape { .. }
        | PackError::PaddedPacking { .. }
        | PackError::ByteLength { .. }
        | PackError::Shape { .. }
        | PackError::Quant(_) => "tensor-shape",
        _ => "unpack",
    }
}

fn suffix_of(error: &PackError) -> Option<&'static str> {
    match error {
        PackError::Missing { suffix, .. }
        | PackError::Unexpected { suffix, .. }
        | PackError::Dtype { suffix, .. }
        | PackError::TensorShape { suffix, .. }
        | PackError::PaddedPacking { suffix, .. }
        | PackError::ByteLength { suffix, .. }
        | PackError::AmbiguousZeros { suffix, .. } => Some(suffix),
        PackError::Value { what, .. } => Some(what),
        _ => None,
    }
}
