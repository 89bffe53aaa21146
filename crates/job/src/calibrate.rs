//! The block loop of a calibrated run.

use std::collections::BTreeMap;

use candle_core::Tensor;
use lite_calib::Windows;
use lite_decoder::{
    Block, BlockSpec, DecoderError, DecoderSpec, Fold, InputId, NoTap, Rope, Stream, Tap, WeightSource,
};
use lite_model::{CheckpointWriter, Dtype};
use lite_quant::{ScaleDtype, Weights};
use lite_stats::{BlockStats, StatsTap};

use crate::batches::Batch;
use crate::check::{Expected, encode_edit};
use crate::fold::{Edit, missing, round_biased_norms, tensor, to_vec};
use crate::hidden::HiddenStates;
use crate::journal::Journal;
use crate::layer::{Drift, Folded, Solved, fold_block, folded_gram, solve_input};
use crate::routed::Routed;
use crate::run::{LayerClock, Runner};
use crate::source::ModelSource;
use crate::{JobError, Method, Plan, QuantSite, SiteReport};

/// Largest change of a block's float output that folding may cause: f32 rounding, with room.
const FOLD_TOLERANCE: f64 = 1e-4;

/// Where results go as they are made.
pub(crate) struct Sink<'a> {
    pub(crate) writer: &'a CheckpointWriter,
    pub(crate) expected: &'a mut Expected,
    /// By module.
    pub(crate) reports: BTreeMap<String, SiteReport>,
    /// What is finished; `None` where a run has nothing to resume.
    pub(crate) journal: Option<&'a mut Journal>,
    /// The block that the hidden states are behind already.
    pub(crate) behind: Option<usize>,
}

impl Sink<'_> {
    /// The reports, in the order of the plan.
    pub(crate) fn into_reports(mut self, plan: &Plan) -> Vec<SiteReport> {
        let report = |site: &QuantSite| {
            self.reports.remove(&site.module).unwrap_or_else(|| SiteReport::new(site, crate::check::Outcome::default()))
        };
        plan.sites.iter().map(report).collect()
    }
}

/// What was gathered at the inputs of one block.
pub(crate) struct Gathered {
    pub(crate) stats: BlockStats,
    /// What is known of the experts behind a router; their statistics are made one expert at a time.
    pub(crate) routed: Option<Routed>,
}

/// What every block of a run shares.
pub(crate) struct Pass<'a> {
    pub(crate) spec: &'a DecoderSpec,
    pub(crate) rope: Rope,
    pub(crate) storage: BTreeMap<&'a str, ScaleDtype>,
}

impl Pass<'_> {
    /// The float type a tensor has in the output.
    pub(crate) fn storage(&self, name: &str) -> ScaleDtype {
        self.storage.get(name).copied().unwrap_or(ScaleDtype::F32)
    }
}

