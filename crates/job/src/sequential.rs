//! Error-aware solving: the float and the quantized model side by side.
//!
//! Every input is gathered after everything before it was quantized, q/k/v first, then o, gate and up, down, and the
//! linears are asked to reproduce the float model's outputs on what the quantized model feeds them
//! (`lite_gptq::error_aware_target`). A block's forward pass is cut at its inputs, and each stream keeps its residual
//! and, for a moment, its heads' outputs, so the whole costs one and a half forward passes per stream and not one per
//! input.

use std::sync::atomic::Ordering;

use candle_core::Tensor;
use lite_decoder::{Block, InputId, Stream, with_cpu_slice};
use lite_stats::CrossStats;
use lite_tune::{Side, TuneData, TuneError, TuneLinear, TuneSettings, tune_block};

use crate::calibrate::{Pass, Sink, by_input, role};
use crate::hidden::HiddenStates;
use crate::layer::{Solved, solve_input};
use crate::run::{LayerClock, Runner};
use crate::source::ModelSource;
use crate::{Event, JobError, QuantSite};

/// One model's states.
struct Lane {
    /// `(tokens, hidden)`: the residual stream.
    residual: HiddenStates,
    /// `(tokens, heads)`: outputs of the heads, between attention and o.
    heads: Option<HiddenStates>,
}

