//! What is kept of the inputs of a block's linears besides, or instead of, Gram matrices: the range of every channel,
//! and sampled tokens.

use std::collections::BTreeMap;

use candle_core::Tensor;
use lite_decoder::{BlockSpec, DecoderError, InputId, Tap, with_cpu_slice};
use lite_quant::{ActivationScale, ActivationScheme, InputQuantization, QuantError, StaticRange};
use lite_stats::{BlockStats, StatsError, StatsTap};
use rayon::prelude::*;

/// Tokens kept of each input where scales are searched on tokens.
pub(crate) const SAMPLED_TOKENS: usize = 512;

/// Rows per partial result.
const ROWS: usize = 256;

/// The smallest and largest value of every channel, 0 included.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ChannelRange {
    min: Vec<f32>,
    max: Vec<f32>,
}

impl ChannelRange {
    pub(crate) fn new(width: usize) -> Self {
        Self { min: vec![0.0; width], max: vec![0.0; width] }
    }

    /// Widens the range by that of other activations.
    pub(crate) fn join(&mut self, other: &Self) {
        self.min.iter_mut().zip(&other.min).for_each(|(m, v)| *m = lower(*m, *v));
        self.max.iter_mut().zip(&other.max).for_each(|(m, v)| *m = upper(*m, *v));
    }

    /// Widens the range by rows of activations. NaN stays.
    fn update(&mut self, x: &[f32]) {
        let width = self.min.len().max(1);
        let partial: Vec<Self> = x
            .par_chunks(ROWS * width)
            .map(|rows| {
                let mut range = Self::new(width);
                for row in rows.chunks_exact(width) {
                    range.min.iter_mut().zip(row).for_each(|(m, v)| *m = lower(*m, *v));
                    range.max.iter_mut().zip(row).for_each(|(m, v)| *m = upper(*m, *v));
                }
                range
            })
            .collect();
        partial.iter().for_each(|range| self.join(range));
    }

    /// `max |x|` of every channel.
    pub(crate) fn abs_max(&self) -> Vec<f32> {
        self.min.iter().zip(&self.max).map(|(min, max)| max.max(-min)).collect()
    }

    /// The range of the whole input once each channel is divided by its scale.
    fn divided(&self, scales: Option<&[f32]>) -> Result<StaticRange, QuantError> {
        let (mut min, mut max) = (0f32, 0f32);
        for c in 0..self.min.len() {
            let scale = scales.map_or(1.0, |scales| scales[c]);
            min = min.min(self.min[c] / scale);
            max = max.max(self.max[c] / scale);
        }
        StaticRange::from_bounds(min, max)
    }

    fn broken_channels(&self) -> usize {
        // Finite bounds of finite values only: a NaN replaces a bound and stays.
        self.min.iter().zip(&self.max).filter(|(min, max)| !min.is_finite() || !max.is_finite()).count()
    }

    /// What a static scheme needs, `None` for a dynamic one. `scales` were divided out of the input.
    pub(crate) fn quantization(
        &self,
        scheme: &ActivationScheme,
        scales: Option<&[f32]>,
    ) -> Result<Option<InputQuantization>, QuantError> {
        let found = self.divided(scales)?.quantization(scheme)?;
        let local = matches!(scheme.scale, ActivationScale::StaticTensorLocal(_));
        Ok(found.map(|found| if local { InputQuantization { scale: invertible(found.scale), ..found } } else { found }))
    }
}

/// The smaller of two; NaN if either is.
fn lower(m: f32, v: f32) -> f32 {
    if v >= m || m.is_nan() { m } else { v }
}

/// The larger of two; NaN if either is.
fn upper(m: f32, v: f32) -> f32 {
    if v <= m || m.is_nan() { m } else { v }
}

/// The value next to `scale` that survives being stored as its reciprocal, as some layouts of NVFP4 do.
fn invertible(scale: f32) -> f32 {
    let mut scale = scale;
    // Twice the reciprocal is off by one unit in the last place at most, and does not move again.
    for _ in 0..8 {
        let stored = (1.0 / f64::from(scale)) as f32;
        let back = (1.0 / f64::from(stored)) as f32;
        if back == scale || !back.is_normal() {
            break;
        }
        scale = back;
    }
    scale
}

/// Rows of one input, evenly spread over all tokens.
#[derive(Debug)]
struct TokenSample {
    /// One in so many.
    step: usize,
    seen: usize,
    rows: Vec<f32>,
}

impl TokenSample {
    fn update(&mut self, x: &[f32], width: usize) {
        for row in x.chunks_exact(width.max(1)) {
            // The middle token of each run of `step`.
            if self.seen % self.step == self.step / 2 && self.rows.len() < SAMPLED_TOKENS * width {
                self.rows.extend_from_slice(row);
            }
            self.seen += 1;
        }
    }
}

/// What an [`InputTap`] gathers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    /// Gram matrices.
    pub(crate) grams: bool,
    /// Sampled tokens.
    pub(crate) samples: bool,
    /// Tokens of all windows.
    pub(crate) tokens: usize,
}

/// Everything gathered at the inputs of one block.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) ranges: BTreeMap<InputId, ChannelRange>,
    /// Tokens that reached each input.
    pub(crate) tokens: BTreeMap<InputId, usize>,
    /// `[tokens, K]` rows of each input, if they were wanted.
    pub(crate) samples: BTreeMap<InputId, Vec<f32>>,
    /// Gram matrices, if they were wanted.
    pub(crate) stats: Option<BlockStats>,
}

