//! A model folder, opened.

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Write as _};
use std::io;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use crate::config::{self, Config};
use crate::convert;
use crate::discover::{self, Weights};
use crate::error::ModelError;
use crate::header::{self, Header};
use crate::index;
use crate::map::ShardMap;
use crate::open_file::open_regular;
use crate::side_files;
use crate::text::printable;

/// A Hugging Face model folder whose config and headers have been checked, its weights mapped read-only.
///
/// The weights may be one `model.safetensors`, one safetensors file of another name, or shards with an index. Nothing
/// of their data is read before it is asked for. It can be shared between threads.
#[derive(Debug)]
pub struct Checkpoint {
    root: PathBuf,
    config: Config,
    paths: Vec<PathBuf>,
    maps: Vec<ShardMap>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    aliases: BTreeMap<String, usize>,
    side_files: Vec<PathBuf>,
    digest: String,
    /// What was odd but not wrong, one sentence each, safe to print.
    pub warnings: Vec<String>,
}

/// What the header says of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name in the file.
    pub name: String,
    /// Type of one element.
    pub dtype: Dtype,
    /// Dimensions, outermost first (C order); empty for a scalar.
    pub shape: Vec<usize>,
    /// Length of its data in bytes.
    pub bytes: u64,
    /// Its shard, a position in [`Checkpoint::shards`].
    pub shard: usize,
    /// Offset of its data in the shard's file.
    start: usize,
}

impl TensorInfo {
    /// Number of elements: the product of the shape, 1 for a scalar.
    #[must_use]
    pub fn elements(&self) -> usize {
        // Checked against 64 bits when the header was read.
        self.shape.iter().product()
    }

    fn range(&self) -> std::ops::Range<usize> {
        // `start + bytes` is at most the length of the mapped file.
        self.start..self.start + self.bytes as usize
    }
}

/// One tensor in the mapped file.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    /// Type of one element.
    pub dtype: Dtype,
    /// Dimensions, outermost first (C order).
    pub shape: &'a [usize],
    /// Little-endian elements; the address need not be aligned to them.
    pub data: &'a [u8],
}

/// Dtype, shape and length: the data may be gigabytes.
impl fmt::Debug for TensorView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}, {} bytes", self.dtype, self.shape, self.data.len())
    }
}

/// How much of a checkpoint has one dtype.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DtypeCount {
    /// Number of tensors.
    pub tensors: usize,
    /// Their data in bytes.
    pub bytes: u64,
}

