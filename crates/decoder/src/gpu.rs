use crate::DecoderError;

/// An NVIDIA GPU that this process sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Its index here, as in `cuda:0`.
    pub index: usize,
    /// What the driver calls it.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
    /// Bytes of its memory.
    pub total_bytes: u64,
    /// Bytes that nobody uses.
    pub free_bytes: u64,
}

/// Every GPU that this process sees.
///
/// # Errors
/// [`DecoderError::Device`] if this build has no CUDA support, or the driver is not there or does not work.
#[cfg(feature = "cuda")]
pub fn gpus() -> Result<Vec<Gpu>, DecoderError> {
    use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError};

    let gpu = |index: usize| -> Result<Gpu, DriverError> {
        let context = CudaContext::new(index)?;
        let (free, total) = context.mem_get_info()?;
        Ok(Gpu {
            index,
            name: context.name()?,
            capability: context.compute_capability()?,
            total_bytes: total as u64,
            free_bytes: free as u64,
        })
    };
    let count = CudaContext::device_count().map(|count| usize::try_from(count).unwrap_or(0));
    let found: Result<Vec<Gpu>, DriverError> = count.and_then(|count| (0..count).map(gpu).collect());
    found.map_err(|error| {
        let reason = match format!("{:?}", error.0).as_str() {
            "CUDA_ERROR_NO_DEVICE" => "no NVIDIA driver was found, or it sees no GPU (CUDA_ERROR_NO_DEVICE)".to_owned(),
            other => format!("the CUDA driver fails: {other}"),
        };
        DecoderError::Device { reason }
    })
}

/// Every GPU that this process sees.
///
/// # Errors
/// [`DecoderError::Device`]: this build has no CUDA support.
#[cfg(not(feature = "cuda"))]
pub fn gpus() -> Result<Vec<Gpu>, DecoderError> {
    Err(DecoderError::Device { reason: "this build has no CUDA support".to_owned() })
}