/// A [`Tap`] on every input of a block.
pub(crate) struct InputTap {
    block: usize,
    widths: BTreeMap<InputId, usize>,
    tokens: BTreeMap<InputId, usize>,
    ranges: BTreeMap<InputId, ChannelRange>,
    samples: BTreeMap<InputId, TokenSample>,
    stats: Option<StatsTap>,
}

impl InputTap {
    pub(crate) fn new(block: &BlockSpec, wanted: Wanted) -> Self {
        let widths = block.inputs();
        let step = (wanted.tokens / SAMPLED_TOKENS).max(1);
        let sample = || TokenSample { step, seen: 0, rows: Vec::new() };
        Self {
            block: block.index,
            ranges: widths.iter().map(|(id, width)| (*id, ChannelRange::new(*width))).collect(),
            samples: if wanted.samples { widths.keys().map(|id| (*id, sample())).collect() } else { BTreeMap::new() },
            stats: wanted.grams.then(|| StatsTap::new(block)),
            tokens: BTreeMap::new(),
            widths,
        }
    }

    /// What was gathered.
    ///
    /// # Errors
    /// [`StatsError::NotFinite`] if an activation was NaN or Inf.
    pub(crate) fn finish(self) -> Result<Seen, StatsError> {
        for (id, range) in &self.ranges {
            let channels = range.broken_channels();
            if channels > 0 {
                let (input, total) = (format!("{:?}", id.stream), range.min.len());
                return Err(StatsError::NotFinite { block: self.block, input, channels, total });
            }
        }
        Ok(Seen {
            ranges: self.ranges,
            tokens: self.tokens,
            samples: self.samples.into_iter().map(|(id, sample)| (id, sample.rows)).collect(),
            stats: self.stats.map(StatsTap::finish).transpose()?,
        })
    }
}

impl Tap for InputTap {
    fn input(&mut self, at: InputId, x: &Tensor) -> Result<(), DecoderError> {
        let Some(width) = self.widths.get(&at).copied() else { return Ok(()) };
        with_cpu_slice(x, |values| {
            *self.tokens.entry(at).or_default() += values.len() / width.max(1);
            if let Some(range) = self.ranges.get_mut(&at) {
                range.update(values);
            }
            if let Some(sample) = self.samples.get_mut(&at) {
                sample.update(values, width);
            }
        })?;
        match &mut self.stats {
            Some(stats) => stats.input(at, x),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lite_quant::ActivationFormat;

    fn rows(tokens: usize, width: usize) -> Vec<f32> {
        (0..tokens * width).map(|i| ((i * 7919 % 10_007) as f32 / 777.0) - 6.0).collect()
    }

    #[test]
    fn ranges_are_those_of_the_channels_whatever_the_batches() {
        let (tokens, width) = (700, 5);
        let x = rows(tokens, width);
        let (mut whole, mut parts) = (ChannelRange::new(width), ChannelRange::new(width));
        whole.update(&x);
        x.chunks(width * 9).for_each(|part| parts.update(part));
        assert_eq!(whole, parts);
        for c in 0..width {
            let column = || x.iter().skip(c).step_by(width).copied();
            assert_eq!(whole.min[c], column().fold(0.0, f32::min));
            assert_eq!(whole.max[c], column().fold(0.0, f32::max));
        }
        let scheme = ActivationScheme {
            format: ActivationFormat::Int { bits: 8, symmetric: true },
            scale: ActivationScale::StaticTensor,
        };
        let largest = whole.abs_max().into_iter().fold(0f32, f32::max);
        let found = whole.quantization(&scheme, None).unwrap().unwrap();
        assert_eq!(found, InputQuantization { scale: largest / 127.5, zero_point: 0 });
        let halved = whole.quantization(&scheme, Some(&[2.0; 5])).unwrap().unwrap();
        assert_eq!(halved.scale, largest / 2.0 / 127.5);
    }

    #[test]
    fn outer_scales_survive_as_reciprocals() {
        let mut changed = 0;
        for i in 1..20_000u32 {
            let scale = i as f32 * 1.7e-4 / 2688.0;
            let found = invertible(scale);
            let stored = (1.0 / f64::from(found)) as f32;
            assert_eq!((1.0 / f64::from(stored)) as f32, found);
            assert!((found / scale - 1.0).abs() <= 2.0 * f32::EPSILON);
            changed += u32::from(found != scale);
        }
        assert!(changed > 100, "{changed}");
    }

    #[test]
    fn a_nan_anywhere_is_seen() {
        for (at, bad) in [(0, f32::NAN), (7, f32::NAN), (13, f32::INFINITY), (14, f32::NEG_INFINITY)] {
            let mut x = vec![1.0; 15];
            x[at] = bad;
            let mut range = ChannelRange::new(3);
            range.update(&x);
            range.update(&[1.0; 3]);
            assert_eq!(range.broken_channels(), 1, "{at}");
        }
    }

    #[test]
    fn samples_are_spread_over_all_tokens() {
        let (tokens, width) = (5000, 2);
        let x: Vec<f32> = (0..tokens).flat_map(|t| [t as f32, -(t as f32)]).collect();
        let take = |batch: usize| {
            let mut sample = TokenSample { step: tokens / SAMPLED_TOKENS, seen: 0, rows: Vec::new() };
            x.chunks(batch * width).for_each(|part| sample.update(part, width));
            sample.rows
        };
        let sampled = take(37);
        assert_eq!(sampled, take(tokens));
        assert_eq!(sampled.len(), SAMPLED_TOKENS * width);
        assert_eq!(sampled[0], 4.0, "the middle of the first nine");
        assert!(sampled[sampled.len() - 2] > 0.9 * tokens as f32);
    }
}
