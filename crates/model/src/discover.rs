//! Which files of a folder are the model.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::ModelError;
use crate::text::printable;

/// The file of a checkpoint that is not sharded.
pub(crate) const SINGLE: &str = "model.safetensors";
/// The end of the name of a shard index.
pub(crate) const INDEX_SUFFIX: &str = ".safetensors.index.json";
/// The configuration of the model.
pub(crate) const CONFIG: &str = "config.json";
const SUFFIX: &str = ".safetensors";

/// Weights of other formats: suffix, name, way out.
const FOREIGN: [(&[&str], &str, &str); 4] = [
    (
        &[".bin", ".pt", ".pth", ".ckpt"],
        "PyTorch pickles",
        "pickles can run code when loaded and are not read; convert to safetensors with transformers, \
         `AutoModelForCausalLM.from_pretrained(...).save_pretrained(OUT, safe_serialization=True)`",
    ),
    (&[".gguf"], "GGUF", "use the safetensors checkpoint that it was made from; GGUF is not read as a source"),
    (&[".h5", ".msgpack"], "TensorFlow or Flax weights", "use the safetensors files of the model"),
    (&[".onnx"], "ONNX", "use the safetensors files of the model"),
];

/// Where the weights of a folder are.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Weights {
    /// One file with everything.
    Single(PathBuf),
    /// A shard index.
    Index(PathBuf),
}

/// Finds the weights of a model folder; what was seen and not used goes to `warnings`.
pub(crate) fn find(dir: &Path, warnings: &mut Vec<String>) -> Result<Weights, ModelError> {
    let names = list(dir)?;
    if names.is_empty() {
        return Err(ModelError::EmptyFolder { path: dir.to_path_buf() });
    }
    let indexes = ending(&names, INDEX_SUFFIX);
    let files = ending(&names, SUFFIX);
    let ambiguous = |found, next| Err(ModelError::Ambiguous { path: dir.to_path_buf(), found, next });
    if indexes.len() > 1 {
        return ambiguous(
            format!("{} shard indexes ({})", indexes.len(), some(&indexes)),
            "keep the one that belongs to the weights",
        );
    }
    if let Some(index) = indexes.first() {
        return Ok(Weights::Index(dir.join(index)));
    }
    let shards: Vec<_> = files.iter().filter(|f| is_shard(f)).cloned().collect();
    if files.contains(&OsString::from(SINGLE)) {
        if !shards.is_empty() {
            let found = format!("`{SINGLE}` and shards without an index ({})", some(&shards));
            return ambiguous(found, "remove one of the two");
        }
        if files.len() > 1 {
            let others: Vec<_> = files.into_iter().filter(|f| f != SINGLE).collect();
            warnings.push(format!("not used, since `{SINGLE}` is there: {}", some(&others)));
        }
        return Ok(Weights::Single(dir.join(SINGLE)));
    }
    if !shards.is_empty() {
        let next = format!("the shards ({}) need model.safetensors.index.json; download it again", some(&shards));
        return Err(ModelError::NoWeights { path: dir.to_path_buf(), next });
    }
    match files.as_slice() {
        [] => Err(no_weights(dir, &names)),
        [file] if file == "adapter_model.safetensors" => Err(ModelError::ForeignWeights {
            path: dir.to_path_buf(),
            file: file.to_string_lossy().into_owned(),
            format: "a LoRA adapter",
            next: "merge it into its base model first, with peft `merge_and_unload()`",
        }),
        [file] => Ok(Weights::Single(dir.join(file))),
        _ => ambiguous(
            format!("{} weight files ({}) and no index", files.len(), some(&files)),
            "keep one, or add the model.safetensors.index.json that names them",
        ),
    }
}

