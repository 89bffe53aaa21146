use candle_core::Tensor;

use crate::block::load;
use crate::norm::{Norm, load_norm};
use crate::{Compute, DecoderError, DecoderSpec, HeadSpec, NormSpec, WeightSource, ops, with_cpu_slice};

/// The norm between the last block and the head.
#[derive(Debug, Clone)]
pub struct FinalNorm {
    spec: NormSpec,
    /// `[hidden]`
    weight: Tensor,
    /// `[hidden]`
    bias: Option<Tensor>,
    composed: bool,
}

impl FinalNorm {
    /// Reads the norm's weight, and its bias if it has one.
    ///
    /// # Errors
    /// If one cannot be read or has another shape than `[hidden]`.
    pub fn load(
        spec: &DecoderSpec,
        source: &dyn WeightSource,
        compute: impl Into<Compute>,
    ) -> Result<Self, DecoderError> {
        let compute = compute.into();
        let mut tensors = load_norm(source, &spec.final_norm, spec.hidden, compute.device())?.into_iter();
        let lost = || DecoderError::tensor(&spec.final_norm.weight, "is not loaded");
        let (_, weight) = tensors.next().ok_or_else(lost)?;
        let bias = tensors.next().map(|(_, bias)| bias);
        Ok(Self { spec: spec.final_norm.clone(), weight, bias, composed: compute.is_composed() })
    }

    /// Normalises the last block's outputs, `(rows, hidden)`.
    ///
    /// # Errors
    /// If `x` does not fit, or the device fails.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor, DecoderError> {
        let ((_, hidden), wanted) = (x.dims2()?, self.weight.elem_count());
        if hidden != wanted {
            return Err(DecoderError::input(format!("the head was given rows of {hidden} values, wanted {wanted}")));
        }
        let norm = Norm { spec: &self.spec, weight: &self.weight, bias: self.bias.as_ref() };
        norm.apply(&x.contiguous()?, self.composed)
    }

    /// The weight, `[hidden]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }
}

/// Final norm and head: hidden states to logits.
#[derive(Debug, Clone)]
pub struct Head {
    spec: HeadSpec,
    norm: FinalNorm,
    /// `[vocab, hidden]`
    weight: Tensor,
    /// `[vocab]`
    bias: Option<Tensor>,
}

impl Head {
    /// Reads the final norm and the head, which is the embedding if they are tied.
    ///
    /// # Errors
    /// If a tensor cannot be read or has another shape than `spec` says.
    pub fn load(
        spec: &DecoderSpec,
        source: &dyn WeightSource,
        compute: impl Into<Compute>,
    ) -> Result<Self, DecoderError> {
        let compute = compute.into();
        let device = compute.device();
        let bias = spec.head.bias.as_ref().map(|bias| load(source, bias, &[spec.vocab], device)).transpose()?;
        let mut weight = load(source, &spec.head.weight, &[spec.vocab, spec.hidden], device)?;
        if spec.head.normalised {
            let mut values = with_cpu_slice(&weight, <[f32]>::to_vec)?;
            spec.head.prepare(&mut values, spec.hidden);
            weight = Tensor::from_vec(values, weight.shape(), device)?;
        }
        let norm = FinalNorm::load(spec, source, &compute)?;
        Ok(Self { spec: spec.head.clone(), norm, weight, bias })
    }

    /// Logits `(rows, vocab)` of the last block's outputs `(rows, hidden)`.
    ///
    /// # Errors
    /// If `x` does not fit, or the device fails.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor, DecoderError> {
        self.finish(ops::linear(&self.norm(x)?, &self.weight, self.bias.as_ref(), self.norm.composed)?)
    }

    /// The final norm of the last block's outputs `(rows, hidden)`; input of [`Head::logits_chunk`].
    ///
    /// # Errors
    /// If `x` does not fit, or the device fails.
    pub fn norm(&self, x: &Tensor) -> Result<Tensor, DecoderError> {
        self.norm.forward(x)
    }

    /// Logits `(rows, len)` of tokens `start..start + len` from normed hidden states: for vocabularies whose
    /// logits would not fit at once.
    ///
    /// # Errors
    /// If the range leaves the vocabulary, or the device fails.
    pub fn logits_chunk(&self, normed: &Tensor, start: usize, len: usize) -> Result<Tensor, DecoderError> {
        let bias = self.bias.as_ref().map(|bias| bias.narrow(0, start, len)).transpose()?;
        self.finish(ops::linear(normed, &self.weight.narrow(0, start, len)?, bias.as_ref(), self.norm.composed)?)
    }

    fn finish(&self, logits: Tensor) -> Result<Tensor, DecoderError> {
        let logits = ops::scaled(&logits, self.spec.scale, self.norm.composed)?;
        let Some(cap) = self.spec.softcap.map(f64::from) else { return Ok(logits) };
        Ok(((logits / cap)?.tanh()? * cap)?)
    }

    /// The head's weight `[vocab, hidden]` as it is multiplied.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The final norm's weight `[hidden]`.
    pub fn norm_weight(&self) -> &Tensor {
        self.norm.weight()
    }
}
