//! Perplexity of one model, by the rule of the GPTQ and AWQ papers.

use lite_decoder::Compute;

use super::Estimate;
use crate::RuntimeError;
use crate::compare::CompareProgress;
use crate::stream::{Batch, Subject, log_probs, run_blocks};

/// Perplexity of one model on some windows.
#[derive(Debug, Clone, PartialEq)]
pub struct Perplexity {
    /// Windows run.
    pub windows: usize,
    /// Tokens per window.
    pub seqlen: usize,
    /// Predictions scored: `windows · (seqlen − 1)`.
    pub predictions: usize,
    /// exp of the mean negative log-likelihood, with its standard error (tokens taken for independent).
    pub perplexity: Estimate,
}

/// exp of the mean negative log-likelihood over the `seqlen − 1` predictions inside each window; every window starts
/// anew (Frantar et al. 2022, arXiv:2210.17323; Lin et al. 2023, arXiv:2306.00978).
///
/// Memory: one block in f32, `batch` windows of activations, and hidden states `(windows, seqlen, hidden)` of all
/// windows.
///
/// # Errors
/// Windows of several lengths or of fewer than two tokens, tensors that cannot be read, NaN or Inf, or a stop asked
/// for by `progress`.
pub fn perplexity(
    subject: &Subject<'_>,
    windows: &[Vec<u32>],
    batch: usize,
    compute: &Compute,
    progress: CompareProgress<'_>,
) -> Result<Perplexity, RuntimeError> {
    let seqlen = windows.first().map_or(0, Vec::len);
    if seqlen < 2 || windows.iter().any(|window| window.len() != seqlen) {
        let reason = "perplexity needs windows of one length, of two tokens or more".to_owned();
        return Err(lite_decoder::DecoderError::Input { reason }.into());
    }
    let mut batches = Vec::new();
    for windows in windows.chunks(batch.max(1)) {
        batches.push(Batch::embed(subject, windows)?);
    }
    run_blocks(subject, &mut batches, compute, progress)?;
    let width = subject.spec.hidden;
    let per_batch = batch.max(1) * seqlen;
    let row_of = |row: usize| &batches[row / per_batch].hidden[row % per_batch * width..][..width];
    let targets: Vec<(usize, u32)> = windows
        .iter()
        .enumerate()
        .flat_map(|(w, window)| (1..seqlen).map(move |at| (w * seqlen + at - 1, window[at])))
        .collect();
    let found = log_probs(subject, &row_of, &targets, compute, progress)?;
    let perplexity = Estimate::mean(found.iter().map(|p| -p)).exp();
    Ok(Perplexity { windows: windows.len(), seqlen, predictions: targets.len(), perplexity })
}
