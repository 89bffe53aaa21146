//! Both models' states beside each other, and how a block is walked through input by input.

use candle_core::{Device, Tensor};
use lite_decoder::{Block, Rope, Stream};
use lite_stats::CrossStats;

use crate::JobError;
use crate::batches::Batch;
use crate::hidden::HiddenStates;

/// One model's states.
pub(crate) struct Lane {
    /// `(tokens, hidden)`: the residual stream.
    pub(crate) residual: HiddenStates,
    /// `(tokens, heads)`: outputs of the heads, between attention and o.
    pub(crate) heads: HiddenStates,
}

/// Both models' states, and what is being gathered.
pub(crate) struct Lanes {
    pub(crate) float: Lane,
    pub(crate) quantized: Lane,
    /// `(tokens, intermediate)`: the quantized model's input of down, if there is room for it.
    pub(crate) middle: Option<HiddenStates>,
    pub(crate) stats: Option<CrossStats>,
}

/// What a lane made of one batch.
#[derive(Default)]
pub(crate) struct Step {
    /// The input that was asked for.
    pub(crate) input: Option<Tensor>,
    /// The new residual stream, if it moved.
    pub(crate) residual: Option<Tensor>,
    /// The outputs of the heads, if they are new.
    pub(crate) heads: Option<Tensor>,
    /// The output of the last linear.
    pub(crate) output: Option<Tensor>,
}

impl Lane {
    pub(crate) fn keep(&mut self, first: usize, step: &Step) -> Result<(), JobError> {
        if let Some(residual) = &step.residual {
            self.residual.keep(first, residual)?;
        }
        if let Some(heads) = &step.heads {
            self.heads.keep(first, heads)?;
        }
        Ok(())
    }
}

/// A block on its way through the windows.
#[derive(Clone, Copy)]
pub(crate) struct Walk<'a> {
    pub(crate) rope: &'a Rope,
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) seqlen: usize,
    pub(crate) device: &'a Device,
}

impl Walk<'_> {
    pub(crate) fn rows(&self, store: &HiddenStates, batch: Batch, width: usize) -> Result<Tensor, JobError> {
        store.tensor(batch, &[batch.1 * self.seqlen, width], self.device)
    }

    /// The input `stream` of one batch, from what the lane kept, and what the next input needs. `last` moves the lane
    /// behind the block at its last input, and gives the output of the last linear too.
    pub(crate) fn advance(
        &self,
        stream: Stream,
        block: &Block,
        lane: &Lane,
        batch: Batch,
        last: bool,
    ) -> Result<Step, JobError> {
        let residual = self.rows(&lane.residual, batch, self.hidden)?;
        Ok(match stream {
            Stream::AttnIn => Step { input: Some(block.attn_in(&residual)?), ..Step::default() },
            Stream::QLatent => Step { input: block.q_latent(&block.attn_in(&residual)?)?, ..Step::default() },
            Stream::KvLatent => Step { input: Some(block.kv_latent(&block.attn_in(&residual)?)?), ..Step::default() },
            Stream::AttnOut => {
                let heads = block.attn_out(&block.attn_in(&residual)?, self.rope)?;
                Step { input: Some(heads.clone()), heads: Some(heads), ..Step::default() }
            }
            Stream::MlpIn => {
                let residual = block.after_attn(&residual, &self.rows(&lane.heads, batch, self.heads)?)?;
                Step { input: Some(block.mlp_in(&residual)?), residual: Some(residual), ..Step::default() }
            }
            Stream::MlpMid => {
                let middle = block.mlp_mid(&block.mlp_in(&residual)?)?;
                let mut step = Step { input: Some(middle.clone()), ..Step::default() };
                if last {
                    let (after, output) = block.after_mlp_with_output(&residual, &middle)?;
                    (step.residual, step.output) = (Some(after), Some(output));
                }
                step
            }
            // Experts are gathered one by one.
            _ => Step::default(),
        })
    }

    /// The quantized lane behind the block, once down is solved too.
    pub(crate) fn finish(&self, block: &Block, lanes: &Lanes, batch: Batch) -> Result<Tensor, JobError> {
        let residual = self.rows(&lanes.quantized.residual, batch, self.hidden)?;
        let middle = match &lanes.middle {
            Some(middle) => self.rows(middle, batch, middle.window_values() / self.seqlen)?,
            None => block.mlp_mid(&block.mlp_in(&residual)?)?,
        };
        Ok(block.after_mlp(&residual, &middle)?)
    }
}
