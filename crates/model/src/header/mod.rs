//! The header of one safetensors file, checked before anything relies on it.
//!
//! Layout: `u64` little-endian header length, that many bytes of JSON, then the data. The JSON maps each tensor name to
//! `{"dtype", "shape", "data_offsets": [begin, end]}`, offsets counted from the start of the data, and may hold
//! `"__metadata__"`, a map of strings. Format: <https://github.com/huggingface/safetensors#format>.

mod raw;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use safetensors::Dtype;
use serde::de::Deserialize as _;

use self::raw::{RawHeader, RawTensor};
use crate::error::ModelError;
use crate::json;
use crate::sniff;
use crate::text::printable;

/// Longest header in bytes, the limit of the reference implementation.
pub(crate) const MAX_HEADER: u64 = 100_000_000;
/// Most tensors in one file, and most metadata entries.
const MAX_ENTRIES: usize = 1_000_000;
/// Longest tensor name in bytes.
pub(crate) const MAX_NAME: usize = 4096;
/// Most dimensions of a tensor.
pub(crate) const MAX_RANK: usize = 32;
/// Bytes of the length field.
pub(crate) const LENGTH_FIELD: u64 = 8;
/// The key that names no tensor.
pub(crate) const METADATA: &str = "__metadata__";

/// A header that has passed every check.
#[derive(Debug)]
pub(crate) struct Header {
    /// The tensors by offset, without overlap or hole.
    pub(crate) entries: Vec<Entry>,
    /// `__metadata__`.
    pub(crate) metadata: BTreeMap<String, String>,
    /// Offset of the data in the file.
    pub(crate) data_start: u64,
    /// The JSON bytes, padding included, for fingerprints.
    pub(crate) raw: Vec<u8>,
}

/// One tensor of a header.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// First byte, from the start of the data.
    pub(crate) begin: u64,
    /// One past the last byte, from the start of the data.
    pub(crate) end: u64,
}

/// Reads and checks the header of a file of `size` bytes.
///
/// The header is copied out of the file, so that a later change of the file cannot change what was checked.
pub(crate) fn read(path: &Path, file: &File, size: u64) -> Result<Header, ModelError> {
    let mut prefix = [0; sniff::PREFIX];
    let length = prefix.len().min(usize::try_from(size).unwrap_or(usize::MAX));
    let prefix = &mut prefix[..length];
    file.read_exact_at(prefix, 0).map_err(ModelError::io("read", path))?;
    // A file that fails the first checks is looked at for what it really is.
    let refuse = |reason: String| match sniff::recognise(prefix) {
        Some((found, next)) => {
            ModelError::Foreign { path: path.to_path_buf(), wanted: "a safetensors file", found, next }
        }
        None => ModelError::container(path, reason),
    };
    let Some((field, after)) = prefix.split_first_chunk::<8>() else {
        return Err(refuse(format!(
            "found {size} bytes, too short for a header, which takes at least {LENGTH_FIELD}: download the file again"
        )));
    };
    let header_len = u64::from_le_bytes(*field);
    if header_len > MAX_HEADER {
        return Err(refuse(format!(
            "the first 8 bytes give a header of {header_len} bytes, the limit is {MAX_HEADER}: not a safetensors file"
        )));
    }
    let available = size - LENGTH_FIELD;
    if header_len > available {
        return Err(refuse(format!(
            "the first 8 bytes give a header of {header_len} bytes, only {available} follow: the file was cut or is not safetensors; download it again"
        )));
    }
    if header_len == 0 || after.first() != Some(&b'{') {
        return Err(refuse("the header does not start with `{`: not a safetensors file".to_owned()));
    }
    let too_big = || ModelError::OutOfMemory { what: path.display().to_string(), bytes: header_len };
    let mut raw = Vec::new();
    let wanted = usize::try_from(header_len).map_err(|_| too_big())?;
    raw.try_reserve_exact(wanted).map_err(|_| too_big())?;
    raw.resize(wanted, 0);
    file.read_exact_at(&mut raw, LENGTH_FIELD).map_err(ModelError::io("read", path))?;
    parse(path, raw, available - header_len)
}

