use candle_core::{Device, Tensor};

use crate::DecoderError;
use crate::DecoderSpec;
use crate::kernels::Rotation;
use crate::ops::with_cpu_slice;

/// Longest table believed: 4 GiB of f32.
const MAX_TABLE: usize = 1 << 30;

/// Cosines and sines of the rotary embedding for windows of one length. The length matters: dynamic scaling
/// and LongRoPE choose their frequencies by it.
#[derive(Debug, Clone)]
pub struct Rope {
    tokens: usize,
    half: usize,
    /// `(tokens, half)`, times the attention factor.
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// Tables for windows of `tokens` tokens at positions `0..tokens`.
    ///
    /// # Errors
    /// If `tokens` is 0 or the tables do not fit in memory.
    pub fn new(spec: &DecoderSpec, tokens: usize, device: &Device) -> Result<Self, DecoderError> {
        let (frequencies, factor) = spec.rope.frequencies(tokens);
        let half = frequencies.len();
        let len = tokens.checked_mul(half).filter(|len| (1..=MAX_TABLE).contains(len));
        let len = len.ok_or_else(|| {
            DecoderError::input(format!(
                "windows of {tokens} tokens, wanted at least 1 and a table that fits in memory"
            ))
        })?;
        let (mut cos, mut sin) = (Vec::with_capacity(len), Vec::with_capacity(len));
        for position in 0..tokens {
            for frequency in &frequencies {
                // The angle is rounded to f32 because the reference does so; at long range that matters.
                let angle = f64::from(frequency * position as f32);
                cos.push(angle.cos() as f32 * factor);
                sin.push(angle.sin() as f32 * factor);
            }
        }
        let table = |values| Tensor::from_vec(values, (tokens, half), device);
        Ok(Self { tokens, half, cos: table(cos)?, sin: table(sin)? })
    }

    /// The window length.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Cosines and sines, `(tokens, half)` each and times the attention factor: value `i` of a head is turned
    /// with value `i + half`, the rest of the head stays.
    pub fn tables(&self) -> (&Tensor, &Tensor) {
        (&self.cos, &self.sin)
    }

    /// Calls `f` with the tables on the CPU.
    pub(crate) fn with_rotation<R>(&self, f: impl FnOnce(Rotation) -> R) -> Result<R, DecoderError> {
        let (half, tokens) = (self.half, self.tokens);
        with_cpu_slice(&self.cos, |cos| with_cpu_slice(&self.sin, |sin| f(Rotation { cos, sin, half, tokens })))?
    }

    /// Rotates `x` `(windows, heads, tokens, head_dim)` by candle operations.
    pub(crate) fn rotate_composed(&self, x: &Tensor) -> Result<Tensor, DecoderError> {
        let (half, dim) = (self.half, x.dim(3)?);
        let (low, high) = (x.narrow(3, 0, half)?, x.narrow(3, half, half)?);
        let turn = |a: &Tensor, b: &Tensor| a.broadcast_mul(&self.cos)? + b.broadcast_mul(&self.sin)?;
        let mut parts = vec![turn(&low, &high.neg()?)?, turn(&high, &low)?];
        if dim > 2 * half {
            parts.push(x.narrow(3, 2 * half, dim - 2 * half)?);
        }
        Ok(Tensor::cat(&parts, 3)?)
    }
}
