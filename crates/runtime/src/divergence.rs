//! KL divergence, top-1 agreement and perplexity from two rows of logits, in one pass over the
//! vocabulary.
//!
//! Logits of a large vocabulary are never stored whole: the head is applied in slices of the
//! vocabulary, and each token keeps running sums. With `l` the original's logits, `m` the quantized
//! model's, `L = max l`, `Z = Σ e^(l−L)`, `A = Σ e^(l−L) (l − m)`:
//!
//! ```text
//! KL(original ‖ quantized) = Σ p (log p − log q) = A / Z − lse(l) + lse(m)
//! ```

use crate::eval::{Estimate, quantile};

/// Running softmax sums of one token.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sums {
    max: f32,
    sum: f64,
    argmax: u32,
    target: f32,
}

impl Sums {
    pub(crate) const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0, argmax: 0, target: f32::NAN };

    fn log_sum_exp(&self) -> f64 {
        f64::from(self.max) + self.sum.ln()
    }

    /// Adds the logits of vocabulary entries `first ..`.
    pub(crate) fn update(&mut self, first: u32, logits: &[f32], target: Option<u32>) {
        raise(self, first, logits);
        let max = self.max;
        self.sum += logits.iter().map(|l| f64::from((l - max).exp())).sum::<f64>();
        self.look_up(first, logits, target);
    }

    fn look_up(&mut self, first: u32, logits: &[f32], target: Option<u32>) {
        if let Some(logit) = target.and_then(|t| t.checked_sub(first)).and_then(|at| logits.get(at as usize)) {
            self.target = *logit;
        }
    }

    /// Log-probability of the target once the whole vocabulary was seen.
    pub(crate) fn log_prob(&self) -> f64 {
        f64::from(self.target) - self.log_sum_exp()
    }
}

/// The running comparison of one token's two rows of logits.
#[derive(Debug, Clone, Copy)]
pub struct Divergence {
    original: Sums,
    quantized: Sums,
    cross: f64,
    target: Option<u32>,
}

/// What one token says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenScore {
    /// KL(original ‖ quantized) in nats.
    pub kl: f64,
    /// Whether both models rank the same token first.
    pub same_top: bool,
    /// Negative log-likelihood of the next token under the original and the quantized model; `None` for
    /// the last token of a window.
    pub nll: Option<(f64, f64)>,
}

impl Divergence {
    /// Nothing seen yet; `target` is the next token, if the window has one.
    pub fn new(target: Option<u32>) -> Self {
        Self { original: Sums::EMPTY, quantized: Sums::EMPTY, cross: 0.0, target }
    }

    /// Adds the logits of vocabulary entries `first ..` of both models.
    ///
    /// # Panics
    /// If the slices differ in length.
    pub fn update(&mut self, first: u32, original: &[f32], quantized: &[f32]) {
        assert_eq!(original.len(), quantized.len(), "both models have one vocabulary");
        let old = self.original.max;
        raise(&mut self.original, first, original);
        raise(&mut self.quantized, first, quantized);
        if self.original.max > old && self.cross != 0.0 {
            self.cross *= f64::from(old - self.original.max).exp();
        }
        let max = self.original.max;
        for (&l, &m) in original.iter().zip(quantized) {
            let weight = f64::from((l - max).exp());
            self.original.sum += weight;
            self.cross += weight * (f64::from(l) - f64::from(m));
        }
        let max = self.quantized.max;
        self.quantized.sum += quantized.iter().map(|m| f64::from((m - max).exp())).sum::<f64>();
        self.original.look_up(first, original, self.target);
        self.quantized.look_up(first, quantized, self.target);
    }

    /// The token's score once the whole vocabulary was seen.
    pub fn finish(&self) -> TokenScore {
        let (lse, quantized_lse) = (self.original.log_sum_exp(), self.quantized.log_sum_exp());
        TokenScore {
            kl: self.cross / self.original.sum - lse + quantized_lse,
            same_top: self.original.argmax == self.quantized.argmax,
            nll: self.target.map(|_| (-self.original.log_prob(), -self.quantized.log_prob())),
        }
    }
}

/// Moves the maximum, rescaling the sum; ties keep the first index.
fn raise(sums: &mut Sums, first: u32, logits: &[f32]) {
    let old = sums.max;
    for (i, &value) in logits.iter().enumerate() {
        if value > sums.max {
            sums.max = value;
            sums.argmax = first + i as u32;
        }
    }
    if sums.max > old && sums.sum != 0.0 {
        sums.sum *= f64::from(old - sums.max).exp();
    }
}