/// Checks header JSON against `data_len` bytes of data.
fn parse(path: &Path, raw: Vec<u8>, data_len: u64) -> Result<Header, ModelError> {
    let text = std::str::from_utf8(&raw).map_err(|e| {
        ModelError::container(path, format!("the header is not UTF-8 (first wrong byte at {})", e.valid_up_to()))
    })?;
    let RawHeader { tensors, metadata } = serde_json::from_str(text)
        .map_err(|e| ModelError::container(path, format!("header: {}", json::explain(text, &e))))?;
    let mut entries = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        entries.push(check_tensor(path, name, tensor)?);
    }
    refuse_equal_names(path, &entries)?;
    let data_start = LENGTH_FIELD + raw.len() as u64;
    let wanted = entries.iter().map(|e| e.end).max().unwrap_or(0);
    if wanted > data_len {
        return Err(ModelError::Truncated {
            path: path.to_path_buf(),
            found: data_start + data_len,
            wanted: data_start.saturating_add(wanted),
        });
    }
    entries.sort_by(|a, b| (a.begin, a.end, &a.name).cmp(&(b.begin, b.end, &b.name)));
    check_ranges(path, &entries, data_len)?;
    Ok(Header { entries, metadata, data_start, raw })
}

/// Dtype, shape and length of one tensor.
fn check_tensor(path: &Path, name: String, raw: RawTensor) -> Result<Entry, ModelError> {
    let wrong = |reason: String| ModelError::Tensor { path: path.to_path_buf(), tensor: name.clone(), reason };
    let unsupported =
        |reason: String| ModelError::UnsupportedTensor { path: path.to_path_buf(), tensor: name.clone(), reason };
    let Some(dtype) = dtype_of(&raw.dtype) else {
        return Err(unsupported(format!(
            "dtype `{}` is not known: save the model in BF16, F16 or F32",
            printable(&raw.dtype)
        )));
    };
    let [begin, end] = raw.data_offsets;
    if begin > end {
        return Err(wrong(format!("its data ends at {end}, before it begins at {begin}")));
    }
    let bits = bit_count(&raw.shape.0, dtype)
        .ok_or_else(|| wrong(format!("shape {:?} of {dtype} overflows 64 bits", raw.shape.0)))?;
    if bits % 8 != 0 {
        return Err(unsupported(format!("shape {:?} of {dtype} is not a whole number of bytes", raw.shape.0)));
    }
    if bits / 8 != end - begin {
        return Err(wrong(format!(
            "shape {:?} of {dtype} takes {} bytes, its data_offsets [{begin}, {end}] give {}",
            raw.shape.0,
            bits / 8,
            end - begin
        )));
    }
    let shape = raw.shape.0.iter().map(|d| usize::try_from(*d)).collect::<Result<_, _>>();
    let shape = shape.map_err(|_| wrong(format!("shape {:?} does not fit this machine", raw.shape.0)))?;
    Ok(Entry { name, dtype, shape, begin, end })
}

/// Bits of a tensor. `None` on overflow, also where a dimension of 0 would hide it: later code multiplies some of the
/// dimensions and not others.
pub(crate) fn bit_count(shape: &[u64], dtype: Dtype) -> Option<u64> {
    let product = shape.iter().try_fold(dtype.bitsize() as u64, |product, d| product.checked_mul((*d).max(1)))?;
    Some(if shape.contains(&0) { 0 } else { product })
}

fn refuse_equal_names(path: &Path, entries: &[Entry]) -> Result<(), ModelError> {
    let mut names: Vec<&str> = entries.iter().map(|e| e.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(ModelError::Tensor {
            path: path.to_path_buf(),
            tensor: pair[0].to_owned(),
            reason: "the header names it twice".to_owned(),
        }),
        None => Ok(()),
    }
}

