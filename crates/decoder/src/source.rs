use lite_model::Checkpoint;

use crate::DecoderError;

/// Where weights come from. Names are the checkpoint's own.
pub trait WeightSource {
    /// Shape and values of a tensor, row-major, as f32.
    ///
    /// # Errors
    /// If the tensor is missing, unreadable or not of a float type.
    fn load(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), DecoderError>;

    /// Whether there is a tensor `name`.
    fn contains(&self, name: &str) -> bool;

    /// Says that these tensors will not be read again soon, so that their pages need not stay in memory. Does nothing
    /// by default.
    fn release(&self, names: &[String]) {
        let _ = names;
    }

    /// The given rows of a matrix `[rows, width]`, one after the other: `rows.len() · width` values.
    /// The default loads the whole matrix; sources that can seek should not.
    ///
    /// # Errors
    /// As [`WeightSource::load`]; if the tensor is not a matrix, or a row is outside of it.
    fn rows(&self, name: &str, rows: &[u32]) -> Result<Vec<f32>, DecoderError> {
        let (shape, values) = self.load(name)?;
        let &[height, width] = shape.as_slice() else {
            return Err(DecoderError::tensor(name, format!("has shape {shape:?}, wanted a matrix")));
        };
        let mut out = Vec::with_capacity(rows.len().saturating_mul(width));
        for &row in rows {
            let start = (row as usize).checked_mul(width).filter(|_| (row as usize) < height);
            let found = start.and_then(|start| values.get(start..start.checked_add(width)?));
            out.extend_from_slice(
                found.ok_or_else(|| DecoderError::tensor(name, format!("has {height} rows, row {row} was wanted")))?,
            );
        }
        Ok(out)
    }
}

/// A checkpoint on disk as a source: BF16, F16 and F32 tensors, converted exactly.
#[derive(Debug, Clone, Copy)]
pub struct CheckpointSource<'a>(pub &'a Checkpoint);

impl<'a> CheckpointSource<'a> {
    /// Reads from `checkpoint`.
    pub fn new(checkpoint: &'a Checkpoint) -> Self {
        Self(checkpoint)
    }
}

impl WeightSource for CheckpointSource<'_> {
    fn release(&self, names: &[String]) {
        self.0.release(names.iter().map(String::as_str));
    }

    fn load(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), DecoderError> {
        let values = self.0.tensor_f32(name)?;
        Ok((self.0.info(name).map(|info| info.shape.clone()).unwrap_or_default(), values))
    }

    fn contains(&self, name: &str) -> bool {
        self.0.info(name).is_some()
    }

    /// Touches only the pages that hold the rows.
    fn rows(&self, name: &str, rows: &[u32]) -> Result<Vec<f32>, DecoderError> {
        let shape = match self.0.info(name) {
            Some(info) => info.shape.as_slice(),
            None => self.0.tensor(name)?.shape,
        };
        let &[height, width] = shape else {
            return Err(DecoderError::tensor(name, format!("has shape {shape:?}, wanted a matrix")));
        };
        let mut out = vec![0f32; rows.len().saturating_mul(width)];
        for (&row, out) in rows.iter().zip(out.chunks_exact_mut(width.max(1))) {
            if row as usize >= height {
                return Err(DecoderError::tensor(name, format!("has {height} rows, row {row} was wanted")));
            }
            // Inside the tensor, whose elements fit 64 bits.
            self.0.tensor_f32_part(name, row as usize * width, out)?;
        }
        Ok(out)
    }
}
