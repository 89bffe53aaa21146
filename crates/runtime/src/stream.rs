//! The two ends of the model: embedding, and the head in slices of the vocabulary.

use candle_core::{Device, Tensor};
use lite_decoder::{DecoderError, DecoderSpec, Embedding, FinalNorm, WeightSource, with_cpu_slice};
use lite_linalg::{Mat, Threads, gemm};
use rayon::prelude::*;

use crate::compare::CompareProgress;
use crate::{Divergence, RuntimeError, TokenScore};

/// Entries of the vocabulary whose logits are computed together.
const SLICE: usize = 8192;

/// Tokens whose logits are computed together.
const TOKENS: usize = 512;

/// Hidden states of one window after the embedding, `(tokens, hidden)` row-major. Only the rows of the table
/// that occur are read.
///
/// # Errors
/// A table that cannot be read, or ids outside of it.
pub fn embed(spec: &DecoderSpec, source: &dyn WeightSource, window: &[u32]) -> Result<Vec<f32>, DecoderError> {
    let windows = [window.to_vec()];
    let embedding = Embedding::load_rows(spec, source, &windows, &Device::Cpu)?;
    with_cpu_slice(&embedding.embed(&windows)?, <[f32]>::to_vec)
}

/// Compares the two models' next-token distributions at every position.
pub(crate) fn score(
    spec: &DecoderSpec,
    original: &dyn WeightSource,
    quantized: &dyn WeightSource,
    windows: &[Vec<u32>],
    float: &[f32],
    coded: &[f32],
    device: &Device,
    progress: CompareProgress<'_>,
) -> Result<Vec<TokenScore>, RuntimeError> {
    let normed = |source: &dyn WeightSource, values: &[f32]| -> Result<Vec<f32>, RuntimeError> {
        let norm = FinalNorm::load(spec, source, device)?;
        let rows = values.len() / spec.hidden;
        let x = Tensor::from_slice(values, (rows, spec.hidden), device).map_err(DecoderError::from)?;
        Ok(with_cpu_slice(&norm.forward(&x)?, <[f32]>::to_vec)?)
    };
    let (float, coded) = (normed(original, float)?, normed(quantized, coded)?);
    let targets = windows.iter().flat_map(|w| w.iter().skip(1).map(|&t| Some(t)).chain([None]));
    let mut tokens: Vec<Divergence> = targets.map(Divergence::new).collect();
    let slices = spec.vocab.div_ceil(SLICE);
    for slice in 0..slices {
        if !progress("head", slice, slices) {
            return Err(RuntimeError::Interrupted);
        }
        let first = slice * SLICE;
        let ids: Vec<u32> = (first..(first + SLICE).min(spec.vocab)).map(|id| id as u32).collect();
        let weight = original.rows(&spec.head.weight, &ids)?;
        let coded_weight = quantized.rows(&spec.head.weight, &ids)?;
        let h = spec.hidden;
        for (chunk, tokens) in tokens.chunks_mut(TOKENS).enumerate() {
            let rows = chunk * TOKENS * h..(chunk * TOKENS + tokens.len()) * h;
            let logits = |values: &[f32], weight: &[f32]| {
                let x = Mat::new(&values[rows.clone()], tokens.len(), h);
                gemm(x, Mat::new(weight, ids.len(), h).t(), Threads::All)
            };
            let (l, m) = (logits(&float, &weight), logits(&coded, &coded_weight));
            let rows = l.par_chunks(ids.len()).zip(m.par_chunks(ids.len()));
            tokens.par_iter_mut().zip(rows).for_each(|(token, (l, m))| token.update(first as u32, l, m));
        }
    }
    Ok(tokens.iter().map(Divergence::finish).collect())
}
