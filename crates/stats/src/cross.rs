use candle_core::Tensor;
use lite_decoder::{DecoderError, with_cpu_slice};
use lite_linalg::cross_update;

use crate::InputStats;

/// Statistics of one input as the quantized model sees it, and what ties them to the float model.
#[derive(Debug, Clone)]
pub struct CrossStats {
    /// Of the quantized stream, X.
    pub input: InputStats,
    /// Width of the other side: K for the float stream's input, N for its output.
    width: usize,
    /// `[width, K]`: `Σ other xᵀ` while gathering, divided by the tokens once finished.
    cross: Vec<f32>,
}

impl CrossStats {
    /// Empty statistics of an input with `in_features` channels beside `width` values of the float stream: its own
    /// input X̃ (K of them), or, where that is less work, the outputs X̃Wᵀ of a linear (N).
    pub fn new(in_features: usize, width: usize) -> Self {
        Self { input: InputStats::new(in_features), width, cross: vec![0.0; width * in_features] }
    }

    /// Adds the same tokens of both streams: `(tokens, width)` of the float one, `(tokens, K)` of the quantized one.
    ///
    /// # Errors
    /// If a tensor cannot be read.
    ///
    /// # Panics
    /// If the shapes differ from what was announced.
    pub fn update(&mut self, float: &Tensor, quantized: &Tensor) -> Result<(), DecoderError> {
        let k = self.input.in_features;
        with_cpu_slice(quantized, |x| {
            self.input.update(x);
            with_cpu_slice(float, |other| cross_update(&mut self.cross, other, x, x.len() / k, self.width, k))
        })?
    }

    /// Divides by the number of tokens.
    pub fn finish(&mut self) {
        self.input.finish();
        let factor = 1.0 / self.input.tokens.max(1) as f32;
        self.cross.iter_mut().for_each(|c| *c *= factor);
    }

    /// `[width, K]`: `X̃ᵀX / T`, or `(X̃Wᵀ)ᵀX / T`.
    pub fn cross(&self) -> &[f32] {
        &self.cross
    }
}
