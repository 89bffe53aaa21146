use rayon::prelude::*;

use super::{FloatScheme, ScaleKind};
use crate::QuantError;

/// One linear layer's weight in small floats, `w ≈ value(code) · scale · global_scale`.
#[derive(Debug, Clone, PartialEq)]
pub struct FloatLinear {
    /// Codes, grain, scale type.
    pub scheme: FloatScheme,
    /// N, rows.
    pub out_features: usize,
    /// K, columns.
    pub in_features: usize,
    /// `[N, K]` row-major codes, one per byte (e2m1: the low four bits).
    pub codes: Vec<u8>,
    /// Row-major grid of scales (see [`Grain::grid`](super::Grain::grid)), each exactly representable in
    /// `scheme.scale`; multipliers, whatever a layout stores.
    pub scales: Vec<f32>,
    /// The multiplier of the whole tensor with [`ScaleKind::E4M3WithGlobal`] (absmax / 2688 by convention), else 1. An
    /// f64, so that it and its reciprocal, whichever of them a layout stores in f32, come back as they were.
    pub global_scale: f64,
}

impl FloatLinear {
    /// Checks lengths and divisibility.
    ///
    /// # Errors
    /// [`QuantError::Length`] or [`QuantError::NotDivisible`].
    pub fn check(&self) -> Result<(), QuantError> {
        let (rows, columns) = self.scheme.grain.grid(self.out_features, self.in_features)?;
        let lengths = [
            ("codes", self.codes.len(), self.out_features.saturating_mul(self.in_features)),
            ("scales", self.scales.len(), rows.saturating_mul(columns)),
        ];
        match lengths.into_iter().find(|(_, found, wanted)| found != wanted) {
            Some((what, found, wanted)) => Err(QuantError::Length { what, found, wanted }),
            None => Ok(()),
        }
    }

    /// The weights in f32, `[N, K]` row-major.
    pub fn dequantize(&self) -> Vec<f32> {
        let (n, k) = (self.out_features, self.in_features);
        let mut out = vec![0f32; self.codes.len()];
        let Ok((_, columns)) = self.scheme.grain.grid(n, k) else { return out };
        if out.is_empty() || self.check().is_err() {
            return out;
        }
        let values: Vec<f32> = (0..=255).map(|code| self.scheme.format.decode(code)).collect();
        let (tall, wide) = self.scheme.grain.cover(n, k);
        let global = if self.scheme.scale == ScaleKind::E4M3WithGlobal { self.global_scale as f32 } else { 1.0 };
        out.par_chunks_mut(k).zip(self.codes.par_chunks(k)).enumerate().for_each(|(row, (out, codes))| {
            let scales = &self.scales[row / tall * columns..][..columns];
            for ((out, codes), scale) in out.chunks_mut(wide).zip(codes.chunks(wide)).zip(scales) {
                let scale = scale * global;
                for (out, &code) in out.iter_mut().zip(codes) {
                    *out = values[usize::from(code)] * scale;
                }
            }
        });
        out
    }
}
