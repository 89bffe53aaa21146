//! `lite auto_awq`.

use std::io::Write;

use lite_job::{
    CalibSettings, DeviceChoice, DtypeChoice, EvalSettings, JobError, Method, Recipe,
};
use lite_pack::targets::Target;

use crate::args::{Device, Dtype, Format, QuantizeArgs, Range};
use crate::output;
use crate::progress::Progress;

/// Quantizes, and prints the result on standard output.
pub(crate) fn run(args: &QuantizeArgs, format: Format) -> anyhow::Result<()> {
    let recipe = recipe(args)?;
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
pub(crate) fn recipe(args: &QuantizeArgs) -> Result<Recipe, JobError> {
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
        method: Method::Awq { search_scale: !weights.no_search_scale },
        bits: weights.w_bits,
        group_size: weights.w_group_size,
        symmetric: weights.w_sym,
        range: match weights.range {
            Range::Search => lite_quant::Range::Search,
            Range::Minmax => lite_quant::Range::MinMax,
        },
        dtype: match weights.dtype {
            Dtype::Auto => DtypeChoice::Auto,
            Dtype::Float16 => DtypeChoice::Float16,
            Dtype::Bfloat16 => DtypeChoice::Bfloat16,
        },
        layout: weights.layout.clone(),
        target,
        tensor_parallel: weights.tp,
        calib: CalibSettings {
            dataset: args.calib.calib_dataset.clone(),
            samples: args.calib.calib_samples,
            seqlen: args.calib.calib_seqlen,
            seed: args.calib.seed,
        },
        eval: EvalSettings {
            dataset: args.check.eval_dataset.clone(),
            windows: args.check.eval_samples,
            seqlen: args.check.eval_seqlen,
        },
        batch_size: args.calib.batch_size,
        device: match args.resources.device {
            Device::Auto => DeviceChoice::Auto,
            Device::Cpu => DeviceChoice::Cpu,
            Device::Cuda => DeviceChoice::Cuda,
        },
        max_shard_bytes: args.resources.max_shard_size,
        max_memory: args.resources.max_memory,
    })
}
