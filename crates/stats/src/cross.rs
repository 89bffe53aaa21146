use candle_core::Tensor;
use lite_decoder::{DecoderError, with_cpu_slice};
use lite_linalg::cross_update;

use crate::InputStats;

/// Statistics of one input as the quantized model sees it, beside the float model's.
#[derive(Debug, Clone)]
pub struct CrossStats {
    /// Of the quantized stream, X.
    pub input: InputStats,
    /// `[K, K]`: `Σ x̃ xᵀ` while gathering, `X̃ᵀX / T` once finished.
    cross: Vec<f32>,
}

impl CrossStats {
    /// Empty statistics of an input with `in_features` channels.
    pub fn new(in_features: usize) -> Self {
        Self { input: InputStats::new(in_features), cross: vec![0.0; in_features * in_features] }
    }

    /// Adds the same tokens of both streams, `(tokens, K)`.
    ///
    /// # Errors
    /// If a tensor cannot be read.
    ///
    /// # Panics
    /// If the shapes differ from each other or from K.
    pub fn update(&mut self, float: &Tensor, quantized: &Tensor) -> Result<(), DecoderError> {
        let k = self.input.in_features;
        with_cpu_slice(quantized, |x| {
            self.input.update(x);
            with_cpu_slice(float, |other| cross_update(&mut self.cross, other, x, x.len() / k, k))
        })?
    }

    /// Divides by the number of tokens.
    pub fn finish(&mut self) {
        self.input.finish();
        let factor = 1.0 / self.input.tokens.max(1) as f32;
        self.cross.iter_mut().for_each(|c| *c *= factor);
    }

    /// `C = X̃ᵀX / T`: rows are channels of the float stream, columns of the quantized one.
    pub fn cross(&self) -> &[f32] {
        &self.cross
    }
}
