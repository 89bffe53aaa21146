//! Limits a checkpoint must keep.

use crate::DivergenceSummary;

/// One limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Gate {
    /// Mean KL(original ‖ quantized) in nats, at most this.
    MaxKl(f64),
    /// Perplexity of the quantized model over the original's, at most this.
    MaxPerplexityRatio(f64),
    /// Tokens on which both models rank the same token first, in percent, at least this.
    MinTop1(f64),
}

/// What a gate looks at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Mean KL in nats.
    pub kl: f64,
    /// Ratio of perplexities.
    pub perplexity_ratio: f64,
    /// Same first token, percent.
    pub top1: f64,
}

impl From<&DivergenceSummary> for Measured {
    fn from(summary: &DivergenceSummary) -> Self {
        Self { kl: summary.kl_mean, perplexity_ratio: summary.perplexity_ratio.value, top1: summary.top1 * 100.0 }
    }
}

/// The verdict of one gate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GateResult {
    /// The gate.
    pub gate: Gate,
    /// What was measured.
    pub measured: f64,
    /// Whether the limit is kept. NaN keeps none.
    pub passed: bool,
}

impl Gate {
    /// Name of the flag that sets it.
    pub fn flag(&self) -> &'static str {
        match self {
            Self::MaxKl(_) => "--max-kl",
            Self::MaxPerplexityRatio(_) => "--max-ppl-ratio",
            Self::MinTop1(_) => "--min-top1",
        }
    }

    /// The limit.
    pub fn limit(&self) -> f64 {
        match *self {
            Self::MaxKl(limit) | Self::MaxPerplexityRatio(limit) | Self::MinTop1(limit) => limit,
        }
    }

    /// Judges.
    pub fn judge(self, measured: Measured) -> GateResult {
        let (measured, passed) = match self {
            Self::MaxKl(limit) => (measured.kl, measured.kl <= limit),
            Self::MaxPerplexityRatio(limit) => (measured.perplexity_ratio, measured.perplexity_ratio <= limit),
            Self::MinTop1(limit) => (measured.top1, measured.top1 >= limit),
        };
        GateResult { gate: self, measured, passed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_inclusive_and_nan_keeps_none() {
        let measured = Measured { kl: 0.02, perplexity_ratio: 1.01, top1: 97.0 };
        for (gate, passed) in [
            (Gate::MaxKl(0.02), true),
            (Gate::MaxKl(0.019), false),
            (Gate::MaxPerplexityRatio(1.01), true),
            (Gate::MaxPerplexityRatio(1.0), false),
            (Gate::MinTop1(97.0), true),
            (Gate::MinTop1(97.1), false),
        ] {
            assert_eq!(gate.judge(measured).passed, passed, "{gate:?}");
        }
        let nan = Measured { kl: f64::NAN, perplexity_ratio: f64::NAN, top1: f64::NAN };
        for gate in [Gate::MaxKl(f64::INFINITY), Gate::MaxPerplexityRatio(1e9), Gate::MinTop1(0.0)] {
            assert!(!gate.judge(nan).passed, "{gate:?}");
        }
    }
}
