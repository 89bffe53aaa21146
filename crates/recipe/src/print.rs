//! From what is run to the file that says so.

use lite_job::{DtypeChoice, ExpertPolicy, ExpertSettings, Method, Recipe, Rounding, SmoothScales, Solver};
use lite_pack::KvCacheScheme;
use lite_quant::Range;
use lite_runtime::eval::Gate;

use crate::file::{
    Awq, Calibration, DtypeName, Eval, ExpertPolicyName, Experts, Gptq, Job, KvCacheName, OverrideRule, RangeName,
    Resources, RoundingName, Rtn, Save, SmoothAlgorithm, SmoothQuant, Stage,
};
use crate::scheme::{Numbers, SchemeChoice};
use crate::words::{Alpha, DeviceName, EngineName, LayoutName, Size};

/// The file that equals `recipe`: what it does, read back, is this recipe.
pub fn to_yaml(recipe: &Recipe, gates: &[Gate]) -> String {
    yaml(&job(recipe, gates))
}

pub(crate) fn yaml(job: &Job) -> String {
    // Through JSON, so that a stage is a map of one key and not a tag.
    serde_json::to_value(job).ok().and_then(|value| serde_yaml::to_string(&value).ok()).unwrap_or_default()
}

pub(crate) fn job(recipe: &Recipe, gates: &[Gate]) -> Job {
    let path = |path: &std::path::Path| path.to_string_lossy().into_owned();
    let defaults = Recipe::new(String::new());
    let scheme = match &recipe.scheme {
        Some(scheme) => SchemeChoice::of(scheme),
        None => SchemeChoice::Numbers(Box::new(Numbers {
            bits: Some(recipe.bits),
            group_size: Some(recipe.group_size),
            symmetric: Some(recipe.symmetric),
            ..Numbers::default()
        })),
    };
    let resources = Resources {
        device: recipe.device.map(DeviceName),
        max_memory: recipe.max_memory.map(Size),
        checkpoint_seconds: (recipe.resume.checkpoint_seconds != defaults.resume.checkpoint_seconds)
            .then_some(recipe.resume.checkpoint_seconds),
    };
    let overrides: Vec<OverrideRule> = recipe
        .overrides
        .iter()
        .map(|rule| OverrideRule {
            pattern: rule.pattern.clone(),
            bits: rule.bits,
            group_size: rule.group_size,
            symmetric: rule.symmetric,
            scheme: rule.scheme.as_ref().map(SchemeChoice::of),
        })
        .collect();
    Job {
        name: None,
        model: Some(recipe.model.clone()),
        arch: recipe.arch.as_deref().map(path),
        revision: recipe.revision.clone(),
        download_dir: recipe.download_dir.as_deref().map(path),
        stages: Some(stages(recipe)),
        scheme: Some(scheme),
        power_of_two_scales: recipe.power_of_two_scales.then_some(true),
        range: Some(match recipe.range {
            Range::Search => RangeName::Search,
            Range::MinMax => RangeName::Minmax,
        }),
        overrides: (!overrides.is_empty()).then_some(overrides),
        ignore: (!recipe.ignore.is_empty()).then(|| recipe.ignore.clone()),
        layout: recipe.layout.clone().map(LayoutName),
        target: recipe.target.map(EngineName),
        tensor_parallel: (recipe.tensor_parallel != 1).then_some(recipe.tensor_parallel),
        dtype: match recipe.dtype {
            DtypeChoice::Auto => None,
            DtypeChoice::Float16 => Some(DtypeName::Float16),
            DtypeChoice::Bfloat16 => Some(DtypeName::Bfloat16),
        },
        kv_cache: recipe.kv_cache.map(|cache| match cache {
            KvCacheScheme::Fp8Tensor => KvCacheName::Fp8,
            KvCacheScheme::Fp8Head => KvCacheName::Fp8Head,
        }),
        experts: (recipe.experts != ExpertSettings::default()).then_some(Experts {
            min_tokens: Some(recipe.experts.min_tokens),
            policy: Some(match recipe.experts.policy {
                ExpertPolicy::Weighted => ExpertPolicyName::Weighted,
                ExpertPolicy::Nearest => ExpertPolicyName::Nearest,
                ExpertPolicy::Fail => ExpertPolicyName::Fail,
            }),
        }),
        calibration: Some(calibration(recipe)),
        eval: eval(recipe, gates),
        save: Some(Save {
            path: Some(path(&recipe.work_dir)),
            plain: None,
            overwrite: recipe.overwrite.then_some(true),
            max_shard_size: (recipe.max_shard_bytes != defaults.max_shard_bytes)
                .then_some(Size(recipe.max_shard_bytes)),
        }),
        resources: (resources != Resources::default()).then_some(resources),
    }
}

