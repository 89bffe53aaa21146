use std::collections::BTreeMap;

use candle_core::Tensor;
use lite_decoder::{BlockSpec, DecoderError, InputId, Stream, Tap};
use thiserror::Error;

use crate::InputStats;

/// What can be wrong with gathered statistics.
#[derive(Debug, Error)]
pub enum StatsError {
    /// Activations overflow or are undefined.
    #[error(
        "block {block}: {channels} of {total} channels of the {input} input hold NaN or Inf; the model itself overflows on this text: check it in float first, or try other calibration data"
    )]
    NotFinite {
        /// Block index.
        block: usize,
        /// Which input.
        input: String,
        /// Broken channels.
        channels: usize,
        /// All channels.
        total: usize,
    },
    /// What was gathered on a device cannot be brought to the host.
    #[error(transparent)]
    Device(#[from] DecoderError),
    /// Statistics that were read back cannot be any.
    #[error("{what}; the statistics are damaged: make them again")]
    Invalid {
        /// What was found.
        what: String,
    },
}

/// The statistics of every input of one block.
#[derive(Debug, Clone, Default)]
pub struct BlockStats {
    inputs: BTreeMap<InputId, InputStats>,
}

impl BlockStats {
    /// Finished statistics of some inputs of one block.
    pub fn from_inputs(inputs: BTreeMap<InputId, InputStats>) -> Self {
        Self { inputs }
    }

    /// Statistics of one input, if the block has it.
    pub fn get(&self, input: InputId) -> Option<&InputStats> {
        self.inputs.get(&input)
    }

    /// Puts other finished statistics in the place of those of one input.
    pub fn replace(&mut self, input: InputId, stats: InputStats) {
        self.inputs.insert(input, stats);
    }

    /// All inputs, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&InputId, &InputStats)> {
        self.inputs.iter()
    }
}

/// Whether only the tokens of one expert pass through `input`.
fn is_routed(input: InputId) -> bool {
    matches!(input.stream, Stream::ExpertIn(_) | Stream::ExpertMid(_))
}

/// Bytes of the Gram matrix of `k` channels.
fn gram(k: usize) -> u64 {
    (k as u64).pow(2) * 4
}

/// A [`Tap`] that gathers [`InputStats`] for inputs of one block.
#[derive(Debug)]
pub struct StatsTap {
    stats: BlockStats,
}

impl StatsTap {
    /// Room for every input of `block`.
    pub fn new(block: &BlockSpec) -> Self {
        Self::of(block.inputs().into_iter())
    }

    fn of(inputs: impl Iterator<Item = (InputId, usize)>) -> Self {
        let inputs = inputs.map(|(input, width)| (input, InputStats::new(width))).collect();
        Self { stats: BlockStats { inputs } }
    }

    /// Room for every input of `block` but those of single experts, which see some of the tokens only.
    pub fn without_experts(block: &BlockSpec) -> Self {
        Self::of(block.inputs().into_iter().filter(|(input, _)| !is_routed(*input)))
    }

    /// Bytes of the Gram matrices that [`StatsTap::new`] allocates for `block`.
    pub fn gram_bytes(block: &BlockSpec) -> u64 {
        block.inputs().values().map(|k| gram(*k)).sum()
    }

    /// Bytes of those that [`StatsTap::without_experts`] allocates, and of those of one expert.
    pub fn gram_bytes_without_experts(block: &BlockSpec) -> (u64, u64) {
        let inputs = block.inputs();
        let (routed, plain): (Vec<_>, Vec<_>) = inputs.iter().partition(|(input, _)| is_routed(**input));
        let first =
            |(input, _): &&(&InputId, &usize)| matches!(input.stream, Stream::ExpertIn(0) | Stream::ExpertMid(0));
        let bytes = |(_, width): (&InputId, &usize)| gram(*width);
        (plain.into_iter().map(bytes).sum(), routed.iter().filter(first).map(|(_, width)| gram(**width)).sum())
    }

    /// The finished statistics.
    ///
    /// # Errors
    /// [`StatsError::NotFinite`] if an activation was NaN or Inf, [`StatsError::Device`] if its device fails.
    pub fn finish(mut self) -> Result<BlockStats, StatsError> {
        for (id, stats) in &mut self.stats.inputs {
            stats.collect()?;
            stats.finish();
            let channels = stats.broken_channels();
            if channels > 0 {
                let (input, total) = (format!("{:?}", id.stream), stats.in_features);
                return Err(StatsError::NotFinite { block: id.block, input, channels, total });
            }
        }
        Ok(self.stats)
    }
}

impl Tap for StatsTap {
    fn input(&mut self, at: InputId, x: &Tensor) -> Result<(), DecoderError> {
        if let Some(stats) = self.stats.inputs.get_mut(&at) {
            stats.update_tensor(x)?;
        }
        Ok(())
    }
}