impl Runner<'_> {
    /// Block by block, each fed with the outputs of the quantized blocks before it.
    pub(crate) fn calibrated(
        &self,
        spec: &DecoderSpec,
        windows: &Windows,
        writer: &CheckpointWriter,
        expected: &mut Expected,
        journal: Option<&mut Journal>,
    ) -> Result<Vec<SiteReport>, JobError> {
        let source = ModelSource::new(self.checkpoint, spec);
        let mut hidden = self.store("hidden", windows.tokens.len(), spec.hidden)?;
        for (i, window) in windows.tokens.iter().enumerate() {
            self.go_on()?;
            hidden.write(i, &lite_runtime::embed(spec, &source, window)?)?;
        }
        self.checkpoint.release([spec.embed.weight.as_str()]);
        let rope = Rope::new(spec, self.plan.seqlen, &self.plan.device)?;
        let pass = Pass { spec, rope, storage: storage_types(self.plan) };
        let mut sink = Sink { writer, expected, reports: BTreeMap::new(), journal, behind: None };
        if matches!(self.plan.method, Method::SmoothQuant { .. }) || self.recipe.calib.if_needed {
            self.observed(&pass, &source, hidden, &mut sink)?;
        } else if self.plan.solver.error_aware {
            self.sequential(&pass, &source, hidden, &mut sink)?;
        } else {
            self.in_parallel(&pass, &source, hidden, &mut sink)?;
        }
        Ok(sink.into_reports(self.plan))
    }

    /// All inputs of a block outside of experts are gathered in one pass, then their linears are solved; then expert after
    /// expert.
    fn in_parallel(
        &self,
        pass: &Pass<'_>,
        source: &ModelSource<'_>,
        mut hidden: HiddenStates,
        sink: &mut Sink<'_>,
    ) -> Result<(), JobError> {
        sink.load_states(&mut [&mut hidden])?;
        let mut clock = LayerClock::new(self.observer, pass.spec.blocks.len());
        for block_spec in &pass.spec.blocks {
            let index = block_spec.index;
            clock.started(index);
            if let Some(replayed) = self.replay(pass, source, block_spec, sink, &clock)? {
                if self.pass_replayed(pass, index, replayed, &mut hidden, &clock)? {
                    sink.save_states(index, &[&hidden])?;
                }
                continue;
            }
            let mut block = self.load_block(pass, source, index)?;
            clock.step(index, "calibrate");
            let (gathered, folded) = self.gather_and_fold(pass, &mut block, block_spec, &mut hidden, sink, &clock)?;
            clock.step(index, "round");
            let mut errors = self.solve_gathered(index, &mut block, &gathered.stats, &folded, sink)?;
            if let Some(routed) = &gathered.routed {
                errors.extend(self.solve_routed(pass, &mut block, routed, folded, sink)?);
            }
            drop(gathered);
            self.calibrate_cache(pass, &block, &hidden, sink)?;
            sink.finish_block(index)?;
            // The last block's outputs feed nothing.
            if index + 1 < pass.spec.blocks.len() {
                clock.step(index, "propagate");
                self.propagate(&mut hidden, pass, &block)?;
                sink.save_states(index, &[&hidden])?;
            }
            clock.done(index, &errors);
        }
        Ok(())
    }

    /// Solves and writes the linears that read the inputs in `stats`, and puts the result into `block`; returns their
    /// relative errors.
    pub(crate) fn solve_gathered(
        &self,
        index: usize,
        block: &mut Block,
        stats: &BlockStats,
        folded: &Folded,
        sink: &mut Sink<'_>,
    ) -> Result<Vec<f64>, JobError> {
        let mut errors = Vec::new();
        for (input, sites) in by_input(self.plan, index) {
            if matches!(input.stream, Stream::ExpertIn(_) | Stream::ExpertMid(_)) {
                continue;
            }
            self.go_on()?;
            // One Gram matrix is copied at a time.
            let gram = folded_gram(stats, folded, input)
                .ok_or_else(|| JobError::Input(format!("no statistics were gathered for {input}")))?;
            let weights = self.weights(block, &sites)?;
            let solved = solve_input(&weights, &gram, Drift::None, self.plan)?;
            drop(weights);
            errors.extend(self.place_solved(block, &sites, &solved, sink)?);
        }
        Ok(errors)
    }

    /// Writes solved linears and puts them into `block`; returns their relative errors.
    pub(crate) fn place_solved(
        &self,
        block: &mut Block,
        sites: &[&QuantSite],
        solved: &[Solved],
        sink: &mut Sink<'_>,
    ) -> Result<Vec<f64>, JobError> {
        for (site, solved) in sites.iter().zip(solved) {
            self.place(block, site, &solved.quantized.dequantize())?;
            self.finish_site(site, solved, sink)?;
        }
        Ok(solved.iter().filter_map(|solved| solved.error).collect())
    }

    /// Reads a block and lets go of its pages.
    pub(crate) fn load_block(
        &self,
        pass: &Pass<'_>,
        source: &ModelSource<'_>,
        index: usize,
    ) -> Result<Block, JobError> {
        let mut block = Block::load(pass.spec, index, source, &self.plan.device)?;
        round_biased_norms(&mut block, &|name| pass.storage(name))?;
        let names: Vec<String> =
            pass.spec.tensors().into_iter().filter(|t| t.block == Some(index)).map(|t| t.name).collect();
        source.release(&names);
        Ok(block)
    }

    /// Runs all windows for the statistics of every input outside of experts, folds, and asserts that folding changed
    /// nothing.
    pub(crate) fn gather_and_fold(
        &self,
        pass: &Pass<'_>,
        block: &mut Block,
        block_spec: &BlockSpec,
        hidden: &mut HiddenStates,
        sink: &mut Sink<'_>,
        clock: &LayerClock<'_>,
    ) -> Result<(Gathered, Folded), JobError> {
        let mut tap = StatsTap::without_experts(block_spec);
        let entrance = match block_spec.moe() {
            Some(moe) => Some(self.observe_entrance(hidden, pass, block, moe, &mut tap)?),
            None => {
                self.observe(hidden, pass, block, &mut tap)?;
                None
            }
        };
        let stats = tap.finish()?;
        let first = self.windows(hidden, 0, 1, pass.spec.hidden)?;
        let routed = entrance.map(|entrance| self.route(block, entrance)).transpose()?;
        let folded = self.fold_gathered(pass, block, block_spec, &stats, &first, sink, clock)?;
        let routed = routed.map(|routed| routed.behind(block_spec.index, &folded));
        Ok((Gathered { stats, routed }, folded))
    }

    /// Finds scales, folds all but experts' own linears, asserts on `probe` (`(1, tokens, hidden)`) that folding changed
    /// nothing, and writes the vectors that changed.
    pub(crate) fn fold_gathered(
        &self,
        pass: &Pass<'_>,
        block: &mut Block,
        block_spec: &BlockSpec,
        stats: &BlockStats,
        probe: &Tensor,
        sink: &mut Sink<'_>,
        clock: &LayerClock<'_>,
    ) -> Result<Folded, JobError> {
        let mut folded = Folded::default();
        let outside = |fold: &&Fold| !matches!(fold.input.stream, Stream::ExpertMid(_));
        let mut folds = self.plan.folds[block_spec.index].iter().filter(outside).peekable();
        if folds.peek().is_none() {
            return Ok(folded);
        }
        clock.step(block_spec.index, "search");
        let before = block.forward(probe, &pass.rope, &mut NoTap)?;
        fold_block(block, stats, folds, self.plan, &|name| pass.storage(name), &mut folded)?;
        let after = block.forward(probe, &pass.rope, &mut NoTap)?;
        check_fold(block_spec.index, probe, &before, &after)?;
        self.write_edits(&folded.edits, sink)?;
        sink.record_folded(&folded);
        Ok(folded)
    }

    pub(crate) fn write_edits(&self, edits: &[Edit], sink: &mut Sink<'_>) -> Result<(), JobError> {
        for edit in edits {
            let data = encode_edit(self.plan, &edit.tensor, &edit.values)?;
            sink.expected.tensor(&edit.tensor, &data);
            sink.writer.write(&edit.tensor, &data)?;
        }
        Ok(())
    }

    /// The float weights of `sites`, in order.
    pub(crate) fn weights<'s>(
        &self,
        block: &Block,
        sites: &[&'s QuantSite],
    ) -> Result<Vec<(&'s QuantSite, Vec<f32>)>, JobError> {
        let weight = |site: &&'s QuantSite| {
            let role = role(site)?;
            Ok((*site, to_vec(block.weight(role).ok_or_else(|| missing(role))?)?))
        };
        sites.iter().map(weight).collect()
    }

    /// Puts dequantized weights into `block`.
    pub(crate) fn place(&self, block: &mut Block, site: &QuantSite, values: &[f32]) -> Result<(), JobError> {
        let shape = [site.out_features, site.in_features];
        let device = block.device().clone();
        Ok(block.set_weight(role(site)?, tensor(values.to_vec(), &shape, &device)?)?)
    }

    /// Writes a solved linear and notes how it went.
    pub(crate) fn finish_site(&self, site: &QuantSite, solved: &Solved, sink: &mut Sink<'_>) -> Result<(), JobError> {
        let weights = Weights::Int(solved.quantized.clone());
        self.finish_linear(site, &weights, None, solved.outcome(), sink)
    }

    /// Room for one vector of `width` per calibration token, in memory or in a file.
    pub(crate) fn store(&self, name: &str, windows: usize, width: usize) -> Result<HiddenStates, JobError> {
        let window_values = self.plan.seqlen * width;
        if self.plan.memory.spooled {
            HiddenStates::in_file(&self.work.spool_file(name), windows, window_values)
        } else {
            Ok(HiddenStates::in_memory(windows, window_values))
        }
    }

    /// `(count, tokens, width)` of the windows from `first` on.
    pub(crate) fn windows(
        &self,
        store: &HiddenStates,
        first: usize,
        count: usize,
        width: usize,
    ) -> Result<Tensor, JobError> {
        store.tensor((first, count), &[count, self.plan.seqlen, width], &self.plan.device)
    }

    /// Shows `tap` the inputs of all linears of `block`, for all windows, in their order.
    pub(crate) fn observe(
        &self,
        hidden: &HiddenStates,
        pass: &Pass<'_>,
        block: &Block,
        tap: &mut impl Tap,
    ) -> Result<(), JobError> {
        // One batch at a time: an input is let go as soon as the tap has seen it.
        for (first, count) in self.batches(hidden.windows()) {
            self.go_on()?;
            block.observe(&self.windows(hidden, first, count, pass.spec.hidden)?, &pass.rope, tap)?;
        }
        Ok(())
    }

    /// Replaces the hidden states of all windows by what `block` makes of them.
    pub(crate) fn propagate(&self, hidden: &mut HiddenStates, pass: &Pass<'_>, block: &Block) -> Result<(), JobError> {
        for (first, count) in self.batches(hidden.windows()) {
            self.go_on()?;
            let x = self.windows(hidden, first, count, pass.spec.hidden)?;
            hidden.keep(first, &block.forward(&x, &pass.rope, &mut NoTap)?)?;
        }
        Ok(())
    }

    /// First window and number of windows of each batch.
    pub(crate) fn batches(&self, windows: usize) -> impl Iterator<Item = Batch> + use<> {
        let batch = self.plan.batch;
        (0..windows).step_by(batch).map(move |first| (first, batch.min(windows - first)))
    }
}

