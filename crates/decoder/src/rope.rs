use candle_core::{Device, Tensor};

use crate::kernels::Rotation;
use crate::ops::with_cpu_slice;
use crate::{DecoderError, DecoderSpec, GqaSpec, RopePairing, RopeSpec};

/// Longest table believed: 4 GiB of f32.
const MAX_TABLE: usize = 1 << 30;

/// Cosines and sines of the rotary embeddings of a decoder for windows of one length. The length matters: dynamic
/// scaling and LongRoPE choose their frequencies by it.
#[derive(Debug, Clone)]
pub struct Rope {
    tokens: usize,
    tables: RopeTables,
    /// Those of [`GqaSpec::local_rope`].
    local: Option<RopeTables>,
}

/// Cosines and sines of one rotary embedding.
#[derive(Debug, Clone)]
pub struct RopeTables {
    tokens: usize,
    half: usize,
    pairing: RopePairing,
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
        let local = spec.local_rope.as_ref().map(|rope| RopeTables::new(rope, tokens, device)).transpose()?;
        Ok(Self { tokens, tables: RopeTables::new(&spec.rope, tokens, device)?, local })
    }

    /// The window length.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The tables that this attention uses.
    ///
    /// # Errors
    /// If it belongs to another decoder, whose local layers have an embedding of their own.
    pub fn tables(&self, attn: &GqaSpec) -> Result<&RopeTables, DecoderError> {
        if !attn.local_rope {
            return Ok(&self.tables);
        }
        let missing = || DecoderError::input("a block with a local rotary embedding was given tables without one");
        self.local.as_ref().ok_or_else(missing)
    }
}

impl RopeTables {
    fn new(spec: &RopeSpec, tokens: usize, device: &Device) -> Result<Self, DecoderError> {
        let (frequencies, factor) = spec.frequencies(tokens);
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
        Ok(Self { tokens, half, pairing: spec.pairing, cos: table(cos)?, sin: table(sin)? })
    }

    /// Cosines `(tokens, half)`, times the attention factor: pair `i` of a head is turned, the rest of it stays.
    pub fn cos(&self) -> &Tensor {
        &self.cos
    }

    /// Sines, of the same shape.
    pub fn sin(&self) -> &Tensor {
        &self.sin
    }

    /// Which dimensions are pair `i`.
    pub fn pairing(&self) -> RopePairing {
        self.pairing
    }

    /// Calls `f` with the tables on the CPU.
    pub(crate) fn with_rotation<R>(&self, f: impl FnOnce(Rotation) -> R) -> Result<R, DecoderError> {
        let Self { tokens, half, pairing, .. } = *self;
        with_cpu_slice(&self.cos, |cos| {
            with_cpu_slice(&self.sin, |sin| f(Rotation { cos, sin, half, tokens, pairing }))
        })?
    }

    /// Rotates `x` `(windows, heads, tokens, head_dim)` by candle operations.
    pub(crate) fn rotate_composed(&self, x: &Tensor) -> Result<Tensor, DecoderError> {
        let (half, dim) = (self.half, x.dim(3)?);
        let turn = |a: &Tensor, b: &Tensor| a.broadcast_mul(&self.cos)? + b.broadcast_mul(&self.sin)?;
        let both = |low: &Tensor, high: &Tensor| -> Result<[Tensor; 2], DecoderError> {
            Ok([turn(low, &high.neg()?)?, turn(high, low)?])
        };
        let mut parts = match self.pairing {
            RopePairing::Halves => both(&x.narrow(3, 0, half)?, &x.narrow(3, half, half)?)?.to_vec(),
            RopePairing::Neighbours => {
                let (windows, heads, tokens, _) = x.dims4()?;
                let pairs = x.narrow(3, 0, 2 * half)?.contiguous()?.reshape((windows, heads, tokens, half, 2))?;
                let of = |i: usize| pairs.narrow(4, i, 1)?.squeeze(4)?.contiguous();
                let turned = both(&of(0)?, &of(1)?)?;
                vec![Tensor::stack(&turned, 4)?.reshape((windows, heads, tokens, 2 * half))?]
            }
        };
        if dim > 2 * half {
            parts.push(x.narrow(3, 2 * half, dim - 2 * half)?);
        }
        Ok(Tensor::cat(&parts, 3)?)
    }
}
