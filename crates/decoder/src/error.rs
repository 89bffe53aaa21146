use lite_model::ModelError;
use thiserror::Error;

/// Broad class of a [`DecoderError`], for whoever maps errors to exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The model or the tokens are wrong: missing, damaged, contradictory.
    Input,
    /// The model is fine, but of a kind this crate does not run.
    Unsupported,
    /// Not enough memory, or the device failed.
    Resources,
    /// The operating system refused to read.
    Io,
}

/// What can be wrong with a decoder, its weights or its input.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DecoderError {
    /// A value of config.json is missing, of the wrong type or out of range.
    #[error("config.json: `{key}` is {found}, wanted {wanted}")]
    Config {
        /// The key, with its path.
        key: String,
        /// The value found, shortened; `missing` if there is none.
        found: String,
        /// What would do.
        wanted: String,
    },
    /// A value of config.json that is legal, but that no code here implements.
    #[error("config.json: `{key}` is {found}, which is not supported; supported: {supported}")]
    UnsupportedConfig {
        /// The key, with its path.
        key: String,
        /// The value found, shortened.
        found: String,
        /// What is implemented.
        supported: String,
    },
    /// Two values of config.json contradict each other.
    #[error("config.json: {reason}")]
    Contradiction {
        /// The keys, their values, and what would do.
        reason: String,
    },
    /// `architectures` names something unknown.
    #[error(
        "config.json: architecture {found} is unknown; known: {known}. Only these can be calibrated: describe another one in a file (`--arch FILE`), or quantize without data (`--calib-samples 0`)"
    )]
    UnknownArchitecture {
        /// The name found.
        found: String,
        /// The names in [`crate::FAMILIES`].
        known: String,
    },
    /// `architectures` does not name one architecture.
    #[error("config.json: {reason}; known: {known}")]
    UnclearArchitecture {
        /// What was found and what was wanted.
        reason: String,
        /// The names in [`crate::FAMILIES`].
        known: String,
    },
    /// Tensors that the decoder reads are not in the checkpoint.
    #[error(
        "the checkpoint lacks {count} of the {total} tensors that config.json asks for: {first}; is the download complete?"
    )]
    MissingTensors {
        /// How many.
        count: usize,
        /// How many the decoder reads.
        total: usize,
        /// The first few names.
        first: String,
    },
    /// A tensor's shape is not the one that follows from config.json.
    #[error("tensor `{tensor}` has shape {found:?}, wanted {wanted:?} (from {keys} in config.json){more}")]
    Shape {
        /// Tensor name.
        tensor: String,
        /// Its shape in the checkpoint.
        found: Vec<usize>,
        /// The shape that follows from config.json.
        wanted: Vec<usize>,
        /// The keys that the wanted shape was computed from.
        keys: &'static str,
        /// How many other tensors disagree, or nothing.
        more: String,
    },
    /// The checkpoint holds more blocks than config.json says.
    #[error(
        "the checkpoint holds `{tensor}`, but `num_hidden_layers` is {layers}{}, so blocks end at {}; config.json belongs to another model, or the checkpoint is damaged",
        if *mtp > 0 { format!(" and `num_nextn_predict_layers` is {mtp}") } else { String::new() },
        layers.saturating_add(*mtp).saturating_sub(1)
    )]
    ExtraBlock {
        /// A tensor of the first block that should not exist.
        tensor: String,
        /// `num_hidden_layers`.
        layers: usize,
        /// Layers of multi-token prediction behind them.
        mtp: usize,
    },
    /// The checkpoint holds more experts than config.json says.
    #[error(
        "the checkpoint holds `{tensor}`, but config.json says that a layer has {experts} experts (`num_experts`, `num_local_experts` or `n_routed_experts`); it belongs to another model, or the checkpoint is damaged"
    )]
    ExtraExpert {
        /// A tensor of the first expert that should not exist.
        tensor: String,
        /// Experts of a layer.
        experts: usize,
    },
    /// A part of a block that runs forward, but that something asked for does not know.
    #[error("block {block} has {part}, for which {what} not implemented; {instead}")]
    Unimplemented {
        /// Block index.
        block: usize,
        /// The part, such as `experts`.
        part: &'static str,
        /// What was asked for, with its verb.
        what: &'static str,
        /// What to do instead.
        instead: &'static str,
    },
    /// A tensor cannot be read, or is not what was asked for.
    #[error("tensor `{tensor}`: {reason}")]
    Tensor {
        /// Tensor name.
        tensor: String,
        /// What was found and what was wanted.
        reason: String,
    },
    /// Tokens or activations that do not fit the decoder.
    #[error("{reason}")]
    Input {
        /// What was found and what was wanted.
        reason: String,
    },
    /// The device that was asked for is not there or does not work.
    #[error("{reason}")]
    Device {
        /// What was tried and what came of it.
        reason: String,
    },
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// candle or its device failed.
    #[error("tensor operation failed: {0}")]
    Candle(#[from] candle_core::Error),
}

impl DecoderError {
    /// The broad class of this error.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::UnsupportedConfig { .. } | Self::UnknownArchitecture { .. } | Self::Unimplemented { .. } => {
                ErrorKind::Unsupported
            }
            Self::Candle(_) | Self::Device { .. } => ErrorKind::Resources,
            Self::Model(error) => match error.kind() {
                lite_model::ErrorKind::Input => ErrorKind::Input,
                lite_model::ErrorKind::Unsupported => ErrorKind::Unsupported,
                lite_model::ErrorKind::Resources => ErrorKind::Resources,
                lite_model::ErrorKind::Io => ErrorKind::Io,
            },
            _ => ErrorKind::Input,
        }
    }

    pub(crate) fn input(reason: impl Into<String>) -> Self {
        Self::Input { reason: reason.into() }
    }

    pub(crate) fn tensor(tensor: &str, reason: impl Into<String>) -> Self {
        Self::Tensor { tensor: clean(tensor), reason: reason.into() }
    }
}

/// Longest piece of a file that an error message repeats, in characters.
const LONGEST_QUOTE: usize = 80;

/// `text` from an untrusted file, fit for a terminal: control characters escaped, length bounded.
pub(crate) fn clean(text: &str) -> String {
    let mut out: String = text
        .chars()
        .take(LONGEST_QUOTE)
        .flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] })
        .collect();
    if text.chars().nth(LONGEST_QUOTE).is_some() {
        out.push('…');
    }
    out
}
