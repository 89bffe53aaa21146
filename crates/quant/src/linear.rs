use rayon::prelude::*;

use crate::{QuantError, Scheme};

/// One linear layer's weight, quantized: the common currency of the project. Methods return it,
/// layouts pack it and unpack into it. Codes travel as integers and are never re-derived from
/// dequantized weights.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedLinear {
    /// Bits, group size, symmetry, scale type.
    pub scheme: Scheme,
    /// N, rows.
    pub out_features: usize,
    /// K, columns.
    pub in_features: usize,
    /// `[N, K]` row-major unsigned codes, `0 ..= 2^bits − 1`.
    pub codes: Vec<u8>,
    /// `[N, G]` row-major scales; every value is exactly representable in `scheme.scale_dtype`.
    pub scales: Vec<f32>,
    /// `[N, G]` row-major unsigned zero points; all `2^(bits−1)` when symmetric.
    pub zeros: Vec<u8>,
}

impl QuantizedLinear {
    /// Checks lengths, divisibility and code ranges.
    ///
    /// # Errors
    /// [`QuantError::Length`] or [`QuantError::NotDivisible`].
    pub fn check(&self) -> Result<(), QuantError> {
        let groups = self.scheme.groups(self.in_features)?;
        let weights = self.out_features.saturating_mul(self.in_features);
        let params = self.out_features.saturating_mul(groups);
        for (what, found, wanted) in [
            ("codes", self.codes.len(), weights),
            ("scales", self.scales.len(), params),
            ("zeros", self.zeros.len(), params),
        ] {
            if found != wanted {
                return Err(QuantError::Length { what, found, wanted });
            }
        }
        Ok(())
    }

    /// Groups per row, G.
    ///
    /// # Panics
    /// If the value breaks its own invariant that K is a whole number of groups.
    pub fn groups(&self) -> usize {
        self.scales.len().checked_div(self.out_features).unwrap_or(0)
    }

    /// `(code − zero) · scale` in f32, `[N, K]` row-major.
    pub fn dequantize(&self) -> Vec<f32> {
        let (k, groups) = (self.in_features, self.groups());
        let mut out = vec![0f32; self.codes.len()];
        if k == 0 || groups == 0 {
            return out;
        }
        let width = k / groups;
        out.par_chunks_mut(k).enumerate().for_each(|(row, out)| {
            for group in 0..groups {
                let scale = self.scales[row * groups + group];
                let zero = i32::from(self.zeros[row * groups + group]);
                let at = group * width;
                for (o, &code) in out[at..at + width].iter_mut().zip(&self.codes[row * k + at..row * k + at + width]) {
                    *o = (i32::from(code) - zero) as f32 * scale;
                }
            }
        });
        out
    }
}
