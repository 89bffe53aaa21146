//! Norms: their formulas, and where they stand in a block.

/// A normalisation over the last dimension.
#[derive(Debug, Clone, PartialEq)]
pub struct NormSpec {
    /// Tensor `[width]`.
    pub weight: String,
    /// Tensor `[width]` that is added, if there is one; only [`NormKind::Layer`] has it.
    pub bias: Option<String>,
    /// Added to the mean square, or to the variance.
    pub eps: f32,
    /// The formula.
    pub kind: NormKind,
}

impl NormSpec {
    /// The names of its tensors: the weight, then the bias if there is one.
    pub fn tensors(&self) -> impl Iterator<Item = &String> {
        std::iter::once(&self.weight).chain(&self.bias)
    }
}

/// The formula of a norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum NormKind {
    /// `w · x / sqrt(mean(x²) + eps)` (Zhang and Sennrich 2019, arXiv:1910.07467).
    Rms,
    /// The same with `1 + w` in place of `w`: what Gemma stores is the distance from 1.
    RmsPlusOne,
    /// `w · (x − mean(x)) / sqrt(var(x) + eps) + b` (Ba et al. 2016, arXiv:1607.06450).
    Layer,
}

impl NormKind {
    /// What a channel is multiplied by, from its stored weight.
    pub fn factor(self, weight: f32) -> f32 {
        match self {
            Self::Rms | Self::Layer => weight,
            Self::RmsPlusOne => 1.0 + weight,
        }
    }

    /// The stored weight that divides the channel by `s`; not rounded to any type.
    pub fn rescaled(self, weight: f32, s: f32) -> f32 {
        match self {
            Self::Rms | Self::Layer => weight / s,
            Self::RmsPlusOne => (1.0 + weight) / s - 1.0,
        }
    }
}

/// The norms on the residual stream of a block. Each is there or not: `x += attn_out(attn(attn_in(x)))`, and the same
/// for the feed-forward.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct BlockNorms {
    /// Before attention.
    pub attn: Option<NormSpec>,
    /// Between attention and the residual sum.
    pub attn_out: Option<NormSpec>,
    /// Before the feed-forward.
    pub mlp: Option<NormSpec>,
    /// Between the feed-forward and the residual sum.
    pub mlp_out: Option<NormSpec>,
}

impl BlockNorms {
    /// Those that are there, in order of execution.
    pub fn all(&self) -> impl Iterator<Item = &NormSpec> {
        [&self.attn, &self.attn_out, &self.mlp, &self.mlp_out].into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rescaled_weight_divides_the_channel() {
        for kind in [NormKind::Rms, NormKind::RmsPlusOne, NormKind::Layer] {
            for (weight, s) in [(0.5f32, 4.0f32), (-0.25, 0.5), (2.0, 8.0)] {
                assert_eq!(kind.factor(kind.rescaled(weight, s)) * s, kind.factor(weight), "{kind:?}");
            }
        }
        assert_eq!(NormKind::RmsPlusOne.rescaled(1.0, 4.0), -0.5);
        assert_eq!(NormKind::Rms.rescaled(1.0, 4.0), 0.25);
    }
}
