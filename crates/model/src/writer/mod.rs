//! Writing a checkpoint: every name, dtype and shape is known first, the data arrives in any order.

mod atomic;
mod plan;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};

use safetensors::Dtype;
use serde_json::{Map, Value, json};

pub(crate) use self::atomic::atomic_copy;
pub use self::atomic::{atomic_write, free_space};
use self::atomic::{create_partial, partial_path, sync_folder};
use self::plan::Plan;
use crate::error::ModelError;
use crate::text::{printable, printable_path};

/// The shard index.
const INDEX: &str = "model.safetensors.index.json";
/// Most missing tensors that a message names.
const SHOWN: usize = 5;

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputTensor {
    /// Its name, 1 to 4096 bytes.
    pub name: String,
    /// Type of one element.
    pub dtype: Dtype,
    /// Dimensions, outermost first (C order), at most 32; empty for a scalar.
    pub shape: Vec<usize>,
}

impl OutputTensor {
    /// Bytes of its data; saturating, since a shape that large cannot be written anyway.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let elements = self.shape.iter().fold(1u64, |n, &dim| n.saturating_mul(dim as u64));
        elements.saturating_mul(self.dtype.bitsize() as u64).div_ceil(8)
    }
}

/// What a finished writer leaves behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The shards in order, then the index where there is one.
    pub files: Vec<PathBuf>,
    /// Data of all tensors in bytes, headers not counted: `total_size` of the index.
    pub total_bytes: u64,
}

/// Writes safetensors shards whose tensors arrive in any order, from any thread.
///
/// Files grow under temporary names (`.NAME.partial`); [`CheckpointWriter::finish`] brings them to disk and gives them
/// their final names, the index last. A writer that is dropped before that removes them. The bytes written depend on
/// the list of tensors, their data and the shard size alone.
#[derive(Debug)]
pub struct CheckpointWriter {
    dir: PathBuf,
    plan: Plan,
    files: Vec<File>,
    /// Per tensor of the plan: [`EMPTY`], [`BUSY`] or [`DONE`].
    states: Vec<AtomicU8>,
    /// What to remove when the writer is dropped.
    leftovers: Vec<PathBuf>,
}

const EMPTY: u8 = 0;
const BUSY: u8 = 1;
const DONE: u8 = 2;

impl CheckpointWriter {
    /// Plans the shards and creates them, headers written, in `dir` (made where it does not exist).
    ///
    /// Shards are filled in the order given; the next begins when a tensor would bring the data of one above
    /// `max_shard_bytes`, and a tensor above it has a shard to itself. One shard is `model.safetensors`, several are
    /// `model-00001-of-0000N.safetensors`. Inside a shard, tensors of wider dtypes come first, which aligns all of
    /// them.
    ///
    /// # Errors
    ///
    /// [`ModelError::Output`] where names are empty, too long, reserved or equal, where shapes overflow, or where `dir`
    /// already holds safetensors files; [`ModelError::Io`].
    pub fn create(dir: &Path, tensors: Vec<OutputTensor>, max_shard_bytes: u64) -> Result<Self, ModelError> {
        let plan = Plan::new(dir, tensors, max_shard_bytes)?;
        if fs::metadata(dir).is_ok_and(|m| !m.is_dir()) {
            return Err(ModelError::output(dir, "a file is in the way of the output folder: choose another"));
        }
        fs::create_dir_all(dir).map_err(ModelError::io("create", dir))?;
        refuse_older_weights(dir)?;
        let states = plan.tensors.iter().map(|_| AtomicU8::new(EMPTY)).collect();
        let mut writer = Self { dir: dir.to_path_buf(), plan, files: Vec::new(), states, leftovers: Vec::new() };
        for shard in &writer.plan.shards {
            let partial = partial_path(&dir.join(&shard.name))?;
            let file = create_partial(&partial)?;
            writer.leftovers.push(partial.clone());
            file.set_len(shard.file_len).map_err(ModelError::io("reserve space for", &partial))?;
            file.write_all_at(&shard.header, 0).map_err(ModelError::io("write", &partial))?;
            writer.files.push(file);
        }
        Ok(writer)
    }

    /// Writes the data of tensor `name`: its elements in C order, little-endian. Every tensor is written exactly once;
    /// after an I/O error it may be tried again.
    ///
    /// # Errors
    ///
    /// [`ModelError::Output`] for a name that was not announced or was already written; [`ModelError::Length`] where
    /// `data` is not as long as dtype and shape say; [`ModelError::Io`].
    pub fn write(&self, name: &str, data: &[u8]) -> Result<(), ModelError> {
        self.write_parts(name, std::iter::once(data))
    }

