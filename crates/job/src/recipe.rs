//! What a run is asked to do, whether by flags or by a file.

use std::path::PathBuf;

use lite_pack::KvCacheScheme;
use lite_pack::targets::Target;
use lite_quant::{LinearScheme, Range};

/// Everything a run needs to know. Two equal recipes on equal inputs give equal bytes.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// A folder, or a hub id `org/name`.
    pub model: String,
    /// The file that describes the model's architecture. Whoever runs the recipe makes it known first.
    pub arch: Option<PathBuf>,
    /// Hub revision: branch, tag or commit.
    pub revision: Option<String>,
    /// Where hub files are kept, instead of the usual cache.
    pub download_dir: Option<PathBuf>,
    /// Where the result appears.
    pub work_dir: PathBuf,
    /// Replace a checkpoint that is already there.
    pub overwrite: bool,
    /// How weights are prepared before they are rounded.
    pub method: Method,
    /// How codes are chosen.
    pub solver: Solver,
    /// What happens to experts that few tokens reach.
    pub experts: ExpertSettings,
    /// Linears with other bits or groups than the rest: `(regex, changes)`, later rules win.
    pub overrides: Vec<Override>,
    /// Regexes of linears that stay plain.
    pub ignore: Vec<String>,
    /// How linears are quantized, instead of `bits`, `group_size` and `symmetric`. The type of its scales is not read:
    /// the layout and `dtype` decide that.
    pub scheme: Option<LinearScheme>,
    /// Powers of two as the scales of floats, in whatever type they are stored.
    pub power_of_two_scales: bool,
    /// How the engine's key/value cache is quantized; its scales are calibrated.
    pub kv_cache: Option<KvCacheScheme>,
    /// Bits per weight, as typed.
    pub bits: i64,
    /// Group size, as typed; −1 is one scale per output channel.
    pub group_size: i64,
    /// Symmetric codes: zero points fixed in the middle.
    pub symmetric: bool,
    /// How the range of each group is chosen.
    pub range: Range,
    /// Type of scales and plain tensors in the output.
    pub dtype: DtypeChoice,
    /// Layout by name; by default what the target or the scheme asks for.
    pub layout: Option<String>,
    /// Engine that must load the result.
    pub target: Option<Target>,
    /// Tensor-parallel degree the result must support.
    pub tensor_parallel: usize,
    /// Calibration text.
    pub calib: CalibSettings,
    /// Statistics to use instead of running calibration windows; `calib` is not looked at then.
    pub stats: Option<StatsSource>,
    /// Text of the final check.
    pub eval: EvalSettings,
    /// Windows per forward pass; by default about 1536 tokens.
    pub batch_size: Option<usize>,
    /// Where the float blocks run; `None` as [`DeviceChoice::Auto`], which nobody asked for.
    pub device: Option<DeviceChoice>,
    /// Largest weight file, bytes.
    pub max_shard_bytes: u64,
    /// Memory budget, bytes; hidden states go to a file when they would not fit.
    pub max_memory: Option<u64>,
    /// How the run goes on where an earlier one ended.
    pub resume: ResumeSettings,
}

impl Recipe {
    /// A recipe for `model` with everything else as `lite auto_awq MODEL` has it.
    pub fn new(model: String) -> Self {
        Self {
            model,
            arch: None,
            revision: None,
            download_dir: None,
            work_dir: PathBuf::from("./work_dir"),
            overwrite: false,
            method: Method::Awq { search_scale: true },
            solver: Solver::NEAREST,
            experts: ExpertSettings::default(),
            overrides: Vec::new(),
            ignore: Vec::new(),
            scheme: None,
            power_of_two_scales: false,
            kv_cache: None,
            bits: 4,
            group_size: 128,
            symmetric: false,
            range: Range::Search,
            dtype: DtypeChoice::Auto,
            layout: None,
            target: None,
            tensor_parallel: 1,
            calib: CalibSettings { dataset: None, samples: 128, seqlen: None, seed: 0, if_needed: false },
            stats: None,
            eval: EvalSettings { dataset: None, windows: 16, seqlen: None, limit: None },
            batch_size: None,
            device: None,
            max_shard_bytes: 5_000_000_000,
            max_memory: None,
            resume: ResumeSettings::default(),
        }
    }
}

/// How a run goes on where an earlier one ended. None of it changes the result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResumeSettings {
    /// Start over, whatever an interrupted run left in the work directory.
    pub restart: bool,
    /// Least seconds between two copies of the hidden states on disk.
    pub checkpoint_seconds: u64,
    /// The command line, for `lite resume`; empty if there is none.
    pub command: Vec<String>,
}

impl Default for ResumeSettings {
    fn default() -> Self {
        Self { restart: false, checkpoint_seconds: 300, command: Vec::new() }
    }
}

/// How weights are prepared before they are rounded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// The weights as they are.
    Plain,
    /// Activation-aware scales.
    Awq {
        /// Search the scales by output error; otherwise LMDeploy's fixed ratio 0.5 on max |x|.
        search_scale: bool,
    },
    /// Scales that move outliers from activations, which the engine quantizes, to weights.
    SmoothQuant {
        /// How scales are found.
        scales: SmoothScales,
    },
}

