//! The block loop of runs that need the ranges of inputs and no more: static scales of activations, SmoothQuant.

use lite_decoder::{Block, InputId, Stream};
use lite_linalg::unscale_gram;
use lite_quant::{InputQuantization, Weights};

use crate::calibrate::{Pass, Sink, by_input};
use crate::check::Outcome;
use crate::hidden::HiddenStates;
use crate::inputs::{ChannelRange, InputTap, Seen, Wanted};
use crate::layer::{Drift, Folded, solve_input};
use crate::poor::PoorExperts;
use crate::run::{LayerClock, Runner};
use crate::source::ModelSource;
use crate::stream::{Shared, round};
use crate::{JobError, Method, QuantSite, Rounding, SmoothScales};

impl Runner<'_> {
    /// Block by block, each fed with the outputs of the quantized blocks before it.
    pub(crate) fn observed(
        &self,
        pass: &Pass<'_>,
        source: &ModelSource<'_>,
        mut hidden: HiddenStates,
        sink: &mut Sink<'_>,
    ) -> Result<(), JobError> {
        let wanted = Wanted {
            grams: self.plan.solver.rounding != Rounding::Nearest,
            samples: matches!(
                self.plan.method,
                Method::SmoothQuant { scales: SmoothScales::SearchedAlpha | SmoothScales::Awq }
            ),
            tokens: hidden.windows() * self.plan.seqlen,
        };
        sink.load_states(&mut [&mut hidden])?;
        let mut clock = LayerClock::new(self.observer, pass.spec.blocks.len());
        for spec in &pass.spec.blocks {
            clock.started(spec.index);
            if let Some(replayed) = self.replay(pass, source, spec, sink, &clock)? {
                if self.pass_replayed(pass, spec.index, replayed, &mut hidden, &clock)? {
                    sink.save_states(spec.index, &[&hidden])?;
                }
                continue;
            }
            let mut block = self.load_block(pass, source, spec.index)?;
            clock.step(spec.index, "calibrate");
            let mut tap = InputTap::new(spec, wanted);
            self.observe(&hidden, pass, &block, &mut tap)?;
            let mut seen = tap.finish()?;
            let poor = self.complete(pass, &block, &hidden, &mut seen)?;
            clock.step(spec.index, "search");
            let folded = self.smooth(pass, &mut block, spec, &seen, &hidden, sink)?;
            clock.step(spec.index, "round");
            let errors = self.solve_observed(spec.index, &mut block, &seen, &folded, &poor, sink)?;
            drop(seen);
            self.calibrate_cache(pass, &block, &hidden, sink)?;
            sink.finish_block(spec.index)?;
            // The last block's outputs feed nothing.
            if spec.index + 1 < pass.spec.blocks.len() {
                clock.step(spec.index, "propagate");
                self.propagate(&mut hidden, pass, &block)?;
                sink.save_states(spec.index, &[&hidden])?;
            }
            clock.done(spec.index, &errors);
        }
        Ok(())
    }

    /// Lets other tokens stand for those of experts that few reached: all that the router saw at their input, what all
    /// experts made at the input of down.
    fn complete(
        &self,
        pass: &Pass<'_>,
        block: &Block,
        hidden: &HiddenStates,
        seen: &mut Seen,
    ) -> Result<PoorExperts, JobError> {
        let spec = block.spec();
        let Some(moe) = spec.moe() else { return Ok(PoorExperts::default()) };
        let at = |stream| InputId { block: spec.index, stream };
        let poor = match &mut seen.stats {
            Some(stats) => self.enrich(pass, block, hidden, stats)?,
            None => {
                let tokens = |e| seen.tokens.get(&at(Stream::ExpertIn(e))).copied().unwrap_or(0);
                self.poor_experts(spec.index, &(0..moe.experts as u32).map(tokens).collect::<Vec<_>>())?
            }
        };
        let experts = || 0..moe.experts as u32;
        let mut middles = ChannelRange::new(moe.intermediate);
        experts().filter_map(|e| seen.ranges.get(&at(Stream::ExpertMid(e)))).for_each(|range| middles.join(range));
        let inputs = seen.ranges.get(&at(Stream::MlpIn)).cloned();
        for e in experts().filter(|e| poor.of(Some(*e)).is_some()) {
            seen.ranges.insert(at(Stream::ExpertMid(e)), middles.clone());
            if let Some(inputs) = &inputs {
                seen.ranges.insert(at(Stream::ExpertIn(e)), inputs.clone());
            }
        }
        Ok(poor)
    }

    /// Solves and writes the linears of a block, and puts the result into it; returns their relative errors, where known.
    fn solve_observed(
        &self,
        index: usize,
        block: &mut Block,
        seen: &Seen,
        folded: &Folded,
        poor: &PoorExperts,
        sink: &mut Sink<'_>,
    ) -> Result<Vec<f64>, JobError> {
        let mut errors = Vec::new();
        for (input, sites) in by_input(self.plan, index) {
            self.go_on()?;
            let scales = folded.scales.get(&input).map(Vec::as_slice);
            let weights = self.weights(block, &sites)?;
            let solved: Vec<(Weights, Outcome)> = match &seen.stats {
                Some(stats) => {
                    let gram = stats
                        .get(input)
                        .ok_or_else(|| JobError::Input(format!("no statistics were gathered for {input}")))?
                        .gram();
                    let gram = scales.map_or_else(|| gram.to_vec(), |scales| unscale_gram(gram, scales));
                    let solved = solve_input(&weights, &gram, Drift::None, self.plan)?;
                    solved
                        .into_iter()
                        .map(|s| (s.outcome(), s))
                        .map(|(outcome, s)| (s.quantized.into(), outcome))
                        .collect()
                }
                None => {
                    let shared = Shared::of(weights.iter().map(|(site, weight)| (*site, weight.as_slice())));
                    let round = |(site, weight): &(&QuantSite, Vec<f32>)| {
                        Ok((round(site, weight, self.plan, &shared)?, Outcome::default()))
                    };
                    weights.iter().map(round).collect::<Result<_, JobError>>()?
                }
            };
            drop(weights);
            for (site, (weights, mut outcome)) in sites.iter().zip(solved) {
                if matches!(input.stream, Stream::ExpertIn(_) | Stream::ExpertMid(_)) {
                    outcome.tokens = Some(seen.tokens.get(&input).copied().unwrap_or(0) as u64);
                }
                if let Some(poor) = poor.at(input) {
                    outcome.fallback = Some(poor.words());
                }
                let found = self.input_scale(site, input, seen, scales)?;
                self.place(block, site, &weights.dequantize())?;
                errors.extend(outcome.error);
                self.finish_linear(site, &weights, found.as_ref(), outcome, sink)?;
            }
        }
        Ok(errors)
    }

    /// What a linear's static activation scheme stores.
    fn input_scale(
        &self,
        site: &QuantSite,
        input: InputId,
        seen: &Seen,
        scales: Option<&[f32]>,
    ) -> Result<Option<InputQuantization>, JobError> {
        let Some(scheme) = &site.scheme.activations else { return Ok(None) };
        let range =
            seen.ranges.get(&input).ok_or_else(|| JobError::Input(format!("nothing was gathered for {input}")))?;
        range
            .quantization(scheme, scales)
            .map_err(|source| JobError::Tensor { tensor: format!("{}: its input", site.module), source })
    }
}
