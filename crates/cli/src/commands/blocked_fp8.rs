//! `lite blocked_fp8`, with LMDeploy's flags.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use lite_job::{CalibSettings, JobError, Method, Recipe, Solver};
use lite_quant::floats::{FloatFormat, FloatScheme, Grain, ScaleKind};
use lite_quant::{ActivationFormat, ActivationScale, ActivationScheme, LinearScheme, ScaleDtype};

use super::rtn::check;
use super::scheme_args::{OutputArgs, resources};
use crate::args::{CheckArgs, Format, ResourceArgs};

#[derive(Debug, Args)]
pub(crate) struct BlockedFp8Args {
    /// A model folder (config.json and safetensors), or a hub id such as `Qwen/Qwen3-8B`
    pub(crate) model: String,

    /// Where the quantized checkpoint appears
    #[arg(long, default_value = "./work_dir", value_name = "DIR")]
    pub(crate) work_dir: PathBuf,

    /// Replace a checkpoint that is already in the work directory
    #[arg(long)]
    pub(crate) overwrite: bool,

    /// Type of the weights' codes
    #[arg(long, value_enum, default_value_t = Fp8Dtype::Float8E4m3fn)]
    pub(crate) quant_dtype: Fp8Dtype,

    /// Rows and columns of a block; those at the edges may be cut
    #[arg(long, default_value_t = 128, value_name = "SIZE")]
    pub(crate) block_size: usize,

    /// Powers of two as scales
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub(crate) scale_fmt: Option<ScaleFmt>,

    #[command(flatten)]
    pub(crate) output: OutputArgs,

    #[command(flatten)]
    pub(crate) check: CheckArgs,

    #[command(flatten)]
    pub(crate) resources: ResourceArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Fp8Dtype {
    /// As `float8_e4m3fn`
    Fp8,
    #[value(name = "float8_e4m3fn")]
    Float8E4m3fn,
    #[value(name = "float8_e5m2")]
    Float8E5m2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ScaleFmt {
    /// Powers of two
    Ue8m0,
}

/// Quantizes, and prints the result on standard output.
pub(crate) fn run(args: &BlockedFp8Args, format: Format) -> anyhow::Result<()> {
    args.output.run(&recipe(args)?, format)
}

fn recipe(args: &BlockedFp8Args) -> Result<Recipe, JobError> {
    if args.block_size == 0 {
        return Err(JobError::Usage("--block-size 0: give the rows and columns of a block, such as 128".to_owned()));
    }
    let format = match args.quant_dtype {
        Fp8Dtype::Fp8 | Fp8Dtype::Float8E4m3fn => FloatFormat::E4M3,
        Fp8Dtype::Float8E5m2 => FloatFormat::E5M2,
    };
    let weights = FloatScheme {
        format,
        grain: Grain::Block { rows: args.block_size, columns: args.block_size },
        scale: ScaleKind::Float(ScaleDtype::F32),
    };
    let activations = ActivationScheme {
        format: ActivationFormat::Float(format),
        scale: ActivationScale::DynamicGroup(args.block_size),
    };
    let recipe = Recipe {
        work_dir: args.work_dir.clone(),
        overwrite: args.overwrite,
        method: Method::Plain,
        solver: Solver::NEAREST,
        scheme: Some(LinearScheme { weights: weights.into(), activations: Some(activations) }),
        power_of_two_scales: args.scale_fmt == Some(ScaleFmt::Ue8m0),
        range: lite_quant::Range::MinMax,
        calib: CalibSettings { dataset: None, samples: 0, seqlen: None, seed: 0, if_needed: true },
        eval: check(&args.check),
        ..Recipe::new(args.model.clone())
    };
    let mut recipe = args.output.apply(resources(&args.resources, recipe))?;
    if recipe.layout.is_none() && recipe.target.is_none() {
        recipe.layout = Some("fp8".to_owned());
    }
    Ok(recipe)
}
