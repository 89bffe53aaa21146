//! Solving from statistics: no calibration window is run.

use std::collections::BTreeMap;

use candle_core::Tensor;
use lite_decoder::{DecoderSpec, Rope};
use lite_model::CheckpointWriter;

use crate::calibrate::{Pass, Sink, storage_types};
use crate::check::Expected;
use crate::fold::tensor;
use crate::run::{LayerClock, Runner};
use crate::source::ModelSource;
use crate::statistics::Statistics;
use crate::{JobError, SiteReport};

/// Tokens of the random states on which a fold is checked.
const PROBE_TOKENS: usize = 16;

impl Runner<'_> {
    /// Block by block, each from what the float model saw there.
    pub(crate) fn solve_from_statistics(
        &self,
        spec: &DecoderSpec,
        statistics: &Statistics,
        writer: &CheckpointWriter,
        expected: &mut Expected,
    ) -> Result<Vec<SiteReport>, JobError> {
        let source = ModelSource::new(self.checkpoint, spec);
        let tokens = PROBE_TOKENS.min(spec.max_positions);
        let rope = Rope::new(spec, tokens, &self.plan.device)?;
        let pass = Pass { spec, rope, storage: storage_types(self.plan) };
        let probe = self.probe(tokens, spec.hidden)?;
        let mut sink = Sink { writer, expected, reports: BTreeMap::new(), journal: None, behind: None };
        let mut clock = LayerClock::new(self.observer, spec.blocks.len());
        for block_spec in &spec.blocks {
            let index = block_spec.index;
            self.go_on()?;
            clock.started(index);
            let mut block = self.load_block(&pass, &source, index)?;
            clock.step(index, "read");
            let stats = statistics.block(block_spec)?;
            let folded = self.fold_gathered(&pass, &mut block, block_spec, &stats, &probe, &mut sink, &clock)?;
            clock.step(index, "round");
            let errors = self.solve_gathered(index, &mut block, &stats, &folded, &mut sink)?;
            clock.done(index, &errors);
        }
        Ok(sink.into_reports(self.plan))
    }

    /// `(1, tokens, hidden)` states in [−1, 1): a fold is exact on any.
    fn probe(&self, tokens: usize, hidden: usize) -> Result<Tensor, JobError> {
        let values = (0..(tokens * hidden) as u64).map(|i| (mix(i) >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect();
        tensor(values, &[1, tokens, hidden], &self.plan.device)
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014): the `i`-th number of its stream from seed 0.
fn mix(i: u64) -> u64 {
    let mut z = i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_splitmix64() {
        // First outputs of java.util.SplittableRandom(0), also Vigna's splitmix64.c with x = 0.
        assert_eq!([mix(0), mix(1)], [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4]);
    }
}
