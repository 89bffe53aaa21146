use thiserror::Error;

/// What can be wrong with a scheme or with the matrix it is applied to.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum QuantError {
    /// Bits outside 2..=8.
    #[error("{found} bits per weight: integer codes take 2, 3, 4, 5, 6, 7 or 8 bits")]
    Bits {
        /// The number that was asked for.
        found: i64,
    },
    /// A group size that no layout knows.
    #[error("group size {found}: use 16, 32, 64, 128, 256, or -1 for one scale per output channel")]
    GroupSize {
        /// The number that was asked for.
        found: i64,
    },
    /// The input width is not a whole number of groups.
    #[error("{in_features} input features are not a multiple of the group size {group_size}")]
    NotDivisible {
        /// K of the weight.
        in_features: usize,
        /// Channels per group.
        group_size: usize,
    },
    /// A slice does not have the length its shape says.
    #[error("{what} has {found} elements, its shape asks for {wanted}")]
    Length {
        /// Which slice.
        what: &'static str,
        /// Elements present.
        found: usize,
        /// Elements the shape asks for.
        wanted: usize,
    },
    /// NaN or Inf in a weight.
    #[error("the weight holds {count} values that are NaN or Inf, the first at row {row}, column {column}")]
    NotFinite {
        /// How many.
        count: usize,
        /// Row of the first.
        row: usize,
        /// Column of the first.
        column: usize,
    },
    /// NaN or Inf in activations.
    #[error(
        "the activations hold {count} values that are NaN or Inf, the first in token {token}, channel {channel}; check the model in float first"
    )]
    ActivationNotFinite {
        /// How many.
        count: usize,
        /// Token of the first.
        token: usize,
        /// Channel of the first.
        channel: usize,
    },
    /// An activation scheme that no engine runs, or static parameters that are missing or unusable.
    #[error("activations cannot be quantized with {what}")]
    Activation {
        /// What is wrong, and what was wanted.
        what: String,
    },
}
