//! Log-likelihoods of continuations, and accuracies from them, as EleutherAI's lm-evaluation-harness computes both.

use std::collections::BTreeMap;

use lite_decoder::{BATCH_TOKENS, Compute, DecoderError};

use super::Estimate;
use crate::RuntimeError;
use crate::compare::CompareProgress;
use crate::stream::{Batch, Subject, log_probs, run_blocks};

/// A continuation to score.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Token ids before it.
    pub context: Vec<u32>,
    /// Its token ids.
    pub continuation: Vec<u32>,
}

/// One distinct input, and what is asked of it.
struct Row {
    input: Vec<u32>,
    /// Position in `input` that predicts, the predicted token, the request it counts for.
    targets: Vec<(usize, u32, usize)>,
}

/// Sum of the log-probabilities of each request's continuation after its context.
///
/// Requests with one input (the same context, continuations of one token) share a forward pass. Inputs are sorted by
/// length and padded on the right, which a causal model does not see; no more than `hidden_bytes` of hidden states are
/// held at a time, and the blocks are read once for each such part. Inputs longer than the model's context lose tokens
/// on the left.
///
/// # Errors
/// Empty contexts or continuations, continuations longer than the model's context, tensors that cannot be read, NaN or
/// Inf, or a stop asked for by `progress`.
pub fn log_likelihoods(
    subject: &Subject<'_>,
    requests: &[Request],
    hidden_bytes: usize,
    compute: &Compute,
    progress: CompareProgress<'_>,
) -> Result<Vec<f64>, RuntimeError> {
    let mut rows = rows_of(requests, subject.spec.max_positions)?;
    rows.sort_by(|a, b| b.input.len().cmp(&a.input.len()).then_with(|| a.input.cmp(&b.input)));
    let most = (hidden_bytes / (subject.spec.hidden.max(1) * size_of::<f32>())).max(1);
    let mut sums = vec![0f64; requests.len()];
    let mut rest = &rows[..];
    while !rest.is_empty() {
        let count = rest.iter().scan(0usize, |total, row| {
            *total = total.saturating_add(row.input.len());
            (*total <= most).then_some(())
        });
        let (part, after) = rest.split_at(count.count().clamp(1, rest.len()));
        score_rows(subject, part, &mut sums, compute, progress)?;
        rest = after;
    }
    Ok(sums)
}

/// The distinct inputs of `requests`, cut to `longest` tokens.
fn rows_of(requests: &[Request], longest: usize) -> Result<Vec<Row>, RuntimeError> {
    let input_error = |reason: String| RuntimeError::from(DecoderError::Input { reason });
    let mut rows: BTreeMap<Vec<u32>, Vec<(usize, u32, usize)>> = BTreeMap::new();
    for (index, request) in requests.iter().enumerate() {
        let wanted = request.continuation.len();
        if request.context.is_empty() || wanted == 0 {
            return Err(input_error(format!("request {index} has an empty context or continuation; nothing to score")));
        }
        if wanted > longest {
            let reason = format!("request {index} continues by {wanted} tokens, the model takes {longest}");
            return Err(input_error(reason));
        }
        let all: Vec<u32> = request.context.iter().chain(&request.continuation).copied().collect();
        // The last token predicts nothing that is asked for.
        let input = &all[all.len().saturating_sub(longest + 1)..all.len() - 1];
        let first = input.len() - wanted;
        let targets = request.continuation.iter().enumerate().map(|(i, token)| (first + i, *token, index));
        rows.entry(input.to_vec()).or_default().extend(targets);
    }
    Ok(rows.into_iter().map(|(input, targets)| Row { input, targets }).collect())
}

/// Adds the log-probabilities of `rows`, longest first, to `sums`.
fn score_rows(
    subject: &Subject<'_>,
    rows: &[Row],
    sums: &mut [f64],
    compute: &Compute,
    progress: CompareProgress<'_>,
) -> Result<(), RuntimeError> {
    let width = subject.spec.hidden;
    let mut batches = Vec::new();
    let mut members: Vec<(&[Row], usize)> = Vec::new();
    let mut rest = rows;
    while let Some(first) = rest.first() {
        let length = first.input.len();
        let (batch, after) = rest.split_at((BATCH_TOKENS / length).clamp(1, rest.len()));
        // Token 0 is in every vocabulary.
        let padded = |row: &Row| {
            let mut input = row.input.clone();
            input.resize(length, 0);
            input
        };
        batches.push(Batch::embed(subject, &batch.iter().map(padded).collect::<Vec<_>>())?);
        members.push((batch, length));
        rest = after;
    }
    run_blocks(subject, &mut batches, compute, progress)?;
    // Only rows that predict something that is asked for go to the head.
    let (mut hidden, mut targets, mut owners) = (Vec::new(), Vec::new(), Vec::new());
    for (batch, (rows, length)) in batches.into_iter().zip(members) {
        for (index, row) in rows.iter().enumerate() {
            let mut known: BTreeMap<usize, usize> = BTreeMap::new();
            for &(at, token, owner) in &row.targets {
                let place = *known.entry(at).or_insert_with(|| {
                    hidden.extend_from_slice(&batch.hidden[(index * length + at) * width..][..width]);
                    hidden.len() / width.max(1) - 1
                });
                targets.push((place, token));
                owners.push(owner);
            }
        }
    }
    let row_of = |row: usize| &hidden[row * width..][..width];
    let found = log_probs(subject, &row_of, &targets, compute, progress)?;
    for (owner, log_prob) in owners.into_iter().zip(found) {
        sums[owner] += log_prob;
    }
    Ok(())
}

