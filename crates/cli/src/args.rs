//! The command line. Flags that LMDeploy has keep their names, defaults and meaning, so that users change one word.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use lite_job::DeviceChoice;

/// Quantize LLM checkpoints offline: one binary, no Python, no GPU needed.
#[derive(Debug, Parser)]
#[command(name = "lite", version, about, max_term_width = 110)]
pub(crate) struct Cli {
    /// How results and progress are printed; `json` gives one event per line and a summary
    #[arg(long, global = true, value_enum, default_value_t = Format::Auto)]
    pub(crate) format: Format,

    /// Threads to use; by default one per core
    #[arg(long, global = true, value_name = "N")]
    pub(crate) threads: Option<usize>,

    /// A file that describes the model's architecture, where that is not known by itself (configs/arch/README.md)
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) arch: Option<PathBuf>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Quantize weights with activation-aware scales (AWQ)
    #[command(name = "auto_awq", visible_alias = "auto-awq")]
    AutoAwq(Box<QuantizeArgs>),

    /// Choose codes by second-order error feedback (GPTQ), refined and aware of earlier errors
    #[command(name = "auto_gptq", visible_alias = "auto-gptq")]
    AutoGptq(Box<QuantizeArgs>),

    /// Run the model on calibration text and keep the statistics, for any number of runs with --stats
    Calibrate(Box<CalibrateArgs>),

    /// Show what a run here has to work with: processor, memory, disk, GPUs, hub
    Env(crate::commands::env::EnvArgs),

    /// Judge a checkpoint: perplexity, divergence from the original, multiple-choice tasks, limits to keep
    Eval(Box<crate::commands::eval::EvalArgs>),

    /// Continue a prompt with a checkpoint, quantized or not
    Generate(Box<crate::commands::generate::GenerateArgs>),

    /// Write a quantized checkpoint in another layout, without loss, or as plain floats
    Convert(Box<crate::commands::convert::ConvertArgs>),

    /// Show what a checkpoint holds, quantized or not, and what in it does not fit together
    Inspect(crate::commands::inspect::InspectArgs),

    /// Judge whether a checkpoint on disk is sound: tensors, values, config, engine rules, and against the original
    Verify(Box<crate::commands::verify::VerifyArgs>),

    /// Round weights to nearest by a scheme's name, without data wherever the scheme needs none; any architecture
    Rtn(Box<crate::commands::rtn::RtnArgs>),

    /// Quantize weights to fp8 with one scale per block, without data; any architecture
    #[command(name = "blocked_fp8", visible_alias = "blocked-fp8")]
    BlockedFp8(Box<crate::commands::blocked_fp8::BlockedFp8Args>),

    /// Quantize weights and activations to 8 bits, outliers moved from activations to weights (SmoothQuant)
    #[command(name = "smooth_quant", visible_alias = "smooth-quant")]
    SmoothQuant(Box<crate::commands::smooth_quant::SmoothQuantArgs>),

    /// Run the jobs of recipe files: lite's own, LLMC's, llm-compressor's
    Run(Box<crate::commands::run::RunArgs>),

    /// Go on with an interrupted run, by the command that began it
    Resume(crate::commands::resume::ResumeArgs),

    /// Remove what an interrupted run left in its work directory; a finished result is not touched
    Clean(crate::commands::resume::CleanArgs),

    /// Show what a run, or the jobs of a recipe file, would do and cost, and run nothing
    Plan(Box<crate::commands::plan::PlanArgs>),
}

