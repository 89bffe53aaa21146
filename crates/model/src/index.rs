//! `model.safetensors.index.json`: which shard holds which tensor.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use serde_json::Value;

use crate::error::ModelError;
use crate::json;
use crate::open_file::{not_json, read_bounded};
use crate::text::printable;

/// Longest index in bytes; a million tensors take about 100 MB.
const MAX_INDEX: u64 = 128_000_000;
/// Longest shard name in bytes, the limit of common file systems.
const MAX_FILE_NAME: usize = 255;

/// A shard index whose names have been checked.
#[derive(Debug)]
pub(crate) struct Index {
    /// Tensor name to shard file name.
    pub(crate) weight_map: BTreeMap<String, String>,
    /// `metadata.total_size`: bytes of all tensors, where the file says.
    pub(crate) total_size: Option<u64>,
}

impl Index {
    /// The shard file names, sorted: the order of the shards.
    pub(crate) fn shards(&self) -> BTreeSet<String> {
        self.weight_map.values().cloned().collect()
    }

    /// Checks the index at `path` against what the shards hold: (shard file name, its tensor names).
    pub(crate) fn agree(&self, path: &Path, shards: &[(&str, Vec<&str>)]) -> Result<(), ModelError> {
        let mut held = HashMap::new();
        for (shard, names) in shards {
            for name in names {
                if let Some(other) = held.insert(*name, *shard) {
                    let (name, other, shard) = (printable(name), printable(other), printable(shard));
                    let reason =
                        format!("tensor `{name}` is in two shards, `{other}` and `{shard}`: remove the stale one");
                    return Err(ModelError::index(path, reason));
                }
            }
        }
        for (shard, names) in shards {
            for name in names {
                let placed = self.weight_map.get(*name);
                if placed.is_some_and(|p| p == shard) {
                    continue;
                }
                let (name, shard) = (printable(name), printable(shard));
                return Err(ModelError::index(
                    path,
                    match placed {
                        None => format!("shard `{shard}` holds tensor `{name}`, which the index does not name"),
                        Some(p) => {
                            format!("tensor `{name}` is in shard `{shard}`, the index places it in `{}`", printable(p))
                        }
                    } + ": index and shards are of different saves; download the model again",
                ));
            }
        }
        match self.weight_map.iter().find(|(name, _)| !held.contains_key(name.as_str())) {
            Some((name, shard)) => Err(ModelError::index(
                path,
                format!(
                    "the index places tensor `{}` in shard `{}`, which does not hold it: download the model again",
                    printable(name),
                    printable(shard)
                ),
            )),
            None => Ok(()),
        }
    }
}

/// Reads an index and checks that every shard is a plain file name.
pub(crate) fn read(path: &Path) -> Result<Index, ModelError> {
    let bytes = read_bounded(path, MAX_INDEX, |len| {
        ModelError::index(path, format!("the index has {len} bytes, the limit is {MAX_INDEX}"))
    })?;
    let (_, mut top) = json::parse_object(&bytes).map_err(|e| not_json(path, &bytes, ModelError::index(path, e)))?;
    let total_size = match top.get("metadata").and_then(|m| m.get("total_size")) {
        // Some tools write a float.
        Some(Value::Number(n)) => n.as_u64().or_else(|| n.as_f64().filter(|f| *f >= 0.0).map(|f| f as u64)),
        _ => None,
    };
    let Some(Value::Object(map)) = top.remove("weight_map") else {
        return Err(ModelError::index(path, "found no object `weight_map`, which names the shard of every tensor"));
    };
    let mut weight_map = BTreeMap::new();
    for (tensor, shard) in map {
        let Value::String(shard) = shard else {
            let tensor = printable(&tensor);
            return Err(ModelError::index(path, format!("the shard of tensor `{tensor}` is not a string")));
        };
        if let Some(reason) = bad_name(&shard) {
            return Err(ModelError::index(
                path,
                format!(
                    "shard name `{}` {reason}: a plain file name in the same folder is wanted; do not trust this checkpoint",
                    printable(&shard)
                ),
            ));
        }
        weight_map.insert(tensor, shard);
    }
    if weight_map.is_empty() {
        return Err(ModelError::index(path, "`weight_map` is empty: download the file again"));
    }
    Ok(Index { weight_map, total_size })
}

/// Why a name must not be joined to the model folder.
fn bad_name(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("is empty")
    } else if name.len() > MAX_FILE_NAME {
        Some("is longer than 255 bytes")
    } else if name.contains(['/', '\\']) {
        Some("holds a path separator")
    } else if name.contains(':') {
        Some("holds `:`, as drives and URLs do")
    } else if name.contains("..") {
        Some("holds `..`")
    } else if name.chars().any(char::is_control) {
        Some("holds control characters")
    } else if !name.ends_with(".safetensors") {
        Some("does not end in `.safetensors`")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_file_names_pass() {
        assert_eq!(bad_name("model-00001-of-00002.safetensors"), None);
        let long = format!("{}.safetensors", "n".repeat(5000));
        for name in [
            "",
            ".",
            "..",
            "../x.safetensors",
            "/etc/x.safetensors",
            "a/b.safetensors",
            "C:\\x.safetensors",
            "C:x.safetensors",
            "file://x.safetensors",
            "x\0.safetensors",
            "x.safetensors.",
            "x.safetensors ",
            "x.bin",
            "a..b.safetensors",
            "x\n.safetensors",
            &long,
        ] {
            assert!(bad_name(name).is_some(), "{name:?}");
        }
    }
}
