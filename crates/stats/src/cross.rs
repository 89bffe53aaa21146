use candle_core::{Device, Tensor};
use lite_decoder::{DecoderError, with_cpu_slice};
use lite_linalg::cross_update;

use crate::InputStats;

/// Statistics of one input as the quantized model sees it, and what ties them to the float model.
#[derive(Debug, Clone)]
pub struct CrossStats {
    /// Of the quantized stream, X.
    pub input: InputStats,
    /// Width of the other side: K for the float stream's input, N for its output.
    width: usize,
    /// `[width, K]`: `Σ other xᵀ` while gathering, divided by the tokens once finished.
    cross: Vec<f32>,
    /// The same, gathered on a device and not brought to the host yet.
    device: Option<Tensor>,
}

impl CrossStats {
    /// Empty statistics of an input with `in_features` channels beside `width` values of the float stream: its own
    /// input X̃ (K of them), or, where that is less work, the outputs X̃Wᵀ of a linear (N).
    pub fn new(in_features: usize, width: usize) -> Self {
        Self { input: InputStats::new(in_features), width, cross: vec![0.0; width * in_features], device: None }
    }

    /// Adds the same tokens of both streams: `(tokens, width)` of the float one, `(tokens, K)` of the quantized one.
    ///
    /// # Errors
    /// If a tensor cannot be read.
    ///
    /// # Panics
    /// If the shapes differ from what was announced.
    pub fn update(&mut self, float: &Tensor, quantized: &Tensor) -> Result<(), DecoderError> {
        let k = self.input.in_features;
        if !quantized.device().is_cpu() {
            return self.update_composed(float, quantized);
        }
        with_cpu_slice(quantized, |x| {
            self.input.update(x);
            with_cpu_slice(float, |other| cross_update(&mut self.cross, other, x, x.len() / k, self.width, k))
        })?
    }

    /// [`CrossStats::update`] by candle operations on the tensors' device; the sums stay there until
    /// [`CrossStats::finish`].
    ///
    /// # Errors
    /// If the shapes differ from what was announced, or the device fails.
    pub fn update_composed(&mut self, float: &Tensor, quantized: &Tensor) -> Result<(), DecoderError> {
        self.input.update_composed(quantized)?;
        let (tokens, width) = float.dims2()?;
        if (tokens, width) != (quantized.dim(0)?, self.width) {
            let reason = format!(
                "cross statistics of {} values were given {:?} beside {:?}",
                self.width,
                float.dims(),
                quantized.dims()
            );
            return Err(DecoderError::Input { reason });
        }
        let new = float.t()?.matmul(&quantized.contiguous()?)?;
        self.device = Some(match self.device.take() {
            None => new,
            Some(old) => (old + new)?,
        });
        Ok(())
    }

    /// Brings everything to the host, and divides by the number of tokens.
    ///
    /// # Errors
    /// If the device that gathered the sums cannot be read.
    pub fn finish(&mut self) -> Result<(), DecoderError> {
        self.input.collect()?;
        self.input.finish();
        if let Some(sums) = self.device.take() {
            with_cpu_slice(&sums.to_device(&Device::Cpu)?, |sums| {
                self.cross.iter_mut().zip(sums).for_each(|(c, s)| *c += s);
            })?;
        }
        let factor = 1.0 / self.input.tokens.max(1) as f32;
        self.cross.iter_mut().for_each(|c| *c *= factor);
        Ok(())
    }

    /// `[width, K]`: `X̃ᵀX / T`, or `(X̃Wᵀ)ᵀX / T`.
    pub fn cross(&self) -> &[f32] {
        &self.cross
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_on_a_device_are_those_of_the_cpu() {
        let (tokens, width, k) = (150, 11, 23);
        let values =
            |n: usize, step: usize| -> Vec<f32> { (0..n).map(|i| ((i * step % 1009) as f32 / 500.0) - 1.0).collect() };
        let (float, coded) = (values(tokens * width, 7919), values(tokens * k, 6067));
        let gather = |device: &Device, composed: bool| {
            let float = Tensor::from_slice(&float, (tokens, width), device).unwrap();
            let coded = Tensor::from_slice(&coded, (tokens, k), device).unwrap();
            let mut stats = CrossStats::new(k, width);
            for (first, count) in [(0, 40), (40, 110)] {
                let (float, coded) = (float.narrow(0, first, count).unwrap(), coded.narrow(0, first, count).unwrap());
                if composed { stats.update_composed(&float, &coded) } else { stats.update(&float, &coded) }.unwrap();
            }
            stats.finish().unwrap();
            stats
        };
        let wanted = gather(&Device::Cpu, false);
        let sum: f64 = (0..tokens).map(|t| f64::from(float[t * width + 3]) * f64::from(coded[t * k + 5])).sum();
        assert!((f64::from(wanted.cross()[3 * k + 5]) - sum / tokens as f64).abs() < 1e-5);
        for compute in &lite_decoder::Compute::every()[1..] {
            let found = gather(compute.device(), true);
            assert_eq!(found.input.tokens, wanted.input.tokens);
            let pairs =
                found.cross().iter().zip(wanted.cross()).chain(found.input.gram().iter().zip(wanted.input.gram()));
            pairs.for_each(|(a, b)| assert!((a - b).abs() < 1e-5, "{a} {b}"));
        }
        let wide = Tensor::zeros((3, width + 1), candle_core::DType::F32, &Device::Cpu).unwrap();
        let x = Tensor::zeros((3, k), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(CrossStats::new(k, width).update_composed(&wide, &x).is_err());
    }
}
