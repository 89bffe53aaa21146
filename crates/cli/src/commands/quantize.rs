//! `lite auto_awq` and `lite auto_gptq`.

use std::io::Write;

use lite_job::{
    CalibSettings, DeviceChoice, DtypeChoice, EvalSettings, JobError, Method, Override, Recipe, Rounding, Solver,
    StatsSource,
};
use lite_pack::targets::Target;

use crate::args::{Device, Dtype, Effort, Format, MethodName, QuantizeArgs, Range, RoundingName, SolverArgs};
use crate::output;
use crate::progress::Progress;

/// Quantizes, and prints the result on standard output.
pub(crate) fn run(method: MethodName, args: &QuantizeArgs, format: Format) -> anyhow::Result<()> {
    let recipe = recipe(method, args)?;
    let cancel = super::cancel_flag()?;
    let progress = Progress::new(format);
    let report = lite_job::run(&recipe, &progress, &cancel)?;
    drop(progress);
    let mut stdout = std::io::stdout().lock();
    match format {
        Format::Json => {}
        Format::Quiet => writeln!(stdout, "{}", report.output.display())?,
        Format::Auto | Format::Human => output::report(&mut stdout, &report)?,
    }
    Ok(())
}

/// The recipe that equals the flags.
pub(crate) fn recipe(method: MethodName, args: &QuantizeArgs) -> Result<Recipe, JobError> {
    let weights = &args.weights;
    let target = match weights.target.as_deref() {
        None => None,
        Some(name) => Some(Target::from_name(name).ok_or_else(|| {
            let known: Vec<&str> = Target::ALL.iter().map(|t| t.name()).collect();
            JobError::Usage(format!("--target {name}: give one of {}", known.join(", ")))
        })?),
    };
    if weights.tp == 0 {
        return Err(JobError::Usage("--tp 0: give the number of GPUs a model is split over, at least 1".to_owned()));
    }
    Ok(Recipe {
        model: args.model.clone(),
        revision: args.resources.revision.clone(),
        download_dir: args.resources.download_dir.clone(),
        work_dir: args.work_dir.clone(),
        overwrite: args.overwrite,
        method: match method {
            MethodName::Awq => Method::Awq { search_scale: !weights.no_search_scale },
            MethodName::Gptq => Method::Plain,
        },
        solver: solver(method, &args.solver, args.calib.samples() == 0),
        overrides: weights.overrides.iter().map(|text| read_override(text)).collect::<Result<_, _>>()?,
        ignore: weights.ignore.clone(),
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
        dtype: match weights.dtype {
            Dtype::Auto => DtypeChoice::Auto,
            Dtype::Float16 => DtypeChoice::Float16,
            Dtype::Bfloat16 => DtypeChoice::Bfloat16,
        },
        layout: match (&weights.layout, target, method) {
            (None, None, MethodName::Gptq) => Some("gptq".to_owned()),
            (layout, _, _) => layout.clone(),
        },
        target,
        tensor_parallel: weights.tp,
        calib: CalibSettings {
            dataset: args.calib.calib_dataset.clone(),
            samples: args.calib.samples(),
            seqlen: args.calib.calib_seqlen,
            seed: args.calib.seed(),
        },
        stats: stats(args)?,
        eval: EvalSettings {
            dataset: args.check.eval_dataset.clone(),
            windows: args.check.eval_samples,
            seqlen: args.check.eval_seqlen,
        },
        batch_size: args.calib.batch_size,
        device: device(args.resources.device),
        max_shard_bytes: args.resources.max_shard_size,
        max_memory: args.resources.max_memory,
    })
}

/// `--device`.
pub(crate) fn device(device: Device) -> DeviceChoice {
    match device {
        Device::Auto => DeviceChoice::Auto,
        Device::Cpu => DeviceChoice::Cpu,
        Device::Cuda => DeviceChoice::Cuda,
    }
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
fn read_override(text: &str) -> Result<Override, JobError> {
    let bad = |why: &str| {
        JobError::Usage(format!("--override `{text}`: {why}; write it like 'mlp.down_proj:bits=8,group_size=64'"))
    };
    let (pattern, changes) = text.rsplit_once(':').ok_or_else(|| bad("no `:` between the regex and the settings"))?;
    let mut rule = Override { pattern: pattern.to_owned(), bits: None, group_size: None, symmetric: None };
    for change in changes.split(',') {
        let (key, value) = change.split_once('=').ok_or_else(|| bad("a setting has no `=`"))?;
        let number = || value.trim().parse::<i64>().map_err(|_| bad(&format!("`{value}` is no whole number")));
        match key.trim() {
            "bits" => rule.bits = Some(number()?),
            "group_size" => rule.group_size = Some(number()?),
            "symmetric" => {
                rule.symmetric = Some(value.trim().parse().map_err(|_| bad("`symmetric` is true or false"))?);
            }
            other => return Err(bad(&format!("`{other}` is none of bits, group_size, symmetric"))),
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
        };
        assert_eq!(rule, wanted);
        for bad in ["down_proj", "a:bits", "a:bits=x", "a:colour=3", "a:symmetric=1"] {
            assert!(matches!(read_override(bad), Err(JobError::Usage(_))), "{bad}");
        }
    }
}
