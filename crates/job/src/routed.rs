//! The experts of a block in the ways that keep one stream: one after the other, so that only one expert's statistics are
//! in memory, whatever their number.

use std::collections::BTreeMap;

use candle_core::Tensor;
use lite_decoder::{Block, DecoderError, Fold, InputId, MoeSpec, Stream, Tap};
use lite_stats::{BlockStats, InputStats, StatsError};

use crate::calibrate::{Pass, Sink, by_input, check_fold};
use crate::entrance::Entrance;
use crate::expert_rows::CHUNK;
use crate::experts::{pick, weighted_rows};
use crate::fold::tensor;
use crate::hidden::HiddenStates;
use crate::layer::{Drift, Folded, fold_block, folded_gram, nearest, solve_input};
use crate::poor::PoorExperts;
use crate::run::Runner;
use crate::{ExpertPolicy, JobError, QuantSite};

/// Rows on which folding an expert is checked.
const PROBE_ROWS: usize = 64;

/// What is known of a block's experts before any of them is looked at.
pub(crate) struct Routed {
    entrance: Entrance,
    poor: PoorExperts,
    /// What all tokens are weighted by for an expert that few reach.
    roots: BTreeMap<u32, Vec<f32>>,
    /// What the folded block divides the experts' input by, if it was folded since.
    divisors: Option<Vec<f32>>,
}

impl Routed {
    /// Takes note of what folding did to the experts' input.
    pub(crate) fn behind(mut self, block: usize, folded: &Folded) -> Self {
        self.divisors = folded.scales.get(&InputId { block, stream: Stream::MlpIn }).cloned();
        self
    }

    /// The tokens that stand for those of an expert.
    fn members(&self, expert: u32) -> Vec<u32> {
        match self.roots.get(&expert) {
            Some(_) => (0..self.entrance.tokens as u32).collect(),
            None => self.entrance.routing.rows(expert).0,
        }
    }
}

/// Whose statistics are wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Both,
    /// Those of down's input.
    Mid,
}

