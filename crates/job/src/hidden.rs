//! The hidden states of all calibration windows at one depth: in memory, or in a file when they would
//! not fit the budget. They are kept in f32, so that both give the same bytes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use candle_core::{Device, Tensor};
use lite_decoder::{scatter, with_cpu_slice};

use crate::JobError;
use crate::batches::Batch;

/// Windows × tokens × hidden values.
#[derive(Debug)]
pub(crate) struct HiddenStates {
    windows: usize,
    window_values: usize,
    storage: Storage,
}

#[derive(Debug)]
enum Storage {
    Memory(Vec<f32>),
    Spool { file: File, path: std::path::PathBuf },
}

impl HiddenStates {
    /// Room for `windows` windows of `window_values` values in memory.
    pub(crate) fn in_memory(windows: usize, window_values: usize) -> Self {
        Self { windows, window_values, storage: Storage::Memory(vec![0.0; windows * window_values]) }
    }

    /// The same in a file. It has no name any more once it is open, so nothing is left of it whatever happens.
    pub(crate) fn in_file(path: &Path, windows: usize, window_values: usize) -> Result<Self, JobError> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .map_err(JobError::io("create the spool file", path))?;
        std::fs::remove_file(path).map_err(JobError::io("unlink the spool file", path))?;
        file.set_len((windows * window_values * 4) as u64).map_err(JobError::io("size the spool file", path))?;
        Ok(Self { windows, window_values, storage: Storage::Spool { file, path: path.to_owned() } })
    }

    /// Number of windows.
    pub(crate) fn windows(&self) -> usize {
        self.windows
    }

    /// Values per window.
    pub(crate) fn window_values(&self) -> usize {
        self.window_values
    }

    /// Bytes of all windows.
    pub(crate) fn bytes(&self) -> u64 {
        self.windows as u64 * self.window_values as u64 * 4
    }

    /// Values of `count` windows from `first` on.
    pub(crate) fn read(&self, first: usize, count: usize) -> Result<Vec<f32>, JobError> {
        let (start, len) = (first * self.window_values, count * self.window_values);
        match &self.storage {
            Storage::Memory(values) => Ok(values[start..start + len].to_vec()),
            Storage::Spool { file, path } => {
                let mut values = vec![0f32; len];
                read_at(file, start, &mut values).map_err(JobError::io("read the spool file", path))?;
                Ok(values)
            }
        }
    }

    /// The same as a tensor of this shape.
    pub(crate) fn tensor(&self, (first, count): Batch, shape: &[usize], device: &Device) -> Result<Tensor, JobError> {
        crate::fold::tensor(self.read(first, count)?, shape, device)
    }

    /// [`HiddenStates::write`] of a tensor.
    pub(crate) fn keep(&mut self, first: usize, values: &Tensor) -> Result<(), JobError> {
        with_cpu_slice(values, |values| self.write(first, values))?
    }

    /// Single rows of `width` values, counted over all windows, one after the other.
    pub(crate) fn rows(&self, rows: &[u32], width: usize) -> Result<Vec<f32>, JobError> {
        let mut out = Vec::with_capacity(rows.len() * width);
        match &self.storage {
            Storage::Memory(values) => {
                rows.iter().for_each(|row| out.extend_from_slice(&values[*row as usize * width..][..width]));
            }
            Storage::Spool { file, path } => {
                out.resize(rows.len() * width, 0.0);
                for (row, values) in rows.iter().zip(out.chunks_exact_mut(width.max(1))) {
                    read_at(file, *row as usize * width, values).map_err(JobError::io("read the spool file", path))?;
                }
            }
        }
        Ok(out)
    }

    /// Adds `values`, times the weight of each row, to single rows.
    pub(crate) fn add_rows(&mut self, rows: &[u32], weights: &[f32], values: &[f32]) -> Result<(), JobError> {
        let width = values.len() / rows.len().max(1);
        if let Storage::Memory(all) = &mut self.storage {
            scatter(all, width, values, rows, weights);
            return Ok(());
        }
        let mut sums = self.rows(rows, width)?;
        let places: Vec<u32> = (0..rows.len() as u32).collect();
        scatter(&mut sums, width, values, &places, weights);
        let Storage::Spool { file, path } = &self.storage else { return Ok(()) };
        for (row, sum) in rows.iter().zip(sums.chunks_exact(width.max(1))) {
            write_at(file, *row as usize * width, sum).map_err(JobError::io("write the spool file", path))?;
        }
        Ok(())
    }

    /// Replaces the values of the windows from `first` on.
    pub(crate) fn write(&mut self, first: usize, values: &[f32]) -> Result<(), JobError> {
        let start = first * self.window_values;
        match &mut self.storage {
            Storage::Memory(all) => all[start..start + values.len()].copy_from_slice(values),
            Storage::Spool { file, path } => {
                write_at(file, start, values).map_err(JobError::io("write the spool file", &*path))?;
            }
        }
        Ok(())
    }
}

