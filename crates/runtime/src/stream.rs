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
    // The norm is applied chunk by chunk: cheap beside the head, and no second copy of all hidden states.
    let norms = (FinalNorm::load(spec, original, device)?, FinalNorm::load(spec, quantized, device)?);
    let normed = |norm: &FinalNorm, values: &[f32]| -> Result<Vec<f32>, RuntimeError> {
        let x = Tensor::from_slice(values, (values.len() / spec.hidden, spec.hidden), device);
        Ok(with_cpu_slice(&norm.forward(&x.map_err(DecoderError::from)?)?, <[f32]>::to_vec)?)
    };
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
        original.release(std::slice::from_ref(&spec.head.weight));
        quantized.release(std::slice::from_ref(&spec.head.weight));
        let h = spec.hidden;
        for (chunk, tokens) in tokens.chunks_mut(TOKENS).enumerate() {
            let rows = chunk * TOKENS * h..(chunk * TOKENS + tokens.len()) * h;
            let logits = |norm: &FinalNorm, values: &[f32], weight: &[f32]| -> Result<Vec<f32>, RuntimeError> {
                let x = normed(norm, &values[rows.clone()])?;
                Ok(gemm(Mat::new(&x, tokens.len(), h), Mat::new(weight, ids.len(), h).t(), Threads::All))
            };
            let (l, m) = (logits(&norms.0, float, &weight)?, logits(&norms.1, coded, &coded_weight)?);
            let rows = l.par_chunks(ids.len()).zip(m.par_chunks(ids.len()));
            tokens.par_iter_mut().zip(rows).for_each(|(token, (l, m))| token.update(first as u32, l, m));
        }
    }
    Ok(tokens.iter().map(Divergence::finish).collect())
}
