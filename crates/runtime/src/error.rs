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
}
