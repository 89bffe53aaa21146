//! Causal attention, optionally within a sliding window, in tiles of queries: the scores of one tile and one
//! head are all that exists at a time, never tokens × tokens × heads.

use candle_core::{D, DType, Tensor};
use lite_linalg::{Mat, Threads, gemm_into};
use rayon::prelude::*;

use crate::kernels::{self, Heads};
use crate::norm::Norm;
use crate::ops::with_cpu_slice;
use crate::spec::LATENT_ATTENTION;
use crate::{AttnSpec, Block, DecoderError, GqaSpec, KvPart, KvTransform, NormKind, QkvLayout, Role, Rope, Stream};

/// Queries per tile: large enough for matrix products at full speed, small enough that little is computed
/// above the diagonal and that one window feeds all threads.
const TILE: usize = 128;

/// The keys that query `position` sees, as a range of positions.
fn span(position: usize, window: Option<usize>) -> (usize, usize) {
    (window.map_or(0, |window| (position + 1).saturating_sub(window)), position + 1)
}

/// What attention reads: the projections of `windows` windows, and the norms over heads.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    /// Projections `(windows·tokens, out)` by role.
    pub(crate) projections: &'a [(Role, Tensor)],
    pub(crate) windows: usize,
    pub(crate) q_norm: Option<Norm<'a>>,
    pub(crate) k_norm: Option<Norm<'a>>,
    /// `[heads]`, where the spec has them.
    pub(crate) sinks: Option<&'a Tensor>,
    /// What the cache makes of keys and values; `None`: they stay as they are.
    pub(crate) kv: Option<&'a dyn KvTransform>,
}

impl Inputs<'_> {
    fn projection(&self, role: Role) -> Result<&Tensor, DecoderError> {
        let found = self.projections.iter().find(|(r, _)| *r == role);
        found.map(|(_, x)| x).ok_or_else(|| DecoderError::input(format!("attention lacks its {role:?} projection")))
    }
}

impl Block {
    /// From the block's normalised input to the input of o. `see` is shown what lies between, where there is something,
    /// and gives what its linears read.
    pub(crate) fn attend(
        &self,
        normed: &Tensor,
        rope: &Rope,
        kv: Option<&dyn KvTransform>,
        see: &mut dyn FnMut(Stream, Tensor) -> Result<Tensor, DecoderError>,
    ) -> Result<Tensor, DecoderError> {
        let (rows, _) = normed.dims2()?;
        let tokens = rope.tokens().max(1);
        if rows == 0 || rows % tokens != 0 {
            let reason = format!("{rows} rows are not whole windows of {tokens} tokens");
            return Err(DecoderError::input(reason));
        }
        let windows = rows / tokens;
        let attn = match (&self.spec().attn, kv) {
            (AttnSpec::Gqa(attn), _) => attn,
            (AttnSpec::Mla(mla), None) => return self.latent_attention(mla, normed, rope, windows, see),
            (AttnSpec::Mla(_), Some(_)) => {
                return Err(DecoderError::Unimplemented {
                    block: self.spec().index,
                    part: LATENT_ATTENTION,
                    what: "quantizing the cache of keys and values is",
                    instead: "leave the cache in floats",
                });
            }
        };
        let inputs = Inputs {
            projections: &self.apply(Stream::AttnIn, normed)?,
            windows,
            q_norm: attn.q_norm.as_ref().map(|norm| self.tensors_of(norm)).transpose()?,
            k_norm: attn.k_norm.as_ref().map(|norm| self.tensors_of(norm)).transpose()?,
            sinks: attn.sinks.as_ref().map(|name| self.plain(name)).transpose()?,
            kv,
        };
        attention(&inputs, attn, rope, self.compute().is_composed())
    }
}

/// The heads' outputs: `(windows·tokens, heads·head_dim)`.
pub(crate) fn attention(
    inputs: &Inputs,
    spec: &GqaSpec,
    rope: &Rope,
    by_composition: bool,
) -> Result<Tensor, DecoderError> {
    if by_composition { composed(inputs, spec, rope) } else { on_cpu(inputs, spec, rope) }
}

