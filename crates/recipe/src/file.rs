//! The keys of a recipe file. These types are the parser, the printer and the JSON schema at once.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::scheme::SchemeChoice;
use crate::words::{DeviceName, EngineName, LayoutName, Size};

/// Several jobs in one file.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Batch", rename = "Batch")]
pub(crate) struct Batch {
    /// Environment variables that texts may use as `${NAME}`, with the value where one is not set; a variable with
    /// nothing after it must be set
    #[serde(default)]
    #[allow(dead_code, reason = "read from the tree before this type is")]
    pub(crate) env: BTreeMap<String, Option<String>>,
    /// What every job has unless it says otherwise: maps are merged key by key, all else is replaced
    #[allow(dead_code, reason = "checked here, merged as a tree")]
    pub(crate) defaults: Option<Job>,
    /// The jobs, in order
    #[serde(default)]
    #[allow(dead_code, reason = "checked here, merged as trees")]
    pub(crate) jobs: Vec<Job>,
    /// Jobs for every combination, after those of `jobs`
    #[allow(dead_code, reason = "checked here, expanded as a tree")]
    pub(crate) matrix: Option<Matrix>,
}

/// One job for every combination of what is given here; models vary slowest, variants fastest.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "checked here, expanded as a tree")]
pub(crate) struct Matrix {
    /// Values of `model`
    #[serde(default)]
    pub(crate) models: Vec<String>,
    /// Values of `scheme`
    #[serde(default)]
    pub(crate) schemes: Vec<SchemeChoice>,
    /// Jobs in part, merged over the defaults; each needs a `name`
    #[serde(default)]
    pub(crate) variants: Vec<Job>,
}

/// One job: from one model to one quantized checkpoint.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Job {
    /// Name in messages, in the summary, and for `{name}` in paths
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    /// A folder (config.json and safetensors), or a hub id such as `Qwen/Qwen3-8B`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) model: Option<String>,
    /// A file that describes the model's architecture, where that is not known by itself
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) arch: Option<String>,
    /// Branch, tag or commit of a hub model
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) revision: Option<String>,
    /// Where hub files are kept [default: the Hugging Face cache]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) download_dir: Option<String>,
    /// What is done, in order: at most one of `smoothquant` and `awq`, then at most one of `gptq` and `rtn`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stages: Option<Vec<Stage>>,
    /// How linears are quantized: a name such as W4A16, or numbers [default: W8A8 for smoothquant, 4 bits in groups of
    /// 128 for awq (asymmetric) and gptq (symmetric)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) scheme: Option<SchemeChoice>,
    /// Powers of two as the scales of small floats, in whatever type they are stored [default: false]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) power_of_two_scales: Option<bool>,
    /// How the range of each scale is chosen [default: minmax for rtn and for smoothquant without gptq, else search]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) range: Option<RangeName>,
    /// Other settings for some linears; later ones win
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) overrides: Option<Vec<OverrideRule>>,
    /// Regular expressions; linears whose name matches one stay as they are
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ignore: Option<Vec<String>>,
    /// Layout of the packed weights [default: what the target or the scheme asks for]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) layout: Option<LayoutName>,
    /// Engine that must load the result
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) target: Option<EngineName>,
    /// GPUs that the target will split the model over [default: 1]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tensor_parallel: Option<usize>,
    /// Type of scales and plain tensors in the output [default: auto]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) dtype: Option<DtypeName>,
    /// Calibrate scales of the key/value cache too
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kv_cache: Option<KvCacheName>,
    /// What happens to experts of a mixture that few calibration tokens reach
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) experts: Option<Experts>,
    /// Calibration text
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) calibration: Option<Calibration>,
    /// The final comparison with the original, and what it must show
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) eval: Option<Eval>,
    /// Where the result goes
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) save: Option<Save>,
    /// Machine
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) resources: Option<Resources>,
}

/// Experts of a mixture.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Experts {
    /// Calibration tokens that are enough for an expert's own statistics [default: 128]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) min_tokens: Option<u64>,
    /// What stands for experts that fewer tokens reach [default: weighted]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) policy: Option<ExpertPolicyName>,
}

/// What stands for experts that few tokens reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ExpertPolicyName {
    /// All tokens, each weighted by the router's score for that expert
    Weighted,
    /// Nearest rounding, with ranges searched on the weights
    Nearest,
    /// The run fails
    Fail,
}

/// One step, as a map of one key.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Stage {
    /// Move outliers from activations to weights
    #[serde(rename = "smoothquant", alias = "smooth_quant")]
    SmoothQuant(SmoothQuant),
    /// Activation-aware scales
    Awq(Awq),
    /// Second-order error feedback
    Gptq(Gptq),
    /// Round to nearest
    Rtn(Rtn),
}

/// `smoothquant`
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SmoothQuant {
    /// From 0 (even out the weights) to 1 (the activations), or `auto` [default: 0.5]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) alpha: Option<crate::words::Alpha>,
    /// The formula of the scales [default: smoothquant]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) algorithm: Option<SmoothAlgorithm>,
}

