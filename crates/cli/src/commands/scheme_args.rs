//! Flags that the verbs with named schemes share.

use clap::{Args, ValueEnum};
use lite_job::{CalibSettings, EvalSettings, JobError, Recipe};
use lite_pack::{KvCacheScheme, PRESETS, near_presets, preset};
use lite_quant::{LinearScheme, ScaleDtype};

use crate::args::{CalibArgs, CheckArgs, Dtype, Format, ResourceArgs};

/// Floating-point operations that the forward check may take where it was not asked for: some minutes of two cores.
pub(crate) const CHECK_LIMIT: f64 = 1e13;

#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct OutputArgs {
    /// Type of plain tensors, and of scales where the layout leaves it open
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub(crate) dtype: Dtype,

    /// Other settings for linears whose name matches, such as 'mlp.down_proj:scheme=W8A16' or 'down_proj:bits=8';
    /// repeatable, later ones win
    #[arg(long = "override", value_name = "REGEX:KEY=VALUE,…")]
    pub(crate) overrides: Vec<String>,

    /// Leave linears whose name matches this regex as they are; repeatable
    #[arg(long, value_name = "REGEX")]
    pub(crate) ignore: Vec<String>,

    /// Layout of the packed weights: `compressed-tensors`, `lmdeploy-w8a8`, `fp8`, `modelopt`, `awq` or `gptq`
    /// [default: what the target or scheme asks for]
    #[arg(long, value_name = "NAME")]
    pub(crate) layout: Option<String>,

    /// Engine that must load the result: `vllm`, `turbomind`, `lmdeploy-pytorch` or `transformers`
    #[arg(long, value_name = "ENGINE")]
    pub(crate) target: Option<String>,

    /// Tensor-parallel degree that the target will use
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) tp: usize,

    /// Show what the run would do and cost, and run nothing
    #[arg(long)]
    pub(crate) plan: bool,

    /// Print the recipe that equals these flags, for `lite run`, and run nothing
    #[arg(long, conflicts_with = "plan")]
    pub(crate) print_recipe: bool,

    #[command(flatten)]
    pub(crate) report: super::report_args::ReportArgs,
}

impl OutputArgs {
    /// Puts these flags into `recipe`.
    ///
    /// # Errors
    /// Names that are not known, overrides that cannot be read.
    pub(crate) fn apply(&self, recipe: Recipe) -> Result<Recipe, JobError> {
        if self.tp == 0 {
            return Err(JobError::Usage(
                "--tp 0: give the number of GPUs a model is split over, at least 1".to_owned(),
            ));
        }
        Ok(Recipe {
            overrides: self
                .overrides
                .iter()
                .map(|text| super::quantize::read_override(text))
                .collect::<Result<_, _>>()?,
            ignore: self.ignore.clone(),
            dtype: super::quantize::dtype(self.dtype),
            layout: self.layout.clone(),
            target: super::quantize::target(self.target.as_deref())?,
            tensor_parallel: self.tp,
            ..recipe
        })
    }

    /// Runs `recipe`, or shows its plan.
    pub(crate) fn run(&self, recipe: &Recipe, format: Format) -> anyhow::Result<()> {
        if self.print_recipe {
            return super::run::print_recipe(recipe);
        }
        if self.plan {
            super::plan::show(recipe, format)
        } else {
            super::quantize::execute(recipe, &self.report, format)
        }
    }
}

/// Puts the flags about files and resources into `recipe`.
pub(crate) fn resources(args: &ResourceArgs, recipe: Recipe) -> Recipe {
    Recipe {
        arch: super::arch::named(),
        revision: args.revision.clone(),
        download_dir: args.download_dir.clone(),
        device: args.device,
        max_shard_bytes: args.max_shard_size,
        max_memory: args.max_memory,
        resume: super::resume::settings(args),
        ..recipe
    }
}

/// The scheme of this name.
///
/// # Errors
/// [`JobError::Usage`] with the names near it.
pub(crate) fn scheme(flag: &str, name: &str) -> Result<LinearScheme, JobError> {
    // The type of scales is the layout's business.
    preset(name, ScaleDtype::F32).ok_or_else(|| {
        let near = near_presets(name);
        let listed = if near.is_empty() { PRESETS.join(", ") } else { near.join(", ") };
        let which = match near.len() {
            0 => "known are",
            1 => "near it is",
            _ => "near it are",
        };
        let name = lite_model::printable(name);
        JobError::Usage(format!("{flag} `{name}` is the name of no scheme; {which} {listed}"))
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvCache {
    /// fp8, one scale for the keys of a layer and one for its values
    Fp8,
    /// fp8, one scale per head
    Fp8Head,
}

impl From<KvCache> for KvCacheScheme {
    fn from(cache: KvCache) -> Self {
        match cache {
            KvCache::Fp8 => Self::Fp8Tensor,
            KvCache::Fp8Head => Self::Fp8Head,
        }
    }
}

impl CalibArgs {
    /// The settings that equal the flags.
    pub(crate) fn settings(&self) -> CalibSettings {
        CalibSettings {
            dataset: self.calib_dataset.clone(),
            samples: self.samples(),
            seqlen: self.calib_seqlen,
            seed: self.seed(),
            if_needed: false,
        }
    }
}

impl CheckArgs {
    /// The settings that equal the flags.
    pub(crate) fn settings(&self) -> EvalSettings {
        EvalSettings {
            dataset: self.eval_dataset.clone(),
            windows: self.eval_samples.unwrap_or(16),
            seqlen: self.eval_seqlen,
            limit: None,
        }
    }
}
