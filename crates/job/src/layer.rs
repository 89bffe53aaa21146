//! One decoder block: scales, folds, codes.

use std::collections::BTreeMap;

use lite_awq::{Consumer, FoldProblem, fixed_scales, search_scales};
use lite_decoder::{Block, BlockSpec, Fold, InputId, Producer, with_cpu_slice};
use lite_gptq::{Fallback, GptqSettings, Hessian, NearestReason};
use lite_linalg::unscale_gram;
use lite_quant::{QuantizedLinear, RangeContext, ScaleDtype, Weights, gram_loss, quantize_nearest};
use lite_stats::BlockStats;

use crate::check::Outcome;
use crate::fold::{Edit, apply, frozen_channels, missing, note_scales, storable, to_vec};
use crate::stream::{Shared, round};
use crate::{JobError, Method, Plan, QuantSite, Rounding};

/// Coordinate-descent sweeps of [`Rounding::Refine`].
const SWEEPS: usize = 3;

/// What folding left behind.
#[derive(Debug, Default)]
pub(crate) struct Folded {
    /// The scales that were asked for, by fold of the plan.
    pub(crate) found: Vec<Vec<f32>>,
    /// Scales that the consumers of an input got: the input itself was divided by them.
    pub(crate) scales: BTreeMap<InputId, Vec<f32>>,
    /// Norm weights and biases that changed, as written.
    pub(crate) edits: Vec<Edit>,
}

/// Finds and applies the scales of some folds of a block, in the order of the plan. What was asked for and what changed
/// is added to `folded`; so are the scales of inputs.
pub(crate) fn fold_block<'f>(
    block: &mut Block,
    stats: &BlockStats,
    folds: impl Iterator<Item = &'f Fold>,
    plan: &Plan,
    storage: &dyn Fn(&str) -> ScaleDtype,
    folded: &mut Folded,
) -> Result<(), JobError> {
    let spec = block.spec().clone();
    for fold in folds {
        let scales = fold_scales(block, &spec, stats, fold, plan)?;
        let (effective, edits) = apply(block, &spec, fold, &scales, storage)?;
        note_scales(&mut folded.scales, &spec, fold, &effective);
        folded.edits.extend(edits);
        folded.found.push(scales);
    }
    Ok(())
}

fn fold_scales(
    block: &Block,
    spec: &BlockSpec,
    stats: &BlockStats,
    fold: &Fold,
    plan: &Plan,
) -> Result<Vec<f32>, JobError> {
    let input = stats
        .get(fold.input)
        .ok_or_else(|| JobError::Input(format!("no statistics were gathered for {}", fold.input)))?;
    let weights = consumer_rows(block, spec, fold, SEARCHED_ROWS)?;
    let frozen = frozen_channels(block, fold)?;
    let ties = match &fold.producer {
        Producer::Rows { rows, .. } => Some(&rows[..]),
        Producer::Norm { .. } => None,
    };
    if input.tokens == 0 {
        return Ok(vec![1.0; input.in_features]);
    }
    let search = plan.method == Method::Awq { search_scale: true };
    let activation = if search { input.abs_mean() } else { input.abs_max().to_vec() };
    let problem = FoldProblem {
        consumers: weights.iter().map(|(weight, n)| Consumer { weight, out_features: *n }).collect(),
        in_features: input.in_features,
        gram: input.gram(),
        activation: &activation,
        ties,
        frozen: frozen.as_deref(),
    };
    // Consumers of one input share a scheme, or the first one's stands for all.
    let scheme = fold
        .consumers
        .first()
        .and_then(|id| plan.sites.iter().find(|s| s.site == Some(*id)))
        .ok_or_else(|| JobError::Input(format!("no linear is quantized at {}", fold.input)))?
        .int()?;
    if !search {
        return Ok(storable(fold, fixed_scales(&problem, scheme)));
    }
    let choice = search_scales(&problem, scheme, plan.range).map_err(|source| JobError::Awq {
        block: spec.index,
        input: format!("{:?}", fold.input.stream),
        source,
    })?;
    Ok(storable(fold, choice.scales))
}

