use candle_core::Device;

use crate::DecoderError;

/// Where blocks run, and by which operations.
///
/// The CPU has kernels of its own, fused and cut by shape alone. Everywhere else a block is composed of candle's
/// operations, with matrix products in f32. [`Compute::composed`] takes that way on any device, so that the CPU can check
/// what a GPU will do.
#[derive(Debug, Clone)]
pub struct Compute {
    device: Device,
    composed: bool,
}

impl Compute {
    /// The CPU, by its kernels.
    pub fn cpu() -> Self {
        Self { device: Device::Cpu, composed: false }
    }

    /// Composed operations on `device`, the CPU included.
    pub fn composed(device: Device) -> Self {
        Self { device, composed: true }
    }

    /// The NVIDIA GPU of this index.
    ///
    /// # Errors
    /// [`DecoderError::Device`] if this build has no CUDA support, or there is no such GPU, or it does not work.
    pub fn cuda(index: usize) -> Result<Self, DecoderError> {
        if !cfg!(feature = "cuda") {
            return Err(DecoderError::Device { reason: "this build has no CUDA support".to_owned() });
        }
        let failed = |error| {
            let reason = format!("GPU {index} cannot be used: {}", explained(&error));
            DecoderError::Device { reason }
        };
        let device = Device::new_cuda(index).map_err(failed)?;
        // A first kernel and a first product: a driver that is too old, or a missing cuBLAS, shows here and not mid-run.
        let works = || {
            let x = candle_core::Tensor::full(1f32, (16, 16), &device)?;
            (x.matmul(&x)? + 1.0)?.sum_all()?.to_scalar::<f32>()
        };
        match works() {
            Ok(sum) if sum == 17.0 * 256.0 => Ok(Self::composed(device)),
            Ok(sum) => {
                let reason = format!("GPU {index} cannot be used: it adds 256 times 17 up to {sum}");
                Err(DecoderError::Device { reason })
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// Every way there is to compute here, the first one the CPU's kernels: for tests that run on each.
    pub fn every() -> Vec<Self> {
        let mut all = vec![Self::cpu(), Self::composed(Device::Cpu)];
        all.extend(Self::cuda(0));
        all
    }

    /// Where tensors are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether blocks are composed of candle's operations.
    pub fn is_composed(&self) -> bool {
        self.composed
    }
}

impl From<&Device> for Compute {
    /// The device's usual way: kernels on the CPU, composed operations elsewhere.
    fn from(device: &Device) -> Self {
        Self { device: device.clone(), composed: !device.is_cpu() }
    }
}

impl From<&Compute> for Compute {
    fn from(compute: &Compute) -> Self {
        compute.clone()
    }
}

/// A driver's error without its backtrace, and what to do about it.
fn explained(error: &candle_core::Error) -> String {
    let text = error.to_string();
    let text = text.lines().next().unwrap_or("unknown error");
    if text.contains("CUDA_ERROR_NO_DEVICE") {
        return "no NVIDIA driver was found, or it sees no GPU (CUDA_ERROR_NO_DEVICE)".to_owned();
    }
    format!("{text} (`lite env` tells which of CUDA's libraries were found)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_their_usual_way() {
        assert!(!Compute::from(&Device::Cpu).is_composed());
        assert!(Compute::composed(Device::Cpu).is_composed());
        let all = Compute::every();
        assert!(all.len() >= 2 && !all[0].is_composed() && all[1..].iter().all(Compute::is_composed));
        if !cfg!(feature = "cuda") {
            let error = Compute::cuda(0).unwrap_err().to_string();
            assert!(error.contains("no CUDA support"), "{error}");
        }
    }
}