fn stages(recipe: &Recipe) -> Vec<Stage> {
    let mut stages = Vec::new();
    match recipe.method {
        Method::Plain => {}
        Method::Awq { search_scale } => stages.push(Stage::Awq(Awq { search_scale: (!search_scale).then_some(false) })),
        Method::SmoothQuant { scales } => {
            let (alpha, algorithm) = match scales {
                SmoothScales::Alpha(alpha) => (Some(Alpha::Fixed(alpha)), None),
                SmoothScales::SearchedAlpha => (Some(Alpha::Auto), None),
                SmoothScales::LogEqualization => (None, Some(SmoothAlgorithm::LogEqualization)),
                SmoothScales::Awq => (None, Some(SmoothAlgorithm::Awq)),
            };
            stages.push(Stage::SmoothQuant(SmoothQuant { alpha, algorithm }));
        }
    }
    let solver = &recipe.solver;
    if recipe.method == Method::Plain && recipe.calib.if_needed {
        stages.push(Stage::Rtn(Rtn {}));
    } else if recipe.method == Method::Plain || *solver != Solver::NEAREST {
        stages.push(Stage::Gptq(Gptq {
            rounding: Some(match solver.rounding {
                Rounding::Nearest => RoundingName::Nearest,
                Rounding::Gptq => RoundingName::Gptq,
                Rounding::Refine => RoundingName::Refine,
            }),
            error_aware: Some(solver.error_aware),
            tune: Some(solver.tune),
            act_order: Some(solver.act_order),
            // The shortest decimal that is this f32: not 0.009999999776.
            damp_percent: Some(solver.damp.to_string().parse().unwrap_or(f64::from(solver.damp))),
            fallback: Some(solver.fallback),
        }));
    }
    stages
}

fn calibration(recipe: &Recipe) -> Calibration {
    let found = &recipe.calib;
    match &recipe.stats {
        Some(stats) => Calibration {
            dataset: stats.dataset.clone(),
            samples: stats.samples,
            seqlen: stats.seqlen,
            seed: stats.seed,
            batch_size: recipe.batch_size,
            statistics: Some(stats.folder.to_string_lossy().into_owned()),
            gather: stats.gather.then_some(true),
        },
        None => Calibration {
            dataset: found.dataset.clone(),
            samples: Some(found.samples),
            seqlen: found.seqlen,
            seed: Some(found.seed),
            batch_size: recipe.batch_size,
            statistics: None,
            gather: None,
        },
    }
}

fn eval(recipe: &Recipe, gates: &[Gate]) -> Option<Eval> {
    let found = &recipe.eval;
    let mut eval = Eval {
        dataset: found.dataset.clone(),
        // Where it is left out, the comparison is made if it is cheap.
        samples: found.limit.is_none().then_some(found.windows),
        seqlen: found.seqlen,
        ..Eval::default()
    };
    for gate in gates {
        match *gate {
            Gate::MaxKl(limit) => eval.max_kl = Some(limit),
            Gate::MaxPerplexityRatio(limit) => eval.max_ppl_ratio = Some(limit),
            Gate::MinTop1(limit) => eval.min_top1 = Some(limit),
        }
    }
    let anything = eval.dataset.is_some() || eval.samples.is_some() || eval.seqlen.is_some() || !gates.is_empty();
    anything.then_some(eval)
}
