//! Error-aware solving: the float and the quantized model side by side.
//!
//! Every input is gathered after everything before it was quantized, q/k/v first, then o, gate and up, down, and the
//! linears are asked to reproduce the float model's outputs on what the quantized model feeds them
//! (`lite_gptq::error_aware_target`). A block's forward pass is cut at its inputs, and each stream keeps its residual
//! and, for a moment, its heads' outputs, so the whole costs one and a half forward passes per stream and not one per
//! input.

use std::sync::atomic::Ordering;

use lite_decoder::{Block, InputId, Role, Stream};
use lite_stats::CrossStats;
use lite_tune::{Side, TuneData, TuneError, TuneLinear, TuneSettings, tune_block};

use crate::batches::{Batch, in_order};
use crate::calibrate::{Pass, Sink, by_input, role};
use crate::experts::is_experts;
use crate::hidden::HiddenStates;
use crate::lanes::{Lane, Lanes, Walk};
use crate::layer::{Drift, Solved, solve_input};
use crate::replay::Replayed;
use crate::run::{LayerClock, Runner};
use crate::source::ModelSource;
use crate::{Event, JobError, QuantSite};

/// A block with its solved linears in place, and those linears.
type SolvedBlock<'p> = (Block, Vec<(&'p QuantSite, Solved)>);

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
        let mut lanes = Lanes {
            float: Lane { residual: hidden, heads: HiddenStates::in_memory(windows, 0) },
            quantized: Lane {
                residual: self.store("hidden-quantized", windows, pass.spec.hidden)?,
                heads: HiddenStates::in_memory(windows, 0),
            },
            middle: None,
            stats: None,
        };
        self.copy(&lanes.float.residual, &mut lanes.quantized.residual)?;
        sink.load_states(&mut [&mut lanes.float.residual, &mut lanes.quantized.residual])?;
        let mut clock = LayerClock::new(self.observer, pass.spec.blocks.len());
        for block_spec in &pass.spec.blocks {
            let index = block_spec.index;
            clock.started(index);
            if let Some(replayed) = self.replay(pass, source, block_spec, sink, &clock)? {
                if self.pass_both(pass, index, replayed, &mut lanes, &clock)? {
                    sink.save_states(index, &[&lanes.float.residual, &lanes.quantized.residual])?;
                }
                continue;
            }
            let mut original = self.load_block(pass, source, index)?;
            if !self.plan.folds[index].is_empty() {
                clock.step(index, "calibrate");
                // Folding leaves the function alone: the folded block stands for the float model too.
                let hidden = &mut lanes.quantized.residual;
                let (gathered, folded) = self.gather_and_fold(pass, &mut original, block_spec, hidden, sink, &clock)?;
                if let Some(routed) = &gathered.routed {
                    self.fold_routed(pass, &mut original, routed, folded, sink)?;
                }
            }
            self.calibrate_cache(pass, &original, &lanes.quantized.residual, sink)?;
            let (coded, solved) = self.solve_block(pass, index, &original, &mut lanes, &clock)?;
            let mut errors: Vec<f64> = solved.iter().filter_map(|(_, solved)| solved.error).collect();
            for (site, solved) in &solved {
                self.finish_site(site, solved, sink)?;
            }
            drop(solved);
            if block_spec.moe().is_some() {
                errors.extend(self.solve_experts(pass, &original, coded, &mut lanes, sink, &clock)?);
            }
            sink.finish_block(index)?;
            if index + 1 < pass.spec.blocks.len() {
                sink.save_states(index, &[&lanes.float.residual, &lanes.quantized.residual])?;
            }
            clock.done(index, &errors);
        }
        Ok(())
    }

    /// Moves both lanes behind a replayed block, unless they are already, and ends the block; returns whether they moved.
    fn pass_both(
        &self,
        pass: &Pass<'_>,
        index: usize,
        replayed: Replayed<'_>,
        lanes: &mut Lanes,
        clock: &LayerClock<'_>,
    ) -> Result<bool, JobError> {
        let Some(original) = &replayed.block else {
            return self.pass_replayed(pass, index, replayed, &mut lanes.quantized.residual, clock);
        };
        if original.spec().moe().is_none() {
            self.propagate(&mut lanes.float.residual, pass, original)?;
            return self.pass_replayed(pass, index, replayed, &mut lanes.quantized.residual, clock);
        }
        clock.step(index, "propagate");
        let mut coded = original.clone();
        for (site, weights) in replayed.linears.iter().filter(|(site, _)| !is_experts(site)) {
            self.place(&mut coded, site, &weights.dequantize())?;
        }
        let walk = self.walk(pass, index);
        self.fit(&mut lanes.float.heads, "heads", walk.heads)?;
        self.fit(&mut lanes.quantized.heads, "heads-quantized", walk.heads)?;
        let work = |lanes: &Lanes, batch: Batch| {
            let float = walk.advance(Stream::AttnOut, original, &lanes.float, batch, false)?;
            Ok((float, walk.advance(Stream::AttnOut, &coded, &lanes.quantized, batch, false)?))
        };
        let windows = lanes.float.residual.windows();
        in_order(lanes, self.batches(windows), work, |lanes, (first, _), (float, quantized)| {
            self.go_on()?;
            lanes.float.keep(first, &float)?;
            lanes.quantized.keep(first, &quantized)
        })?;
        self.pass_experts(pass, original, coded, &replayed.linears, lanes)?;
        clock.done(index, &replayed.errors);
        Ok(true)
    }

    /// How blocks are walked through.
    fn walk<'a>(&'a self, pass: &'a Pass<'_>, index: usize) -> Walk<'a> {
        Walk {
            rope: &pass.rope,
            hidden: pass.spec.hidden,
            heads: width(pass, index, Role::O),
            seqlen: self.plan.seqlen,
            device: &self.plan.device,
        }
    }

    /// Solves the linears of one block and moves both streams behind it; where a block has experts, those of its
    /// attention, and both streams up to the heads' outputs.
    fn solve_block(
        &self,
        pass: &Pass<'_>,
        index: usize,
        original: &Block,
        lanes: &mut Lanes,
        clock: &LayerClock<'_>,
    ) -> Result<SolvedBlock<'_>, JobError> {
        let experts = original.spec().moe().is_some();
        let mut coded = original.clone();
        let mut done = Vec::new();
        let groups = by_input(self.plan, index);
        let windows = lanes.float.residual.windows();
        let last_block = index + 1 == pass.spec.blocks.len();
        let walk = self.walk(pass, index);
        self.fit(&mut lanes.float.heads, "heads", walk.heads)?;
        self.fit(&mut lanes.quantized.heads, "heads-quantized", walk.heads)?;
        if self.plan.memory.middle > 0 && !experts {
            let mut middle = lanes.middle.take().unwrap_or_else(|| HiddenStates::in_memory(windows, 0));
            self.fit(&mut middle, "middle", width(pass, index, Role::Down))?;
            lanes.middle = Some(middle);
        }
        let tune = self.plan.solver.tune && !experts;
        let before = if tune {
            let mut copy = self.store("block-input", windows, pass.spec.hidden)?;
            self.copy(&lanes.quantized.residual, &mut copy)?;
            Some(copy)
        } else {
            None
        };
        let attention = [Stream::AttnIn, Stream::QLatent, Stream::KvLatent, Stream::AttnOut];
        let mlp: &[Stream] = if experts { &[] } else { &[Stream::MlpIn, Stream::MlpMid] };
        for stream in attention.iter().chain(mlp).copied() {
            let input = InputId { block: index, stream };
            let sites =
                groups.iter().find(|(id, _)| *id == input).map(|(_, sites)| sites.as_slice()).unwrap_or_default();
            if sites.is_empty() && matches!(stream, Stream::QLatent | Stream::KvLatent) {
                // Nothing reads it, or nothing that is quantized; the lanes need nothing of it.
                continue;
            }
            clock.step(index, "calibrate");
            let by_outputs = by_outputs(stream, sites, original);
            lanes.stats = sites.first().map(|site| {
                CrossStats::new(site.in_features, if by_outputs { site.out_features } else { site.in_features })
            });
            let work = |lanes: &Lanes, batch: Batch| {
                let float = || walk.advance(stream, original, &lanes.float, batch, true);
                let quantized = || walk.advance(stream, &coded, &lanes.quantized, batch, false);
                let (float, quantized) = rayon::join(float, quantized);
                Ok((float?, quantized?))
            };
            in_order(lanes, self.batches(windows), work, |lanes, (first, _), (float, quantized)| {
                self.go_on()?;
                lanes.float.keep(first, &float)?;
                lanes.quantized.keep(first, &quantized)?;
                let Some(x) = quantized.input else { return Ok(()) };
                if let (Some(middle), Stream::MlpMid) = (&mut lanes.middle, stream) {
                    middle.keep(first, &x)?;
                }
                let other = if by_outputs { float.output } else { float.input };
                if let (Some(stats), Some(other)) = (&mut lanes.stats, other) {
                    stats.update(&other, &x)?;
                }
                Ok(())
            })?;
            let Some(mut stats) = lanes.stats.take() else { continue };
            stats.finish()?;
            let channels = stats.input.broken_channels();
            if channels > 0 {
                let (input, total) = (format!("{stream:?}"), stats.input.in_features);
                return Err(lite_stats::StatsError::NotFinite { block: index, input, channels, total }.into());
            }
            clock.step(index, "solve");
            // At the very first input both streams are one: there is no drift to make up for.
            let drift = match (index > 0 || stream != Stream::AttnIn, by_outputs) {
                (false, _) => Drift::None,
                (true, false) => Drift::Inputs(stats.cross()),
                (true, true) => Drift::Outputs(stats.cross()),
            };
            let weights = self.weights(original, sites)?;
            let solved = solve_input(&weights, stats.input.gram(), drift, self.plan)?;
            for (site, solved) in sites.iter().zip(solved) {
                self.place(&mut coded, site, &solved.quantized.dequantize())?;
                done.push((*site, solved));
            }
        }
        if let Some(before) = before {
            clock.step(index, "tune");
            let data = BlockData { input: &before, target: &lanes.float.residual };
            let tuned = self.tune(pass, index, original, &mut done, &data)?;
            self.observer.event(Event::Tuned { block: index, before: tuned.0, after: tuned.1, kept: tuned.2 });
            for (site, solved) in &done {
                self.place(&mut coded, site, &solved.quantized.dequantize())?;
            }
            // All linears may have moved: the whole block runs again on what it was fed.
            lanes.quantized.residual = before;
        }
        // The last block's outputs feed nothing.
        if last_block || experts {
            return Ok((coded, done));
        }
        clock.step(index, "propagate");
        if tune {
            self.propagate(&mut lanes.quantized.residual, pass, &coded)?;
        } else {
            let work = |lanes: &Lanes, batch: Batch| walk.finish(&coded, lanes, batch);
            in_order(lanes, self.batches(windows), work, |lanes, (first, _), after| {
                self.go_on()?;
                lanes.quantized.residual.keep(first, &after)
            })?;
        }
        Ok((coded, done))
    }

    /// Gives `store` this width; one that has it already is used again.
    fn fit(&self, store: &mut HiddenStates, name: &str, width: usize) -> Result<(), JobError> {
        if store.window_values() != width * self.plan.seqlen {
            *store = self.store(name, store.windows(), width)?;
        }
        Ok(())
    }

    /// All windows of `from`.
    fn copy(&self, from: &HiddenStates, to: &mut HiddenStates) -> Result<(), JobError> {
        for (first, count) in self.batches(from.windows()) {
            to.write(first, &from.read(first, count)?)?;
        }
        Ok(())
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

/// Whether the drift at an input is gathered from the float linear's outputs, which the forward pass makes anyway:
/// for down, N·K instead of K² per token, a third for most models.
fn by_outputs(stream: Stream, sites: &[&QuantSite], original: &Block) -> bool {
    stream == Stream::MlpMid
        && original.bias(Role::Down).is_none()
        && matches!(sites, [site] if site.out_features < site.in_features)
}

/// Input channels of a linear of a block.
fn width(pass: &Pass<'_>, index: usize, role: Role) -> usize {
    pass.spec.blocks[index].site(role).map_or(0, |site| site.in_features)
}