/// A multiple-choice question whose choices were scored.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredItem {
    /// Log-likelihood of each choice.
    pub log_likelihoods: Vec<f64>,
    /// Length of each choice, in characters: what `acc_norm` divides by.
    pub lengths: Vec<usize>,
    /// The right choice.
    pub gold: usize,
}

/// Accuracies over some questions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TaskScore {
    /// Questions.
    pub items: usize,
    /// Share answered right by the likeliest choice; standard error `s / sqrt(n)` with the sample deviation s.
    pub acc: Estimate,
    /// The same by log-likelihood per character.
    pub acc_norm: Estimate,
}

impl ScoredItem {
    /// The likeliest choice.
    pub fn answer(&self) -> Option<usize> {
        best(self.log_likelihoods.iter().copied())
    }

    /// The likeliest choice by log-likelihood per character.
    pub fn answer_norm(&self) -> Option<usize> {
        best(self.log_likelihoods.iter().zip(&self.lengths).map(|(ll, length)| ll / *length as f64))
    }
}

/// Index of the largest value; of equal ones the first, as in numpy's argmax.
fn best(values: impl Iterator<Item = f64>) -> Option<usize> {
    let mut best: Option<(usize, f64)> = None;
    for (index, value) in values.enumerate() {
        if best.is_none_or(|(_, top)| value > top) {
            best = Some((index, value));
        }
    }
    best.map(|(index, _)| index)
}

/// Questions that two models answer differently, right or wrong: "flips" (Dutta et al. 2024, arXiv:2407.09141).
pub fn flips(a: &[ScoredItem], b: &[ScoredItem]) -> usize {
    a.iter().zip(b).filter(|(a, b)| a.answer() != b.answer()).count()
}

/// Accuracies; NaN of nothing.
pub fn score_items(items: &[ScoredItem]) -> TaskScore {
    let right = |item: &ScoredItem| item.answer() == Some(item.gold);
    let right_norm = |item: &ScoredItem| item.answer_norm() == Some(item.gold);
    let share =
        |of: &dyn Fn(&ScoredItem) -> bool| Estimate::mean(items.iter().map(|item| f64::from(u8::from(of(item)))));
    TaskScore { items: items.len(), acc: share(&right), acc_norm: share(&right_norm) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_shared_and_cut_on_the_left() {
        let request = |context: &[u32], continuation: &[u32]| Request {
            context: context.into(),
            continuation: continuation.into(),
        };
        let requests = [request(&[1, 2, 3], &[4]), request(&[1, 2, 3], &[5]), request(&[1, 2], &[3, 6])];
        let rows = rows_of(&requests, 10).unwrap();
        assert_eq!(rows.len(), 1, "[1, 2, 3] is the input of all three");
        assert_eq!(rows[0].targets, [(2, 4, 0), (2, 5, 1), (1, 3, 2), (2, 6, 2)]);
        // lm-eval: (context + continuation)[-(max_length + 1):][:-1]
        let rows = rows_of(&[request(&[1, 2, 3, 4], &[5, 6])], 3).unwrap();
        assert_eq!(
            (rows[0].input.as_slice(), rows[0].targets.as_slice()),
            (&[3, 4, 5][..], &[(1, 5, 0), (2, 6, 0)][..])
        );
        for bad in [request(&[], &[1]), request(&[1], &[]), request(&[1], &[1, 2, 3, 4])] {
            assert!(rows_of(&[bad], 3).is_err());
        }
    }

    #[test]
    fn accuracies_are_those_of_the_definition() {
        let item = |log_likelihoods: &[f64], lengths: &[usize], gold| ScoredItem {
            log_likelihoods: log_likelihoods.into(),
            lengths: lengths.into(),
            gold,
        };
        let items = [
            item(&[-4.0, -5.0], &[2, 10], 0), // right, wrong by length
            item(&[-4.0, -5.0], &[4, 10], 1), // wrong, right by length
            item(&[-1.0, -1.0], &[3, 3], 0),  // a tie goes to the first
            item(&[f64::NEG_INFINITY, -9.0], &[1, 1], 0),
        ];
        let score = score_items(&items);
        assert_eq!((score.items, score.acc.value, score.acc_norm.value), (4, 0.5, 0.5));
        let mut other = items.clone();
        other[1].log_likelihoods = vec![-5.0, -4.0];
        assert_eq!((flips(&items, &items), flips(&items, &other)), (0, 1));
        // sample standard deviation of [1, 0, 1, 0] / sqrt(4)
        assert!((score.acc.standard_error - 0.288_675_134_594_8).abs() < 1e-12);
    }
}
