//! Where a block with experts parts its tokens: what its router sees, and what it decides.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use lite_decoder::{Block, Routing};

use crate::JobError;
use crate::expert_rows::CHUNK;
use crate::experts::score_roots;
use crate::fold::tensor;
use crate::hidden::HiddenStates;

/// One stream at the input of a block's experts.
pub(crate) struct Entrance {
    /// `(tokens, hidden)`: the input of the feed-forward.
    normed: HiddenStates,
    /// Which experts each token goes to.
    pub(crate) routing: Routing,
    hidden: usize,
    /// Tokens of all windows.
    pub(crate) tokens: usize,
}

impl Entrance {
    /// Nothing yet, with room in `normed` for `windows` windows.
    pub(crate) fn new(normed: HiddenStates, top_k: usize, hidden: usize) -> Self {
        let tokens = normed.windows() * normed.window_values() / hidden.max(1);
        Self { normed, routing: Routing::empty(top_k), hidden, tokens }
    }

    /// Adds the next windows, from window `first` on.
    pub(crate) fn push(&mut self, first: usize, normed: &Tensor, routing: Routing) -> Result<(), JobError> {
        self.routing.append(routing);
        self.normed.keep(first, normed)
    }

    /// Some tokens' inputs, `(rows, hidden)`.
    pub(crate) fn rows(&self, rows: &[u32], device: &Device) -> Result<Tensor, JobError> {
        tensor(self.normed.rows(rows, self.hidden)?, &[rows.len(), self.hidden], device)
    }

    /// The square roots of the router's scores of some experts, for every token: factors that weight rows by the scores.
    pub(crate) fn score_roots(
        &self,
        block: &Block,
        experts: impl Iterator<Item = u32>,
    ) -> Result<BTreeMap<u32, Vec<f32>>, JobError> {
        let mut roots: BTreeMap<u32, Vec<f32>> = experts.map(|e| (e, Vec::with_capacity(self.tokens))).collect();
        let Some(moe) = block.spec().moe().filter(|_| !roots.is_empty()) else { return Ok(roots) };
        let all: Vec<u32> = (0..self.tokens as u32).collect();
        for rows in all.chunks(CHUNK) {
            let scores = block.router_scores(&self.rows(rows, block.device())?)?;
            roots.iter_mut().for_each(|(e, roots)| roots.extend(score_roots(&scores, *e, moe.experts)));
        }
        Ok(roots)
    }
}