/// Counts of tokens by their KL, in bins of equal width on a logarithmic axis.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KlHistogram {
    /// Tokens below [`FIRST`](Self::FIRST), those whose KL rounds to a little less than zero among them.
    pub below: u64,
    /// Tokens in `[edge(i), edge(i + 1))`.
    pub counts: [u64; Self::BINS],
    /// Tokens at or above the last edge.
    pub above: u64,
}

impl KlHistogram {
    /// Number of bins.
    pub const BINS: usize = 40;
    /// Bins per factor of ten.
    pub const PER_DECADE: usize = 4;
    /// Lower edge of the first bin, nats. Below it is what f32 logits cannot tell from zero.
    pub const FIRST: f64 = 1e-8;

    /// Lower edge of bin `i`, which is also the upper edge of the bin before, nats.
    pub fn edge(i: usize) -> f64 {
        Self::FIRST * 10f64.powf(i as f64 / Self::PER_DECADE as f64)
    }

    /// Counts `sorted` values, which rise; NaN at their end counts as above.
    fn of(sorted: &[f64]) -> Self {
        let upto = |i: usize| sorted.partition_point(|kl| *kl < Self::edge(i));
        let bounds: Vec<usize> = (0..=Self::BINS).map(upto).collect();
        let mut counts = [0; Self::BINS];
        for (count, pair) in counts.iter_mut().zip(bounds.windows(2)) {
            *count = (pair[1] - pair[0]) as u64;
        }
        Self { below: bounds[0] as u64, counts, above: (sorted.len() - bounds[Self::BINS]) as u64 }
    }
}

/// Scores of many tokens. Standard errors take tokens for independent, as llama.cpp's do.
#[derive(Debug, Clone, PartialEq)]
pub struct DivergenceSummary {
    /// Tokens scored.
    pub tokens: usize,
    /// Tokens of them that predict a next one: what perplexity and `delta_p` are over.
    pub predictions: usize,
    /// Mean KL(original ‖ quantized), nats per token.
    pub kl_mean: f64,
    /// Standard error of that mean.
    pub kl_standard_error: f64,
    /// Median KL.
    pub kl_median: f64,
    /// 90th percentile of KL, linear between ranks.
    pub kl_p90: f64,
    /// 99th percentile of KL.
    pub kl_p99: f64,
    /// 99.9th percentile of KL.
    pub kl_p999: f64,
    /// Largest KL.
    pub kl_max: f64,
    /// How many tokens have how much of it.
    pub kl_histogram: KlHistogram,
    /// Share of tokens on which both models rank the same token first.
    pub top1: f64,
    /// Standard error of that share: `sqrt(p (1 − p) / (n − 1))`.
    pub top1_standard_error: f64,
    /// exp of the mean next-token NLL of the original.
    pub perplexity_original: f64,
    /// Its standard error.
    pub perplexity_original_standard_error: f64,
    /// exp of the mean next-token NLL of the quantized model.
    pub perplexity_quantized: f64,
    /// Its standard error.
    pub perplexity_quantized_standard_error: f64,
    /// Perplexity of the quantized model over the original's, with its standard error by the delta method over the
    /// differences of the tokens' NLL.
    pub perplexity_ratio: Estimate,
    /// Mean change of the correct token's probability, quantized − original.
    pub delta_p_mean: Estimate,
    /// Root mean square of that change.
    pub delta_p_rms: Estimate,
}

