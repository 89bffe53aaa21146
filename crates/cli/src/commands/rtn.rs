//! `lite rtn`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use lite_job::{CalibSettings, EvalSettings, JobError, Method, Recipe, Solver};

use super::scheme_args::{CHECK_LIMIT, KvCache, OutputArgs, resources, scheme};
use crate::args::{CalibArgs, CheckArgs, Format, ResourceArgs};

#[derive(Debug, Args)]
pub(crate) struct RtnArgs {
    /// A model folder (config.json and safetensors), or a hub id such as `Qwen/Qwen3-8B`
    pub(crate) model: String,

    /// Where the quantized checkpoint appears
    #[arg(long, default_value = "./work_dir", value_name = "DIR")]
    pub(crate) work_dir: PathBuf,

    /// Replace a checkpoint that is already in the work directory
    #[arg(long)]
    pub(crate) overwrite: bool,

    /// Scheme by llm-compressor's name: W4A16, W8A16, W8A8, FP8_DYNAMIC, FP8_BLOCK, FP8, NVFP4, NVFP4A16, MXFP4, MXFP8, …
    #[arg(long, value_name = "NAME")]
    pub(crate) scheme: String,

    /// How the range of each scale is chosen
    #[arg(long, value_enum, default_value_t = RtnRange::Minmax)]
    pub(crate) range: RtnRange,

    /// Calibrate scales of an fp8 key/value cache too
    #[arg(long, value_enum, value_name = "TYPE")]
    pub(crate) kv_cache: Option<KvCache>,

    #[command(flatten)]
    pub(crate) output: OutputArgs,

    #[command(flatten)]
    pub(crate) experts: super::experts::ExpertArgs,

    #[command(flatten)]
    pub(crate) calib: CalibArgs,

    #[command(flatten)]
    pub(crate) check: CheckArgs,

    #[command(flatten)]
    pub(crate) resources: ResourceArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RtnRange {
    /// The smallest and largest weight, as llm-compressor has it
    Minmax,
    /// Shrink the range to what gives the least squared error of the weights
    Mse,
    /// The same as `mse`
    Search,
}

/// Quantizes, and prints the result on standard output.
pub(crate) fn run(args: &RtnArgs, format: Format) -> anyhow::Result<()> {
    args.output.run(&recipe(args)?, format)
}

fn recipe(args: &RtnArgs) -> Result<Recipe, JobError> {
    let recipe = Recipe {
        work_dir: args.work_dir.clone(),
        overwrite: args.overwrite,
        method: Method::Plain,
        solver: Solver::NEAREST,
        experts: args.experts.settings(),
        scheme: Some(scheme("--scheme", &args.scheme)?),
        kv_cache: args.kv_cache.map(Into::into),
        range: match args.range {
            RtnRange::Minmax => lite_quant::Range::MinMax,
            RtnRange::Mse | RtnRange::Search => lite_quant::Range::Search,
        },
        calib: CalibSettings { if_needed: true, ..args.calib.settings() },
        eval: check(&args.check),
        batch_size: args.calib.batch_size,
        ..Recipe::new(args.model.clone())
    };
    args.output.apply(resources(&args.resources, recipe))
}

/// The forward check of a verb that is otherwise as fast as the disk: only where it is cheap, unless asked for.
pub(crate) fn check(args: &CheckArgs) -> EvalSettings {
    EvalSettings { limit: args.eval_samples.is_none().then_some(CHECK_LIMIT), ..args.settings() }
}
