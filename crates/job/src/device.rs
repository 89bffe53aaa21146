//! Where blocks run.

use lite_decoder::Compute;

use crate::{DeviceChoice, JobError};

/// Opens the device that was asked for. Beside it what there is to say: why [`DeviceChoice::Auto`] came out at the CPU,
/// or which GPU it took. Where nobody asked (`None`), a build without CUDA support says nothing.
///
/// # Errors
/// [`JobError::Resources`] for a GPU that this build or this machine has not.
pub fn open_device(choice: Option<DeviceChoice>) -> Result<(Compute, Option<String>), JobError> {
    let index = match choice {
        Some(DeviceChoice::Cpu) => return Ok((Compute::cpu(), None)),
        Some(DeviceChoice::Cuda(index)) => index,
        Some(DeviceChoice::Auto) => 0,
        None if cfg!(feature = "cuda") => 0,
        None => return Ok((Compute::cpu(), None)),
    };
    match (Compute::cuda(index), choice) {
        (Ok(compute), Some(DeviceChoice::Cuda(_))) => Ok((compute, None)),
        (Ok(compute), _) => Ok((compute, Some(format!("blocks run on GPU {index}")))),
        (Err(error), Some(DeviceChoice::Cuda(_))) => Err(JobError::Resources(format!(
            "--device cuda: {error}; use --device cpu, or --device auto to take whatever is there"
        ))),
        (Err(error), _) => Ok((Compute::cpu(), Some(format!("blocks run on the CPU: {error}")))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_taken_refused_or_done_without() {
        let (cpu, note) = open_device(Some(DeviceChoice::Cpu)).unwrap();
        assert!(cpu.device().is_cpu() && !cpu.is_composed() && note.is_none());
        // No machine has this many.
        let error = open_device(Some(DeviceChoice::Cuda(99))).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Resources);
        assert!(error.to_string().contains("--device cpu"), "{error}");
        let (auto, note) = open_device(Some(DeviceChoice::Auto)).unwrap();
        assert_eq!(note.unwrap().contains("on the CPU"), auto.device().is_cpu());
        if !cfg!(feature = "cuda") {
            assert!(auto.device().is_cpu());
            assert_eq!(open_device(None).unwrap().1, None, "nobody asked");
        }
    }
}
