//! Activation-aware weight quantization (AWQ, Lin et al. 2023, arXiv:2306.00978): per-channel scales
//! that are folded into the producer of an input and out of its consumers, so that the channels that
//! matter most are rounded on a finer grid.
//!
//! For consumers `W` of one input `x`, scales `s` turn `W x` into `(W · diag(s)) (x / s)`. The float
//! function is unchanged; the rounding error is not. The candidates are
//!
//! ```text
//! duo:    s = a^r / w̄^(1−r)        plain: s = a^r        r = 0, 0.05, … 0.95
//! ```
//!
//! with `a = mean |x|` and `w̄` the mean over rows of `|W| / max |W|` of the weight's group, each
//! normalised by `sqrt(max s · min s)`; the identity is always a candidate.
//!
//! Where reference implementations run the block once per candidate, the loss here is the exact output
//! error of the linears themselves, `tr((W − Ŵ) G (W − Ŵ)ᵀ)` with the Gram matrix `G = XᵀX / T`:
//! `2·N·K²` flops whatever the number of calibration tokens, and no forward pass. Candidates are ranked
//! on a fixed sample of rows; the best few and the identity are then quantized in full, with the range
//! search that the final weights get, and the best of those wins.
#![forbid(unsafe_code)]

mod candidates;
mod search;

pub use candidates::{Candidate, FIXED_RATIO, RATIOS, fixed_scales};
pub use search::{AwqError, Consumer, FoldProblem, ScaleChoice, search_scales};
