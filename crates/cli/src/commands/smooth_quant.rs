//! `lite smooth_quant`, with LMDeploy's flags and more.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use lite_job::{JobError, Method, Recipe, Rounding, SmoothScales, Solver};
use lite_quant::floats::{FloatFormat, FloatScheme, Grain, ScaleKind};
use lite_quant::{
    ActivationFormat, ActivationScale, ActivationScheme, GroupSize, LinearScheme, ScaleDtype, Scheme, WeightScheme,
};

use super::scheme_args::{KvCache, OutputArgs, resources};
use crate::args::{CalibArgs, CheckArgs, Format, ResourceArgs, RoundingName};

#[derive(Debug, Args)]
pub(crate) struct SmoothQuantArgs {
    /// A model folder (config.json and safetensors), or a hub id such as `Qwen/Qwen3-8B`
    pub(crate) model: String,

    /// Where the quantized checkpoint appears
    #[arg(long, default_value = "./work_dir", value_name = "DIR")]
    pub(crate) work_dir: PathBuf,

    /// Replace a checkpoint that is already in the work directory
    #[arg(long)]
    pub(crate) overwrite: bool,

    /// Type of the codes of weights and activations
    #[arg(long, value_enum, default_value_t = QuantDtype::Int8)]
    pub(crate) quant_dtype: QuantDtype,

    /// What the scales that move outliers are made of
    #[arg(long, value_enum, default_value_t = SmoothMethod::Smooth)]
    pub(crate) method: SmoothMethod,

    /// The formula of the scales
    #[arg(long, value_enum, default_value_t = AlgorithmName::Smoothquant)]
    pub(crate) algorithm: AlgorithmName,

    /// How much of the outliers moves from activations (1) or to them (0), or `auto`: the least error of each input's
    /// linears on sampled tokens
    #[arg(long, default_value = "0.5", allow_negative_numbers = true, value_name = "ALPHA|auto")]
    pub(crate) alpha: String,

    /// Who finds the scales of activations
    #[arg(long, value_enum, default_value_t = ActivationsName::DynamicToken)]
    pub(crate) activations: ActivationsName,

    /// Activations with zero points
    #[arg(long)]
    pub(crate) act_asymmetric: bool,

    /// Who chooses the codes of the weights (int8)
    #[arg(long, value_enum, default_value_t = RoundingName::Nearest)]
    pub(crate) rounding: RoundingName,

    /// Calibrate scales of an fp8 key/value cache too
    #[arg(long, value_enum, value_name = "TYPE")]
    pub(crate) kv_cache: Option<KvCache>,

    /// Accepted for compatibility, as `--alpha auto`: LMDeploy's search
    #[arg(long)]
    pub(crate) search_scale: bool,

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
pub(crate) enum QuantDtype {
    Int8,
    /// As `float8_e4m3fn`
    Fp8,
    #[value(name = "float8_e4m3fn")]
    Float8E4m3fn,
    #[value(name = "float8_e5m2")]
    Float8E5m2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SmoothMethod {
    /// Largest magnitudes of activations and weights
    Smooth,
    /// AWQ's mean magnitudes of activations, the exponent by the least error on sampled tokens
    Awq,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum AlgorithmName {
    /// max|X|^α / max|W|^(1−α)
    Smoothquant,
    /// max|X| / log2(2 + max|X|)
    #[value(name = "log_equalization")]
    LogEqualization,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ActivationsName {
    /// The engine, for every token
    DynamicToken,
    /// Calibration, one for all tokens
    StaticTensor,
}

/// Quantizes, and prints the result on standard output.
pub(crate) fn run(args: &SmoothQuantArgs, format: Format) -> anyhow::Result<()> {
    args.output.run(&recipe(args)?, format)
}

fn recipe(args: &SmoothQuantArgs) -> Result<Recipe, JobError> {
    let float = match args.quant_dtype {
        QuantDtype::Int8 => None,
        QuantDtype::Fp8 | QuantDtype::Float8E4m3fn => Some(FloatFormat::E4M3),
        QuantDtype::Float8E5m2 => Some(FloatFormat::E5M2),
    };
    let rounding = match args.rounding {
        RoundingName::Nearest => Rounding::Nearest,
        RoundingName::Gptq => Rounding::Gptq,
        RoundingName::Refine => Rounding::Refine,
    };
    if float.is_some() && (rounding != Rounding::Nearest || args.act_asymmetric) {
        return Err(JobError::Usage(
            "fp8 takes neither --rounding gptq or refine, which choose integer codes, nor --act-asymmetric, for it has no zero points; leave them out, or use --quant-dtype int8"
                .to_owned(),
        ));
    }
    let weights: WeightScheme = match float {
        None => {
            Scheme { bits: 8, group_size: GroupSize::Channel, symmetric: true, scale_dtype: ScaleDtype::F32 }.into()
        }
        Some(format) => FloatScheme { format, grain: Grain::Channel, scale: ScaleKind::Float(ScaleDtype::F32) }.into(),
    };
    let activations = ActivationScheme {
        format: float
            .map_or(ActivationFormat::Int { bits: 8, symmetric: !args.act_asymmetric }, ActivationFormat::Float),
        scale: match args.activations {
            ActivationsName::DynamicToken => ActivationScale::DynamicToken,
            ActivationsName::StaticTensor => ActivationScale::StaticTensor,
        },
    };
    let recipe = Recipe {
        work_dir: args.work_dir.clone(),
        overwrite: args.overwrite,
        method: Method::SmoothQuant { scales: scales(args)? },
        solver: Solver { rounding, ..Solver::NEAREST },
        experts: args.experts.settings(),
        scheme: Some(LinearScheme { weights, activations: Some(activations) }),
        kv_cache: args.kv_cache.map(Into::into),
        range: if rounding == Rounding::Nearest { lite_quant::Range::MinMax } else { lite_quant::Range::Search },
        calib: args.calib.settings(),
        eval: args.check.settings(),
        batch_size: args.calib.batch_size,
        ..Recipe::new(args.model.clone())
    };
    let mut recipe = args.output.apply(resources(&args.resources, recipe))?;
    if recipe.layout.is_none() && recipe.target.is_none() {
        let native =
            args.activations == ActivationsName::DynamicToken && !args.act_asymmetric && args.kv_cache.is_none();
        recipe.layout = Some(if native { "lmdeploy-w8a8" } else { "compressed-tensors" }.to_owned());
    }
    Ok(recipe)
}

fn scales(args: &SmoothQuantArgs) -> Result<SmoothScales, JobError> {
    let auto = args.alpha == "auto" || args.search_scale;
    match (args.method, args.algorithm) {
        (SmoothMethod::Awq, _) => Ok(SmoothScales::Awq),
        (SmoothMethod::Smooth, AlgorithmName::LogEqualization) => Ok(SmoothScales::LogEqualization),
        (SmoothMethod::Smooth, AlgorithmName::Smoothquant) if auto => Ok(SmoothScales::SearchedAlpha),
        (SmoothMethod::Smooth, AlgorithmName::Smoothquant) => {
            let alpha = args.alpha.parse().map_err(|_| {
                JobError::Usage(format!(
                    "--alpha `{}`: give a number from 0 to 1, or `auto`",
                    lite_model::printable(&args.alpha)
                ))
            })?;
            Ok(SmoothScales::Alpha(alpha))
        }
    }
}
