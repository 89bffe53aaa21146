//! Causal attention and its gradient in tiles of queries; probabilities are computed again rather than kept.

use lite_linalg::{Mat, Threads, gemm_into};
use rayon::prelude::*;

use crate::kernels::{Softmax, attention_gradient, softcap, softcap_gradient, softmax};

/// Queries per tile: large enough for matrix products at full speed, small enough that scores stay in the L2 cache
/// and little is computed above the diagonal.
const TILE: usize = 128;

/// What attention reads: rotated `q` `(rows, heads·dim)` and `k` `(rows, kv_heads·dim)`, and `v` inside the rows of
/// the projection, head `h` at `projection[row · stride + v_columns[h]..][..dim]`.
#[derive(Clone, Copy)]
pub(crate) struct Heads<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) projection: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) v_columns: &'a [usize],
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) dim: usize,
    pub(crate) tokens: usize,
    /// Keys that a query sees, itself included; `None`: all before it.
    pub(crate) window: Option<usize>,
    pub(crate) scale: f32,
    /// Scores become `cap · tanh(score / cap)`.
    pub(crate) softcap: Option<f32>,
}

/// A tile of queries: positions `[first, end)` see keys from `start` on.
struct Tile {
    first: usize,
    end: usize,
    start: usize,
    /// Visible keys per query, counted from `start`.
    spans: Vec<(usize, usize)>,
}

/// Scores of one tile, and gradients towards them.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    slopes: Vec<f32>,
    /// Scores behind their cap, where there is one.
    capped: Vec<f32>,
}

impl<'a> Heads<'a> {
    fn tile(&self, first: usize) -> Tile {
        let end = (first + TILE).min(self.tokens);
        let from = |position: usize| self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let start = from(first);
        let spans = (first..end).map(|position| (from(position) - start, position + 1 - start)).collect();
        Tile { first, end, start, spans }
    }

    /// Rows `[from, to)` of one head of `data`, whose rows hold `count` heads.
    fn head(&self, data: &'a [f32], count: usize, head: usize, from: usize, to: usize) -> Mat<'a> {
        let stride = count * self.dim;
        Mat::window(data, from * stride + head * self.dim, to - from, self.dim, stride)
    }

    fn values(&self, head: usize, from: usize, to: usize) -> Mat<'a> {
        let start = from * self.stride + self.v_columns[head];
        Mat::window(self.projection, start, to - from, self.dim, self.stride)
    }

    /// `scale · q · kᵀ`, capped, of one head and tile of the window that starts at `row`.
    fn scores(&self, out: &mut Vec<f32>, tile: &Tile, row: usize, head: usize) {
        let (count, keys) = (tile.end - tile.first, tile.end - tile.start);
        out.resize(count * keys, 0.0);
        let q = self.head(self.q, self.heads, head, row + tile.first, row + tile.end);
        let kv = head / (self.heads / self.kv_heads);
        let k = self.head(self.k, self.kv_heads, kv, row + tile.start, row + tile.end);
        gemm_into(out, keys, 0.0, self.scale, q, k.t(), Threads::One);
        if let Some(cap) = self.softcap {
            softcap(out, keys, &tile.spans, cap);
        }
    }

    /// The heads' outputs `(rows, heads·dim)` into `out`, and a note per row and head into `notes`.
    pub(crate) fn forward(&self, out: &mut [f32], notes: &mut [Softmax]) {
        let (width, tokens, group) = (self.heads * self.dim, self.tokens, self.heads / self.kv_heads);
        let mut tasks = Vec::new();
        let windows = out.chunks_mut(tokens * width).zip(notes.chunks_mut(tokens * self.heads));
        for (window, (out, notes)) in windows.enumerate() {
            let tiles = out.chunks_mut(TILE * width).zip(notes.chunks_mut(TILE * self.heads)).enumerate();
            tasks.extend(tiles.map(|(tile, (out, notes))| (window * tokens, tile * TILE, out, notes)));
        }
        tasks.into_par_iter().with_max_len(1).for_each_init(Vec::new, |scores, (row, first, out, notes)| {
            let tile = self.tile(first);
            let keys = tile.end - tile.start;
            let mut head_notes = vec![Softmax::default(); tile.spans.len()];
            for head in 0..self.heads {
                self.scores(scores, &tile, row, head);
                softmax(scores, keys, &tile.spans, &mut head_notes);
                let weights = Mat::new(scores, tile.spans.len(), keys);
                let values = self.values(head / group, row + tile.start, row + tile.end);
                gemm_into(&mut out[head * self.dim..], width, 0.0, 1.0, weights, values, Threads::One);
                for (note, all) in head_notes.iter().zip(notes.chunks_exact_mut(self.heads)) {
                    all[head] = *note;
                }
            }
        });
    }

