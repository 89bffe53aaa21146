use std::io;
use std::path::PathBuf;

use lite_awq::AwqError;
use lite_calib::CalibError;
use lite_decoder::DecoderError;
use lite_gptq::GptqError;
use lite_model::ModelError;
use lite_model::hub::HubError;
use lite_pack::PackError;
use lite_pack::targets::RuleViolation;
use lite_quant::QuantError;
use lite_runtime::RuntimeError;
use lite_smoothquant::SmoothQuantError;
use lite_stats::StatsError;
use thiserror::Error;

/// What kind of failure, for the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The command or recipe asks for something that cannot be (2).
    Usage,
    /// The model or the data is broken (3).
    Input,
    /// A combination nobody supports (4).
    Unsupported,
    /// Memory, disk or device are not enough (5).
    Resources,
    /// Finished, but a check failed (6).
    Verification,
    /// Reading or writing failed (7).
    Io,
    /// Another run, or the remains of one, is in the way (8).
    State,
    /// The user stopped it (130).
    Interrupted,
}

/// Why a run did not finish.
#[derive(Debug, Error)]
pub enum JobError {
    /// A setting that cannot be.
    #[error("{0}")]
    Usage(String),
    /// A model or data that cannot be used.
    #[error("{0}")]
    Input(String),
    /// A combination that is not supported.
    #[error("{0}")]
    Unsupported(String),
    /// Not enough of something.
    #[error("{0}")]
    Resources(String),
    /// The folder is in use, or holds something else.
    #[error("{0}")]
    State(String),
    /// The engine would refuse or misread the result.
    #[error("{target} would not load this result:{}", list(violations))]
    Target {
        /// Engine name.
        target: String,
        /// Broken rules.
        violations: Vec<RuleViolation>,
    },
    /// What was read back is not what was solved.
    #[error("{0}")]
    Verification(String),
    /// The user stopped the run.
    #[error("interrupted; nothing was published in `{}`", .0.display())]
    Interrupted(PathBuf),
    /// The run ended, but what it finished is kept.
    #[error("{source}\n{done} of {of} blocks are finished and kept: {next}")]
    Stopped {
        /// Why it ended.
        source: Box<JobError>,
        /// Blocks that are kept.
        done: usize,
        /// Blocks in all.
        of: usize,
        /// What to do, in words.
        next: String,
    },
    /// Reading or writing failed.
    #[error("cannot {what} `{}`: {source}{}", .path.display(), hint(source))]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A tensor could not be quantized.
    #[error("`{tensor}`: {source}")]
    Tensor {
        /// Tensor or module name.
        tensor: String,
        /// Why not.
        source: QuantError,
    },
    /// A fold did not leave the block's output unchanged.
    #[error(
        "block {block}: folding scales changed the float output by {found:.1e} of its size (at most {allowed:.0e} is rounding); this is a defect or a broken weight, nothing was written"
    )]
    Fold {
        /// Block index.
        block: usize,
        /// Relative change.
        found: f64,
        /// Bound.
        allowed: f64,
    },
    /// Scales could not be found.
    #[error("block {block}, {input}: {source}")]
    Awq {
        /// Block index.
        block: usize,
        /// Which input.
        input: String,
        /// Why not.
        source: AwqError,
    },
    /// Scales that move outliers to weights could not be found.
    #[error("block {block}, {input}: {source}")]
    Smooth {
        /// Block index.
        block: usize,
        /// Which input.
        input: String,
        /// Why not.
        source: SmoothQuantError,
    },
    /// A linear could not be solved.
    #[error("`{module}`: {source}")]
    Gptq {
        /// Module name.
        module: String,
        /// Why not.
        source: GptqError,
    },
    /// Experts that too few tokens reach, where nothing may stand for their statistics.
    #[error(
        "block {block}: {count} of {experts} experts got fewer than {wanted} calibration tokens ({named}); give more or longer windows (--calib-samples, --calib-seqlen), another --expert-policy, or a smaller --min-expert-tokens"
    )]
    PoorExperts {
        /// Block index.
        block: usize,
        /// Poor ones.
        count: usize,
        /// All of them.
        experts: usize,
        /// Tokens that are enough.
        wanted: u64,
        /// The first of them, with their tokens.
        named: String,
    },
    /// A block could not be tuned.
    #[error("block {block}: {reason}")]
    Tune {
        /// Block index.
        block: usize,
        /// Why not.
        reason: String,
    },
    /// Model files.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The hub.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// Calibration text or tokenizer.
    #[error(transparent)]
    Calib(#[from] CalibError),
    /// The decoder.
    #[error(transparent)]
    Decoder(#[from] DecoderError),
    /// Statistics.
    #[error(transparent)]
    Stats(#[from] StatsError),
    /// A layout.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// A scheme.
    #[error(transparent)]
    Quant(#[from] QuantError),
    /// Reopening the output.
    #[error("checking the output: {0}")]
    Runtime(#[from] RuntimeError),
}

impl JobError {
    /// The kind of failure, for the exit code.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Usage(_) => ErrorKind::Usage,
            Self::Stats(StatsError::Device(_)) => ErrorKind::Resources,
            Self::Input(_) | Self::Tensor { .. } | Self::Awq { .. } | Self::Smooth { .. } | Self::Stats(_) => {
                ErrorKind::Input
            }
            Self::Unsupported(_) | Self::Target { .. } => ErrorKind::Unsupported,
            Self::Resources(_) => ErrorKind::Resources,
            Self::State(_) => ErrorKind::State,
            Self::Verification(_) | Self::Runtime(_) | Self::Fold { .. } | Self::PoorExperts { .. } => {
                ErrorKind::Verification
            }
            Self::Interrupted(_) => ErrorKind::Interrupted,
            Self::Stopped { source, .. } => source.kind(),
            Self::Io { .. } => ErrorKind::Io,
            Self::Quant(_) => ErrorKind::Usage,
            Self::Tune { .. } => ErrorKind::Input,
            Self::Gptq { source, .. } => match source {
                GptqError::Damp { .. } | GptqError::Block => ErrorKind::Usage,
                // Only without the fallback: the run could not be what was asked for.
                GptqError::NoSignal | GptqError::NotFactored { .. } => ErrorKind::Verification,
                _ => ErrorKind::Input,
            },
            Self::Model(error) => match error.kind() {
                lite_model::ErrorKind::Input => ErrorKind::Input,
                lite_model::ErrorKind::Unsupported => ErrorKind::Unsupported,
                lite_model::ErrorKind::Resources => ErrorKind::Resources,
                lite_model::ErrorKind::Io => ErrorKind::Io,
            },
            Self::Hub(error) => crate::locate::hub_error_kind(error),
            Self::Calib(error) => match error.kind() {
                lite_calib::ErrorKind::Usage => ErrorKind::Usage,
                lite_calib::ErrorKind::Input => ErrorKind::Input,
                lite_calib::ErrorKind::Unsupported => ErrorKind::Unsupported,
                lite_calib::ErrorKind::Io => ErrorKind::Io,
            },
            Self::Decoder(error) => match error.kind() {
                lite_decoder::ErrorKind::Unsupported => ErrorKind::Unsupported,
                lite_decoder::ErrorKind::Resources => ErrorKind::Resources,
                _ => ErrorKind::Input,
            },
            Self::Pack(error) => match error.kind() {
                lite_pack::ErrorKind::Unsupported => ErrorKind::Unsupported,
                lite_pack::ErrorKind::Input => ErrorKind::Input,
            },
        }
    }

    /// An I/O failure with its file.
    pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }
}

fn list(violations: &[RuleViolation]) -> String {
    violations.iter().map(|v| format!("\n  - {} [{}]", v.message, v.rule)).collect()
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull => "; free some space or choose another --work-dir",
        io::ErrorKind::PermissionDenied => "; check the folder's permissions",
        io::ErrorKind::ReadOnlyFilesystem => "; choose a --work-dir on a writable disk",
        _ => "",
    }
}