fn on_cpu(inputs: &Inputs, spec: &GqaSpec, rope: &Rope) -> Result<Tensor, DecoderError> {
    let rows = inputs.windows * rope.tokens();
    let [(q_role, q_columns), (k_role, k_columns), (v_role, v_columns)] = spec.columns();
    let tables = rope.tables(spec)?;
    let rotate = |role, columns: &[usize], norm: Option<Norm>| {
        let whole;
        let (x, norm) = match norm {
            Some(norm) if over_all_heads(spec, &norm)? => {
                whole = norm.apply(inputs.projection(role)?, false)?;
                (&whole, None)
            }
            norm => (inputs.projection(role)?, norm),
        };
        let factors = norm.map(|norm| Ok::<_, DecoderError>((norm.factors()?, norm.spec.eps))).transpose()?;
        let norm = factors.as_ref().map(|(factors, eps)| (factors.as_slice(), *eps));
        let stride = x.dim(1)?;
        with_cpu_slice(x, |data| {
            let heads = Heads { data, stride, columns, dim: spec.head_dim };
            tables.with_rotation(|rotation| kernels::rotate(rows, heads, rotation, norm))
        })?
    };
    let q = rotate(q_role, &q_columns, inputs.q_norm)?;
    let mut k = rotate(k_role, &k_columns, inputs.k_norm)?;
    let v = inputs.projection(v_role)?;
    let stride = v.dim(1)?;
    let sinks = inputs.sinks.map(|sinks| with_cpu_slice(sinks, <[f32]>::to_vec)).transpose()?;
    let sinks = sinks.as_deref();
    let out = with_cpu_slice(v, |data| {
        let v = Heads { data, stride, columns: &v_columns, dim: spec.head_dim };
        let Some(kv) = inputs.kv else { return attend(&q, &k, v, sinks, inputs.windows, rope.tokens(), spec) };
        kv.apply(KvPart::Keys, &mut k, spec.head_dim);
        let mut data = gathered(v, rows);
        kv.apply(KvPart::Values, &mut data, spec.head_dim);
        let columns: Vec<usize> = (0..spec.kv_heads).map(|head| head * spec.head_dim).collect();
        let v = Heads { data: &data, stride: spec.kv_heads * spec.head_dim, columns: &columns, dim: spec.head_dim };
        attend(&q, &k, v, sinks, inputs.windows, rope.tokens(), spec)
    })?;
    Ok(Tensor::from_vec(out, (rows, spec.heads * spec.head_dim), &candle_core::Device::Cpu)?)
}

/// Whether a norm of queries or keys goes over the whole projection; an error if it is none that is implemented.
fn over_all_heads(spec: &GqaSpec, norm: &Norm) -> Result<bool, DecoderError> {
    match (spec.norm_all_heads, spec.qkv, norm.spec.kind) {
        (true, QkvLayout::Separate, _) => Ok(true),
        (false, _, NormKind::Rms | NormKind::RmsPlusOne) => Ok(false),
        _ => Err(DecoderError::tensor(&norm.spec.weight, "this kind of norm over heads is not implemented")),
    }
}

/// The heads alone, `(rows, heads·dim)`.
fn gathered(heads: Heads, rows: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(rows * heads.columns.len() * heads.dim);
    for row in 0..rows {
        for column in heads.columns {
            out.extend_from_slice(&heads.data[row * heads.stride + column..][..heads.dim]);
        }
    }
    out
}

/// Attention of `q` `(windows·tokens, heads·dim)` over `k` `(windows·tokens, kv_heads·dim)` and `v`, with `sinks` `[heads]`.
fn attend(
    q: &[f32],
    k: &[f32],
    v: Heads,
    sinks: Option<&[f32]>,
    windows: usize,
    tokens: usize,
    spec: &GqaSpec,
) -> Vec<f32> {
    let (heads, dim, group) = (spec.heads, spec.head_dim, spec.heads / spec.kv_heads);
    let (q_stride, k_stride) = (heads * dim, spec.kv_heads * dim);
    let mut out = vec![0f32; windows * tokens * q_stride];
    // One task per window and tile: its outputs are whole rows.
    let mut tasks: Vec<(usize, usize, &mut [f32])> = Vec::new();
    for (window, rows) in out.chunks_mut((tokens * q_stride).max(1)).enumerate() {
        tasks.extend(rows.chunks_mut(TILE * q_stride).enumerate().map(|(tile, rows)| (window, tile * TILE, rows)));
    }
    tasks.into_par_iter().with_max_len(1).for_each_init(Vec::new, |scores, (window, first, out)| {
        let count = out.len() / q_stride;
        // Keys that at least one query of the tile sees.
        let (start, end) = (span(first, spec.window).0, first + count);
        let keys = end - start;
        let spans: Vec<(usize, usize)> = (first..end)
            .map(|position| span(position, spec.window))
            .map(|(from, to)| (from - start, to - start))
            .collect();
        let mut scale = [0f32; TILE];
        scores.resize(count * keys, 0.0);
        let row = window * tokens;
        for head in 0..heads {
            let kv = head / group;
            let queries = Mat::window(q, (row + first) * q_stride + head * dim, count, dim, q_stride);
            let head_keys = Mat::window(k, (row + start) * k_stride + kv * dim, keys, dim, k_stride);
            gemm_into(scores, keys, 0.0, spec.scale, queries, head_keys.t(), Threads::One);
            if let Some(cap) = spec.softcap {
                kernels::softcap_rows(scores, keys, &spans, cap);
            }
            let sink = sinks.map(|sinks| sinks[head]);
            kernels::softmax_rows(scores, keys, &spans, sink, &mut scale[..count]);
            let values = Mat::window(v.data, (row + start) * v.stride + v.columns[kv], keys, dim, v.stride);
            let weights = Mat::new(scores, count, keys);
            gemm_into(&mut out[head * dim..], q_stride, 0.0, 1.0, weights, values, Threads::One);
            kernels::scale_rows(out, q_stride, head * dim, dim, &scale[..count]);
        }
    });
    out
}

