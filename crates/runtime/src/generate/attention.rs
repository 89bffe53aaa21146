//! Attention of new tokens over the cache.

use lite_decoder::GqaSpec;
use lite_linalg::{Mat, Threads, gemm_into};
use rayon::prelude::*;

use super::cache::BlockCache;
use super::ops::{softcap, softmax};

/// Queries per task.
const TILE: usize = 64;

/// The heads' outputs `(tokens, heads·head_dim)` of rotated queries `q` of that shape, whose tokens are the last of those
/// in the cache; `sinks` `[heads]` are one more score each.
pub(super) fn attend(spec: &GqaSpec, sinks: Option<&[f32]>, cache: &BlockCache, q: &[f32], past: usize) -> Vec<f32> {
    let (dim, group) = (spec.head_dim, spec.heads / spec.kv_heads);
    let width = spec.heads * dim;
    let tokens = q.len() / width;
    let tiles = tokens.div_ceil(TILE);
    // One task per key head and tile: `(queries of the tile, group·dim)`.
    let parts: Vec<Vec<f32>> = (0..spec.kv_heads * tiles)
        .into_par_iter()
        .map(|task| {
            let (kv, first) = (task / tiles, task % tiles * TILE);
            let count = TILE.min(tokens - first);
            let mut out = vec![0f32; count * group * dim];
            let from = |row: usize| spec.window.map_or(0, |window| (past + row + 1).saturating_sub(window));
            let (start, end) = (from(first), past + first + count);
            let keys = Mat::window(&cache.keys[kv], start * dim, end - start, dim, dim);
            let values = Mat::window(&cache.values[kv], start * dim, end - start, dim, dim);
            // The heads that share these keys, one after the other; of a single token all of them are one matrix.
            let (products, rows) = if count == 1 { (1, group) } else { (group, count) };
            let mut scores = vec![0f32; rows * (end - start)];
            for product in 0..products {
                let offset = first * width + (kv * group + product) * dim;
                let queries = Mat::window(q, offset, rows, dim, if count == 1 { dim } else { width });
                gemm_into(&mut scores, end - start, 0.0, spec.scale, queries, keys.t(), Threads::One);
                for (row, scores) in scores.chunks_exact_mut(end - start).enumerate() {
                    let member = if count == 1 { row } else { product };
                    let sink = sinks.map(|sinks| sinks[kv * group + member]);
                    let row = if count == 1 { first } else { first + row };
                    let (low, high) = (from(row) - start, past + row + 1 - start);
                    scores[..low].fill(0.0);
                    scores[high..].fill(0.0);
                    if let Some(cap) = spec.softcap {
                        softcap(&mut scores[low..high], cap);
                    }
                    softmax(&mut scores[low..high], sink);
                }
                let weights = Mat::new(&scores, rows, end - start);
                let stride = if count == 1 { dim } else { group * dim };
                gemm_into(&mut out[product * dim..], stride, 0.0, 1.0, weights, values, Threads::One);
            }
            out
        })
        .collect();
    let mut out = vec![0f32; tokens * width];
    for (task, part) in parts.iter().enumerate() {
        let (kv, first) = (task / tiles, task % tiles * TILE);
        for (row, part) in part.chunks_exact(group * dim).enumerate() {
            out[(first + row) * width + kv * group * dim..][..group * dim].copy_from_slice(part);
        }
    }
    out
}
