//! The original's weights as the decoder asks for them.

use lite_decoder::{DecoderError, DecoderSpec, WeightSource};
use lite_model::{Checkpoint, Dtype};
use lite_runtime::{FloatSource, RuntimeError};

use crate::JobError;

/// A checkpoint in which a tied embedding or head may be stored under the other's name. fp8 and MXFP4 codes are read as
/// the values they stand for.
pub(crate) struct ModelSource<'a> {
    inner: FloatSource<'a>,
    /// (asked for, stored as)
    rename: Option<(String, String)>,
}

impl<'a> ModelSource<'a> {
    pub(crate) fn new(checkpoint: &'a Checkpoint, spec: &DecoderSpec) -> Self {
        Self { inner: FloatSource::new(checkpoint), rename: stored_embedding(checkpoint, spec) }
    }

    fn stored<'n>(&'n self, name: &'n str) -> &'n str {
        match &self.rename {
            Some((asked, stored)) if asked == name => stored,
            _ => name,
        }
    }
}

/// A tied checkpoint may hold only `lm_head.weight`: then (embedding name, head name).
///
/// Two forms are met: an alias in the file's `__metadata__`, and nothing at all but `tie_word_embeddings`.
pub(crate) fn stored_embedding(checkpoint: &Checkpoint, spec: &DecoderSpec) -> Option<(String, String)> {
    let embed = &spec.embed.weight;
    let head = format!("{}.weight", spec.head.module);
    let physical = |name: &str| checkpoint.info(name).is_some() && !checkpoint.is_alias(name);
    (spec.head.tied && !physical(embed) && physical(&head)).then(|| (embed.clone(), head))
}

/// Values of a tensor of the source: floats as they are, fp8 and MXFP4 codes times their scales.
///
/// # Errors
/// [`JobError::Input`] naming a tensor whose codes cannot be read; [`JobError::Model`].
pub(crate) fn source_f32(checkpoint: &Checkpoint, name: &str) -> Result<Vec<f32>, JobError> {
    FloatSource::new(checkpoint).tensor_f32(name).map_err(source_error)
}

/// Whether the source's weights are fp8 codes with all of their scales, or gpt-oss's MXFP4, which are read as values: they
/// are the weights as trained or published. Integers and other fp4 are not: choosing codes again would start from what
/// an earlier rounding left.
///
/// # Errors
/// [`JobError::Input`] naming a tensor whose scales are missing or do not fit.
pub(crate) fn holds_float_codes(checkpoint: &Checkpoint) -> Result<bool, JobError> {
    let source = FloatSource::new(checkpoint);
    let packed = |name: &str| {
        let Some((module, leaf)) = name.rsplit_once('.') else { return false };
        let is_float = |dtype| matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        match leaf {
            "qweight" | "weight_packed" => true,
            "weight" => checkpoint.info(name).is_some_and(|info| !is_float(info.dtype)) && !source.is_coded(name),
            "weight_scale_2" => checkpoint.info(&format!("{module}.weight")).is_some(),
            _ => false,
        }
    };
    if checkpoint.names().any(packed) {
        return Ok(false);
    }
    Ok(source.check().map_err(source_error)? > 0)
}

fn source_error(error: RuntimeError) -> JobError {
    match error {
        RuntimeError::Model(error) => JobError::Model(error),
        other => JobError::Input(other.to_string()),
    }
}

impl WeightSource for ModelSource<'_> {
    fn release(&self, names: &[String]) {
        let stored: Vec<String> = names.iter().map(|name| self.stored(name).to_owned()).collect();
        self.inner.release(&stored);
    }

    fn load(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), DecoderError> {
        self.inner.load(self.stored(name))
    }

    fn contains(&self, name: &str) -> bool {
        self.inner.contains(self.stored(name))
    }

    fn rows(&self, name: &str, rows: &[u32]) -> Result<Vec<f32>, DecoderError> {
        self.inner.rows(self.stored(name), rows)
    }
}
