//! `lite auto_awq` and `lite auto_gptq`.

use std::io::Write;

use lite_job::{
    DtypeChoice, Finished, JobError, Method, Override, Recipe, Rounding, RunReport, Solver, StatsSource, TextCache,
};
use lite_pack::targets::Target;

use super::report_args::ReportArgs;
use crate::args::{Dtype, Effort, Format, MethodName, QuantizeArgs, Range, RoundingName, SolverArgs};
use crate::log::RunLog;
use crate::output;
use crate::progress::Progress;

/// Quantizes, and prints the result on standard output.
pub(crate) fn run(method: MethodName, args: &QuantizeArgs, format: Format) -> anyhow::Result<()> {
    let recipe = recipe(method, args)?;
    if args.print_recipe { super::run::print_recipe(&recipe) } else { execute(&recipe, &args.report, format) }
}

/// Runs a recipe, and prints the result on standard output.
pub(crate) fn execute(recipe: &Recipe, report: &ReportArgs, format: Format) -> anyhow::Result<()> {
    perform(recipe, report, &TextCache::default(), format).map(drop)
}

/// The same as one of several jobs that share `texts`; returns what was done.
pub(crate) fn perform(
    recipe: &Recipe,
    report: &ReportArgs,
    texts: &TextCache,
    format: Format,
) -> anyhow::Result<RunReport> {
    let cancel = super::cancel_flag()?;
    super::calibrate::awaited(recipe, format)?;
    let progress = Progress::new(format);
    let log = RunLog::new(&progress);
    let documents = |finished: &Finished<'_>| report.documents(recipe, finished, &log, &cancel);
    crate::allocator::keep_within_budget(recipe.max_memory.is_some());
    let report =
        lite_job::run_sharing(recipe, &log, &documents, &cancel, texts).inspect_err(|error| log.failed(error))?;
    drop(progress);
    let mut stdout = std::io::stdout().lock();
    match format {
        Format::Json => {}
        Format::Quiet => writeln!(stdout, "{}", report.output.display())?,
        Format::Auto | Format::Human => output::report(&mut stdout, &report)?,
    }
    Ok(report)
}

/// The recipe that equals the flags.
pub(crate) fn recipe(method: MethodName, args: &QuantizeArgs) -> Result<Recipe, JobError> {
    let weights = &args.weights;
    let target = target(weights.target.as_deref())?;
    if weights.tp == 0 {
        return Err(JobError::Usage("--tp 0: give the number of GPUs a model is split over, at least 1".to_owned()));
    }
    Ok(Recipe {
        model: args.model.clone(),
        arch: super::arch::named(),
        revision: args.resources.revision.clone(),
        download_dir: args.resources.download_dir.clone(),
        work_dir: args.work_dir.clone(),
        overwrite: args.overwrite,
        method: match method {
            MethodName::Awq => Method::Awq { search_scale: !weights.no_search_scale },
            MethodName::Gptq => Method::Plain,
        },
        solver: solver(method, &args.solver, args.calib.samples() == 0),
        experts: args.solver.experts.settings(),
        overrides: weights.overrides.iter().map(|text| read_override(text)).collect::<Result<_, _>>()?,
        ignore: weights.ignore.clone(),
        scheme: None,
        power_of_two_scales: false,
        kv_cache: weights.kv_cache.map(Into::into),
        bits: weights.w_bits,
        group_size: weights.w_group_size,
        symmetric: match method {
            MethodName::Awq => weights.w_sym,
            MethodName::Gptq => !weights.w_asym,
        },
        range: match weights.range {
            Range::Search => lite_quant::Range::Search,
            Range::Minmax => lite_quant::Range::MinMax,
        },
        dtype: dtype(weights.dtype),
        layout: match (&weights.layout, target, method) {
            (None, None, MethodName::Gptq) => Some("gptq".to_owned()),
            (layout, _, _) => layout.clone(),
        },
        target,
        tensor_parallel: weights.tp,
        calib: args.calib.settings(),
        stats: stats(args)?,
        eval: args.check.settings(),
        batch_size: args.calib.batch_size,
        device: args.resources.device,
        max_shard_bytes: args.resources.max_shard_size,
        max_memory: args.resources.max_memory,
        resume: super::resume::settings(&args.resources),
    })
}

/// `--dtype`.
pub(crate) fn dtype(dtype: Dtype) -> DtypeChoice {
    match dtype {
        Dtype::Auto => DtypeChoice::Auto,
        Dtype::Float16 => DtypeChoice::Float16,
        Dtype::Bfloat16 => DtypeChoice::Bfloat16,
    }
}