impl DivergenceSummary {
    /// Summarises `scores`; NaN everywhere if there are none.
    pub fn of(scores: &[TokenScore]) -> Self {
        let mut sorted: Vec<f64> = scores.iter().map(|s| s.kl).collect();
        sorted.sort_by(f64::total_cmp);
        let nll: Vec<(f64, f64)> = scores.iter().filter_map(|s| s.nll).collect();
        let kl = Estimate::mean(scores.iter().map(|s| s.kl));
        let top1 = Estimate::mean(scores.iter().map(|s| f64::from(u8::from(s.same_top))));
        let original = Estimate::mean(nll.iter().map(|n| n.0)).exp();
        let quantized = Estimate::mean(nll.iter().map(|n| n.1)).exp();
        let delta_p = nll.iter().map(|(original, quantized)| (-quantized).exp() - (-original).exp());
        Self {
            tokens: scores.len(),
            predictions: nll.len(),
            kl_mean: kl.value,
            kl_standard_error: kl.standard_error,
            kl_median: quantile(&sorted, 0.5),
            kl_p90: quantile(&sorted, 0.9),
            kl_p99: quantile(&sorted, 0.99),
            kl_p999: quantile(&sorted, 0.999),
            kl_max: quantile(&sorted, 1.0),
            kl_histogram: KlHistogram::of(&sorted),
            top1: top1.value,
            top1_standard_error: top1.standard_error,
            perplexity_original: original.value,
            perplexity_original_standard_error: original.standard_error,
            perplexity_quantized: quantized.value,
            perplexity_quantized_standard_error: quantized.standard_error,
            perplexity_ratio: Estimate::mean(nll.iter().map(|(original, quantized)| quantized - original)).exp(),
            delta_p_mean: Estimate::mean(delta_p.clone()),
            delta_p_rms: Estimate::mean(delta_p.map(|d| d * d)).sqrt(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn direct(l: &[f32], m: &[f32], target: usize) -> TokenScore {
        let log_softmax = |x: &[f32]| -> Vec<f64> {
            let lse = x.iter().map(|&v| f64::from(v).exp()).sum::<f64>().ln();
            x.iter().map(|&v| f64::from(v) - lse).collect()
        };
        let argmax = |x: &[f32]| (0..x.len()).max_by(|&a, &b| x[a].total_cmp(&x[b])).unwrap();
        let (p, q) = (log_softmax(l), log_softmax(m));
        TokenScore {
            kl: p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum(),
            same_top: argmax(l) == argmax(m),
            nll: Some((-p[target], -q[target])),
        }
    }

    #[test]
    fn slices_of_the_vocabulary_add_up_to_the_definition() {
        let l: Vec<f32> = (0..997).map(|i| ((i * 7919) % 1000) as f32 / 60.0 - 5.0).collect();
        let m: Vec<f32> = l.iter().enumerate().map(|(i, v)| v + ((i * 31) % 17) as f32 / 40.0).collect();
        for target in [0usize, 500, 996] {
            let wanted = direct(&l, &m, target);
            for slice in [1usize, 10, 333, 997] {
                let mut divergence = Divergence::new(Some(target as u32));
                for (i, (l, m)) in l.chunks(slice).zip(m.chunks(slice)).enumerate() {
                    divergence.update((i * slice) as u32, l, m);
                }
                let got = divergence.finish();
                assert!((got.kl - wanted.kl).abs() < 1e-6, "{} {}", got.kl, wanted.kl);
                assert_eq!(got.same_top, wanted.same_top);
                let ((a, b), (x, y)) = (got.nll.unwrap(), wanted.nll.unwrap());
                assert!((a - x).abs() < 1e-5 && (b - y).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn the_histogram_counts_every_token_once() {
        let mut values = vec![-1e-12, 0.0, 9e-9, 1e-8, 1.1e-8, 5e-4, 0.02, 0.02, 3.0, 99.0, 1e2, 1e9];
        values.sort_by(f64::total_cmp);
        let histogram = KlHistogram::of(&values);
        assert_eq!((histogram.below, histogram.above), (3, 2));
        assert_eq!(histogram.counts[..2], [2, 0]);
        // 0.02 = 10^-1.699, and -1.699 is 6.301 decades, 25.2 bins, above 1e-8.
        assert_eq!(histogram.counts[25], 2);
        assert_eq!(histogram.counts.iter().sum::<u64>() + 5, values.len() as u64);
        assert!((KlHistogram::edge(KlHistogram::BINS) / 100.0 - 1.0).abs() < 1e-12);
        assert_eq!(KlHistogram::of(&[]).counts, [0; KlHistogram::BINS]);
    }

    #[test]
    fn equal_models_do_not_diverge() {
        let l: Vec<f32> = (0..100).map(|i| i as f32 / 7.0).collect();
        let mut divergence = Divergence::new(None);
        divergence.update(0, &l, &l);
        let score = divergence.finish();
        assert!(score.kl.abs() < 1e-12 && score.same_top && score.nll.is_none());
        let summary = DivergenceSummary::of(&[score, score]);
        assert_eq!((summary.tokens, summary.top1), (2, 1.0));
        assert!(summary.perplexity_original.is_nan(), "no next token, no perplexity");
    }
}
