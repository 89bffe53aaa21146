//! Multi-head latent attention: makes queries, keys and values of the latents, as heads of one width, for the kernels
//! of [`crate::attention`].

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::attention::{Inputs, attention};
use crate::kernels::rows_per_task;
use crate::spec::LatentSpec;
use crate::{AttnSpec, Block, DecoderError, MlaSpec, Role, Rope, Stream, with_cpu_slice};

/// A piece of every head: `len` values from column `start + head · step` of the rows of `from`.
struct Piece<'a> {
    from: &'a Tensor,
    start: usize,
    /// 0: all heads share it.
    step: usize,
    len: usize,
}

/// Heads of `width` made of pieces, one after the other, then zeros: `(rows, heads · width)`.
fn heads_of(pieces: &[Piece], heads: usize, width: usize, composed: bool) -> Result<Tensor, DecoderError> {
    let Some(rows) = pieces.first().map(|piece| piece.from.dim(0)).transpose()? else {
        return Err(DecoderError::input("heads without parts were asked for"));
    };
    if composed {
        return by_composition(pieces, rows, heads, width);
    }
    let mut out = vec![0f32; rows * heads * width];
    let mut offset = 0;
    for piece in pieces {
        let stride = piece.from.dim(1)?;
        let task = rows_per_task(heads * width);
        with_cpu_slice(piece.from, |from| {
            let from = from.par_chunks(task * stride);
            out.par_chunks_mut(task * heads * width).zip(from).for_each(|(out, from)| {
                for (out, from) in out.chunks_exact_mut(heads * width).zip(from.chunks_exact(stride)) {
                    for (head, out) in out.chunks_exact_mut(width).enumerate() {
                        let start = piece.start + head * piece.step;
                        out[offset..offset + piece.len].copy_from_slice(&from[start..start + piece.len]);
                    }
                }
            });
        })?;
        offset += piece.len;
    }
    Ok(Tensor::from_vec(out, (rows, heads * width), &Device::Cpu)?)
}

/// [`heads_of`] by candle operations, for any device.
fn by_composition(pieces: &[Piece], rows: usize, heads: usize, width: usize) -> Result<Tensor, DecoderError> {
    let mut parts = Vec::with_capacity(pieces.len() + 1);
    for piece in pieces {
        parts.push(if piece.step == 0 {
            let one = piece.from.narrow(1, piece.start, piece.len)?;
            one.unsqueeze(1)?.expand((rows, heads, piece.len))?.contiguous()?
        } else {
            let by_head = piece.from.contiguous()?.reshape((rows, heads, piece.step))?;
            by_head.narrow(2, piece.start, piece.len)?.contiguous()?
        });
    }
    let used: usize = pieces.iter().map(|piece| piece.len).sum();
    if used < width
        && let Some(part) = parts.first()
    {
        parts.push(Tensor::zeros((rows, heads, width - used), DType::F32, part.device())?);
    }
    Ok(Tensor::cat(&parts, 2)?.contiguous()?.reshape((rows, heads * width))?)
}

impl Block {
    /// The latent attention of this block, if it has one.
    fn mla(&self) -> Result<&MlaSpec, DecoderError> {
        match &self.spec().attn {
            AttnSpec::Mla(mla) => Ok(mla),
            AttnSpec::Gqa(_) => Err(DecoderError::input(format!("block {} has no latents", self.spec().index))),
        }
    }

    /// The input of q_b ([`Stream::QLatent`]) that `normed` ([`Stream::AttnIn`]) leads to; `None` where queries are
    /// made directly.
    ///
    /// # Errors
    /// If the block's attention has no latents, or `normed` does not fit.
    pub fn q_latent(&self, normed: &Tensor) -> Result<Option<Tensor>, DecoderError> {
        let Some(latent) = &self.mla()?.q_latent else { return Ok(None) };
        self.latent_normed(&self.linear(Role::QA, normed)?, latent).map(Some)
    }

