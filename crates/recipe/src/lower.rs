//! From the keys of a file to what is run, with the defaults of the verbs.

use std::path::PathBuf;

use lite_job::{
    CalibSettings, DtypeChoice, EvalSettings, ExpertPolicy, ExpertSettings, Method, Override, Recipe, Rounding,
    SmoothScales, Solver, StatsSource,
};
use lite_pack::KvCacheScheme;
use lite_quant::floats::Grain;
use lite_quant::{ActivationFormat, ActivationScale, GroupSize, LinearScheme, Range, WeightScheme};
use lite_runtime::eval::Gate;

use crate::error::Fault;
use crate::file::{
    Calibration, DtypeName, Eval, ExpertPolicyName, Gptq, Job, KvCacheName, RangeName, RoundingName, SmoothAlgorithm,
    Stage,
};
use crate::node::Node;
use crate::scheme::{SchemeChoice, usual, w8a8};
use crate::words::Alpha;

/// Floating-point operations that the final comparison may take where it was not asked for and the rest of the run needs
/// no forward pass: some minutes of two cores.
pub const CHECK_LIMIT: f64 = 1e13;

/// What is to be run.
#[derive(Debug, Clone)]
pub(crate) struct Lowered {
    pub(crate) recipe: Recipe,
    pub(crate) gates: Vec<Gate>,
    pub(crate) plain: Option<PathBuf>,
}

/// What the stages ask for.
struct Steps {
    method: Method,
    solver: Solver,
    /// Nothing that needs windows was asked for by name.
    data_if_needed: bool,
    /// `gptq` without anything before it.
    gptq_alone: bool,
}

/// Reads a job. `tree` is what it was read from, for the places of contradictions.
pub(crate) fn lower(job: &Job, tree: &Node) -> Result<Lowered, Fault> {
    let bad = |path: &str, message: &str| Fault::value(tree.place(path), message);
    let Some(model) = &job.model else {
        return Err(bad(
            "model",
            "`model` is missing: give a folder or a hub id, here, in `defaults`, or with --model",
        ));
    };
    let steps = steps(job, tree)?;
    let smooth = matches!(steps.method, Method::SmoothQuant { .. });
    let awq = matches!(steps.method, Method::Awq { .. });
    let nearest = steps.solver.rounding == Rounding::Nearest;
    let defaults = Recipe::new(model.clone());
    let scheme = |choice: &SchemeChoice| choice.scheme(usual(!awq)).map_err(|message| bad("scheme", &message));
    let mut recipe = Recipe { method: steps.method, solver: steps.solver, symmetric: !awq, ..defaults };
    match &job.scheme {
        None if smooth => recipe.scheme = Some(w8a8()),
        None if steps.data_if_needed => {
            return Err(bad("stages", "`rtn` needs a `scheme`: give a name such as W4A16 or FP8_DYNAMIC, or numbers"));
        }
        None => {}
        Some(choice @ SchemeChoice::Numbers(numbers)) if numbers.short() => {
            scheme(choice)?;
            recipe.bits = numbers.bits.unwrap_or(recipe.bits);
            recipe.group_size = numbers.group_size.unwrap_or(recipe.group_size);
            recipe.symmetric = numbers.symmetric.unwrap_or(recipe.symmetric);
        }
        Some(choice) => recipe.scheme = Some(scheme(choice)?),
    }
    if recipe.scheme.is_some() {
        // Not read beside a scheme; equal recipes are to be equal here as well.
        (recipe.bits, recipe.group_size, recipe.symmetric) = (4, 128, false);
    }
    recipe.power_of_two_scales = job.power_of_two_scales.unwrap_or(false);
    recipe.range = match job.range {
        Some(RangeName::Search) => Range::Search,
        Some(RangeName::Minmax) => Range::MinMax,
        None if nearest && (smooth || steps.data_if_needed) => Range::MinMax,
        None => Range::Search,
    };
    recipe.arch = job.arch.as_ref().map(PathBuf::from);
    recipe.revision = job.revision.clone();
    recipe.download_dir = job.download_dir.as_ref().map(PathBuf::from);
    recipe.overrides = overrides(job, tree)?;
    recipe.ignore = job.ignore.clone().unwrap_or_default();
    recipe.kv_cache = job.kv_cache.map(|name| match name {
        KvCacheName::Fp8 => KvCacheScheme::Fp8Tensor,
        KvCacheName::Fp8Head => KvCacheScheme::Fp8Head,
    });
    if let Some(experts) = &job.experts {
        let usual = ExpertSettings::default();
        recipe.experts = ExpertSettings {
            min_tokens: experts.min_tokens.unwrap_or(usual.min_tokens),
            policy: match experts.policy {
                None => usual.policy,
                Some(ExpertPolicyName::Weighted) => ExpertPolicy::Weighted,
                Some(ExpertPolicyName::Nearest) => ExpertPolicy::Nearest,
                Some(ExpertPolicyName::Fail) => ExpertPolicy::Fail,
            },
        };
    }
    recipe.dtype = match job.dtype.unwrap_or(DtypeName::Auto) {
        DtypeName::Auto => DtypeChoice::Auto,
        DtypeName::Float16 => DtypeChoice::Float16,
        DtypeName::Bfloat16 => DtypeChoice::Bfloat16,
    };
    recipe.target = job.target.map(|name| name.0);
    recipe.layout = match (&job.layout, recipe.target) {
        (Some(name), _) => Some(name.0.clone()),
        (None, Some(_)) => None,
        (None, None) if steps.gptq_alone && integer(recipe.scheme.as_ref()) => Some("gptq".to_owned()),
        (None, None) if smooth => Some(smooth_layout(&recipe).to_owned()),
        (None, None) => None,
    };
    recipe.tensor_parallel = match job.tensor_parallel {
        Some(0) => return Err(bad("tensor_parallel", "found 0, wanted the number of GPUs, at least 1")),
        other => other.unwrap_or(1),
    };
    calibration(&mut recipe, job.calibration.as_ref().unwrap_or(&Calibration::default()), tree, steps.data_if_needed)?;
    let eval = job.eval.clone().unwrap_or_default();
    let gates = gates(&eval, tree)?;
    recipe.eval = EvalSettings {
        dataset: eval.dataset,
        windows: eval.samples.unwrap_or(16),
        seqlen: eval.seqlen,
        limit: (steps.data_if_needed && eval.samples.is_none() && gates.is_empty()).then_some(CHECK_LIMIT),
    };
    let save = job.save.clone().unwrap_or_default();
    recipe.work_dir = save.path.map_or(recipe.work_dir, PathBuf::from);
    recipe.overwrite = save.overwrite.unwrap_or(false);
    recipe.max_shard_bytes = save.max_shard_size.map_or(recipe.max_shard_bytes, |size| size.0);
    let plain = save.plain.map(PathBuf::from);
    if plain.as_ref() == Some(&recipe.work_dir) {
        return Err(bad("save.plain", "is the folder of the quantized checkpoint; give another one"));
    }
    let resources = job.resources.clone().unwrap_or_default();
    recipe.max_memory = resources.max_memory.map(|size| size.0);
    recipe.resume.checkpoint_seconds = resources.checkpoint_seconds.unwrap_or(recipe.resume.checkpoint_seconds);
    recipe.device = resources.device.map(|name| name.0);
    Ok(Lowered { recipe, gates, plain })
}

