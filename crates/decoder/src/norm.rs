//! Norms over the last dimension, with their weights.

use candle_core::{D, Device, Tensor};

use crate::block::load;
use crate::{DecoderError, NormKind, NormSpec, WeightSource, kernels, with_cpu_slice};

/// A norm and its tensors, `[width]` each.
#[derive(Clone, Copy)]
pub(crate) struct Norm<'a> {
    pub(crate) spec: &'a NormSpec,
    pub(crate) weight: &'a Tensor,
    pub(crate) bias: Option<&'a Tensor>,
}

impl Norm<'_> {
    /// Normalises the rows of `x` (`(rows, width)`).
    pub(crate) fn apply(&self, x: &Tensor, composed: bool) -> Result<Tensor, DecoderError> {
        if composed {
            return self.composed(x);
        }
        let (factors, eps) = (self.factors()?, self.spec.eps);
        let out = match self.spec.kind {
            NormKind::Rms | NormKind::RmsPlusOne => with_cpu_slice(x, |x| kernels::rms_norm(x, &factors, eps))?,
            NormKind::Layer => {
                let bias = match self.bias {
                    Some(bias) => with_cpu_slice(bias, <[f32]>::to_vec)?,
                    None => vec![0.0; factors.len()],
                };
                with_cpu_slice(x, |x| kernels::layer_norm(x, &factors, &bias, eps))?
            }
        };
        Ok(Tensor::from_vec(out, x.shape(), x.device())?)
    }

    /// [`Norm::apply`] over the last dimension, of any rank, by candle operations.
    pub(crate) fn composed(&self, x: &Tensor) -> Result<Tensor, DecoderError> {
        let centred = match self.spec.kind {
            NormKind::Rms | NormKind::RmsPlusOne => x.clone(),
            NormKind::Layer => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
        };
        let mean = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let factor = (mean + f64::from(self.spec.eps))?.sqrt()?.recip()?;
        let scaled = centred.broadcast_mul(&factor)?;
        let out = match self.spec.kind {
            NormKind::Rms | NormKind::Layer => scaled.broadcast_mul(self.weight)?,
            NormKind::RmsPlusOne => scaled.broadcast_mul(&(self.weight + 1.0)?)?,
        };
        Ok(match self.bias {
            Some(bias) => out.broadcast_add(bias)?,
            None => out,
        })
    }

    /// What each channel is multiplied by, on the CPU.
    pub(crate) fn factors(&self) -> Result<Vec<f32>, DecoderError> {
        let kind = self.spec.kind;
        with_cpu_slice(self.weight, |weight| weight.iter().map(|w| kind.factor(*w)).collect())
    }
}

/// The tensors of a norm of `width` channels by name: the weight, then the bias if there is one.
pub(crate) fn load_norm(
    source: &dyn WeightSource,
    norm: &NormSpec,
    width: usize,
    device: &Device,
) -> Result<Vec<(String, Tensor)>, DecoderError> {
    norm.tensors().map(|name| Ok((name.clone(), load(source, name, &[width], device)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_agrees_with_its_definition_in_both_ways() {
        let (rows, width, eps) = (3, 37, 1e-3f32);
        let x: Vec<f32> = (0..rows * width).map(|i| ((i * 29 + 7) % 41) as f32 * 0.1 - 1.3).collect();
        let w: Vec<f32> = (0..width).map(|i| (i % 7) as f32 * 0.2 - 0.4).collect();
        let b: Vec<f32> = (0..width).map(|i| (i % 5) as f32 * 0.3 - 0.6).collect();
        let tensor = |values: &[f32], shape: &[usize]| Tensor::from_vec(values.to_vec(), shape, &Device::Cpu).unwrap();
        let (input, weight, bias) = (tensor(&x, &[rows, width]), tensor(&w, &[width]), tensor(&b, &[width]));
        for kind in [NormKind::Rms, NormKind::RmsPlusOne, NormKind::Layer] {
            let layer = kind == NormKind::Layer;
            let spec = NormSpec { weight: String::new(), bias: layer.then(String::new), eps, kind };
            let norm = Norm { spec: &spec, weight: &weight, bias: layer.then_some(&bias) };
            for composed in [false, true] {
                let found = with_cpu_slice(&norm.apply(&input, composed).unwrap(), <[f32]>::to_vec).unwrap();
                for (row, found) in x.chunks(width).zip(found.chunks(width)) {
                    let n = width as f64;
                    let mean = if layer { row.iter().map(|v| f64::from(*v)).sum::<f64>() / n } else { 0.0 };
                    let square = row.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n;
                    for i in 0..width {
                        let scaled = (f64::from(row[i]) - mean) / (square + f64::from(eps)).sqrt();
                        let wanted = match kind {
                            NormKind::Rms => scaled * f64::from(w[i]),
                            NormKind::RmsPlusOne => scaled * (1.0 + f64::from(w[i])),
                            NormKind::Layer => scaled * f64::from(w[i]) + f64::from(b[i]),
                        };
                        assert!((f64::from(found[i]) - wanted).abs() < 1e-5, "{kind:?} {composed}");
                    }
                }
            }
        }
    }
}
