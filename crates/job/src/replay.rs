//! Finished blocks of an interrupted run: written again from their records, and the hidden states moved behind them.

use lite_decoder::{Block, BlockSpec};
use lite_quant::{InputQuantization, Weights};

use crate::calibrate::{Pass, Sink};
use crate::check::{Outcome, SiteReport};
use crate::fold::apply;
use crate::hidden::HiddenStates;
use crate::layer::Folded;
use crate::record::Recorded;
use crate::run::{LayerClock, Runner};
use crate::source::ModelSource;
use crate::{JobError, QuantSite};

/// A finished block that was written again.
pub(crate) struct Replayed<'p> {
    /// Relative errors of its linears, where known.
    pub(crate) errors: Vec<f64>,
    /// The folded float block, if the hidden states have yet to pass it.
    pub(crate) block: Option<Block>,
    pub(crate) linears: Vec<(&'p QuantSite, Weights)>,
}

impl Sink<'_> {
    /// From here on block `index` is finished, whatever happens.
    pub(crate) fn finish_block(&mut self, index: usize) -> Result<(), JobError> {
        self.journal.as_mut().map_or(Ok(()), |journal| journal.finish(index))
    }

    /// Records what folding the block at work found.
    pub(crate) fn record_folded(&mut self, folded: &Folded) {
        if let Some(journal) = &mut self.journal {
            journal.record.folded(folded);
        }
    }

    /// Saves the states behind block `index` from time to time.
    pub(crate) fn save_states(&mut self, index: usize, lanes: &[&HiddenStates]) -> Result<(), JobError> {
        self.journal.as_mut().map_or(Ok(()), |journal| journal.save_states(index, lanes))
    }

    /// Fills `lanes` with saved states, if there are any.
    pub(crate) fn load_states(&mut self, lanes: &mut [&mut HiddenStates]) -> Result<(), JobError> {
        if let Some(journal) = &mut self.journal {
            self.behind = journal.load_states(lanes)?;
        }
        Ok(())
    }
}

impl<'r> Runner<'r> {
    /// Writes block `spec` from its record, if it has one.
    ///
    /// # Errors
    /// [`JobError::State`] if the record does not fit the model; reading and writing.
    pub(crate) fn replay(
        &self,
        pass: &Pass<'_>,
        source: &ModelSource<'_>,
        spec: &BlockSpec,
        sink: &mut Sink<'_>,
        clock: &LayerClock<'_>,
    ) -> Result<Option<Replayed<'r>>, JobError> {
        let index = spec.index;
        let Some(journal) = &sink.journal else { return Ok(None) };
        let Some(recorded) = journal.recorded(index, self.plan)? else { return Ok(None) };
        self.go_on()?;
        clock.step(index, "resume");
        // The last block's outputs feed nothing.
        let passed = sink.behind.is_some_and(|behind| index <= behind) || index + 1 == pass.spec.blocks.len();
        let block = if passed { None } else { Some(self.refold(pass, source, spec, &recorded)?) };
        self.write_edits(&recorded.edits, sink)?;
        for (tensor, data) in &recorded.cache {
            sink.expected.tensor(tensor, data);
            sink.writer.write(tensor, data)?;
        }
        let mut replayed = Replayed { errors: Vec::new(), block, linears: Vec::new() };
        for linear in recorded.linears {
            self.write_linear(linear.site, &linear.weights, linear.input.as_ref(), sink.writer, sink.expected)?;
            replayed.errors.extend(linear.outcome.error);
            sink.reports.insert(linear.site.module.clone(), SiteReport::new(linear.site, linear.outcome));
            if !passed {
                replayed.linears.push((linear.site, linear.weights));
            }
        }
        Ok(Some(replayed))
    }

    /// The float block with the recorded scales folded in, as it was when it was solved.
    fn refold(
        &self,
        pass: &Pass<'_>,
        source: &ModelSource<'_>,
        spec: &BlockSpec,
        recorded: &Recorded<'_>,
    ) -> Result<Block, JobError> {
        let mut block = self.load_block(pass, source, spec.index)?;
        let mut edits = Vec::new();
        for (fold, scales) in self.plan.folds[spec.index].iter().zip(&recorded.folds) {
            edits.extend(apply(&mut block, spec, fold, scales, &|name| pass.storage(name))?.1);
        }
        for edit in &recorded.edits {
            let again = edits.iter().find(|e| e.tensor == edit.tensor);
            if again.is_none_or(|again| again.values != edit.values) {
                return Err(JobError::State(format!(
                    "the record of block {} does not fit the model: `{}` comes out otherwise; start over with --restart",
                    spec.index,
                    lite_model::printable(&edit.tensor)
                )));
            }
        }
        Ok(block)
    }

    /// Moves `hidden` behind a replayed block, unless it is already, and ends the block; returns whether it moved.
    pub(crate) fn pass_replayed(
        &self,
        pass: &Pass<'_>,
        index: usize,
        replayed: Replayed<'_>,
        hidden: &mut HiddenStates,
        clock: &LayerClock<'_>,
    ) -> Result<bool, JobError> {
        let moves = replayed.block.is_some();
        if let Some(mut block) = replayed.block {
            for (site, weights) in &replayed.linears {
                self.place(&mut block, site, &weights.dequantize())?;
            }
            clock.step(index, "propagate");
            self.propagate(hidden, pass, &block)?;
        }
        clock.done(index, &replayed.errors);
        Ok(moves)
    }

    /// Writes a solved linear, notes how it went, and records it.
    pub(crate) fn finish_linear(
        &self,
        site: &QuantSite,
        weights: &Weights,
        input: Option<&InputQuantization>,
        outcome: Outcome,
        sink: &mut Sink<'_>,
    ) -> Result<(), JobError> {
        self.write_linear(site, weights, input, sink.writer, sink.expected)?;
        if let Some(journal) = &mut sink.journal {
            journal.record.linear(&site.module, weights, input, &outcome);
        }
        sink.reports.insert(site.module.clone(), SiteReport::new(site, outcome));
        Ok(())
    }
}