/// Formulas of `smoothquant`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SmoothAlgorithm {
    /// max|X|^α / max|W|^(1−α)
    Smoothquant,
    /// max|X| / log2(2 + max|X|)
    LogEqualization,
    /// AWQ's mean|X|^r, r by the least error
    Awq,
}

/// `awq`
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Awq {
    /// Search the scales by output error; otherwise LMDeploy's fixed ratio 0.5 on max|x| [default: true]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) search_scale: Option<bool>,
}

/// `gptq`
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Gptq {
    /// Who chooses the codes [default: refine]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rounding: Option<RoundingName>,
    /// Solve for the float model's outputs on what the quantized model sees [default: true; false after smoothquant and
    /// with `rounding: nearest`]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error_aware: Option<bool>,
    /// Tune scales and rounding of each block against the float block [default: false]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tune: Option<bool>,
    /// Visit columns by falling activation energy; costs engines nothing [default: true]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) act_order: Option<bool>,
    /// Damping, a fraction of the mean diagonal of the Gram matrix [default: 0.01]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) damp_percent: Option<f64>,
    /// Round a linear that cannot be solved to nearest and say so, instead of failing [default: true]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) fallback: Option<bool>,
}

/// Who chooses the codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RoundingName {
    /// The nearest code, with ranges by output error
    Nearest,
    /// GPTQ's error feedback
    Gptq,
    /// GPTQ, then coordinate descent over codes and scales
    Refine,
}

/// `rtn`
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rtn {}

/// Settings for linears whose name matches.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct OverrideRule {
    /// A regular expression, anywhere in the module's name
    #[serde(rename = "match")]
    pub(crate) pattern: String,
    /// Bits per weight
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bits: Option<i64>,
    /// Input channels that share a scale; -1 for a whole row
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) group_size: Option<i64>,
    /// No zero points
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) symmetric: Option<bool>,
    /// Another scheme altogether; the other keys then change that
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) scheme: Option<SchemeChoice>,
}

/// Calibration text.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Calibration {
    /// wikitext2, ptb, c4, pileval, gsm8k, neuralmagic_calibration, open-platypus, openwebtext, ultrachat, random,
    /// builtin, or a path (.txt, .jsonl, .json, .parquet, or a folder of them) [default: wikitext2; the built-in corpus
    /// when offline]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) dataset: Option<String>,
    /// Number of windows; 0 quantizes without data [default: 128]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) samples: Option<i64>,
    /// Tokens per window [default: 2048, or the model's maximum]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) seqlen: Option<i64>,
    /// Seed of all random draws [default: 0]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) seed: Option<u64>,
    /// Windows per forward pass [default: about 1536 tokens]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) batch_size: Option<usize>,
    /// Use the statistics in this folder (made by `lite calibrate`) and run no windows; other keys given as well must be
    /// those the statistics were made with
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) statistics: Option<String>,
    /// Gather the statistics first where that folder does not have them, so that jobs of one model share them
    /// [default: false]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gather: Option<bool>,
}

/// The final comparison with the original.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Eval {
    /// A dataset name or a path [default: built-in held-out text]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) dataset: Option<String>,
    /// Windows; 0 compares the files only [default: 16]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) samples: Option<usize>,
    /// Tokens per window [default: as calibration.seqlen, at most 512]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) seqlen: Option<usize>,
    /// The job fails (exit code 6) if the mean KL divergence from the original is larger, in nats
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_kl: Option<f64>,
    /// The job fails if the perplexity is more than this times the original's
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_ppl_ratio: Option<f64>,
    /// The job fails if both models rank the same token first on fewer of the tokens, in percent
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) min_top1: Option<f64>,
}

/// Where the result goes.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Save {
    /// Folder of the checkpoint; `{name}`, `{model}`, `{scheme}` and `{variant}` stand for those of the job [default:
    /// ./work_dir, with several jobs ./work_dir/{name}]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) path: Option<String>,
    /// Another folder, for the same weights as plain floats: what every engine computes with, without its kernels
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) plain: Option<String>,
    /// Replace a checkpoint that is already there [default: false]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) overwrite: Option<bool>,
    /// Largest weight file, such as 5GB or 500MB [default: 5GB]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_shard_size: Option<Size>,
}

/// The machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Resources {
    /// Where the model runs: `cpu`, `cuda`, `cuda:N`, or `auto`, a GPU if there is one [default: auto]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) device: Option<DeviceName>,
    /// Memory budget, such as 16GB; hidden states go to a file when they would not fit
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_memory: Option<Size>,
    /// Least seconds between two copies of the hidden states on disk, from which an interrupted run goes on [default: 300]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) checkpoint_seconds: Option<u64>,
}

/// How ranges are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RangeName {
    /// What gives the least error
    #[serde(alias = "mse")]
    Search,
    /// The smallest and largest weight
    Minmax,
}

/// Types of plain tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DtypeName {
    /// What the checkpoint has; float16 for a float32 checkpoint
    Auto,
    /// IEEE half
    #[serde(alias = "fp16", alias = "half")]
    Float16,
    /// bfloat16
    #[serde(alias = "bf16")]
    Bfloat16,
}

/// Types of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum KvCacheName {
    /// fp8, one scale for the keys of a layer and one for its values
    Fp8,
    /// fp8, one scale per head
    Fp8Head,
}
