use lite_linalg::FactorError;
use lite_quant::QuantError;
use thiserror::Error;

/// What can go wrong in a solve.
#[derive(Debug, Error, Clone, PartialEq)]
pub enum GptqError {
    /// The weight or the scheme does not fit, or the weight holds NaN or Inf.
    #[error(transparent)]
    Quant(#[from] QuantError),
    /// The damping is not a usable fraction.
    #[error("`damp` is {found}: use a fraction of the mean Gram diagonal above 0 and at most 1, such as 0.01")]
    Damp {
        /// The number that was asked for.
        found: f32,
    },
    /// Columns per block.
    #[error("`block` is 0: use a number of columns such as 128")]
    Block,
    /// A matrix does not have the length its shape says.
    #[error("{what} has {found} elements, its shape asks for {wanted}")]
    Length {
        /// Which matrix.
        what: &'static str,
        /// Elements present.
        found: usize,
        /// Elements the shape asks for.
        wanted: usize,
    },
    /// NaN or Inf in a matrix of input statistics.
    #[error(
        "the {what} holds NaN or Inf, the first at row {row}, column {column}: the activations of this input overflow; \
         check the model in float first, or leave this linear out"
    )]
    NotFinite {
        /// Which matrix.
        what: &'static str,
        /// Row of the first.
        row: usize,
        /// Column of the first.
        column: usize,
    },
    /// A sum of squares below zero: the matrix is no `XᵀX`.
    #[error("the Gram matrix has {value} on its diagonal at channel {channel}: a mean of squares is never negative")]
    NegativeDiagonal {
        /// Which channel.
        channel: usize,
        /// What is there.
        value: f32,
    },
    /// Every input channel was zero on all calibration tokens.
    #[error(
        "the Gram matrix is all zeros: no token reached this input; calibrate on more text, or allow the fallback to \
         nearest rounding"
    )]
    NoSignal,
    /// Neither f32 nor f64 could factor the damped Gram matrix.
    #[error(
        "the Gram matrix cannot be factored with damping up to {damp}: {reason}; calibrate on more tokens, or allow the \
         fallback to nearest rounding"
    )]
    NotFactored {
        /// The largest damping tried.
        damp: f32,
        /// What the last attempt said.
        reason: FactorError,
    },
}