/// Rows of all linears that read one input; many experts have more of them than a search needs.
pub(crate) const SEARCHED_ROWS: usize = 16_384;

/// The weights of a fold's consumers with their numbers of rows: all rows, or evenly spaced ones of each where there are
/// more than `most` in all. Errors are sums over rows, so a sample of them ranks scales as all would.
pub(crate) fn consumer_rows(
    block: &Block,
    spec: &BlockSpec,
    fold: &Fold,
    most: usize,
) -> Result<Vec<(Vec<f32>, usize)>, JobError> {
    let sites = fold.consumers.iter().map(|id| spec.site(id.role).ok_or_else(|| missing(id.role)));
    let sites: Vec<_> = sites.collect::<Result<_, JobError>>()?;
    let step = sites.iter().map(|s| s.out_features).sum::<usize>().div_ceil(most).max(1);
    let rows = |site: &&lite_decoder::Site| {
        let weight = block.weight(site.id.role).ok_or_else(|| missing(site.id.role))?;
        let sampled = |values: &[f32]| -> Vec<f32> {
            values.chunks_exact(site.in_features).skip(step / 2).step_by(step).flatten().copied().collect()
        };
        let values = if step == 1 { to_vec(weight)? } else { with_cpu_slice(weight, sampled)? };
        let rows = values.len() / site.in_features.max(1);
        Ok((values, rows))
    };
    let all: Vec<(Vec<f32>, usize)> = sites.iter().map(rows).collect::<Result<_, JobError>>()?;
    Ok(all.into_iter().filter(|(_, rows)| *rows > 0).collect())
}

/// One quantized linear.
#[derive(Debug)]
pub(crate) struct Solved {
    pub(crate) quantized: QuantizedLinear,
    /// Relative error of its output on the calibration tokens.
    pub(crate) error: Option<f64>,
    /// What the solver had to do instead of what was asked, in words.
    pub(crate) fallback: Option<String>,
    /// What the codes stand for, if it is not the weight itself.
    pub(crate) target: Option<Vec<f32>>,
    /// Tokens that reached it, where a router decides that.
    pub(crate) tokens: Option<u64>,
}

impl Solved {
    pub(crate) fn outcome(&self) -> Outcome {
        Outcome { error: self.error, fallback: self.fallback.clone(), tokens: self.tokens }
    }
}