/// The verbs that quantize with calibration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum MethodName {
    /// As `auto_awq`
    Awq,
    /// As `auto_gptq`
    Gptq,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Effort {
    /// Nearest rounding with range search
    Fast,
    /// GPTQ, refinement, error-aware targets
    Default,
    /// As `default`, then scales and rounding of each block are tuned against the float block
    Best,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RoundingName {
    /// The nearest code
    Nearest,
    /// GPTQ's error feedback
    Gptq,
    /// GPTQ, then coordinate descent over codes and scales
    Refine,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Human, with progress bars on a terminal
    Auto,
    /// Text
    Human,
    /// JSON lines on standard output
    Json,
    /// Only the path of the result
    Quiet,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Dtype {
    /// What the checkpoint has; float16 for a float32 checkpoint
    Auto,
    #[value(alias = "fp16", alias = "half")]
    Float16,
    #[value(alias = "bf16")]
    Bfloat16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Range {
    /// Shrink each group's range to what gives the least output error
    Search,
    /// The smallest and largest weight of each group
    Minmax,
}

#[derive(Debug, Args)]
pub(crate) struct QuantizeArgs {
    /// A model folder (config.json and safetensors), or a hub id such as `Qwen/Qwen3-8B`
    pub(crate) model: String,

    /// Where the quantized checkpoint appears
    #[arg(long, default_value = "./work_dir", value_name = "DIR")]
    pub(crate) work_dir: PathBuf,

    /// Replace a checkpoint that is already in the work directory
    #[arg(long)]
    pub(crate) overwrite: bool,

    /// Print the recipe that equals these flags, for `lite run`, and run nothing
    #[arg(long)]
    pub(crate) print_recipe: bool,

    #[command(flatten)]
    pub(crate) weights: WeightArgs,

    #[command(flatten)]
    pub(crate) solver: SolverArgs,

    #[command(flatten)]
    pub(crate) calib: CalibArgs,

    #[command(flatten)]
    pub(crate) stats: StatsArgs,

    #[command(flatten)]
    pub(crate) check: CheckArgs,

    #[command(flatten)]
    pub(crate) report: crate::commands::report_args::ReportArgs,

    #[command(flatten)]
    pub(crate) resources: ResourceArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CalibrateArgs {
    /// A model folder (config.json and safetensors), or a hub id such as `Qwen/Qwen3-8B`
    pub(crate) model: String,

    /// Where the statistics appear
    #[arg(long, default_value = "./work_dir", value_name = "DIR")]
    pub(crate) work_dir: PathBuf,

    /// Replace statistics, or a checkpoint, already in the work directory
    #[arg(long)]
    pub(crate) overwrite: bool,

    #[command(flatten)]
    pub(crate) calib: CalibArgs,

    #[command(flatten)]
    pub(crate) resources: ResourceArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Weights")]
pub(crate) struct WeightArgs {
    /// Bits per weight, 2 to 8
    #[arg(long, default_value_t = 4, allow_negative_numbers = true, value_name = "BITS")]
    pub(crate) w_bits: i64,

    /// Symmetric codes: no zero points (the default of auto_gptq)
    #[arg(long, overrides_with = "w_asym")]
    pub(crate) w_sym: bool,

    /// Asymmetric codes (the default of auto_awq)
    #[arg(long, overrides_with = "w_sym")]
    pub(crate) w_asym: bool,

    /// Input channels that share a scale: 16, 32, 64, 128, 256, or -1 for a whole row
    #[arg(long, default_value_t = 128, allow_negative_numbers = true, value_name = "SIZE")]
    pub(crate) w_group_size: i64,

    /// Search the AWQ scales by output error (this is the default)
    #[arg(long, overrides_with = "no_search_scale")]
    pub(crate) search_scale: bool,

    /// Use the fixed ratio 0.5 on max |x| instead, as LMDeploy does by default
    #[arg(long, overrides_with = "search_scale")]
    pub(crate) no_search_scale: bool,

    /// How the range of each group is chosen
    #[arg(long, value_enum, default_value_t = Range::Search)]
    pub(crate) range: Range,

    /// Type of scales and plain tensors in the output
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub(crate) dtype: Dtype,

    /// Other settings for linears whose name matches, such as 'mlp.down_proj:bits=8,group_size=64,symmetric=true';
    /// repeatable, later ones win
    #[arg(long = "override", value_name = "REGEX:KEY=VALUE,…")]
    pub(crate) overrides: Vec<String>,

    /// Leave linears whose name matches this regex as they are; repeatable
    #[arg(long, value_name = "REGEX")]
    pub(crate) ignore: Vec<String>,

    /// Layout of the packed weights: `awq`, `gptq` or `compressed-tensors` [default: what the target or scheme asks for]
    #[arg(long, value_name = "NAME")]
    pub(crate) layout: Option<String>,

    /// Engine that must load the result: `vllm`, `turbomind`, `lmdeploy-pytorch` or `transformers`
    #[arg(long, value_name = "ENGINE")]
    pub(crate) target: Option<String>,

    /// Tensor-parallel degree that the target will use
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) tp: usize,

    /// Calibrate scales of an fp8 key/value cache too
    #[arg(long, value_enum, value_name = "TYPE")]
    pub(crate) kv_cache: Option<crate::commands::scheme_args::KvCache>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Solver")]
pub(crate) struct SolverArgs {
    /// How hard to try [default: fast for auto_awq, default for auto_gptq]
    #[arg(long, value_enum)]
    pub(crate) effort: Option<Effort>,

    /// Who chooses the codes [default: what the effort says]
    #[arg(long, value_enum)]
    pub(crate) rounding: Option<RoundingName>,

    /// Visit columns by falling activation energy (this is the default); costs engines nothing
    #[arg(long, overrides_with = "no_act_order")]
    pub(crate) act_order: bool,

    /// Visit columns as they are stored
    #[arg(long, overrides_with = "act_order")]
    pub(crate) no_act_order: bool,

    /// Damping, a fraction of the mean diagonal of the Gram matrix
    #[arg(long, default_value_t = 0.01, allow_negative_numbers = true, value_name = "FRACTION")]
    pub(crate) damp_percent: f32,

    /// Fail where a linear cannot be solved, instead of rounding it to nearest and saying so
    #[arg(long)]
    pub(crate) no_fallback: bool,

    #[command(flatten)]
    pub(crate) experts: crate::commands::experts::ExpertArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Calibration")]
pub(crate) struct CalibArgs {
    /// wikitext2, ptb, c4, pileval, gsm8k, neuralmagic_calibration, open-platypus, openwebtext, ultrachat,
    /// random, builtin, or a path (.txt, .jsonl, .json, .parquet, or a folder of them)
    /// [default: wikitext2; the built-in corpus when offline]
    #[arg(long, value_name = "NAME|PATH")]
    pub(crate) calib_dataset: Option<String>,

    /// Number of windows; 0 quantizes without data [default: 128]
    #[arg(long, allow_negative_numbers = true, value_name = "N")]
    pub(crate) calib_samples: Option<i64>,

    /// Tokens per window [default: 2048, or the model's maximum]
    #[arg(long, allow_negative_numbers = true, value_name = "TOKENS")]
    pub(crate) calib_seqlen: Option<i64>,

    /// Seed of all random draws [default: 0]
    #[arg(long)]
    pub(crate) seed: Option<u64>,

    /// Windows per forward pass [default: about 1536 tokens]
    #[arg(long, value_name = "N")]
    pub(crate) batch_size: Option<usize>,
}

impl CalibArgs {
    /// Number of windows.
    pub(crate) fn samples(&self) -> i64 {
        self.calib_samples.unwrap_or(128)
    }

    /// Seed of all random draws.
    pub(crate) fn seed(&self) -> u64 {
        self.seed.unwrap_or(0)
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Calibration")]
pub(crate) struct StatsArgs {
    /// Use the statistics in this folder (made by `lite calibrate`) and run no windows; calibration flags given as well
    /// must be those the statistics were made with
    #[arg(long, value_name = "DIR")]
    pub(crate) stats: Option<PathBuf>,

    /// With --stats: gather them first if that folder does not have them, for this run and all later ones
    #[arg(long, requires = "stats")]
    pub(crate) gather: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Final check")]
pub(crate) struct CheckArgs {
    /// Text the result is compared with the original on, a path or a dataset name [default: built-in held-out text]
    #[arg(long, value_name = "NAME|PATH")]
    pub(crate) eval_dataset: Option<String>,

    /// Windows of that text; 0 compares the files only [default: 16]
    #[arg(long, value_name = "N")]
    pub(crate) eval_samples: Option<usize>,

    /// Tokens per window [default: as --calib-seqlen, at most 512]
    #[arg(long, value_name = "TOKENS")]
    pub(crate) eval_seqlen: Option<usize>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Model files and resources")]
pub(crate) struct ResourceArgs {
    /// Branch, tag or commit of a hub model
    #[arg(long, value_name = "REV")]
    pub(crate) revision: Option<String>,

    /// Where hub files are kept [default: the Hugging Face cache]
    #[arg(long, value_name = "DIR")]
    pub(crate) download_dir: Option<PathBuf>,

    /// Where the blocks run: `cpu`, `cuda`, `cuda:N`, or `auto` for a GPU if there is one that works [default: auto]
    #[arg(long, value_parser = device, value_name = "DEVICE")]
    pub(crate) device: Option<DeviceChoice>,

    /// Largest weight file, such as 5GB or 500MB
    #[arg(long, default_value = "5GB", value_parser = bytes, value_name = "SIZE")]
    pub(crate) max_shard_size: u64,

    /// Memory budget, such as 16GB; hidden states go to a file when they would not fit, and if that is not enough, fewer
    /// windows go through a forward pass at a time (unless --batch-size says how many)
    #[arg(long, value_parser = bytes, value_name = "SIZE")]
    pub(crate) max_memory: Option<u64>,

    /// Start over, whatever an interrupted run finished in the work directory; without it, the run goes on there
    #[arg(long)]
    pub(crate) restart: bool,

    /// Least seconds between two copies of the hidden states on disk
    #[arg(long, hide = true, default_value_t = 300, value_name = "SECONDS")]
    pub(crate) checkpoint_seconds: u64,

    /// Accepted for compatibility: no model here needs remote code, and none is ever run
    #[arg(long, hide = true)]
    pub(crate) trust_remote_code: bool,
}

/// Reads `--device`.
pub(crate) fn device(text: &str) -> Result<DeviceChoice, String> {
    let index = |text: &str| text.parse().map_err(|_| format!("`{text}` is no index of a GPU; write cuda:0"));
    match text.split_once(':') {
        None if text == "auto" => Ok(DeviceChoice::Auto),
        None if text == "cpu" => Ok(DeviceChoice::Cpu),
        None if text == "cuda" => Ok(DeviceChoice::Cuda(0)),
        Some(("cuda", number)) => index(number).map(DeviceChoice::Cuda),
        _ => Err(format!("`{text}` is no device; give cpu, cuda, cuda:N or auto")),
    }
}

/// Reads `5GB`, `500 MB`, `2GiB`, `1000000`.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: f64 = match unit.trim().to_ascii_uppercase().as_str() {
        "" | "B" => 1.0,
        "KB" | "K" => 1e3,
        "MB" | "M" => 1e6,
        "GB" | "G" => 1e9,
        "TB" | "T" => 1e12,
        "KIB" => 1024.0,
        "MIB" => 1024.0 * 1024.0,
        "GIB" => 1024.0 * 1024.0 * 1024.0,
        other => return Err(format!("`{other}` is no unit of size; use KB, MB, GB, KiB, MiB or GiB")),
    };
    let value = number.parse::<f64>().map_err(|_| format!("`{text}` is no size; write it like 5GB"))? * factor;
    if value < 1.0 || value > u64::MAX as f64 / 2.0 {
        return Err(format!("`{text}` is not a usable size"));
    }
    Ok(value as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn devices_are_read() {
        for (text, wanted) in [
            ("auto", DeviceChoice::Auto),
            ("cpu", DeviceChoice::Cpu),
            ("cuda", DeviceChoice::Cuda(0)),
            ("cuda:3", DeviceChoice::Cuda(3)),
        ] {
            assert_eq!(device(text).unwrap(), wanted);
        }
        for text in ["", "gpu", "cuda:", "cuda:-1", "cpu:0", "cuda:1:2", "CUDA:x"] {
            assert!(device(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_read() {
        for (text, wanted) in
            [("5GB", 5_000_000_000), ("500 MB", 500_000_000), ("2GiB", 2 << 30), ("123", 123), ("1.5k", 1500)]
        {
            assert_eq!(bytes(text), Ok(wanted), "{text}");
        }
        for bad in ["", "GB", "-5GB", "5XB", "0", "1e30TB"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_later_of_two_opposite_flags_wins() {
        let parse = |flags: &[&str]| {
            let args = ["lite", "auto_awq", "m"].iter().chain(flags);
            let Command::AutoAwq(args) = Cli::try_parse_from(args).unwrap().command else { panic!("not auto_awq") };
            !args.weights.no_search_scale
        };
        assert!(parse(&[]));
        assert!(parse(&["--search-scale"]));
        assert!(!parse(&["--search-scale", "--no-search-scale"]));
        assert!(parse(&["--no-search-scale", "--search-scale"]));
    }
}