impl Checkpoint {
    /// Opens the model folder `dir`: reads and checks config.json, the shard index and every header, maps the shards.
    ///
    /// # Errors
    ///
    /// Every way in which the folder is not a complete, consistent safetensors checkpoint; see [`ModelError`].
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        let mut warnings = Vec::new();
        let weights = discover::find(dir, &mut warnings)?;
        let config = config::load(dir)?;
        let (paths, opened) = match &weights {
            Weights::Single(path) => (vec![path.clone()], vec![open_shard(path)?]),
            Weights::Index(path) => open_sharded(dir, path, &mut warnings)?,
        };
        let mut digest = Sha256::new();
        add_to(&mut digest, &config.raw);
        let mut metadata = BTreeMap::new();
        let mut tensors = Vec::new();
        let mut maps = Vec::with_capacity(opened.len());
        for (shard, (header, map)) in opened.into_iter().enumerate() {
            add_to(&mut digest, &header.raw);
            for entry in header.entries {
                let start = usize::try_from(header.data_start + entry.begin).map_err(|_| too_large(&paths[shard]))?;
                let bytes = entry.end - entry.begin;
                tensors.push(TensorInfo {
                    name: entry.name,
                    dtype: entry.dtype,
                    shape: entry.shape,
                    bytes,
                    shard,
                    start,
                });
            }
            if matches!(weights, Weights::Single(_)) {
                metadata = header.metadata;
            }
            maps.push(map);
        }
        let by_name: HashMap<_, _> = tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        // `transformers` and `safetensors.torch.save_model` store one of several tied tensors and note the others here.
        let aliases = metadata
            .into_iter()
            .filter(|(name, _)| !by_name.contains_key(name))
            .filter_map(|(name, target)| Some((name, *by_name.get(&target)?)))
            .collect();
        let side_files = side_files::find(dir, &mut warnings)?;
        let digest = digest.finalize().iter().fold(String::new(), |mut hex, byte| {
            // Writing to a string does not fail.
            let _ = write!(hex, "{byte:02x}");
            hex
        });
        let root = dir.to_path_buf();
        Ok(Self { root, config, paths, maps, tensors, by_name, aliases, side_files, digest, warnings })
    }

    /// The folder it was opened from.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// config.json, its keys in the order of the file.
    #[must_use]
    pub fn config(&self) -> &Map<String, Value> {
        &self.config.keys
    }

    /// config.json as text, without a byte order mark.
    #[must_use]
    pub fn config_text(&self) -> &str {
        &self.config.text
    }

    /// The weight files, in the order of their names.
    #[must_use]
    pub fn shards(&self) -> &[PathBuf] {
        &self.paths
    }

    /// Names of the stored tensors, by shard and then by offset. Aliases are not among them.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.iter().map(|t| t.name.as_str())
    }

    /// What the header says of tensor `name` or, where that is an alias, of the tensor it stands for.
    #[must_use]
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        let position = self.by_name.get(name).or_else(|| self.aliases.get(name))?;
        self.tensors.get(*position)
    }

    /// The stored tensor that `name` is another name for; `None` for stored tensors and unknown names.
    #[must_use]
    pub fn resolve_alias(&self, name: &str) -> Option<&str> {
        self.aliases.get(name).and_then(|i| self.tensors.get(*i)).map(|t| t.name.as_str())
    }

    /// Whether `name` is another name of a stored tensor, as the header of a checkpoint with tied weights notes it.
    #[must_use]
    pub fn is_alias(&self, name: &str) -> bool {
        self.aliases.contains_key(name)
    }

    /// All (alias, stored tensor) pairs, sorted.
    pub fn aliases(&self) -> impl Iterator<Item = (&str, &str)> {
        self.aliases.iter().filter_map(|(alias, i)| Some((alias.as_str(), self.tensors.get(*i)?.name.as_str())))
    }

    /// Tensor `name` (aliases are followed) as it lies in the mapped file.
    ///
    /// # Errors
    ///
    /// [`ModelError::UnknownTensor`]; [`ModelError::Changed`] where the file was modified since it was opened.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, ModelError> {
        let info = self.info(name).ok_or_else(|| self.unknown(name))?;
        let changed = || ModelError::Changed { path: self.paths[info.shard].clone() };
        let map = self.maps.get(info.shard).filter(|map| map.is_unchanged()).ok_or_else(changed)?;
        let data = map.bytes().get(info.range()).ok_or_else(changed)?;
        Ok(TensorView { dtype: info.dtype, shape: &info.shape, data })
    }

    /// Tensor `name` (aliases are followed) as f32, in C order; exact for BF16, F16 and F32.
    ///
    /// # Errors
    ///
    /// Those of [`Checkpoint::tensor`]; [`ModelError::NotFloat`] for other dtypes; [`ModelError::OutOfMemory`].
    pub fn tensor_f32(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        let elements = self.info(name).ok_or_else(|| self.unknown(name))?.elements();
        // The probe turns an allocation that cannot succeed into an error; the second call then gets zeroed pages
        // straight from the system, which a `resize` would touch twice.
        let probe = Vec::<f32>::new().try_reserve_exact(elements);
        probe.map_err(|_| ModelError::OutOfMemory { what: name.to_owned(), bytes: 4 * elements as u64 })?;
        let mut out = vec![0.0; elements];
        self.tensor_f32_into(name, &mut out)?;
        Ok(out)
    }

    /// Like [`Checkpoint::tensor_f32`], into a buffer of exactly the tensor's length.
    ///
    /// # Errors
    ///
    /// Those of [`Checkpoint::tensor_f32`]; [`ModelError::Length`] for a buffer of another length.
    pub fn tensor_f32_into(&self, name: &str, out: &mut [f32]) -> Result<(), ModelError> {
        let elements = self.info(name).ok_or_else(|| self.unknown(name))?.elements();
        if out.len() != elements {
            let (found, wanted) = (out.len() as u64, elements as u64);
            return Err(ModelError::Length { tensor: name.to_owned(), unit: "elements", found, wanted });
        }
        self.tensor_f32_part(name, 0, out)
    }

    /// Like [`Checkpoint::tensor_f32_into`], for as many elements as `out` holds, from element `first` on.
    ///
    /// # Errors
    ///
    /// As there; [`ModelError::Length`] where the tensor does not reach that far.
    pub fn tensor_f32_part(&self, name: &str, first: usize, out: &mut [f32]) -> Result<(), ModelError> {
        let view = self.tensor(name)?;
        let not_float = || ModelError::NotFloat { tensor: name.to_owned(), dtype: view.dtype };
        let bytes = convert::float_bytes(view.dtype).ok_or_else(not_float)?;
        let end = first.saturating_add(out.len());
        let data = view.data.get(first.saturating_mul(bytes)..end.saturating_mul(bytes)).ok_or_else(|| {
            let (found, wanted) = ((view.data.len() / bytes) as u64, end as u64);
            ModelError::Length { tensor: name.to_owned(), unit: "elements", found, wanted }
        })?;
        convert::to_f32(view.dtype, data, out);
        Ok(())
    }

    /// Lets go of the memory behind these tensors (unknown names are passed over).
    ///
    /// Mapped pages count as resident until the kernel needs them, so a run that keeps one layer in memory would look
    /// as if it held the whole model. This drops them from the process now; a later access reads them again.
    pub fn release<'a>(&self, names: impl IntoIterator<Item = &'a str>) {
        for info in names.into_iter().filter_map(|name| self.info(name)) {
            if let Some(map) = self.maps.get(info.shard) {
                map.forget(info.range());
            }
        }
    }

    /// [`Checkpoint::release`] of some bytes of one tensor's data.
    pub fn release_part(&self, name: &str, bytes: std::ops::Range<usize>) {
        let Some((info, map)) = self.info(name).and_then(|info| Some((info, self.maps.get(info.shard)?))) else {
            return;
        };
        let whole = info.range();
        map.forget(whole.start.saturating_add(bytes.start)..whole.end.min(whole.start.saturating_add(bytes.end)));
    }

    /// Data of all tensors in bytes, headers not counted.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes).sum()
    }

    /// SHA-256, in hex, over config.json and every shard header, each preceded by its length: a fingerprint of what
    /// the checkpoint claims to be, without reading the weights.
    #[must_use]
    pub fn header_digest(&self) -> &str {
        &self.digest
    }

    /// Tensors and bytes by dtype.
    #[must_use]
    pub fn dtype_census(&self) -> BTreeMap<Dtype, DtypeCount> {
        let mut census = BTreeMap::<_, DtypeCount>::new();
        for tensor in &self.tensors {
            let count = census.entry(tensor.dtype).or_default();
            count.tensors += 1;
            count.bytes += tensor.bytes;
        }
        census
    }

    /// Every other file of the model (tokenizer, templates, code, licence), sub-folders included: relative paths,
    /// sorted. Weights in any format, hidden files, config.json and the files of an earlier quantization
    /// (`quantize_config.json`, `quant_config.json`, `hf_quant_config.json`) are not among them.
    #[must_use]
    pub fn side_files(&self) -> Vec<PathBuf> {
        self.side_files.clone()
    }

    /// Copies the side files into the folder `dst`, byte for byte; each appears whole or not at all.
    ///
    /// # Errors
    ///
    /// [`ModelError::Output`] where `dst` is the model folder itself; [`ModelError::Io`].
    pub fn copy_side_files(&self, dst: &Path) -> Result<(), ModelError> {
        side_files::copy(&self.root, &self.side_files, dst)
    }

    fn unknown(&self, name: &str) -> ModelError {
        let hint = match self.tensors.first() {
            Some(first) => {
                format!("it holds {} tensors, the first is `{}`", self.tensors.len(), printable(&first.name))
            }
            None => "it holds no tensors".to_owned(),
        };
        ModelError::UnknownTensor { path: self.root.clone(), tensor: name.to_owned(), hint }
    }
}