/// Values that are converted at a time: a whole batch would be there twice.
const PART: usize = 1 << 14;

/// Values from position `start` on, little-endian f32.
fn read_at(file: &File, start: usize, values: &mut [f32]) -> std::io::Result<()> {
    let mut bytes = vec![0u8; values.len().min(PART) * 4];
    let mut at = start as u64 * 4;
    for part in values.chunks_mut(PART) {
        let bytes = &mut bytes[..part.len() * 4];
        file.read_exact_at(bytes, at)?;
        part.iter_mut().zip(bytes.as_chunks().0).for_each(|(v, b)| *v = f32::from_le_bytes(*b));
        at += bytes.len() as u64;
    }
    Ok(())
}

/// The way back of [`read_at`].
fn write_at(file: &File, start: usize, values: &[f32]) -> std::io::Result<()> {
    let mut bytes = Vec::with_capacity(values.len().min(PART) * 4);
    let mut at = start as u64 * 4;
    for part in values.chunks(PART) {
        bytes.clear();
        bytes.extend(part.iter().flat_map(|v| v.to_le_bytes()));
        file.write_all_at(&bytes, at)?;
        at += bytes.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_go_through_in_parts() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = HiddenStates::in_file(&dir.path().join("hidden"), 2, 2 * PART + 3).unwrap();
        let values: Vec<f32> = (0..2 * PART + 3).map(|v| v as f32).collect();
        store.write(1, &values).unwrap();
        assert_eq!(store.read(1, 1).unwrap(), values);
        assert_eq!(store.read(0, 1).unwrap(), vec![0.0; 2 * PART + 3]);
    }

    #[test]
    fn memory_and_file_hold_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hidden");
        let mut stores = [HiddenStates::in_memory(5, 7), HiddenStates::in_file(&path, 5, 7).unwrap()];
        for store in &mut stores {
            store.write(1, &(0..14).map(|v| v as f32 * 0.3).collect::<Vec<_>>()).unwrap();
            store.write(4, &[f32::MIN_POSITIVE; 7]).unwrap();
        }
        for first in 0..4 {
            assert_eq!(stores[0].read(first, 2).unwrap(), stores[1].read(first, 2).unwrap());
        }
        assert_eq!(stores[1].read(2, 1).unwrap()[0], 7.0 * 0.3);
        let added: Vec<Vec<f32>> = stores
            .iter_mut()
            .map(|store| {
                store.add_rows(&[2, 0], &[0.5, 2.0], &(0..14).map(|v| v as f32).collect::<Vec<_>>()).unwrap();
                store.rows(&[0, 1, 2, 2], 7).unwrap()
            })
            .collect();
        assert_eq!(added[0], added[1]);
        assert_eq!(
            (added[0][1], added[0][8], added[0][14], added[0][22]),
            (16.0, 1.0 * 0.3, 7.0 * 0.3, 8.0 * 0.3 + 0.5)
        );
        assert!(!path.exists());
    }
}
