//! The original's weights as the decoder asks for them.

use lite_decoder::{CheckpointSource, DecoderError, DecoderSpec, WeightSource};
use lite_model::Checkpoint;

/// A checkpoint in which a tied embedding or head may be stored under the other's name.
pub(crate) struct ModelSource<'a> {
    inner: CheckpointSource<'a>,
    /// (asked for, stored as)
    rename: Option<(String, String)>,
}

impl<'a> ModelSource<'a> {
    pub(crate) fn new(checkpoint: &'a Checkpoint, spec: &DecoderSpec) -> Self {
        Self { inner: CheckpointSource::new(checkpoint), rename: stored_embedding(checkpoint, spec) }
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