    /// From `d_out` `(rows, heads·dim)` the gradients towards `q`, `k` and `v`, each `(windows, heads, tokens, dim)`.
    pub(crate) fn backward(&self, notes: &[Softmax], d_out: &[f32], dq: &mut [f32], dk: &mut [f32], dv: &mut [f32]) {
        let (tokens, dim, group) = (self.tokens, self.dim, self.heads / self.kv_heads);
        let one = tokens * dim;
        let tasks = dq.par_chunks_mut(group * one).zip(dk.par_chunks_mut(one)).zip(dv.par_chunks_mut(one));
        tasks.with_max_len(1).enumerate().for_each_init(Scratch::default, |scratch, (index, ((dq, dk), dv))| {
            let (row, kv) = (index / self.kv_heads * tokens, index % self.kv_heads);
            dk.fill(0.0);
            dv.fill(0.0);
            for first in (0..tokens).step_by(TILE) {
                let tile = self.tile(first);
                for (member, dq) in dq.chunks_exact_mut(one).enumerate() {
                    let head = kv * group + member;
                    self.tile_backward(scratch, &tile, row, head, notes, d_out, dq, dk, dv);
                }
            }
        });
    }

    fn tile_backward(
        &self,
        scratch: &mut Scratch,
        tile: &Tile,
        row: usize,
        head: usize,
        notes: &[Softmax],
        d_out: &[f32],
        dq: &mut [f32],
        dk: &mut [f32],
        dv: &mut [f32],
    ) {
        let (count, keys, dim) = (tile.end - tile.first, tile.end - tile.start, self.dim);
        let kv = head / (self.heads / self.kv_heads);
        let Scratch { scores, slopes, capped } = scratch;
        let width = self.heads * dim;
        let d_out = Mat::window(d_out, (row + tile.first) * width + head * dim, count, dim, width);
        self.scores(scores, tile, row, head);
        if self.softcap.is_some() {
            capped.clear();
            capped.extend_from_slice(scores);
        }
        slopes.resize(count * keys, 0.0);
        let values = self.values(kv, row + tile.start, row + tile.end);
        gemm_into(slopes, keys, 0.0, 1.0, d_out, values.t(), Threads::One);
        let notes: Vec<Softmax> =
            (row + tile.first..row + tile.end).map(|row| notes[row * self.heads + head]).collect();
        attention_gradient(scores, slopes, keys, &tile.spans, &notes);
        if let Some(cap) = self.softcap {
            softcap_gradient(slopes, capped, cap);
        }
        let (weights, slopes) = (Mat::new(scores, count, keys), Mat::new(slopes, count, keys));
        gemm_into(&mut dv[tile.start * dim..], dim, 1.0, 1.0, weights.t(), d_out, Threads::One);
        let q = self.head(self.q, self.heads, head, row + tile.first, row + tile.end);
        gemm_into(&mut dk[tile.start * dim..], dim, 1.0, self.scale, slopes.t(), q, Threads::One);
        let k = self.head(self.k, self.kv_heads, kv, row + tile.start, row + tile.end);
        gemm_into(&mut dq[tile.first * dim..], dim, 0.0, self.scale, slopes, k, Threads::One);
    }
}
