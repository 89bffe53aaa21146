use lite_decoder::DecoderError;
use lite_model::ModelError;
use lite_pack::PackError;
use thiserror::Error;

/// Why a checkpoint cannot be judged.
#[derive(Debug, Error)]
pub enum RuntimeError {
    /// The config names no quantization.
    #[error("`config.json` has no `quantization_config`: this checkpoint is not quantized")]
    NotQuantized,
    /// A packed linear that cannot be read.
    #[error("`{module}`: {source}")]
    Linear {
        /// Module name.
        module: String,
        /// Why not.
        source: PackError,
    },
    /// A config or layout that cannot be read.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// The files.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A tensor of small floats that cannot be read as values.
    #[error("`{}` {reason}", lite_model::printable(tensor))]
    Codes {
        /// Tensor name.
        tensor: String,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// The forward pass.
    #[error(transparent)]
    Decoder(#[from] DecoderError),
    /// The caller asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// A forward pass gave NaN or Inf.
    #[error("block {block}: the {which} model's hidden states hold NaN or Inf")]
    NotFinite {
        /// Block index.
        block: usize,
        /// "original" or "quantized".
        which: &'static str,
    },
    /// Finite hidden states gave NaN or Inf in the final norm or the head.
    #[error("the {which} model's logits hold NaN or Inf: its final norm or head is damaged")]
    LogitsNotFinite {
        /// "original", "quantized" or "evaluated".
        which: &'static str,
    },
    /// Two models that cannot be compared.
    #[error(
        "the original has {original} {what}, this checkpoint {quantized}: it was not made from that model; give the model it was made from"
    )]
    Unlike {
        /// What differs.
        what: &'static str,
        /// How many the original has.
        original: usize,
        /// How many the checkpoint has.
        quantized: usize,
    },
    /// A matrix that cannot be held for generation.
    #[error("`{}`: {source}", lite_model::printable(tensor))]
    Matrix {
        /// Tensor name.
        tensor: String,
        /// Why not.
        source: lite_kernels::KernelError,
    },
    /// Text that cannot be generated: a prompt that does not fit, or a model that gives no numbers.
    #[error("{reason}")]
    Generate {
        /// What was found, what was wanted, what to do.
        reason: String,
    },
    /// Settings of generation that cannot be.
    #[error("`{setting}` is {found}, wanted {wanted}")]
    GenerateSetting {
        /// Name of the setting.
        setting: &'static str,
        /// Its value.
        found: String,
        /// What would do.
        wanted: &'static str,
    },
}
