use lite_decoder::{DecoderError, Role};
use lite_quant::QuantError;
use thiserror::Error;

/// What can go wrong when a block is tuned.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TuneError {
    /// A number in the settings cannot be used.
    #[error("`{name}` is {found}, wanted {wanted}")]
    Setting {
        /// Which setting.
        name: &'static str,
        /// The number found.
        found: String,
        /// What would do.
        wanted: &'static str,
    },
    /// Too few windows to tune on some and judge on others.
    #[error(
        "block tuning was given {found} calibration windows, wanted at least 2: calibrate on more text, or turn tuning off"
    )]
    TooFewWindows {
        /// Windows present.
        found: usize,
    },
    /// A linear that is given twice or that the block does not have.
    #[error("{role:?} {reason}")]
    Linear {
        /// Which linear.
        role: Role,
        /// What was found and what was wanted.
        reason: String,
    },
    /// A quantized linear contradicts itself.
    #[error("{role:?}: {source}")]
    Quant {
        /// Which linear.
        role: Role,
        /// What is wrong with it.
        source: QuantError,
    },
    /// The data do not have the length their shape says.
    #[error("the {what} of window {window} hold {found} values, wanted {wanted} (tokens × hidden)")]
    DataLength {
        /// Which side.
        what: &'static str,
        /// Which window.
        window: usize,
        /// Values present.
        found: usize,
        /// Values the shape asks for.
        wanted: usize,
    },
    /// NaN or Inf, or a value so large that squares overflow.
    #[error(
        "{what} hold NaN, Inf or values too large to square: check the model in float first, or leave this block out of tuning"
    )]
    NotFinite {
        /// Where.
        what: String,
    },
    /// A part of the block that has no derivative here.
    #[error("tuning does not support {what}: turn it off for this model")]
    Unsupported {
        /// Which part.
        what: String,
    },
    /// The caller's data could not be read.
    #[error("hidden states cannot be read")]
    Data(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The block failed.
    #[error(transparent)]
    Decoder(#[from] DecoderError),
    /// candle failed.
    #[error("tensor operation failed: {0}")]
    Candle(#[from] candle_core::Error),
    /// The caller said stop.
    #[error("tuning was cancelled")]
    Cancelled,
}