/// Every byte of the data belongs to exactly one tensor. `entries` are sorted and end inside the data.
fn check_ranges(path: &Path, entries: &[Entry], data_len: u64) -> Result<(), ModelError> {
    let mut covered = 0;
    for (i, entry) in entries.iter().enumerate() {
        let wrong = |reason| Err(ModelError::Tensor { path: path.to_path_buf(), tensor: entry.name.clone(), reason });
        if entry.begin < covered {
            let before = i.checked_sub(1).and_then(|i| entries.get(i)).map_or("", |e| e.name.as_str());
            return wrong(format!("its data overlaps that of `{}`", printable(before)));
        }
        if entry.begin > covered {
            return wrong(format!("{} bytes before its data belong to no tensor", entry.begin - covered));
        }
        covered = entry.end;
    }
    if covered < data_len {
        let reason = format!("{} bytes after the last tensor belong to no tensor", data_len - covered);
        return Err(ModelError::container(path, reason));
    }
    Ok(())
}

/// The dtype of that name in a safetensors header.
fn dtype_of(name: &str) -> Option<Dtype> {
    use serde::de::IntoDeserializer as _;
    let deserializer: serde::de::value::StrDeserializer<'_, serde::de::value::Error> = name.into_deserializer();
    Dtype::deserialize(deserializer).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(json: &str, data_len: u64) -> Result<Header, ModelError> {
        parse(Path::new("m.safetensors"), json.as_bytes().to_vec(), data_len)
    }

    #[test]
    fn every_dtype_of_the_crate_is_known_by_its_own_name() {
        for name in [
            "BOOL",
            "F4",
            "F6_E2M3",
            "F6_E3M2",
            "U8",
            "I8",
            "F8_E5M2",
            "F8_E4M3",
            "F8_E8M0",
            "F8_E4M3FNUZ",
            "F8_E5M2FNUZ",
            "I16",
            "U16",
            "F16",
            "BF16",
            "I32",
            "U32",
            "F32",
            "C64",
            "F64",
            "I64",
            "U64",
        ] {
            assert_eq!(dtype_of(name).unwrap().to_string(), name);
        }
        assert_eq!(dtype_of("f32"), None);
    }

    #[test]
    fn counts_bits_without_overflow() {
        assert_eq!(bit_count(&[], Dtype::F32), Some(32));
        assert_eq!(bit_count(&[3, 5], Dtype::F4), Some(60));
        assert_eq!(bit_count(&[0, 7], Dtype::F32), Some(0));
        assert_eq!(bit_count(&[4_194_305, 4_194_305, 211_106_198_978_564], Dtype::U8), None);
        assert_eq!(bit_count(&[0, 1 << 40, 1 << 40], Dtype::U8), None);
    }

    #[test]
    fn sorts_by_offset_whatever_the_order_in_the_json() {
        let header = parsed(
            r#"{"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}  "#,
            3,
        )
        .unwrap();
        assert_eq!(header.entries.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn accepts_scalars_and_empty_tensors() {
        let header = parsed(
            r#"{"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"e":{"dtype":"F32","shape":[0,3],"data_offsets":[4,4]},
               "f":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#,
            4,
        )
        .unwrap();
        assert_eq!(header.entries.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(), ["f", "s", "e"]);
    }

    #[test]
    fn wrong_entries_are_named() {
        for (json, words) in [
            (r#"{"w":{"dtype":"U8","shape":[-1],"data_offsets":[0,0]}}"#, "entry `w`"),
            (r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1.0]}}"#, "entry `w`"),
            (r#"{"__metadata__":{"a":1}}"#, "entry `__metadata__`"),
        ] {
            let message = parsed(json, 0).unwrap_err().to_string();
            assert!(message.contains(words) && message.matches(" line ").count() == 1, "{message}");
        }
    }
}
