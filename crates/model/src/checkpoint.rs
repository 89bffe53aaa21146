//! A model folder, opened.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use crate::config::{self, Config};
use crate::convert;
use crate::discover::{self, Weights};
use crate::error::ModelError;
use crate::fused;
use crate::map::ShardMap;
use crate::place::Place;
use crate::shards::{open_shard, open_sharded, too_large};
use crate::side_files;
use crate::tensor::{DtypeCount, TensorInfo, TensorView};
use crate::text::printable;

/// Elements that are gathered at a time at least, of tensors that do not lie in one piece.
const STRETCH: usize = 1 << 18;
/// Bytes of the smallest pages.
const PAGE: usize = 4096;

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
    /// Tensors of all experts of a layer, which `tensors` has by expert.
    fused_tensors: usize,
    by_name: HashMap<String, usize>,
    aliases: BTreeMap<String, usize>,
    side_files: Vec<PathBuf>,
    digest: String,
    /// What was odd but not wrong, one sentence each, safe to print.
    pub warnings: Vec<String>,
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
                let length = usize::try_from(bytes).map_err(|_| too_large(&paths[shard]))?;
                tensors.push(TensorInfo {
                    name: entry.name,
                    dtype: entry.dtype,
                    shape: entry.shape,
                    bytes,
                    shard,
                    place: Place::whole(start, length),
                    fused: false,
                });
            }
            if matches!(weights, Weights::Single(_)) {
                metadata = header.metadata;
            }
            maps.push(map);
        }
        let (tensors, fused_tensors) = fused::split(tensors, &config.keys)?;
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
        Ok(Self { root, config, paths, maps, tensors, fused_tensors, by_name, aliases, side_files, digest, warnings })
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

    /// How many tensors hold all experts of a layer. What is seen here are one tensor per expert,
    /// `….experts.{e}.{gate_proj, up_proj, down_proj}.weight` and `.bias`, as quantized experts are stored everywhere.
    #[must_use]
    pub fn fused_tensors(&self) -> usize {
        self.fused_tensors
    }

    /// Names of the stored tensors, by shard and then by offset, experts of one tensor one after the other. Aliases are not among them.
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

    /// Tensor `name` (aliases are followed) as it lies in the mapped file; a copy where an expert lies transposed or
    /// interleaved in a tensor of all experts.
    ///
    /// # Errors
    ///
    /// [`ModelError::UnknownTensor`]; [`ModelError::Changed`] where the file was modified since it was opened;
    /// [`ModelError::OutOfMemory`] for a copy.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, ModelError> {
        let (info, map) = self.find(name)?;
        let changed = || self.changed(info);
        let data = info.place.read(map.bytes()).map_err(|_| out_of_memory(name, info.bytes))?.ok_or_else(changed)?;
        Ok(TensorView { dtype: info.dtype, shape: &info.shape, data })
    }

    /// The bytes of the file from the first element of tensor `name` (aliases are followed) to its last one: the tensor's
    /// data, and of an expert that lies among others what is between as well. Nothing is copied.
    ///
    /// # Errors
    ///
    /// [`ModelError::UnknownTensor`]; [`ModelError::Changed`].
    pub fn stretch(&self, name: &str) -> Result<&[u8], ModelError> {
        let (info, map) = self.find(name)?;
        map.bytes().get(info.place.span()).ok_or_else(|| self.changed(info))
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
        probe.map_err(|_| out_of_memory(name, 4 * elements as u64))?;
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
        let (info, map) = self.find(name)?;
        let not_float = || ModelError::NotFloat { tensor: name.to_owned(), dtype: info.dtype };
        let bytes = convert::float_bytes(info.dtype).ok_or_else(not_float)?;
        let end = first.saturating_add(out.len());
        if end > info.elements() {
            let (found, wanted) = (info.elements() as u64, end as u64);
            return Err(ModelError::Length { tensor: name.to_owned(), unit: "elements", found, wanted });
        }
        if info.place.is_whole() {
            let start = info.place.span().start;
            // Inside the tensor.
            let data = map.bytes().get(start + first * bytes..start + end * bytes);
            convert::to_f32(info.dtype, data.ok_or_else(|| self.changed(info))?, out);
            return Ok(());
        }
        let stretch = info.place.stretch().max(STRETCH);
        let mut data = Vec::new();
        let longest = stretch.min(out.len()) * bytes;
        data.try_reserve_exact(longest).map_err(|_| out_of_memory(name, longest as u64))?;
        for (i, out) in out.chunks_mut(stretch).enumerate() {
            data.resize(out.len() * bytes, 0);
            let gathered = info.place.gather(map.bytes(), first + i * stretch, &mut data);
            gathered.ok_or_else(|| self.changed(info))?;
            convert::to_f32(info.dtype, &data, out);
        }
        Ok(())
    }

    /// Lets go of the memory behind these tensors (unknown names are passed over).
    ///
    /// Mapped pages count as resident until the kernel needs them, so a run that keeps one layer in memory would look
    /// as if it held the whole model. This drops them from the process now; a later access reads them again.
    pub fn release<'a>(&self, names: impl IntoIterator<Item = &'a str>) {
        for info in names.into_iter().filter_map(|name| self.info(name)) {
            if let Some(map) = self.maps.get(info.shard) {
                map.forget(info.place.span());
            }
        }
    }

    /// [`Checkpoint::release`] of some bytes of one tensor's data. What does not lie in one piece is let go as a whole,
    /// with its last byte.
    pub fn release_part(&self, name: &str, bytes: Range<usize>) {
        if let Some((range, map)) = self.pages(name, bytes, false) {
            map.forget(range);
        }
    }

    /// Reads some bytes of one tensor's data into memory, if they are not there: one byte per page is touched. What does
    /// not lie in one piece is read as a whole, with its first byte.
    pub fn read_ahead(&self, name: &str, bytes: Range<usize>) {
        if let Some((range, map)) = self.pages(name, bytes, true) {
            let data = map.bytes().get(range).filter(|_| map.is_unchanged()).unwrap_or_default();
            std::hint::black_box(data.iter().step_by(PAGE).fold(0u8, |sum, byte| sum ^ byte));
        }
    }

    /// Where bytes of a tensor's data lie in its file.
    fn pages(&self, name: &str, bytes: Range<usize>, starts: bool) -> Option<(Range<usize>, &ShardMap)> {
        let info = self.info(name)?;
        let (map, span) = (self.maps.get(info.shard)?, info.place.span());
        if info.place.is_whole() {
            let at = |byte: usize| span.start.saturating_add(byte).min(span.end);
            return Some((at(bytes.start)..at(bytes.end), map));
        }
        let due = if starts { bytes.start == 0 } else { bytes.end as u64 >= info.bytes };
        due.then_some((span, map))
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

    /// A tensor and its file, which must be what it was.
    fn find(&self, name: &str) -> Result<(&TensorInfo, &ShardMap), ModelError> {
        let info = self.info(name).ok_or_else(|| self.unknown(name))?;
        let map = self.maps.get(info.shard).filter(|map| map.is_unchanged());
        Ok((info, map.ok_or_else(|| self.changed(info))?))
    }

    fn changed(&self, info: &TensorInfo) -> ModelError {
        ModelError::Changed { path: self.paths[info.shard].clone() }
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

fn out_of_memory(what: &str, bytes: u64) -> ModelError {
    ModelError::OutOfMemory { what: what.to_owned(), bytes }
}

fn add_to(digest: &mut Sha256, part: &[u8]) {
    digest.update((part.len() as u64).to_le_bytes());
    digest.update(part);
}