fn integer(scheme: Option<&LinearScheme>) -> bool {
    scheme.is_none_or(|scheme| scheme.weights.int().is_some() && scheme.activations.is_none())
}

/// LMDeploy's layout for what its PyTorch engine runs, else compressed-tensors.
fn smooth_layout(recipe: &Recipe) -> &'static str {
    let channel = |scheme: &LinearScheme| match scheme.weights {
        WeightScheme::Int(int) => int.bits == 8 && int.group_size == GroupSize::Channel && int.symmetric,
        WeightScheme::Float(float) => float.format.bits() == 8 && float.grain == Grain::Channel,
    };
    let inputs = |scheme: &LinearScheme| {
        scheme.activations.is_some_and(|inputs| {
            let symmetric = !matches!(inputs.format, ActivationFormat::Int { symmetric: false, .. });
            inputs.scale == ActivationScale::DynamicToken && symmetric
        })
    };
    let native = recipe.scheme.as_ref().is_some_and(|scheme| channel(scheme) && inputs(scheme));
    if native && recipe.kv_cache.is_none() { "lmdeploy-w8a8" } else { "compressed-tensors" }
}

fn steps(job: &Job, tree: &Node) -> Result<Steps, Fault> {
    const ORDER: &str = "wanted at most one of `smoothquant` and `awq`, then at most one of `gptq` and `rtn`";
    let bad = |message: String| Err(Fault::value(tree.place("stages"), message));
    let stages = job.stages.as_deref().unwrap_or_default();
    let (first, second) = match stages {
        [] => {
            let message =
                "`stages` is missing: give a list such as [awq: {}], [smoothquant: {}, gptq: {}] or [rtn: {}]";
            return bad(message.to_owned());
        }
        [one @ (Stage::SmoothQuant(_) | Stage::Awq(_))] => (Some(one), None),
        [one @ (Stage::Gptq(_) | Stage::Rtn(_))] => (None, Some(one)),
        [one @ (Stage::SmoothQuant(_) | Stage::Awq(_)), two @ (Stage::Gptq(_) | Stage::Rtn(_))] => {
            (Some(one), Some(two))
        }
        _ => return bad(format!("found stages in an order that is not known; {ORDER}")),
    };
    let method = match first {
        Some(Stage::SmoothQuant(settings)) => {
            let scales = match (settings.algorithm.unwrap_or(SmoothAlgorithm::Smoothquant), settings.alpha) {
                (SmoothAlgorithm::Smoothquant, None) => SmoothScales::Alpha(0.5),
                (SmoothAlgorithm::Smoothquant, Some(Alpha::Fixed(alpha))) => SmoothScales::Alpha(alpha),
                (SmoothAlgorithm::Smoothquant, Some(Alpha::Auto)) => SmoothScales::SearchedAlpha,
                (_, Some(_)) => {
                    return bad("`alpha` belongs to the algorithm `smoothquant`; leave one of them out".to_owned());
                }
                (SmoothAlgorithm::LogEqualization, None) => SmoothScales::LogEqualization,
                (SmoothAlgorithm::Awq, None) => SmoothScales::Awq,
            };
            Method::SmoothQuant { scales }
        }
        Some(Stage::Awq(settings)) => Method::Awq { search_scale: settings.search_scale.unwrap_or(true) },
        _ => Method::Plain,
    };
    let smooth = matches!(method, Method::SmoothQuant { .. });
    let solver = match second {
        Some(Stage::Gptq(settings)) => solver(settings, smooth, tree)?,
        _ => Solver::NEAREST,
    };
    Ok(Steps {
        method,
        solver,
        data_if_needed: first.is_none() && matches!(second, Some(Stage::Rtn(_))),
        gptq_alone: first.is_none() && matches!(second, Some(Stage::Gptq(_))),
    })
}