/// The role of a linear of a known decoder.
pub(crate) fn role(site: &QuantSite) -> Result<lite_decoder::Role, JobError> {
    let known = site.site.map(|id| id.role);
    known.ok_or_else(|| JobError::Input(format!("`{}` has no place in a known decoder", site.module)))
}

/// The linears of a block that are quantized, by the input they read, in the order of execution.
pub(crate) fn by_input(plan: &Plan, block: usize) -> Vec<(InputId, Vec<&QuantSite>)> {
    let mut groups: Vec<(InputId, Vec<&QuantSite>)> = Vec::new();
    let Some(spec) = &plan.spec else { return groups };
    for site in plan.sites.iter().filter(|s| s.block == block) {
        let Some(input) = site.site.and_then(|id| spec.site(id)).map(|s| s.input) else { continue };
        match groups.iter_mut().find(|(id, _)| *id == input) {
            Some((_, sites)) => sites.push(site),
            None => groups.push((input, vec![site])),
        }
    }
    groups
}

/// The float type of each tensor that is written.
pub(crate) fn storage_types(plan: &Plan) -> BTreeMap<&str, ScaleDtype> {
    let dtype = |dtype: Dtype| match dtype {
        Dtype::F16 => ScaleDtype::F16,
        Dtype::BF16 => ScaleDtype::BF16,
        _ => ScaleDtype::F32,
    };
    plan.tensors.iter().flat_map(|row| &row.outputs).map(|o| (o.name.as_str(), dtype(o.dtype))).collect()
}

/// A block's float output must not change by folding.
pub(crate) fn check_fold(block: usize, input: &Tensor, before: &Tensor, after: &Tensor) -> Result<(), JobError> {
    let norms = || -> Result<(f64, f64), candle_core::Error> {
        let square = |t: Tensor| t.sqr()?.sum_all()?.to_scalar::<f32>().map(f64::from);
        Ok((square((after - before)?)?, square((before - input)?)?))
    };
    let (change, size) = norms().map_err(DecoderError::from)?;
    let found = if size > 0.0 { (change / size).sqrt() } else { change.sqrt() };
    if found <= FOLD_TOLERANCE {
        return Ok(());
    }
    Err(JobError::Fold { block, found, allowed: FOLD_TOLERANCE })
}