/// How the scales of [`Method::SmoothQuant`] are found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum SmoothScales {
    /// `max|X|^α / max|W|^(1−α)`, α in `[0, 1]`.
    Alpha(f64),
    /// The same, α of each input by the error of its quantized linears on sampled tokens.
    SearchedAlpha,
    /// `max|X| / log2(2 + max|X|)`.
    LogEqualization,
    /// AWQ's `mean|X|^r`, r of each input by the error of its quantized linears on sampled tokens.
    Awq,
}

/// How codes are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Solver {
    /// Who chooses them.
    pub rounding: Rounding,
    /// Solve for the float model's outputs on what the quantized model sees: two streams side by side, each input
    /// gathered after everything before it was quantized. Needs [`Rounding::Gptq`] or [`Rounding::Refine`].
    pub error_aware: bool,
    /// Tune scales and rounding of each block against the float block's outputs.
    pub tune: bool,
    /// Visit columns by falling activation energy.
    pub act_order: bool,
    /// Damping, a fraction of the mean Gram diagonal.
    pub damp: f32,
    /// Whether a linear that cannot be solved may be rounded to nearest instead.
    pub fallback: bool,
}

impl Solver {
    /// Nearest rounding.
    pub const NEAREST: Self = Self {
        rounding: Rounding::Nearest,
        error_aware: false,
        tune: false,
        act_order: true,
        damp: 0.01,
        fallback: true,
    };
}

/// What happens to experts that few calibration tokens reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertSettings {
    /// Fewer tokens than this are too few for an expert's own statistics.
    pub min_tokens: u64,
    /// What then stands for them.
    pub policy: ExpertPolicy,
}

impl Default for ExpertSettings {
    fn default() -> Self {
        Self { min_tokens: 128, policy: ExpertPolicy::Weighted }
    }
}

/// What stands for the statistics of an expert that few tokens reached. None of it is silent: every such expert is
/// reported, and fails the run where no fallback is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpertPolicy {
    /// All tokens, each weighted by the score that the router gave it for this expert.
    Weighted,
    /// Nothing: nearest rounding, ranges by the error of the weights.
    Nearest,
    /// The run fails.
    Fail,
}

/// Who chooses the codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// The nearest code.
    Nearest,
    /// GPTQ's error feedback.
    Gptq,
    /// GPTQ, then coordinate descent over codes and scales.
    Refine,
}

/// Other settings for some linears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Override {
    /// Regex over module names, anywhere in the name.
    pub pattern: String,
    /// Bits, if they differ.
    pub bits: Option<i64>,
    /// Group size, if it differs.
    pub group_size: Option<i64>,
    /// Symmetry, if it differs.
    pub symmetric: Option<bool>,
    /// Another scheme altogether; bits, group size and symmetry then change that.
    pub scheme: Option<LinearScheme>,
}

/// Type of scales and plain tensors in the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DtypeChoice {
    /// The checkpoint's own 16-bit type; float16 for a float32 checkpoint.
    Auto,
    /// IEEE half.
    Float16,
    /// bfloat16.
    Bfloat16,
}

/// Where the float blocks run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU if this build and machine have one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA GPU of this index, or an error.
    Cuda(usize),
}

/// Calibration text.
#[derive(Debug, Clone)]
pub struct CalibSettings {
    /// Name or path; `None` is the default set, with the built-in corpus as its stand-in.
    pub dataset: Option<String>,
    /// Number of windows; 0 quantizes without data.
    pub samples: i64,
    /// Tokens per window; `None` is 2048 or what the model allows.
    pub seqlen: Option<i64>,
    /// Seed of every draw.
    pub seed: u64,
    /// Run windows only for what cannot be found without: static scales of activations, scales of a cache.
    pub if_needed: bool,
}

/// Statistics that an earlier run wrote.
#[derive(Debug, Clone, Default)]
pub struct StatsSource {
    /// Their folder.
    pub folder: PathBuf,
    /// Gather them first where that folder does not have them ([`crate::gather_statistics`]): so jobs of one model share
    /// them, whichever comes first.
    pub gather: bool,
    /// The text they must come from, if the user said: name or path.
    pub dataset: Option<String>,
    /// The number of windows they must come from, if the user said.
    pub samples: Option<i64>,
    /// The tokens per window they must come from, if the user said.
    pub seqlen: Option<i64>,
    /// The seed they must come from, if the user said.
    pub seed: Option<u64>,
}

impl StatsSource {
    /// Whether they are yet to be gathered.
    pub fn awaited(&self) -> bool {
        self.gather && !self.folder.join("config.json").exists()
    }
}

/// Text of the final check.
#[derive(Debug, Clone)]
pub struct EvalSettings {
    /// Name or path; `None` is the built-in held-out text.
    pub dataset: Option<String>,
    /// Number of windows; 0 skips the forward comparison (codes are still compared).
    pub windows: usize,
    /// Tokens per window; `None` is the calibration length, at most 512.
    pub seqlen: Option<usize>,
    /// Run no window if that would take more floating-point operations than this.
    pub limit: Option<f64>,
}
