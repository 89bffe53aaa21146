//! GPTQ (Frantar et al. 2022, arXiv:2210.17323): quantization with second-order error feedback, followed by coordinate
//! descent over codes and scales.
//!
//! Everything reads one matrix, the Gram matrix `G = XᵀX / T` of a linear's input, and lowers the output error
//! `tr((W − Ŵ) G (W − Ŵ)ᵀ) = ‖(W − Ŵ) Xᵀ‖² / T`:
//!
//! 1. group parameters, and nearest rounding with them: `lite_quant`;
//! 2. the solve: column by column, by falling diagonal of G, round and spread the error over the columns to come,
//!    weighted by the upper triangular factor of `(G + λ·mean(diag G)·I)⁻¹`;
//! 3. refinement: sweeps of coordinate descent over single codes, each followed by closed-form group scales;
//! 4. per row, nearest rounding is kept where it is still better.
//!
//! [`error_aware_target`] prepares the target for inputs that already carry quantization error.
#![forbid(unsafe_code)]

mod chunk;
mod compensate;
mod error;
mod hessian;
mod loss;
mod refine;
mod settings;
mod solve;

pub use error::GptqError;
pub use hessian::Hessian;
pub use settings::{Fallback, GptqSettings, NearestReason, Problem, Solution};
pub use solve::{error_aware_target, solve};
