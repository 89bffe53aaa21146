//! The block loop of runs that need the ranges of inputs and no more: static scales of activations, SmoothQuant.

use lite_decoder::{Block, InputId};
use lite_linalg::unscale_gram;
use lite_quant::{InputQuantization, Weights};

use crate::calibrate::{Pass, Sink, by_input};
use crate::hidden::HiddenStates;
use crate::inputs::{InputTap, Seen, Wanted};
use crate::layer::{Drift, Folded, solve_input};
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
            let seen = tap.finish()?;
            clock.step(spec.index, "search");
            let folded = self.smooth(pass, &mut block, spec, &seen, &hidden, sink)?;
            clock.step(spec.index, "round");
            let errors = self.solve_observed(spec.index, &mut block, &seen, &folded, sink)?;
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

    /// Solves and writes the linears of a block, and puts the result into it; returns their relative errors, where known.
    fn solve_observed(
        &self,
        index: usize,
        block: &mut Block,
        seen: &Seen,
        folded: &Folded,
        sink: &mut Sink<'_>,
    ) -> Result<Vec<f64>, JobError> {
        let mut errors = Vec::new();
        for (input, sites) in by_input(self.plan, index) {
            self.go_on()?;
            let scales = folded.scales.get(&input).map(Vec::as_slice);
            let weights = self.weights(block, &sites)?;
            let solved: Vec<(Weights, Option<f64>, Option<String>)> = match &seen.stats {
                Some(stats) => {
                    let gram = stats
                        .get(input)
                        .ok_or_else(|| JobError::Input(format!("no statistics were gathered for {input}")))?
                        .gram();
                    let gram = scales.map_or_else(|| gram.to_vec(), |scales| unscale_gram(gram, scales));
                    let solved = solve_input(&weights, &gram, Drift::None, self.plan)?;
                    solved.into_iter().map(|s| (s.quantized.into(), s.error, s.fallback)).collect()
                }
                None => {
                    let shared = Shared::of(weights.iter().map(|(site, weight)| (*site, weight.as_slice())));
                    let round = |(site, weight): &(&QuantSite, Vec<f32>)| {
                        Ok((round(site, weight, self.plan, &shared)?, None, None))
                    };
                    weights.iter().map(round).collect::<Result<_, JobError>>()?
                }
            };
            drop(weights);
            for (site, (weights, error, fallback)) in sites.iter().zip(solved) {
                let found = self.input_scale(site, input, seen, scales)?;
                self.place(block, site, &weights.dequantize())?;
                self.finish_linear(site, &weights, found.as_ref(), error, fallback, sink)?;
                errors.extend(error);
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