fn solver(settings: &Gptq, smooth: bool, tree: &Node) -> Result<Solver, Fault> {
    let rounding = match settings.rounding.unwrap_or(RoundingName::Refine) {
        RoundingName::Nearest => Rounding::Nearest,
        RoundingName::Gptq => Rounding::Gptq,
        RoundingName::Refine => Rounding::Refine,
    };
    let damp = settings.damp_percent.unwrap_or(0.01);
    // Written so that NaN fails.
    if !(damp > 0.0 && damp <= 1.0) {
        let message = format!("`damp_percent` is {damp}; wanted a fraction above 0 and at most 1, such as 0.01");
        return Err(Fault::value(tree.place("stages"), message));
    }
    Ok(Solver {
        rounding,
        error_aware: settings.error_aware.unwrap_or(!smooth && rounding != Rounding::Nearest),
        tune: settings.tune.unwrap_or(false),
        act_order: settings.act_order.unwrap_or(true),
        damp: damp as f32,
        fallback: settings.fallback.unwrap_or(true),
    })
}

fn overrides(job: &Job, tree: &Node) -> Result<Vec<Override>, Fault> {
    let rules = job.overrides.as_deref().unwrap_or_default();
    rules
        .iter()
        .map(|rule| {
            let scheme = rule.scheme.as_ref().map(|choice| choice.scheme(usual(true))).transpose();
            Ok(Override {
                pattern: rule.pattern.clone(),
                bits: rule.bits,
                group_size: rule.group_size,
                symmetric: rule.symmetric,
                scheme: scheme.map_err(|message| Fault::value(tree.place("overrides"), message))?,
            })
        })
        .collect()
}

fn calibration(recipe: &mut Recipe, found: &Calibration, tree: &Node, if_needed: bool) -> Result<(), Fault> {
    if found.samples.is_some_and(|samples| samples < 0) {
        let message = "wanted a number of windows, or 0 to quantize without data";
        return Err(Fault::value(tree.place("calibration.samples"), message));
    }
    recipe.stats = match &found.statistics {
        None if found.gather == Some(true) => {
            let message = "wanted `statistics` beside it: the folder to gather them in";
            return Err(Fault::value(tree.place("calibration.gather"), message));
        }
        None => None,
        Some(_) if found.samples == Some(0) => {
            let message =
                "`samples: 0` quantizes without data, `statistics` with the data of an earlier run; leave one out";
            return Err(Fault::value(tree.place("calibration.samples"), message));
        }
        Some(folder) => Some(StatsSource {
            folder: PathBuf::from(folder),
            gather: found.gather == Some(true),
            dataset: found.dataset.clone(),
            samples: found.samples,
            seqlen: found.seqlen,
            seed: found.seed,
        }),
    };
    recipe.calib = CalibSettings {
        dataset: found.dataset.clone(),
        samples: found.samples.unwrap_or(128),
        seqlen: found.seqlen,
        seed: found.seed.unwrap_or(0),
        if_needed,
    };
    recipe.batch_size = found.batch_size;
    Ok(())
}

fn gates(eval: &Eval, tree: &Node) -> Result<Vec<Gate>, Fault> {
    let limits = [
        ("eval.max_kl", eval.max_kl.map(Gate::MaxKl)),
        ("eval.max_ppl_ratio", eval.max_ppl_ratio.map(Gate::MaxPerplexityRatio)),
        ("eval.min_top1", eval.min_top1.map(Gate::MinTop1)),
    ];
    let mut gates = Vec::new();
    for (path, gate) in limits {
        let Some(gate) = gate else { continue };
        if !(gate.limit().is_finite() && gate.limit() >= 0.0) {
            return Err(Fault::value(tree.place(path), format!("found {}, wanted a limit such as 0.02", gate.limit())));
        }
        if eval.samples == Some(0) {
            let message = "a limit needs the comparison that `eval.samples: 0` leaves out; give windows, such as 16";
            return Err(Fault::value(tree.place(path), message));
        }
        gates.push(gate);
    }
    Ok(gates)
}