    /// [`CheckpointWriter::write`] of data that comes in parts, one after the other. Each part is written before the next
    /// is asked for, so a tensor larger than memory can be copied.
    ///
    /// # Errors
    ///
    /// As there; the length is that of all parts together.
    pub fn write_parts<'d>(&self, name: &str, parts: impl Iterator<Item = &'d [u8]>) -> Result<(), ModelError> {
        let wrong = |what| ModelError::output(&self.dir, format!("tensor `{}` {what}", printable(name)));
        let position = *self.plan.by_name.get(name).ok_or_else(|| wrong("was not announced to the writer"))?;
        let (tensor, state) = (&self.plan.tensors[position], &self.states[position]);
        if state.compare_exchange(EMPTY, BUSY, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return Err(wrong("was written twice"));
        }
        let length = |found| ModelError::Length { tensor: name.to_owned(), unit: "bytes", found, wanted: tensor.bytes };
        let mut written = 0u64;
        let mut put = |part: &[u8]| {
            let end = written.saturating_add(part.len() as u64);
            if end > tensor.bytes {
                return Err(length(end));
            }
            self.files[tensor.shard]
                .write_all_at(part, tensor.offset + written)
                .map_err(ModelError::io("write", &self.leftovers[tensor.shard]))?;
            written = end;
            Ok(())
        };
        let mut parts = parts;
        let mut result = parts.try_for_each(&mut put);
        if result.is_ok() && written != tensor.bytes {
            result = Err(length(written));
        }
        state.store(if result.is_ok() { DONE } else { EMPTY }, Ordering::Release);
        result
    }

    /// Brings every shard to disk, gives them their final names and writes the index (only where there are several).
    ///
    /// # Errors
    ///
    /// [`ModelError::Output`] where tensors are missing; [`ModelError::Io`]. Nothing is left under a final name then.
    pub fn finish(mut self) -> Result<Written, ModelError> {
        self.refuse_missing()?;
        for (file, partial) in self.files.iter().zip(&self.leftovers) {
            file.sync_all().map_err(ModelError::io("bring to disk", partial))?;
        }
        let mut files = Vec::with_capacity(self.plan.shards.len() + 1);
        for (shard, leftover) in self.plan.shards.iter().zip(&mut self.leftovers) {
            let path = self.dir.join(&shard.name);
            fs::rename(&*leftover, &path).map_err(ModelError::io("rename to", &path))?;
            *leftover = path.clone();
            files.push(path);
        }
        if self.plan.shards.len() > 1 {
            let path = self.dir.join(INDEX);
            self.leftovers.push(path.clone());
            atomic_write(&path, self.index().as_bytes())?;
            files.push(path);
        }
        sync_folder(&self.dir)?;
        self.leftovers.clear();
        Ok(Written { files, total_bytes: self.plan.total_bytes })
    }

    fn refuse_missing(&self) -> Result<(), ModelError> {
        let states = self.plan.tensors.iter().zip(&self.states);
        let missing: Vec<_> =
            states.filter(|(_, s)| s.load(Ordering::Acquire) != DONE).map(|(t, _)| t.name.as_str()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let mut names =
            missing.iter().take(SHOWN).map(|n| format!("`{}`", printable(n))).collect::<Vec<_>>().join(", ");
        if missing.len() > SHOWN {
            names.push_str(", …");
        }
        let (count, all) = (missing.len(), self.plan.tensors.len());
        Err(ModelError::output(&self.dir, format!("{count} of {all} tensors were never written: {names}")))
    }

    fn index(&self) -> String {
        let mut tensors: Vec<_> = self.plan.tensors.iter().collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        let weight_map: Map<String, Value> =
            tensors.iter().map(|t| (t.name.clone(), Value::from(self.plan.shards[t.shard].name.as_str()))).collect();
        format!("{:#}\n", json!({"metadata": {"total_size": self.plan.total_bytes}, "weight_map": weight_map}))
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        for path in &self.leftovers {
            // An error here cannot be told to anybody, and a partial file is never mistaken for a finished one.
            let _ = fs::remove_file(path);
        }
    }
}

/// Older shards beside new ones would make a checkpoint of two halves.
fn refuse_older_weights(dir: &Path) -> Result<(), ModelError> {
    for entry in fs::read_dir(dir).map_err(ModelError::io("list", dir))? {
        let name = entry.map_err(ModelError::io("list", dir))?.file_name();
        let text = name.to_string_lossy();
        if text.ends_with(".safetensors") || text.ends_with(".safetensors.index.json") {
            let found = printable_path(Path::new(&name));
            return Err(ModelError::output(dir, format!("it already holds `{found}`: choose an empty folder")));
        }
    }
    Ok(())
}