/// `--target`.
pub(crate) fn target(name: Option<&str>) -> Result<Option<Target>, JobError> {
    let Some(name) = name else { return Ok(None) };
    Ok(Some(Target::from_name(name).ok_or_else(|| {
        let known: Vec<&str> = Target::ALL.iter().map(|t| t.name()).collect();
        JobError::Usage(format!("--target {name}: give one of {}", known.join(", ")))
    })?))
}

/// `--stats`, with the calibration flags that were typed beside it.
fn stats(args: &QuantizeArgs) -> Result<Option<StatsSource>, JobError> {
    let Some(folder) = &args.stats.stats else { return Ok(None) };
    if args.calib.samples() == 0 {
        return Err(JobError::Usage(
            "--calib-samples 0 quantizes without data, --stats with the data of an earlier run; give one of them"
                .to_owned(),
        ));
    }
    Ok(Some(StatsSource {
        folder: folder.clone(),
        gather: args.stats.gather,
        dataset: args.calib.calib_dataset.clone(),
        samples: args.calib.calib_samples,
        seqlen: args.calib.calib_seqlen,
        seed: args.calib.seed,
    }))
}

/// What the effort says, with what the other flags say.
fn solver(method: MethodName, args: &SolverArgs, data_free: bool) -> Solver {
    let usual = match method {
        MethodName::Awq => Effort::Fast,
        MethodName::Gptq => Effort::Default,
    };
    let (rounding, error_aware) = match args.effort.unwrap_or(usual) {
        // Without data there is nothing to solve with; asking for it by name is an error later.
        _ if data_free && args.effort.is_none() => (Rounding::Nearest, false),
        Effort::Fast => (Rounding::Nearest, false),
        Effort::Default | Effort::Best => (Rounding::Refine, true),
    };
    let rounding = match args.rounding {
        None => rounding,
        Some(RoundingName::Nearest) => Rounding::Nearest,
        Some(RoundingName::Gptq) => Rounding::Gptq,
        Some(RoundingName::Refine) => Rounding::Refine,
    };
    Solver {
        rounding,
        error_aware: error_aware && rounding != Rounding::Nearest,
        tune: args.effort == Some(Effort::Best) && rounding != Rounding::Nearest,
        act_order: !args.no_act_order,
        damp: args.damp_percent,
        fallback: !args.no_fallback,
    }
}

/// Reads `REGEX:bits=8,group_size=64,symmetric=true`.
pub(crate) fn read_override(text: &str) -> Result<Override, JobError> {
    let bad = |why: &str| {
        JobError::Usage(format!("--override `{text}`: {why}; write it like 'mlp.down_proj:bits=8,group_size=64'"))
    };
    let (pattern, changes) = text.rsplit_once(':').ok_or_else(|| bad("no `:` between the regex and the settings"))?;
    let mut rule =
        Override { pattern: pattern.to_owned(), bits: None, group_size: None, symmetric: None, scheme: None };
    for change in changes.split(',') {
        let (key, value) = change.split_once('=').ok_or_else(|| bad("a setting has no `=`"))?;
        let number = || value.trim().parse::<i64>().map_err(|_| bad(&format!("`{value}` is no whole number")));
        match key.trim() {
            "bits" => rule.bits = Some(number()?),
            "group_size" => rule.group_size = Some(number()?),
            "symmetric" => {
                rule.symmetric = Some(value.trim().parse().map_err(|_| bad("`symmetric` is true or false"))?);
            }
            "scheme" => rule.scheme = Some(super::scheme_args::scheme("--override", value.trim())?),
            other => return Err(bad(&format!("`{other}` is none of bits, group_size, symmetric, scheme"))),
        }
    }
    Ok(rule)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overrides_are_read_and_refused() {
        let rule = read_override(r"layers\.(0|5)\.:bits=8,group_size=-1,symmetric=true").unwrap();
        let wanted = Override {
            pattern: r"layers\.(0|5)\.".to_owned(),
            bits: Some(8),
            group_size: Some(-1),
            symmetric: Some(true),
            scheme: None,
        };
        assert_eq!(rule, wanted);
        for bad in ["down_proj", "a:bits", "a:bits=x", "a:colour=3", "a:symmetric=1"] {
            assert!(matches!(read_override(bad), Err(JobError::Usage(_))), "{bad}");
        }
    }
}