type OpenShard = (Header, ShardMap);

/// Opens every shard that an index names, and checks that they agree.
fn open_sharded(
    dir: &Path,
    path: &Path,
    warnings: &mut Vec<String>,
) -> Result<(Vec<PathBuf>, Vec<OpenShard>), ModelError> {
    let index = index::read(path)?;
    let names = index.shards();
    discover::unlisted(dir, &names, warnings)?;
    let mut paths = Vec::with_capacity(names.len());
    let mut opened = Vec::with_capacity(names.len());
    for name in &names {
        let shard = dir.join(name);
        let missing = std::fs::symlink_metadata(&shard).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
        if missing {
            let name = printable(name);
            let reason = format!("the index names shard `{name}`, which is not in the folder: download it");
            return Err(ModelError::index(path, reason));
        }
        opened.push(open_shard(&shard)?);
        paths.push(shard);
    }
    let held: Vec<_> = names
        .iter()
        .zip(&opened)
        .map(|(name, (header, _))| (name.as_str(), header.entries.iter().map(|e| e.name.as_str()).collect()))
        .collect();
    index.agree(path, &held)?;
    let found: u64 = opened.iter().flat_map(|(header, _)| &header.entries).map(|e| e.end - e.begin).sum();
    if let Some(said) = index.total_size.filter(|said| *said != found) {
        warnings.push(format!("the index gives a total size of {said} bytes, the shards hold {found}"));
    }
    Ok((paths, opened))
}

fn open_shard(path: &Path) -> Result<OpenShard, ModelError> {
    let (file, size) = open_regular(path)?;
    let header = header::read(path, &file, size)?;
    let map = ShardMap::new(file).map_err(|e| match e.kind() {
        io::ErrorKind::OutOfMemory => too_large(path),
        _ => ModelError::io("map", path)(e),
    })?;
    if map.bytes().len() as u64 != size {
        return Err(ModelError::Changed { path: path.to_path_buf() });
    }
    Ok((header, map))
}

fn too_large(path: &Path) -> ModelError {
    let bytes = std::fs::metadata(path).map_or(0, |m| m.len());
    ModelError::OutOfMemory { what: path.display().to_string(), bytes }
}

fn add_to(digest: &mut Sha256, part: &[u8]) {
    digest.update((part.len() as u64).to_le_bytes());
    digest.update(part);
}
