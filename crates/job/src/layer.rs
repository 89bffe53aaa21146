//! One decoder block: scales, folds, codes.

use std::collections::BTreeMap;

use lite_awq::{Consumer, FoldProblem, fixed_scales, search_scales};
use lite_decoder::{Block, BlockSpec, Fold, InputId, Producer};
use lite_linalg::unscale_gram;
use lite_quant::{QuantizedLinear, Range, RangeContext, ScaleDtype, Scheme, quantize_nearest, relative_error};
use lite_stats::BlockStats;

use crate::fold::{Edit, apply, frozen_channels, missing, to_vec};
use crate::{JobError, Method};

/// What folding left behind.
#[derive(Debug, Default)]
pub(crate) struct Folded {
    /// Scales that the consumers of an input got: the input itself was divided by them.
    pub(crate) scales: BTreeMap<InputId, Vec<f32>>,
    /// Norm weights and biases that changed, as written.
    pub(crate) edits: Vec<Edit>,
}

/// Finds and applies the scales of every fold of a block.
pub(crate) fn fold_block(
    block: &mut Block,
    spec: &BlockSpec,
    stats: &BlockStats,
    scheme: &Scheme,
    range: Range,
    method: Method,
    storage: &dyn Fn(&str) -> ScaleDtype,
) -> Result<Folded, JobError> {
    let mut folded = Folded::default();
    let Method::Awq { search_scale } = method;
    for fold in &spec.folds {
        let scales = fold_scales(block, spec, stats, fold, scheme, range, search_scale)?;
        let (effective, edits) = apply(block, spec, fold, &scales, storage)?;
        folded.scales.insert(fold.input, effective);
        folded.edits.extend(edits);
    }
    Ok(folded)
}

fn fold_scales(
    block: &Block,
    spec: &BlockSpec,
    stats: &BlockStats,
    fold: &Fold,
    scheme: &Scheme,
    range: Range,
    search_scale: bool,
) -> Result<Vec<f32>, JobError> {
    let input = stats
        .get(fold.input)
        .ok_or_else(|| JobError::Input(format!("no statistics were gathered for {:?}", fold.input)))?;
    let mut weights = Vec::new();
    for id in &fold.consumers {
        let site = spec.sites.iter().find(|s| s.id == *id).ok_or_else(|| missing(id.role))?;
        let weight = block.weight(id.role).ok_or_else(|| missing(id.role))?;
        weights.push((to_vec(weight)?, site.out_features));
    }
    let frozen = frozen_channels(block, fold)?;
    let ties = match &fold.producer {
        Producer::Rows { rows, .. } => Some(rows.as_slice()),
        Producer::Norm { .. } => None,
    };
    let activation = if search_scale { input.abs_mean() } else { input.abs_max().to_vec() };
    let problem = FoldProblem {
        consumers: weights.iter().map(|(weight, n)| Consumer { weight, out_features: *n }).collect(),
        in_features: input.in_features,
        gram: input.gram(),
        activation: &activation,
        ties,
        frozen: frozen.as_deref(),
    };
    if !search_scale {
        return Ok(fixed_scales(&problem, scheme));
    }
    let name = format!("{:?}", fold.input.stream);
    let choice = search_scales(&problem, scheme, range)
        .map_err(|source| JobError::Awq { block: spec.index, input: name, source })?;
    Ok(choice.scales)
}

/// One quantized linear, with the relative error of its output on the calibration tokens.
#[derive(Debug)]
pub(crate) struct Solved {
    pub(crate) quantized: QuantizedLinear,
    pub(crate) error: Option<f64>,
}

/// Chooses the codes of one linear. `gram` is that of the input as the folded block sees it.
pub(crate) fn solve(
    module: &str,
    weight: &[f32],
    n: usize,
    k: usize,
    gram: Option<&[f32]>,
    scheme: &Scheme,
    range: Range,
) -> Result<Solved, JobError> {
    let context = RangeContext { weight, out_features: n, in_features: k, gram };
    let quantized = quantize_nearest(&context, scheme, range)
        .map_err(|source| JobError::Tensor { tensor: format!("{module}.weight"), source })?;
    let error = gram.map(|gram| relative_error(weight, &quantized.dequantize(), gram, n, k));
    Ok(Solved { quantized, error })
}

/// The Gram matrix of `input` after the fold's scales were divided out of it.
pub(crate) fn folded_gram(stats: &BlockStats, folded: &Folded, input: InputId) -> Option<Vec<f32>> {
    let gram = stats.get(input)?.gram();
    Some(match folded.scales.get(&input) {
        Some(scales) => unscale_gram(gram, scales),
        None => gram.to_vec(),
    })
}