/// [`attention`] by candle operations, for any device.
pub(crate) fn composed(inputs: &Inputs, spec: &GqaSpec, rope: &Rope) -> Result<Tensor, DecoderError> {
    let (windows, tokens) = (inputs.windows, rope.tokens());
    let (heads, kv, dim) = (spec.heads, spec.kv_heads, spec.head_dim);
    let group = heads / kv;
    let rows = windows * tokens;
    let mut norms = [inputs.q_norm, inputs.k_norm, None];
    // `(rows, heads, dim)` of q, k and v.
    let [q, k, v] = match spec.qkv {
        QkvLayout::Separate => {
            let mut part = |i: usize, role, count| -> Result<Tensor, DecoderError> {
                let x = inputs.projection(role)?;
                Ok(match norms[i] {
                    Some(norm) if over_all_heads(spec, &norm)? => {
                        norms[i] = None;
                        norm.composed(x)?.reshape((rows, count, dim))?
                    }
                    _ => x.reshape((rows, count, dim))?,
                })
            };
            [part(0, Role::Q, heads)?, part(1, Role::K, kv)?, part(2, Role::V, kv)?]
        }
        QkvLayout::Stacked => {
            let all = inputs.projection(Role::Qkv)?.reshape((rows, heads + 2 * kv, dim))?;
            [all.narrow(1, 0, heads)?, all.narrow(1, heads, kv)?, all.narrow(1, heads + kv, kv)?]
        }
        QkvLayout::Grouped => {
            let all = inputs.projection(Role::Qkv)?.reshape((rows, kv, group + 2, dim))?;
            let part = |start, len: usize| all.narrow(2, start, len)?.reshape((rows, kv * len, dim));
            [part(0, group)?, part(group, 1)?, part(group + 1, 1)?]
        }
    };
    let [q_norm, k_norm, _] = norms;
    let normed = |x: Tensor, norm: Option<Norm>| match norm {
        Some(norm) => over_all_heads(spec, &norm).and_then(|_| norm.composed(&x)),
        None => Ok(x),
    };
    // To `(windows, heads, tokens, dim)`.
    let by_head = |x: Tensor, count: usize| -> Result<Tensor, DecoderError> {
        Ok(x.reshape((windows, tokens, count, dim))?.transpose(1, 2)?.contiguous()?)
    };
    let repeated = |x: Tensor| -> Result<Tensor, DecoderError> {
        let x = x.unsqueeze(2)?.expand((windows, kv, group, tokens, dim))?;
        Ok(x.reshape((windows, heads, tokens, dim))?)
    };
    // A cache sees whole tokens, `(windows, tokens, heads, dim)`, as it does in `on_cpu`.
    let cached = |part, x: Tensor| -> Result<Tensor, DecoderError> {
        let Some(kv) = inputs.kv else { return Ok(x) };
        let x = x.transpose(1, 2)?.contiguous()?;
        let mut values = with_cpu_slice(&x, <[f32]>::to_vec)?;
        kv.apply(part, &mut values, dim);
        Ok(Tensor::from_vec(values, x.dims(), x.device())?.transpose(1, 2)?.contiguous()?)
    };
    let tables = rope.tables(spec)?;
    let q = tables.rotate_composed(&by_head(normed(q, q_norm)?, heads)?)?;
    let k = tables.rotate_composed(&by_head(normed(k, k_norm)?, kv)?)?;
    let k = repeated(cached(KvPart::Keys, k)?)?;
    let v = repeated(cached(KvPart::Values, by_head(v, kv)?)?)?;
    let mut tiles = Vec::new();
    for first in (0..tokens).step_by(TILE) {
        let count = TILE.min(tokens - first);
        let (start, end) = (span(first, spec.window).0, first + count);
        let keys = k.narrow(2, start, end - start)?;
        let scores = (q.narrow(2, first, count)?.matmul(&keys.t()?)? * f64::from(spec.scale))?;
        let scores = match spec.softcap {
            Some(cap) => ((scores / f64::from(cap))?.tanh()? * f64::from(cap))?,
            None => scores,
        };
        let mask: Vec<f32> = (first..end)
            .flat_map(|position| {
                let (from, to) = span(position, spec.window);
                (start..end).map(move |key| if (from..to).contains(&key) { 0.0 } else { f32::NEG_INFINITY })
            })
            .collect();
        let mask = Tensor::from_vec(mask, (count, end - start), scores.device())?.to_dtype(DType::F32)?;
        let mut scores = scores.broadcast_add(&mask)?;
        if let Some(sinks) = inputs.sinks {
            let sinks = sinks.reshape((1, heads, 1, 1))?.expand((windows, heads, count, 1))?;
            scores = Tensor::cat(&[&scores, &sinks.contiguous()?], 3)?;
        }
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        // Sinks are behind the keys, and have no values.
        let weights = weights.narrow(3, 0, end - start)?.contiguous()?;
        tiles.push(weights.matmul(&v.narrow(2, start, end - start)?.contiguous()?)?);
    }
    let out = Tensor::cat(&tiles, 2)?;
    Ok(out.transpose(1, 2)?.contiguous()?.reshape((rows, heads * dim))?)
}

#[cfg(test)]
#[path = "attention_tests.rs"]
mod tests;