impl Runner<'_> {
    /// Shows `tap` the inputs outside of experts, for all windows, and keeps what the router sees.
    pub(crate) fn observe_entrance(
        &self,
        hidden: &HiddenStates,
        pass: &Pass<'_>,
        block: &Block,
        moe: &MoeSpec,
        tap: &mut impl Tap,
    ) -> Result<Entrance, JobError> {
        let store = self.store("experts-in", hidden.windows(), pass.spec.hidden)?;
        let mut entrance = Entrance::new(store, moe.top_k, pass.spec.hidden);
        for (first, count) in self.batches(hidden.windows()) {
            self.go_on()?;
            let x = self.windows(hidden, first, count, pass.spec.hidden)?;
            let normed = block.observe_entrance(&x, &pass.rope, tap)?;
            entrance.push(first, &normed, block.route(&normed)?)?;
        }
        Ok(entrance)
    }

    /// Which experts are poor, and what stands for their tokens. `block` is as it was when `entrance` was gathered.
    pub(crate) fn route(&self, block: &Block, entrance: Entrance) -> Result<Routed, JobError> {
        let spec = block.spec();
        let experts = spec.moe().map_or(0, |moe| moe.experts);
        let poor = self.poor_experts(spec.index, &entrance.routing.counts(experts))?;
        let roots = entrance.score_roots(block, poor.weighted())?;
        Ok(Routed { entrance, poor, roots, divisors: None })
    }

    /// Folds, solves and writes the experts of `block`, whose other folds are in `folded`, and puts the result into it;
    /// returns the linears' relative errors.
    pub(crate) fn solve_routed(
        &self,
        pass: &Pass<'_>,
        block: &mut Block,
        routed: &Routed,
        mut folded: Folded,
        sink: &mut Sink<'_>,
    ) -> Result<Vec<f64>, JobError> {
        let index = block.spec().index;
        let experts = block.spec().moe().map_or(0, |moe| moe.experts) as u32;
        let groups: BTreeMap<InputId, Vec<&QuantSite>> = by_input(self.plan, index).into_iter().collect();
        let counts = routed.entrance.routing.counts(experts as usize);
        let written = folded.edits.len();
        let mut errors = Vec::new();
        for (expert, tokens) in (0..experts).zip(counts) {
            self.go_on()?;
            let quantized = [Stream::ExpertIn(expert), Stream::ExpertMid(expert)]
                .iter()
                .any(|stream| groups.contains_key(&InputId { block: index, stream: *stream }));
            if !quantized && self.own_folds(index, expert).next().is_none() {
                continue;
            }
            let stats = self.expert_statistics(block, routed, expert, Wanted::Both)?;
            self.fold_expert(pass, block, routed, expert, &stats, &mut folded)?;
            let poor = routed.poor.of(Some(expert));
            for stream in [Stream::ExpertIn(expert), Stream::ExpertMid(expert)] {
                let input = InputId { block: index, stream };
                let Some(sites) = groups.get(&input) else { continue };
                let weights = self.weights(block, sites)?;
                // Gate and up were gathered behind the fold.
                let gram = match stream {
                    Stream::ExpertIn(_) => stats.get(input).map(|stats| stats.gram().to_vec()),
                    _ => folded_gram(&stats, &folded, input),
                };
                let gram = gram.ok_or_else(|| JobError::Input(format!("no statistics were gathered for {input}")))?;
                let mut solved = match poor {
                    Some(poor) if poor.policy == ExpertPolicy::Nearest => nearest(&weights, self.plan)?,
                    _ => solve_input(&weights, &gram, Drift::None, self.plan)?,
                };
                for solved in &mut solved {
                    solved.tokens = Some(tokens as u64);
                    solved.fallback = poor.map(|poor| poor.words()).or(solved.fallback.take());
                }
                errors.extend(self.place_solved(block, sites, &solved, sink)?);
            }
        }
        self.write_edits(&folded.edits[written..], sink)?;
        sink.record_folded(&folded);
        Ok(errors)
    }

    /// Folds the experts of `block`, whose other folds are in `folded`, without solving them.
    pub(crate) fn fold_routed(
        &self,
        pass: &Pass<'_>,
        block: &mut Block,
        routed: &Routed,
        mut folded: Folded,
        sink: &mut Sink<'_>,
    ) -> Result<(), JobError> {
        let index = block.spec().index;
        let experts = block.spec().moe().map_or(0, |moe| moe.experts) as u32;
        let written = folded.edits.len();
        for expert in (0..experts).filter(|expert| self.own_folds(index, *expert).next().is_some()) {
            self.go_on()?;
            let stats = self.expert_statistics(block, routed, expert, Wanted::Mid)?;
            self.fold_expert(pass, block, routed, expert, &stats, &mut folded)?;
        }
        self.write_edits(&folded.edits[written..], sink)?;
        sink.record_folded(&folded);
        Ok(())
    }

    /// The folds between an expert's own linears.
    fn own_folds(&self, index: usize, expert: u32) -> impl Iterator<Item = &Fold> {
        let own = move |fold: &&Fold| fold.input.stream == Stream::ExpertMid(expert);
        self.plan.folds[index].iter().filter(own)
    }

    /// The rows of some tokens as gate and up of the folded block read them.
    fn entering(&self, routed: &Routed, rows: &[u32]) -> Result<Tensor, JobError> {
        let device = &self.plan.device;
        let x = routed.entrance.rows(rows, device)?;
        let Some(scales) = &routed.divisors else { return Ok(x) };
        let scales = tensor(scales.clone(), &[1, scales.len()], device)?;
        Ok(x.broadcast_div(&scales).map_err(DecoderError::from)?)
    }

    /// Statistics of an expert's inputs, behind the folds that `block` has had.
    fn expert_statistics(
        &self,
        block: &Block,
        routed: &Routed,
        expert: u32,
        wanted: Wanted,
    ) -> Result<BlockStats, JobError> {
        let spec = block.spec();
        let input = |stream| InputId { block: spec.index, stream };
        let mut both = BTreeMap::new();
        let inputs = spec.inputs();
        for stream in [Stream::ExpertIn(expert), Stream::ExpertMid(expert)] {
            if wanted == Wanted::Both || stream == Stream::ExpertMid(expert) {
                let width = inputs.get(&input(stream)).copied().unwrap_or(0);
                both.insert(input(stream), InputStats::new(width));
            }
        }
        let roots = routed.roots.get(&expert);
        for rows in routed.members(expert).chunks(CHUNK) {
            self.go_on()?;
            let roots = roots.map(|roots| pick(roots, rows));
            let x = self.entering(routed, rows)?;
            let middle = block.expert_mid(expert, &x)?;
            for (stream, x) in [(Stream::ExpertIn(expert), x), (Stream::ExpertMid(expert), middle)] {
                if let Some(stats) = both.get_mut(&input(stream)) {
                    stats.update_tensor(&weighted_rows(x, roots.as_deref())?)?;
                }
            }
        }
        for (id, stats) in &mut both {
            stats.collect()?;
            stats.finish();
            let channels = stats.broken_channels();
            if channels > 0 {
                let (input, total) = (format!("{:?}", id.stream), stats.in_features);
                return Err(StatsError::NotFinite { block: id.block, input, channels, total }.into());
            }
        }
        Ok(BlockStats::from_inputs(both))
    }

    /// Folds an expert's own linears, and asserts on some of its rows that nothing changed.
    fn fold_expert(
        &self,
        pass: &Pass<'_>,
        block: &mut Block,
        routed: &Routed,
        expert: u32,
        stats: &BlockStats,
        folded: &mut Folded,
    ) -> Result<(), JobError> {
        let index = block.spec().index;
        let mut folds = self.own_folds(index, expert).peekable();
        if folds.peek().is_none() {
            return Ok(());
        }
        let mut rows = routed.members(expert);
        rows.truncate(PROBE_ROWS);
        let x = self.entering(routed, &rows)?;
        let run = |block: &Block| block.expert_out(expert, &block.expert_mid(expert, &x)?);
        let before = if rows.is_empty() { None } else { Some(run(block)?) };
        fold_block(block, stats, folds, self.plan, &|name| pass.storage(name), folded)?;
        let Some(before) = before else { return Ok(()) };
        let zero = before.zeros_like().map_err(DecoderError::from)?;
        check_fold(index, &zero, &before, &run(block)?)
    }
}
