//! The original and the quantized model side by side on held-out text.

use candle_core::{Device, Tensor};
use lite_decoder::{Block, DecoderError, DecoderSpec, NoTap, Rope, WeightSource, with_cpu_slice};
use rayon::prelude::*;

use crate::stream::{embed, score};
use crate::{DivergenceSummary, RuntimeError};

/// Told of progress; returns whether to go on.
pub type CompareProgress<'a> = &'a dyn Fn(&'static str, usize, usize) -> bool;

/// What one block does to the hidden states.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerError {
    /// Block index.
    pub block: usize,
    /// The block's own error: both versions fed with the original's hidden states,
    /// `‖B_q(h) − B(h)‖ / ‖B(h) − h‖`.
    pub own: f64,
    /// The error that has gathered up to and with this block: `‖h_q − h‖ / ‖h‖`.
    pub accumulated: f64,
}

/// The comparison of two models.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Windows run.
    pub windows: usize,
    /// Tokens per window.
    pub seqlen: usize,
    /// KL, agreement, perplexity.
    pub summary: DivergenceSummary,
    /// Errors of all blocks, in order.
    pub layers: Vec<LayerError>,
}

/// Runs `windows` (all of one length) through both models, one block of each in memory at a time, each
/// on its own stream of hidden states.
///
/// Memory: two blocks in f32, three batches of activations, and two sets of hidden states
/// `(windows, tokens, hidden)`; the head is applied in slices of the vocabulary.
///
/// # Errors
/// Tensors that cannot be read, NaN or Inf in a hidden state, or a stop asked for by `progress`.
pub fn compare(
    spec: &DecoderSpec,
    original: &dyn WeightSource,
    quantized: &dyn WeightSource,
    windows: &[Vec<u32>],
    batch: usize,
    device: &Device,
    progress: CompareProgress<'_>,
) -> Result<Comparison, RuntimeError> {
    let seqlen = windows.first().map_or(0, Vec::len);
    let batch = batch.max(1);
    let embedded = |source| -> Result<Vec<f32>, RuntimeError> {
        let mut values = Vec::with_capacity(windows.len() * seqlen * spec.hidden);
        for window in windows {
            values.extend(embed(spec, source, window)?);
        }
        Ok(values)
    };
    let mut float = embedded(original)?;
    let mut coded = embedded(quantized)?;
    let rope = Rope::new(spec, seqlen, device)?;
    let window_values = seqlen * spec.hidden;
    let mut layers = Vec::with_capacity(spec.blocks.len());
    let tensors = spec.tensors();
    for index in 0..spec.blocks.len() {
        let step =
            |done| if progress("layers", done, spec.blocks.len()) { Ok(()) } else { Err(RuntimeError::Interrupted) };
        step(index)?;
        let block = Block::load(spec, index, original, device)?;
        let coded_block = Block::load(spec, index, quantized, device)?;
        // Both are copies now; mapped pages of blocks gone by would make memory grow with depth.
        let names: Vec<String> = tensors.iter().filter(|t| t.block == Some(index)).map(|t| t.name.clone()).collect();
        original.release(&names);
        quantized.release(&names);
        let mut sums = ErrorSums::default();
        for (h, q) in float.chunks_mut(batch * window_values).zip(coded.chunks_mut(batch * window_values)) {
            let count = h.len() / window_values;
            let run = |block: &Block, values: &[f32]| -> Result<Vec<f32>, RuntimeError> {
                let x = Tensor::from_slice(values, (count, seqlen, spec.hidden), device).map_err(DecoderError::from)?;
                let y = block.forward(&x, &rope, &mut NoTap)?;
                Ok(with_cpu_slice(&y, <[f32]>::to_vec)?)
            };
            let after = run(&block, h)?;
            let local = run(&coded_block, h)?;
            let coded_after = run(&coded_block, q)?;
            sums.add(h, &after, &local, &coded_after);
            h.copy_from_slice(&after);
            q.copy_from_slice(&coded_after);
        }
        layers.push(sums.finish(index)?);
    }
    let scores = score(spec, original, quantized, windows, &float, &coded, device, progress)?;
    Ok(Comparison { windows: windows.len(), seqlen, summary: DivergenceSummary::of(&scores), layers })
}

/// Squared norms over all tokens.
#[derive(Debug, Default, Clone, Copy)]
struct ErrorSums {
    own: f64,
    update: f64,
    drift: f64,
    size: f64,
}

impl ErrorSums {
    fn add(&mut self, before: &[f32], after: &[f32], local: &[f32], coded: &[f32]) {
        // Fixed chunks, added in order: the same figure for any number of threads.
        const CHUNK: usize = 1 << 14;
        let square = |a: f32, b: f32| f64::from(a - b) * f64::from(a - b);
        let partial: Vec<Self> = after
            .par_chunks(CHUNK)
            .enumerate()
            .map(|(i, after)| {
                let at = i * CHUNK;
                let mut sums = Self::default();
                for (j, &y) in after.iter().enumerate() {
                    sums.own += square(local[at + j], y);
                    sums.update += square(y, before[at + j]);
                    sums.drift += square(coded[at + j], y);
                    sums.size += square(y, 0.0);
                }
                sums
            })
            .collect();
        for sums in partial {
            self.own += sums.own;
            self.update += sums.update;
            self.drift += sums.drift;
            self.size += sums.size;
        }
    }

    fn finish(self, block: usize) -> Result<LayerError, RuntimeError> {
        if !self.size.is_finite() {
            return Err(RuntimeError::NotFinite { block, which: "original" });
        }
        if !(self.own + self.drift).is_finite() {
            return Err(RuntimeError::NotFinite { block, which: "quantized" });
        }
        let ratio = |part: f64, whole: f64| if whole > 0.0 { (part / whole).sqrt() } else { 0.0 };
        Ok(LayerError { block, own: ratio(self.own, self.update), accumulated: ratio(self.drift, self.size) })
    }
}
