//! The vocabulary of quantization, without files and without models.
//!
//! One notation everywhere: a weight is `(out, in)` = `[N, K]`, row-major; `group_size` consecutive
//! input channels of one output row share a scale and a zero point, so parameters are `[N, G]` with
//! `G = K / group_size`. Codes are **unsigned**: `w ≈ (code − zero) · scale`, with
//! `zero = 2^(bits−1)` for symmetric schemes. Layouts translate to their own conventions.
#![forbid(unsafe_code)]

mod activation;
mod error;
pub mod floats;
mod grid;
mod linear;
mod metrics;
mod quantize;
mod range;
mod scheme;
mod weights;

pub use activation::{StaticRange, fake_quantize_tokens};
pub use error::QuantError;
pub use grid::{GroupGrid, grid_for_range, nearest_code};
pub use linear::QuantizedLinear;
pub use metrics::{gram_loss, gram_loss_rows, relative_error};
pub use quantize::{Range, RangeContext, quantize_nearest};
pub use range::{SHRINK_STEPS, shrink_factor};
pub use scheme::{GroupSize, ScaleDtype, Scheme};
pub use weights::{
    ActivationFormat, ActivationScale, ActivationScheme, InputQuantization, LinearScheme, WeightScheme, Weights,
};
