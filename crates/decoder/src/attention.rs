//! Causal attention, optionally within a sliding window, in tiles of queries: the scores of one tile and one
//! head are all that exists at a time, never tokens × tokens × heads.

use candle_core::{D, DType, Tensor};
use lite_linalg::{Mat, Threads, gemm_into};
use rayon::prelude::*;

use crate::kernels::{self, Heads};
use crate::ops::{norm_composed, with_cpu_slice};
use crate::{DecoderError, GqaSpec, KvPart, KvTransform, NormSpec, QkvLayout, Role, Rope};

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
    pub(crate) q_norm: Option<(&'a NormSpec, &'a Tensor)>,
    pub(crate) k_norm: Option<(&'a NormSpec, &'a Tensor)>,
    /// What the cache makes of keys and values; `None`: they stay as they are.
    pub(crate) kv: Option<&'a dyn KvTransform>,
}

impl Inputs<'_> {
    fn projection(&self, role: Role) -> Result<&Tensor, DecoderError> {
        let found = self.projections.iter().find(|(r, _)| *r == role);
        found.map(|(_, x)| x).ok_or_else(|| DecoderError::input(format!("attention lacks its {role:?} projection")))
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
    let rotate = |role, columns: &[usize], norm: Option<(&NormSpec, &Tensor)>| {
        let weight = norm.map(|(_, weight)| with_cpu_slice(weight, <[f32]>::to_vec)).transpose()?;
        let norm = norm.zip(weight.as_deref()).map(|((norm, _), weight)| (weight, norm.eps));
        let x = inputs.projection(role)?;
        let stride = x.dim(1)?;
        with_cpu_slice(x, |data| {
            let heads = Heads { data, stride, columns, dim: spec.head_dim };
            rope.with_rotation(|rotation| kernels::rotate(rows, heads, rotation, norm))
        })?
    };
    let q = rotate(q_role, &q_columns, inputs.q_norm)?;
    let mut k = rotate(k_role, &k_columns, inputs.k_norm)?;
    let v = inputs.projection(v_role)?;
    let stride = v.dim(1)?;
    let out = with_cpu_slice(v, |data| {
        let v = Heads { data, stride, columns: &v_columns, dim: spec.head_dim };
        let Some(kv) = inputs.kv else { return attend(&q, &k, v, inputs.windows, rope.tokens(), spec) };
        kv.apply(KvPart::Keys, &mut k, spec.head_dim);
        let mut data = gathered(v, rows);
        kv.apply(KvPart::Values, &mut data, spec.head_dim);
        let columns: Vec<usize> = (0..spec.kv_heads).map(|head| head * spec.head_dim).collect();
        let v = Heads { data: &data, stride: spec.kv_heads * spec.head_dim, columns: &columns, dim: spec.head_dim };
        attend(&q, &k, v, inputs.windows, rope.tokens(), spec)
    })?;
    Ok(Tensor::from_vec(out, (rows, spec.heads * spec.head_dim), &candle_core::Device::Cpu)?)
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

/// Attention of `q` `(windows·tokens, heads·dim)` over `k` `(windows·tokens, kv_heads·dim)` and `v`.
fn attend(q: &[f32], k: &[f32], v: Heads, windows: usize, tokens: usize, spec: &GqaSpec) -> Vec<f32> {
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
            kernels::softmax_rows(scores, keys, &spans, &mut scale[..count]);
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
    // `(rows, heads, dim)` of q, k and v.
    let [q, k, v] = match spec.qkv {
        QkvLayout::Separate => {
            let part = |role, count| Ok::<_, DecoderError>(inputs.projection(role)?.reshape((rows, count, dim))?);
            [part(Role::Q, heads)?, part(Role::K, kv)?, part(Role::V, kv)?]
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
    let normed = |x: Tensor, norm: Option<(&NormSpec, &Tensor)>| match norm {
        Some((norm, weight)) => norm_composed(&x, norm, weight),
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
    let q = rope.rotate_composed(&by_head(normed(q, inputs.q_norm)?, heads)?)?;
    let k = rope.rotate_composed(&by_head(normed(k, inputs.k_norm)?, kv)?)?;
    let k = repeated(cached(KvPart::Keys, k)?)?;
    let v = repeated(cached(KvPart::Values, by_head(v, kv)?)?)?;
    let mut tiles = Vec::new();
    for first in (0..tokens).step_by(TILE) {
        let count = TILE.min(tokens - first);
        let (start, end) = (span(first, spec.window).0, first + count);
        let keys = k.narrow(2, start, end - start)?;
        let scores = (q.narrow(2, first, count)?.matmul(&keys.t()?)? * f64::from(spec.scale))?;
        let mask: Vec<f32> = (first..end)
            .flat_map(|position| {
                let (from, to) = span(position, spec.window);
                (start..end).map(move |key| if (from..to).contains(&key) { 0.0 } else { f32::NEG_INFINITY })
            })
            .collect();
        let mask = Tensor::from_vec(mask, (count, end - start), scores.device())?.to_dtype(DType::F32)?;
        let scores = scores.broadcast_add(&mask)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        tiles.push(weights.matmul(&v.narrow(2, start, end - start)?.contiguous()?)?);
    }
    let out = Tensor::cat(&tiles, 2)?;
    Ok(out.transpose(1, 2)?.contiguous()?.reshape((rows, heads * dim))?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::DecoderSpec;

    /// More than two tiles, the last one ragged.
    const TOKENS: usize = 2 * TILE + 37;
    const WINDOWS: usize = 2;

    struct Scaled {
        keys: f32,
        values: f32,
    }

    impl KvTransform for Scaled {
        fn apply(&self, part: KvPart, heads: &mut [f32], head_dim: usize) {
            assert_eq!((head_dim, heads.len() % head_dim), (8, 0));
            let factor = if part == KvPart::Keys { self.keys } else { self.values };
            heads.iter_mut().for_each(|v| *v *= factor);
        }
    }

    fn values(x: &Tensor) -> Vec<f32> {
        with_cpu_slice(x, <[f32]>::to_vec).unwrap()
    }

    /// The definition, in f64: rotation, scores of all visible keys, softmax, weighted sum.
    fn definition(inputs: &Inputs, spec: &GqaSpec, rope: &Rope) -> Vec<f64> {
        let (dim, group) = (spec.head_dim, spec.heads / spec.kv_heads);
        let projections: Vec<(Role, usize, Vec<f32>)> =
            inputs.projections.iter().map(|(role, x)| (*role, x.dim(1).unwrap(), values(x))).collect();
        let columns = spec.columns();
        let head = |part: usize, row: usize, head: usize| -> Vec<f64> {
            let (role, columns) = &columns[part];
            let (_, stride, data) = projections.iter().find(|(r, ..)| r == role).unwrap();
            data[row * stride + columns[head]..][..dim].iter().map(|v| f64::from(*v)).collect()
        };
        let turned = |part: usize, row: usize, index: usize, norm: Option<(&NormSpec, &Tensor)>| -> Vec<f64> {
            let mut x = head(part, row, index);
            if let Some((norm, weight)) = norm {
                let mean = x.iter().map(|v| v * v).sum::<f64>() / dim as f64;
                let factor = 1.0 / (mean + f64::from(norm.eps)).sqrt();
                x.iter_mut().zip(values(weight)).for_each(|(v, w)| *v *= factor * f64::from(w));
            }
            rope.with_rotation(|r| {
                let at = row % r.tokens * r.half;
                for i in 0..r.half {
                    let (c, s) = (f64::from(r.cos[at + i]), f64::from(r.sin[at + i]));
                    (x[i], x[i + r.half]) = (x[i] * c - x[i + r.half] * s, x[i + r.half] * c + x[i] * s);
                }
            })
            .unwrap();
            x
        };
        let mut out = Vec::new();
        for row in 0..WINDOWS * TOKENS {
            let (position, start) = (row % TOKENS, row / TOKENS * TOKENS);
            let first = spec.window.map_or(0, |window| (position + 1).saturating_sub(window));
            for h in 0..spec.heads {
                let q = turned(0, row, h, inputs.q_norm);
                let dot = |k: &[f64]| q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() / (dim as f64).sqrt();
                let keys = start + first..=row;
                let weights: Vec<f64> =
                    keys.clone().map(|key| dot(&turned(1, key, h / group, inputs.k_norm)).exp()).collect();
                let total: f64 = weights.iter().sum();
                let mut sum = vec![0f64; dim];
                for (key, weight) in keys.zip(weights) {
                    sum.iter_mut().zip(head(2, key, h / group)).for_each(|(s, v)| *s += weight / total * v);
                }
                out.extend(sum);
            }
        }
        out
    }

    #[test]
    fn tiles_and_composed_operations_agree_with_the_definition() {
        let device = Device::Cpu;
        for (arch, window, extra) in [
            ("LlamaForCausalLM", None, ""),
            ("Qwen3ForCausalLM", Some(50), ""),
            ("InternLM2ForCausalLM", Some(1), ""),
            ("Phi3ForCausalLM", Some(TILE + 3), r#", "partial_rotary_factor": 0.5"#),
        ] {
            let config = format!(
                r#"{{"architectures": ["{arch}"], "hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1,
                "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 4{extra}}}"#
            );
            let config: serde_json::Value = serde_json::from_str(&config).unwrap();
            let spec = DecoderSpec::from_config(config.as_object().unwrap()).unwrap();
            let rope = Rope::new(&spec, TOKENS, &device).unwrap();
            let crate::AttnSpec::Gqa(attn) = &spec.blocks[0].attn;
            let attn = GqaSpec { window, ..attn.clone() };
            let random = |columns| Tensor::randn(0f32, 1f32, (WINDOWS * TOKENS, columns), &device).unwrap();
            let projections: Vec<(Role, Tensor)> = match attn.qkv {
                QkvLayout::Separate => vec![(Role::Q, random(24)), (Role::K, random(8)), (Role::V, random(8))],
                QkvLayout::Stacked | QkvLayout::Grouped => vec![(Role::Qkv, random(40))],
            };
            let weights = [0, 1].map(|_| Tensor::rand(0.5f32, 2.0, 8, &device).unwrap());
            let inputs = Inputs {
                projections: &projections,
                windows: WINDOWS,
                q_norm: attn.q_norm.as_ref().map(|norm| (norm, &weights[0])),
                k_norm: attn.k_norm.as_ref().map(|norm| (norm, &weights[1])),
                kv: None,
            };
            let wanted = definition(&inputs, &attn, &rope);
            for found in [on_cpu(&inputs, &attn, &rope).unwrap(), composed(&inputs, &attn, &rope).unwrap()] {
                let found = values(&found);
                assert_eq!(found.len(), wanted.len());
                let worst = found.iter().zip(&wanted).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
                assert!(worst < 2e-5, "{arch}: {worst}");
            }
            // Values doubled by the cache double the outputs; doubled keys are a doubled scale of the scores.
            let doubled = Inputs { kv: Some(&Scaled { keys: 1.0, values: 2.0 }), ..inputs };
            let doubled_keys = Inputs { kv: Some(&Scaled { keys: 2.0, values: 1.0 }), ..inputs };
            let sharper = GqaSpec { scale: 2.0 * attn.scale, ..attn.clone() };
            let wanted_keys = values(&on_cpu(&inputs, &sharper, &rope).unwrap());
            for run in [on_cpu, composed] {
                let found = values(&run(&doubled, &attn, &rope).unwrap());
                let worst = found.iter().zip(&wanted).map(|(a, b)| (f64::from(*a) - 2.0 * b).abs()).fold(0.0, f64::max);
                assert!(worst < 4e-5, "{arch}, values: {worst}");
                let found = values(&run(&doubled_keys, &attn, &rope).unwrap());
                let worst = found.iter().zip(&wanted_keys).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < 4e-5, "{arch}, keys: {worst}");
            }
        }
    }
}
