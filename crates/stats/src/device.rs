//! Sums that stay where the activations are, until they are asked for.

use candle_core::{DType, Tensor};
use lite_decoder::{DecoderError, with_cpu_slice};

/// Sums over the tokens of one input, by candle operations. Products are f32, as on the CPU.
#[derive(Debug, Clone)]
pub(crate) struct DeviceSums {
    /// `[K, K]`: `Σ x xᵀ`.
    gram: Tensor,
    /// `[K]`, f64: `Σ |x|`.
    abs_sum: Tensor,
    /// `[K]`: `max |x|`, NaN or not.
    abs_max: Tensor,
}

/// [`DeviceSums`] on the host.
pub(crate) struct HostSums {
    pub(crate) gram: Vec<f32>,
    pub(crate) abs_sum: Vec<f64>,
    pub(crate) abs_max: Vec<f32>,
}

impl DeviceSums {
    /// Of `x`, `(tokens, K)`.
    fn of(x: &Tensor) -> Result<Self, DecoderError> {
        let abs = x.abs()?;
        Ok(Self { gram: x.t()?.matmul(x)?, abs_sum: abs.sum(0)?.to_dtype(DType::F64)?, abs_max: abs.max(0)? })
    }

    /// Adds `x`, `(tokens, K)` and contiguous, to what was there.
    pub(crate) fn add(sums: &mut Option<Self>, x: &Tensor) -> Result<(), DecoderError> {
        let new = Self::of(x)?;
        *sums = Some(match sums.take() {
            None => new,
            Some(old) => Self {
                gram: (old.gram + new.gram)?,
                abs_sum: (old.abs_sum + new.abs_sum)?,
                abs_max: old.abs_max.maximum(&new.abs_max)?,
            },
        });
        Ok(())
    }

    /// Everything, on the host.
    pub(crate) fn to_host(&self) -> Result<HostSums, DecoderError> {
        let abs_sum = self.abs_sum.to_vec1::<f64>()?;
        let mut abs_max = with_cpu_slice(&self.abs_max, <[f32]>::to_vec)?;
        // A maximum may lose a NaN, a sum never does.
        abs_max.iter_mut().zip(&abs_sum).for_each(|(max, sum)| *max = if sum.is_nan() { f32::NAN } else { *max });
        Ok(HostSums { gram: with_cpu_slice(&self.gram, <[f32]>::to_vec)?, abs_sum, abs_max })
    }
}
