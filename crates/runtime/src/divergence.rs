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

/// Running softmax sums of one token.
#[derive(Debug, Clone, Copy)]
struct Sums {
    max: f32,
    sum: f64,
    argmax: u32,
    target: f32,
}

impl Sums {
    const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0, argmax: 0, target: f32::NAN };

    fn log_sum_exp(&self) -> f64 {
        f64::from(self.max) + self.sum.ln()
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
        if let Some(at) = self.target.and_then(|t| t.checked_sub(first)).map(|t| t as usize)
            && at < original.len()
        {
            self.original.target = original[at];
            self.quantized.target = quantized[at];
        }
    }

    /// The token's score once the whole vocabulary was seen.
    pub fn finish(&self) -> TokenScore {
        let (lse, quantized_lse) = (self.original.log_sum_exp(), self.quantized.log_sum_exp());
        let nll = |sums: &Sums, lse: f64| lse - f64::from(sums.target);
        TokenScore {
            kl: self.cross / self.original.sum - lse + quantized_lse,
            same_top: self.original.argmax == self.quantized.argmax,
            nll: self.target.map(|_| (nll(&self.original, lse), nll(&self.quantized, quantized_lse))),
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

/// Scores of many tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct DivergenceSummary {
    /// Tokens scored.
    pub tokens: usize,
    /// Mean KL(original ‖ quantized), nats per token.
    pub kl_mean: f64,
    /// Median KL.
    pub kl_median: f64,
    /// 99th percentile of KL.
    pub kl_p99: f64,
    /// Largest KL.
    pub kl_max: f64,
    /// Share of tokens on which both models rank the same token first.
    pub top1: f64,
    /// exp of the mean next-token NLL of the original.
    pub perplexity_original: f64,
    /// exp of the mean next-token NLL of the quantized model.
    pub perplexity_quantized: f64,
}

impl DivergenceSummary {
    /// Summarises `scores`; NaN everywhere if there are none.
    pub fn of(scores: &[TokenScore]) -> Self {
        let mut kl: Vec<f64> = scores.iter().map(|s| s.kl).collect();
        kl.sort_by(f64::total_cmp);
        let quantile = |q: f64| match kl.len() {
            0 => f64::NAN,
            n => kl[((n - 1) as f64 * q).round() as usize],
        };
        let mean = |values: &mut dyn Iterator<Item = f64>| {
            let (sum, count) = values.fold((0.0, 0usize), |(sum, count), v| (sum + v, count + 1));
            sum / count as f64
        };
        Self {
            tokens: scores.len(),
            kl_mean: mean(&mut scores.iter().map(|s| s.kl)),
            kl_median: quantile(0.5),
            kl_p99: quantile(0.99),
            kl_max: quantile(1.0),
            top1: mean(&mut scores.iter().map(|s| f64::from(u8::from(s.same_top)))),
            perplexity_original: mean(&mut scores.iter().filter_map(|s| s.nll).map(|n| n.0)).exp(),
            perplexity_quantized: mean(&mut scores.iter().filter_map(|s| s.nll).map(|n| n.1)).exp(),
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
