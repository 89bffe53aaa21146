//! SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): per-channel scales that move outliers from activations, which the
//! engine quantizes with one scale per token or tensor, to weights, which have a scale per row.
//!
//! For linears `W` (`[N, K]`) that share an input `x`, scales `s` (`[K]`) turn `W x` into `(W · diag(s)) (x / s)`: the
//! producer of `x` is divided, its consumers are multiplied, the float function is unchanged. The classical choice is
//!
//! ```text
//! s_j = max|X_j|^α / max|W_j|^(1−α)          over all weights that read channel j
//! ```
//!
//! α = 0 evens out the weights, α = 1 the activations; between the two lies the least error, and where depends on the
//! layer. [`smooth_scales`] takes α as given. [`search_alpha`] tries a grid, and [`awq_act_scales`] AWQ's `mean|X_j|^r`, by
//! the error that the quantized linears make on sampled tokens, activations and weights both quantized as the engine does.
//!
//! Pure functions of slices: no files, no models.
#![forbid(unsafe_code)]

mod channels;
mod error;
mod loss;
mod scales;
mod search;
mod weights;

pub use error::SmoothQuantError;
pub use loss::{Sample, quantized_loss};
pub use scales::{Algorithm, Constraints, DEFAULT_ALPHA, Normalisation, SmoothSettings, smooth_scales};
pub use search::{CandidateLoss, MAX_ROWS, ScaleSearch, SearchSettings, awq_act_scales, exponent_grid, search_alpha};
