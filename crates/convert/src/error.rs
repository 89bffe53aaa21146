use lite_job::{ErrorKind, JobError};
use lite_model::{ModelError, printable};
use lite_pack::PackError;
use lite_runtime::RuntimeError;
use thiserror::Error;

/// Why a checkpoint was not converted.
#[derive(Debug, Error)]
pub enum ConvertError {
    /// The command asks for something that cannot be.
    #[error("{0}")]
    Usage(String),
    /// The source contradicts itself.
    #[error("{0}")]
    Input(String),
    /// A source that no conversion starts from, or something the target layout cannot say.
    #[error("{0}")]
    Unsupported(String),
    /// The target layout cannot hold a linear as it is.
    #[error(
        "`{}` cannot be converted without loss: {reason}; --requantize rounds it to what the layout can hold",
        printable(module)
    )]
    CannotHold {
        /// Module name.
        module: String,
        /// What is in the way.
        reason: String,
    },
    /// Not even by rounding.
    #[error("`{}`: layout `{layout}` holds nothing near {found} for a weight [{n}, {k}]", printable(module))]
    NothingNear {
        /// Module name.
        module: String,
        /// The layout.
        layout: &'static str,
        /// The source's scheme, in words.
        found: String,
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
    },
    /// What was read back is not what was written.
    #[error(
        "`{}`: {what} read back from the output differ from the source's; the disk may be faulty: nothing was published",
        printable(name)
    )]
    Differs {
        /// Tensor or module.
        name: String,
        /// What differs.
        what: &'static str,
    },
    /// A linear of the source that cannot be read.
    #[error(transparent)]
    Source(RuntimeError),
    /// The target layout refused what it had accepted.
    #[error("`{}`: {source}", printable(module))]
    Pack {
        /// Module name.
        module: String,
        /// Why.
        source: PackError,
    },
    /// The target layout's config.
    #[error(transparent)]
    Config(#[from] PackError),
    /// The folder of the result, the hub, an engine's rules, or an interruption.
    #[error(transparent)]
    Job(#[from] JobError),
    /// Files.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl ConvertError {
    /// The kind of failure, for the exit code.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Usage(_) => ErrorKind::Usage,
            Self::Input(_) => ErrorKind::Input,
            Self::Unsupported(_) | Self::CannotHold { .. } | Self::NothingNear { .. } => ErrorKind::Unsupported,
            Self::Differs { .. } => ErrorKind::Verification,
            Self::Source(error) => match error {
                RuntimeError::Linear { source, .. } | RuntimeError::Pack(source) => pack_kind(source),
                RuntimeError::Model(error) => model_kind(error),
                _ => ErrorKind::Input,
            },
            Self::Pack { source, .. } | Self::Config(source) => pack_kind(source),
            Self::Job(error) => error.kind(),
            Self::Model(error) => model_kind(error),
        }
    }
}

fn pack_kind(error: &PackError) -> ErrorKind {
    match error.kind() {
        lite_pack::ErrorKind::Unsupported => ErrorKind::Unsupported,
        lite_pack::ErrorKind::Input => ErrorKind::Input,
    }
}

fn model_kind(error: &ModelError) -> ErrorKind {
    match error.kind() {
        lite_model::ErrorKind::Input => ErrorKind::Input,
        lite_model::ErrorKind::Unsupported => ErrorKind::Unsupported,
        lite_model::ErrorKind::Resources => ErrorKind::Resources,
        lite_model::ErrorKind::Io => ErrorKind::Io,
    }
}
