use lite_linalg::FactorError;
use lite_quant::{QuantizedLinear, Range, Scheme};

use crate::GptqError;

/// How linears are solved.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GptqSettings {
    /// λ: this fraction of the mean diagonal of the Gram matrix is added to the diagonal. Above 0, at most 1.
    pub damp: f32,
    /// Visit columns by falling Gram diagonal. Group parameters are fixed before, in the original order, so the
    /// result has no group index and costs an engine nothing.
    pub act_order: bool,
    /// Columns between two updates of everything that follows; changes rounding noise and speed only.
    pub block: usize,
    /// How the range of each group is chosen.
    pub range: Range,
    /// Coordinate-descent sweeps after the solve.
    pub refine_sweeps: usize,
    /// Whether a linear whose Gram matrix cannot be used gets nearest rounding (recorded in [`Solution::fallback`])
    /// instead of an error.
    pub fallback: bool,
}

impl Default for GptqSettings {
    /// λ 0.01, activation order, blocks of 128, range search, three sweeps, fallback allowed.
    fn default() -> Self {
        Self { damp: 0.01, act_order: true, block: 128, range: Range::Search, refine_sweeps: 3, fallback: true }
    }
}

impl GptqSettings {
    /// Checks the numbers.
    ///
    /// # Errors
    /// [`GptqError::Damp`], [`GptqError::Block`].
    pub fn check(&self) -> Result<(), GptqError> {
        // Written so that NaN fails.
        if !(self.damp > 0.0 && self.damp <= 1.0) {
            return Err(GptqError::Damp { found: self.damp });
        }
        if self.block == 0 {
            return Err(GptqError::Block);
        }
        Ok(())
    }
}

/// One linear and the statistics of its input.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    /// `[N, K]` row-major float target; error-aware already if wanted, see [`crate::error_aware_target`].
    pub weight: &'a [f32],
    /// N.
    pub out_features: usize,
    /// K.
    pub in_features: usize,
    /// `[K, K]` Gram matrix `XᵀX / T` of the input, both triangles, undamped.
    pub gram: &'a [f32],
    /// Bits, groups, symmetry, scale type.
    pub scheme: &'a Scheme,
}

/// What had to be done to use a Gram matrix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fallback {
    /// Nothing: f32 with the damping asked for.
    None,
    /// The factorization needed more damping.
    Damped {
        /// The fraction that worked.
        damp: f32,
    },
    /// No damping up to 1 worked in f32; f64 did.
    Double {
        /// The fraction that worked.
        damp: f32,
    },
    /// The linear was rounded to nearest.
    Nearest {
        /// Why.
        reason: NearestReason,
    },
}

/// Why a linear was rounded to nearest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NearestReason {
    /// The Gram matrix is all zeros: no token reached the input, so there is nothing to weigh errors by.
    NoSignal,
    /// Not factored in f64 with damping 1 either.
    NotFactored(FactorError),
}

/// A quantized linear and what it costs.
#[derive(Debug, Clone, PartialEq)]
pub struct Solution {
    /// Codes, scales and zero points.
    pub quantized: QuantizedLinear,
    /// `tr((W − Ŵ) G (W − Ŵ)ᵀ)` with the undamped Gram matrix: the output error per calibration token.
    pub loss: f64,
    /// The same of nearest rounding with the same ranges. Never below `loss`.
    pub nearest_loss: f64,
    /// What had to be done to use the Gram matrix.
    pub fallback: Fallback,
    /// Rows that kept nearest rounding because the solve did worse on them.
    pub nearest_rows: usize,
    /// Whether the whole linear kept nearest rounding.
    pub kept_nearest: bool,
}