/// Checks the folder that holds an index for weights that the index does not name.
pub(crate) fn unlisted(dir: &Path, listed: &BTreeSet<String>, warnings: &mut Vec<String>) -> Result<(), ModelError> {
    let mut others = ending(&list(dir)?, SUFFIX);
    others.retain(|f| !f.to_str().is_some_and(|f| listed.contains(f)));
    if others.iter().any(|f| f == SINGLE) {
        return Err(ModelError::Ambiguous {
            path: dir.to_path_buf(),
            found: format!("`{SINGLE}` and an index that does not name it"),
            next: "remove the one that is left over from an earlier save",
        });
    }
    if !others.is_empty() {
        warnings.push(format!("not used, since the index does not name them: {}", some(&others)));
    }
    Ok(())
}

/// Names in the folder that are not hidden, sorted.
fn list(dir: &Path) -> Result<Vec<OsString>, ModelError> {
    let io = || ModelError::io("list", dir);
    let entries = match fs::metadata(dir) {
        Ok(meta) if !meta.is_dir() => return Err(ModelError::NotAFolder { path: dir.to_path_buf() }),
        Ok(_) => fs::read_dir(dir).map_err(io())?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(ModelError::MissingFolder { path: dir.to_path_buf() });
        }
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
            return Err(ModelError::NotAFolder { path: dir.to_path_buf() });
        }
        Err(e) => return Err(io()(e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(io())?.file_name();
        if !name.as_encoded_bytes().starts_with(b".") {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn ending(names: &[OsString], suffix: &str) -> Vec<OsString> {
    names.iter().filter(|n| n.as_encoded_bytes().ends_with(suffix.as_bytes())).cloned().collect()
}

/// Whether the name is that of one shard of several, `…-00001-of-00004.safetensors`.
fn is_shard(name: &OsString) -> bool {
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    name.to_str()
        .and_then(|n| n.strip_suffix(SUFFIX))
        .and_then(|n| n.rsplit_once("-of-"))
        .and_then(|(head, count)| Some((head.rsplit_once('-')?.1, count)))
        .is_some_and(|(number, count)| digits(number) && digits(count) && count.trim_start_matches('0') != "1")
}

/// The error for a folder without any safetensors file.
fn no_weights(dir: &Path, names: &[OsString]) -> ModelError {
    let path = dir.to_path_buf();
    for (suffixes, format, next) in FOREIGN {
        let first = names.iter().find(|n| {
            let n = n.to_string_lossy().to_ascii_lowercase();
            suffixes.iter().any(|s| n.ends_with(s))
        });
        if let Some(first) = first {
            return ModelError::ForeignWeights { path, file: first.to_string_lossy().into_owned(), format, next };
        }
    }
    let next = if names.iter().any(|n| n == "snapshots") {
        "this is the top of a hub cache entry; give the folder of one revision under its `snapshots`"
    } else {
        "a model.safetensors, or shards with model.safetensors.index.json, are wanted; download them"
    };
    ModelError::NoWeights { path, next: next.to_owned() }
}

/// The first three of the names, escaped, and how many more there are.
fn some(names: &[OsString]) -> String {
    let mut text =
        names.iter().take(3).map(|n| format!("`{}`", printable(&n.to_string_lossy()))).collect::<Vec<_>>().join(", ");
    if names.len() > 3 {
        text.push_str(&format!(" and {} more", names.len() - 3));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_shard_names() {
        for name in ["model-00001-of-00004.safetensors", "pytorch_model-1-of-2.safetensors"] {
            assert!(is_shard(&name.into()), "{name}");
        }
        for name in ["model.safetensors", "model-00001-of-00001.safetensors", "a-of-b.safetensors", "x-1-of-2.bin"] {
            assert!(!is_shard(&name.into()), "{name}");
        }
    }

    #[test]
    fn lists_a_few_names() {
        let names: Vec<OsString> = ["a", "b\n", "c", "d", "e"].iter().map(OsString::from).collect();
        assert_eq!(some(&names), "`a`, `b\\u{a}`, `c` and 2 more");
        assert_eq!(some(&names[..1]), "`a`");
    }
}