    /// The input of kv_b ([`Stream::KvLatent`]) that `normed` ([`Stream::AttnIn`]) leads to.
    ///
    /// # Errors
    /// As [`Block::q_latent`].
    pub fn kv_latent(&self, normed: &Tensor) -> Result<Tensor, DecoderError> {
        self.kv_latent_of(&self.linear(Role::KvA, normed)?)
    }

    fn kv_latent_of(&self, compressed: &Tensor) -> Result<Tensor, DecoderError> {
        let latent = &self.mla()?.kv_latent;
        self.latent_normed(&compressed.narrow(1, 0, latent.width)?.contiguous()?, latent)
    }

    fn latent_normed(&self, x: &Tensor, latent: &LatentSpec) -> Result<Tensor, DecoderError> {
        self.tensors_of(&latent.norm)?.apply(x, self.compute().is_composed())
    }

    /// The heads' outputs `(rows, heads · value)` of `windows` windows. `see` is shown the latents and gives what
    /// their linears read.
    pub(crate) fn latent_attention(
        &self,
        mla: &MlaSpec,
        normed: &Tensor,
        rope: &Rope,
        windows: usize,
        see: &mut dyn FnMut(Stream, Tensor) -> Result<Tensor, DecoderError>,
    ) -> Result<Tensor, DecoderError> {
        let composed = self.compute().is_composed();
        let MlaSpec { heads, nope, rope: rotated, value, .. } = *mla;
        let width = mla.head_width();
        let q = match self.q_latent(normed)? {
            Some(latent) => self.linear(Role::QB, &see(Stream::QLatent, latent)?)?,
            None => self.linear(Role::Q, normed)?,
        };
        let compressed = self.linear(Role::KvA, normed)?;
        let latent = see(Stream::KvLatent, self.kv_latent_of(&compressed)?)?;
        let kv = self.linear(Role::KvB, &latent)?;
        let (query, pair) = (nope + rotated, nope + value);
        let shared = mla.kv_latent.width;
        let q = [
            Piece { from: &q, start: nope, step: query, len: rotated },
            Piece { from: &q, start: 0, step: query, len: nope },
        ];
        let k = [
            Piece { from: &compressed, start: shared, step: 0, len: rotated },
            Piece { from: &kv, start: 0, step: pair, len: nope },
        ];
        let v = [Piece { from: &kv, start: nope, step: pair, len: value }];
        let projections = [
            (Role::Q, heads_of(&q, heads, width, composed)?),
            (Role::K, heads_of(&k, heads, width, composed)?),
            (Role::V, heads_of(&v, heads, width, composed)?),
        ];
        let inputs = Inputs { projections: &projections, windows, q_norm: None, k_norm: None, sinks: None, kv: None };
        let out = attention(&inputs, &mla.expanded(), rope, composed)?;
        if value == width {
            return Ok(out);
        }
        heads_of(&[Piece { from: &out, start: 0, step: width, len: value }], heads, value, composed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_made_of_pieces_in_both_ways() {
        // Two rows of two heads of three columns, and a piece that both heads share.
        let x = Tensor::arange(0f32, 12.0, &Device::Cpu).unwrap().reshape((2, 6)).unwrap();
        let y = Tensor::arange(100f32, 106.0, &Device::Cpu).unwrap().reshape((2, 3)).unwrap();
        let pieces = [Piece { from: &x, start: 1, step: 3, len: 2 }, Piece { from: &y, start: 2, step: 0, len: 1 }];
        let wanted = [[1.0, 2.0, 102.0, 0.0, 4.0, 5.0, 102.0, 0.0], [7.0, 8.0, 105.0, 0.0, 10.0, 11.0, 105.0, 0.0]];
        for composed in [false, true] {
            let found = heads_of(&pieces, 2, 4, composed).unwrap();
            assert_eq!(found.to_vec2::<f32>().unwrap(), wanted, "{composed}");
        }
        assert!(heads_of(&[], 2, 4, false).is_err());
    }
}
