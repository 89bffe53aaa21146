//! Norms with their weights in memory.

use lite_decoder::{NormKind, NormSpec};
use rayon::prelude::*;

use super::ops::{TASK, sum_by};

/// A norm, ready to be applied.
#[derive(Debug)]
pub(super) struct Norm {
    kind: NormKind,
    eps: f32,
    /// What each channel is multiplied by.
    factors: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl Norm {
    /// The norm of `spec` with its stored weight and bias; `None` if its kind is not known here.
    pub(super) fn new(spec: &NormSpec, weight: &[f32], bias: Option<Vec<f32>>) -> Option<Self> {
        let known = match spec.kind {
            NormKind::Rms | NormKind::RmsPlusOne => bias.is_none(),
            NormKind::Layer => true,
            _ => false,
        };
        let factors = weight.iter().map(|w| spec.kind.factor(*w)).collect();
        known.then_some(Self { kind: spec.kind, eps: spec.eps, factors, bias })
    }

    /// Normalises one row in place.
    pub(super) fn row(&self, x: &mut [f32]) {
        let count = x.len() as f32;
        let mean = match self.kind {
            NormKind::Layer => sum_by(x, |v| v) / count,
            _ => 0.0,
        };
        let factor = 1.0 / (sum_by(x, |v| (v - mean) * (v - mean)) / count + self.eps).sqrt();
        for (v, w) in x.iter_mut().zip(&self.factors) {
            *v = w * ((*v - mean) * factor);
        }
        for (v, b) in x.iter_mut().zip(self.bias.iter().flatten()) {
            *v += b;
        }
    }

    /// Normalises each row of `x`.
    pub(super) fn rows(&self, x: &mut [f32]) {
        let width = self.factors.len().max(1);
        x.par_chunks_mut(width).with_min_len(TASK / width + 1).for_each(|row| self.row(row));
    }
}
