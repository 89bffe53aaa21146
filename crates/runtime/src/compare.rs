//! The original and the quantized model side by side on held-out text.

use lite_decoder::{Compute, DecoderError, DecoderSpec, Rope, WeightSource};
use rayon::prelude::*;

use crate::stream::{Batch, Subject, score};
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
/// on its own stream of hidden states. `compute` is a [`Compute`], or a device for its usual way.
///
/// Memory: two blocks in f32, three batches of activations, and two sets of hidden states
/// `(windows, tokens, hidden)`; the head is applied in slices of the vocabulary.
///
/// # Errors
/// As [`compare_subjects`].
pub fn compare(
    spec: &DecoderSpec,
    original: &dyn WeightSource,
    quantized: &dyn WeightSource,
    windows: &[Vec<u32>],
    batch: usize,
    compute: impl Into<Compute>,
    progress: CompareProgress<'_>,
) -> Result<Comparison, RuntimeError> {
    let subject = |name, source| Subject { name, spec, source, kv: None, engine: None };
    let (original, quantized) = (subject("original", original), subject("quantized", quantized));
    compare_subjects(&original, &quantized, windows, batch, compute, progress)
}

/// [`compare`] of two models that each have a spec of their own, and possibly a quantized cache.
///
/// # Errors
/// Models that differ in depth, width or vocabulary; tensors that cannot be read, NaN or Inf in a hidden state or in
/// the logits, or a stop asked for by `progress`.
pub fn compare_subjects(
    original: &Subject<'_>,
    quantized: &Subject<'_>,
    windows: &[Vec<u32>],
    batch: usize,
    compute: impl Into<Compute>,
    progress: CompareProgress<'_>,
) -> Result<Comparison, RuntimeError> {
    let compute = &compute.into();
    check_alike(original.spec, quantized.spec)?;
    let seqlen = windows.first().map_or(0, Vec::len);
    if windows.iter().any(|window| window.len() != seqlen) || seqlen == 0 {
        return Err(DecoderError::Input { reason: "no windows, or windows of several lengths".to_owned() }.into());
    }
    let mut float = Batch::embed(original, windows)?.hidden;
    let mut coded = Batch::embed(quantized, windows)?.hidden;
    let rope = Rope::new(original.spec, seqlen, compute.device())?;
    let coded_rope = Rope::new(quantized.spec, seqlen, compute.device())?;
    let batch_values = batch.max(1) * seqlen * original.spec.hidden;
    let blocks = original.spec.blocks.len();
    let mut layers = Vec::with_capacity(blocks);
    for index in 0..blocks {
        if !progress("layers", index, blocks) {
            return Err(RuntimeError::Interrupted);
        }
        let block = original.block(index, compute)?;
        let coded_block = quantized.block(index, compute)?;
        let mut sums = ErrorSums::default();
        let (way, coded_way) = (original.way(), quantized.way());
        let through = |h: &mut [f32], q: &mut [f32]| -> Result<ErrorSums, RuntimeError> {
            let after = way.run(&block, &rope, h)?;
            let local = coded_way.run(&coded_block, &coded_rope, h)?;
            let coded_after = coded_way.run(&coded_block, &coded_rope, q)?;
            let sums = ErrorSums::of(h, &after, &local, &coded_after);
            h.copy_from_slice(&after);
            q.copy_from_slice(&coded_after);
            Ok(sums)
        };
        // Two batches in flight, so that one multiplies while the other is copied and normed; sums in their order.
        for (h, q) in float.chunks_mut(2 * batch_values).zip(coded.chunks_mut(2 * batch_values)) {
            let pairs = h.par_chunks_mut(batch_values).zip(q.par_chunks_mut(batch_values)).with_max_len(1);
            let done: Vec<Result<ErrorSums, RuntimeError>> = pairs.map(|(h, q)| through(h, q)).collect();
            done.into_iter().try_for_each(|part| part.map(|part| sums.merge(part)))?;
        }
        layers.push(sums.finish(index)?);
    }
    let scores = score(original, quantized, windows, &float, &coded, compute, progress)?;
    Ok(Comparison { windows: windows.len(), seqlen, summary: DivergenceSummary::of(&scores), layers })
}

/// Refuses models that cannot be laid side by side.
///
/// # Errors
/// [`RuntimeError::Unlike`]: another vocabulary, depth or width.
pub fn check_alike(original: &DecoderSpec, quantized: &DecoderSpec) -> Result<(), RuntimeError> {
    let pairs = [
        ("tokens in the vocabulary", original.vocab, quantized.vocab),
        ("layers", original.blocks.len(), quantized.blocks.len()),
        ("hidden channels", original.hidden, quantized.hidden),
    ];
    match pairs.into_iter().find(|(_, a, b)| a != b) {
        Some((what, original, quantized)) => Err(RuntimeError::Unlike { what, original, quantized }),
        None => Ok(()),
    }
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
    fn of(before: &[f32], after: &[f32], local: &[f32], coded: &[f32]) -> Self {
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
        partial.into_iter().fold(Self::default(), |mut all, part| {
            all.merge(part);
            all
        })
    }

    fn merge(&mut self, part: Self) {
        self.own += part.own;
        self.update += part.update;
        self.drift += part.drift;
        self.size += part.size;
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