impl Runner<'_> {
    /// Solves block after block; `hidden` are the embedded windows, where both streams begin.
    pub(crate) fn sequential(
        &self,
        pass: &Pass<'_>,
        source: &ModelSource<'_>,
        hidden: HiddenStates,
        sink: &mut Sink<'_>,
    ) -> Result<(), JobError> {
        let windows = hidden.windows();
        let mut copy = self.store("hidden-quantized", windows, pass.spec.hidden)?;
        for (first, count) in self.batches(windows) {
            copy.write(first, &hidden.read(first, count)?)?;
        }
        let mut float = Lane { residual: hidden, heads: None };
        let mut quantized = Lane { residual: copy, heads: None };
        let mut clock = LayerClock::new(self.observer, pass.spec.blocks.len());
        for block_spec in &pass.spec.blocks {
            let index = block_spec.index;
            clock.started(index);
            let mut original = self.load_block(pass, source, index)?;
            if !self.plan.folds[index].is_empty() {
                clock.step(index, "calibrate");
                // Folding leaves the function alone: the folded block stands for the float model too.
                self.gather_and_fold(pass, &mut original, block_spec, &mut quantized.residual, sink, &clock)?;
            }
            let solved = self.solve_block(pass, index, &original, &mut float, &mut quantized, &clock)?;
            let errors: Vec<f64> = solved.iter().filter_map(|(_, solved)| solved.error).collect();
            for (site, solved) in &solved {
                self.finish_site(site, solved, sink)?;
            }
            clock.done(index, &errors);
        }
        Ok(())
    }

    /// Solves the linears of one block and moves both streams behind it.
    fn solve_block(
        &self,
        pass: &Pass<'_>,
        index: usize,
        original: &Block,
        float: &mut Lane,
        quantized: &mut Lane,
        clock: &LayerClock<'_>,
    ) -> Result<Vec<(&QuantSite, Solved)>, JobError> {
        let mut coded = original.clone();
        let mut done = Vec::new();
        let groups = by_input(self.plan, index);
        let windows = float.residual.windows();
        let heads = heads_width(pass, index);
        let before = if self.plan.solver.tune {
            let mut copy = self.store("block-input", windows, pass.spec.hidden)?;
            for (first, count) in self.batches(windows) {
                copy.write(first, &quantized.residual.read(first, count)?)?;
            }
            Some(copy)
        } else {
            None
        };
        float.heads = Some(self.store("heads", windows, heads)?);
        quantized.heads = Some(self.store("heads-quantized", windows, heads)?);
        for stream in [Stream::AttnIn, Stream::AttnOut, Stream::MlpIn, Stream::MlpMid] {
            clock.step(index, "calibrate");
            let input = InputId { block: index, stream };
            let sites =
                groups.iter().find(|(id, _)| *id == input).map(|(_, sites)| sites.as_slice()).unwrap_or_default();
            let mut stats = sites.first().map(|site| CrossStats::new(site.in_features));
            for (first, count) in self.batches(windows) {
                self.go_on()?;
                let at = Place { first, count, heads };
                let x = self.advance(pass, stream, original, float, at, true)?;
                let y = self.advance(pass, stream, &coded, quantized, at, false)?;
                if let Some(stats) = &mut stats {
                    stats.update(&x, &y)?;
                }
            }
            let Some(mut stats) = stats else { continue };
            stats.finish();
            let channels = stats.input.broken_channels();
            if channels > 0 {
                let (input, total) = (format!("{stream:?}"), stats.input.in_features);
                return Err(lite_stats::StatsError::NotFinite { block: index, input, channels, total }.into());
            }
            clock.step(index, "solve");
            // At the very first input both streams are one: there is no drift to make up for.
            let cross = (index > 0 || stream != Stream::AttnIn).then(|| stats.cross());
            let weights = self.weights(original, sites)?;
            let solved = solve_input(&weights, stats.input.gram(), cross, self.plan)?;
            for (site, solved) in sites.iter().zip(solved) {
                self.place(&mut coded, site, &solved.quantized.dequantize())?;
                done.push((*site, solved));
            }
        }
        if let Some(before) = before {
            clock.step(index, "tune");
            let data = BlockData { input: &before, target: &float.residual };
            let tuned = self.tune(pass, index, original, &mut done, &data)?;
            self.observer.event(Event::Tuned { block: index, before: tuned.0, after: tuned.1, kept: tuned.2 });
            for (site, solved) in &done {
                self.place(&mut coded, site, &solved.quantized.dequantize())?;
            }
            // All linears may have moved: the whole block runs again on what it was fed.
            quantized.residual = before;
            clock.step(index, "propagate");
            self.propagate(&mut quantized.residual, pass, &coded)?;
            return Ok(done);
        }
        clock.step(index, "propagate");
        for (first, count) in self.batches(windows) {
            self.go_on()?;
            let residual = self.rows(&quantized.residual, first, count, pass.spec.hidden)?;
            let middle = coded.mlp_mid(&coded.mlp_in(&residual)?)?;
            keep(&mut quantized.residual, first, &coded.after_mlp(&residual, &middle)?)?;
        }
        Ok(done)
    }

    /// Tunes the solved linears of a block against the float block; returns the held-out error before and after, and
    /// whether the tuned ones were kept.
    fn tune(
        &self,
        pass: &Pass<'_>,
        index: usize,
        original: &Block,
        done: &mut [(&QuantSite, Solved)],
        data: &BlockData<'_>,
    ) -> Result<(f64, f64, bool), JobError> {
        let mut linears = Vec::new();
        for (site, solved) in done.iter_mut() {
            let target = match solved.target.take() {
                Some(target) => target,
                None => self.weights(original, &[*site])?.swap_remove(0).1,
            };
            linears.push(TuneLinear { role: role(site)?, quantized: solved.quantized.clone(), target });
        }
        let settings = TuneSettings { seed: self.recipe.calib.seed, ..TuneSettings::default() };
        let cancel = || self.cancel.load(Ordering::Relaxed);
        let outcome = match tune_block(original, linears, &pass.rope, data, &settings, &cancel) {
            Ok(outcome) => outcome,
            Err(TuneError::Cancelled) => return Err(JobError::Interrupted(self.recipe.work_dir.clone())),
            Err(error) => return Err(JobError::Tune { block: index, reason: error.to_string() }),
        };
        for ((_, solved), tuned) in done.iter_mut().zip(outcome.linears) {
            solved.quantized = tuned.quantized;
        }
        Ok((outcome.held_out_before, outcome.held_out_after, outcome.kept))
    }

    /// The input `stream` of one batch, from what the lane kept; keeps what the next input needs. `last` moves the lane
    /// behind the block at its last input.
    fn advance(
        &self,
        pass: &Pass<'_>,
        stream: Stream,
        block: &Block,
        lane: &mut Lane,
        at: Place,
        last: bool,
    ) -> Result<Tensor, JobError> {
        let residual = self.rows(&lane.residual, at.first, at.count, pass.spec.hidden)?;
        Ok(match stream {
            Stream::AttnIn => block.attn_in(&residual)?,
            Stream::AttnOut => {
                let heads = block.attn_out(&block.attn_in(&residual)?, &pass.rope)?;
                if let Some(store) = &mut lane.heads {
                    keep(store, at.first, &heads)?;
                }
                heads
            }
            Stream::MlpIn => {
                let kept = lane
                    .heads
                    .as_ref()
                    .ok_or_else(|| JobError::Input("the heads' outputs were not kept".to_owned()))?;
                let heads = self.rows(kept, at.first, at.count, at.heads)?;
                let residual = block.after_attn(&residual, &heads)?;
                keep(&mut lane.residual, at.first, &residual)?;
                block.mlp_in(&residual)?
            }
            Stream::MlpMid => {
                let middle = block.mlp_mid(&block.mlp_in(&residual)?)?;
                if last {
                    keep(&mut lane.residual, at.first, &block.after_mlp(&residual, &middle)?)?;
                }
                middle
            }
        })
    }

    /// `(tokens of count windows, width)`.
    fn rows(&self, store: &HiddenStates, first: usize, count: usize, width: usize) -> Result<Tensor, JobError> {
        let shape = [count * self.plan.seqlen, width];
        crate::fold::tensor(store.read(first, count)?, &shape, &self.plan.device)
    }
}

/// The hidden states around a block, for tuning.
struct BlockData<'a> {
    input: &'a HiddenStates,
    target: &'a HiddenStates,
}

impl TuneData for BlockData<'_> {
    fn windows(&self) -> usize {
        self.input.windows()
    }

    fn read(
        &self,
        side: Side,
        first: usize,
        count: usize,
    ) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
        let store = match side {
            Side::Input => self.input,
            Side::Target => self.target,
        };
        Ok(store.read(first, count)?)
    }
}

/// One batch.
#[derive(Clone, Copy)]
struct Place {
    first: usize,
    count: usize,
    heads: usize,
}

fn keep(store: &mut HiddenStates, first: usize, values: &Tensor) -> Result<(), JobError> {
    with_cpu_slice(values, |values| store.write(first, values))?
}

/// Width of the heads' outputs of a block.
fn heads_width(pass: &Pass<'_>, index: usize) -> usize {
    pass.spec.blocks[index].sites.iter().find(|s| s.input.stream == Stream::AttnOut).map_or(0, |s| s.in_features)
}