/// What is known of the drift between the float and the quantized stream at one input.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Drift<'a> {
    /// Nothing: the target is the weight itself.
    None,
    /// `X̃ᵀX / T`, `[K, K]`.
    Inputs(&'a [f32]),
    /// `(X̃Wᵀ)ᵀX / T`, `[N, K]`, of the only linear that reads the input.
    Outputs(&'a [f32]),
}

/// Chooses the codes of all linears that share one input. `gram` is that of the input as the folded block
/// sees it; the target makes up for `drift`.
pub(crate) fn solve_input(
    sites: &[(&QuantSite, Vec<f32>)],
    gram: &[f32],
    drift: Drift<'_>,
    plan: &Plan,
) -> Result<Vec<Solved>, JobError> {
    let Some((first, _)) = sites.first() else { return Ok(Vec::new()) };
    let k = first.in_features;
    if plan.solver.rounding == Rounding::Nearest {
        let round = |(site, weight): &(&QuantSite, Vec<f32>)| {
            let context = RangeContext { weight, out_features: site.out_features, in_features: k, gram: Some(gram) };
            let quantized = quantize_nearest(&context, site.int()?, plan.range).map_err(tensor_error(site))?;
            let loss = gram_loss(weight, &quantized.dequantize(), gram, site.out_features, k);
            let error = Some(relative(loss, weight, gram, site));
            Ok(Solved { quantized, error, fallback: None, target: None, tokens: None })
        };
        return sites.iter().map(round).collect();
    }
    let settings = GptqSettings {
        damp: plan.solver.damp,
        act_order: plan.solver.act_order,
        range: plan.range,
        refine_sweeps: if plan.solver.rounding == Rounding::Refine { SWEEPS } else { 0 },
        fallback: plan.solver.fallback,
        ..GptqSettings::default()
    };
    let failed = |site: &QuantSite| {
        let module = site.module.clone();
        move |source| JobError::Gptq { module, source }
    };
    let hessian = Hessian::new(gram, k, &settings).map_err(failed(first))?;
    let usable = !matches!(hessian.fallback(), Fallback::Nearest { .. });
    let solve = |(site, weight): &(&QuantSite, Vec<f32>)| {
        let target = match drift {
            Drift::Inputs(cross) if usable => Some(hessian.error_aware_target(weight, cross)),
            Drift::Outputs(product) if usable => Some(hessian.error_aware_target_from_outputs(weight, product)),
            _ => None,
        };
        let target = target.transpose().map_err(failed(site))?;
        let float = target.as_deref().unwrap_or(weight);
        let solution = hessian.solve(float, site.out_features, site.int()?).map_err(failed(site))?;
        let error = Some(relative(solution.loss, float, gram, site));
        let kept = solution.kept_nearest && usable;
        let fallback = words(solution.fallback)
            .or_else(|| kept.then(|| "kept nearest rounding, which had the smaller error on every row".to_owned()));
        Ok(Solved { quantized: solution.quantized, error, fallback, target, tokens: None })
    };
    sites.iter().map(solve).collect()
}

/// Nearest codes of all linears that share one input, of which nothing is known.
pub(crate) fn nearest(sites: &[(&QuantSite, Vec<f32>)], plan: &Plan) -> Result<Vec<Solved>, JobError> {
    let shared = Shared::of(sites.iter().map(|(site, weight)| (*site, weight.as_slice())));
    let round = |(site, weight): &(&QuantSite, Vec<f32>)| {
        site.int()?;
        match round(site, weight, plan, &shared)? {
            Weights::Int(quantized) => {
                Ok(Solved { quantized, error: None, fallback: None, target: None, tokens: None })
            }
            Weights::Float(_) => Err(JobError::Input(format!("`{}` got no integer codes", site.module))),
        }
    };
    sites.iter().map(round).collect()
}

fn relative(loss: f64, weight: &[f32], gram: &[f32], site: &QuantSite) -> f64 {
    let energy = gram_loss(weight, &vec![0.0; weight.len()], gram, site.out_features, site.in_features);
    if energy > 0.0 { (loss.max(0.0) / energy).sqrt() } else { 0.0 }
}

fn words(fallback: Fallback) -> Option<String> {
    match fallback {
        Fallback::None => None,
        Fallback::Damped { damp } => Some(format!("needed damping {damp}")),
        Fallback::Double { damp } => Some(format!("needed f64 and damping {damp}")),
        Fallback::Nearest { reason: NearestReason::NoSignal } => {
            Some("rounded to nearest: no token reached this input".to_owned())
        }
        Fallback::Nearest { reason: NearestReason::NotFactored(_) } => {
            Some("rounded to nearest: its Gram matrix could not be factored".to_owned())
        }
    }
}

fn tensor_error(site: &QuantSite) -> impl FnOnce(lite_quant::QuantError) -> JobError {
    let tensor = format!("{}.weight", site.module);
    move |source| JobError::Tensor { tensor, source }
}

/// The Gram matrix of `input` after the fold's scales were divided out of it.
pub(crate) fn folded_gram(stats: &BlockStats, folded: &Folded, input: InputId) -> Option<Vec<f32>> {
    let gram = stats.get(input)?.gram();
    Some(match folded.scales.get(&input) {
        Some(scales) => unscale_gram(gram, scales),
        None => gram.to_vec(),
    })
}
