//! The files of a model folder that travel unchanged: tokenizer, chat template, generation config, code, licence.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::ModelError;
use crate::open_file::{open_regular, special};
use crate::text::printable_path;
use crate::writer::atomic_copy;

/// Files that the writer of a quantized checkpoint makes itself, or that describe an earlier quantization or tell of it.
const RESERVED: [&str; 5] =
    ["config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json", "lite.log.jsonl"];
/// Ends of names of weights, in every format met in model folders.
const WEIGHTS: [&str; 10] =
    [".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data"];

/// Finds the side files under `root`: relative paths, sorted. Links to files count as files, links to folders and
/// everything hidden are left out.
pub(crate) fn find(root: &Path, warnings: &mut Vec<String>) -> Result<Vec<PathBuf>, ModelError> {
    let allowed = allowed_roots(root);
    let mut found = Vec::new();
    let mut weights = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let top = folder.as_os_str().is_empty();
        let path = root.join(&folder);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(e) if !top && e.kind() == io::ErrorKind::PermissionDenied => {
                warnings.push(format!("folder `{}` cannot be read and is not copied", printable_path(&folder)));
                continue;
            }
            Err(e) => return Err(ModelError::io("list", &path)(e)),
        };
        for entry in entries {
            let entry = entry.map_err(ModelError::io("list", &path))?;
            let name = entry.file_name();
            if name.as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let relative = folder.join(&name);
            let kind = entry.file_type().map_err(ModelError::io("look at", &entry.path()))?;
            if kind.is_dir() {
                if !(top && name == "onnx") {
                    folders.push(relative);
                }
            } else if is_weights(&name) {
                // Those at the top have been judged when the weights were looked for.
                if !top {
                    weights.push(relative);
                }
            } else if !(top && is_reserved(&name, warnings)) && is_copied(root, &relative, kind, &allowed, warnings) {
                found.push(relative);
            }
        }
    }
    weights.sort();
    if let Some(first) = weights.first() {
        let (count, first) = (weights.len(), printable_path(first));
        warnings.push(format!("{count} weight files in sub-folders are not copied, the first is `{first}`"));
    }
    found.sort();
    warnings.sort();
    Ok(found)
}

/// Copies `files`, relative to `root`, into `dst`, byte for byte; each appears whole or not at all.
pub(crate) fn copy(root: &Path, files: &[PathBuf], dst: &Path) -> Result<(), ModelError> {
    fs::create_dir_all(dst).map_err(ModelError::io("create", dst))?;
    let same = fs::canonicalize(dst).ok() == fs::canonicalize(root).ok();
    if same {
        return Err(ModelError::output(dst, "the output folder is the model folder: choose another"));
    }
    for file in files {
        let target = dst.join(file);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(ModelError::io("create", parent))?;
        }
        let (source, _) = open_regular(&root.join(file))?;
        atomic_copy(source, &root.join(file), &target)?;
    }
    Ok(())
}

fn is_weights(name: &OsStr) -> bool {
    let name = name.to_string_lossy().to_ascii_lowercase();
    // An index of weights: `model.safetensors.index.json`, `pytorch_model.bin.index.json`, `….index.fp16.json`.
    let stem = name.strip_suffix(".json").and_then(|n| n.split_once(".index")).map(|(stem, _)| stem);
    WEIGHTS.iter().any(|w| stem.unwrap_or(&name).ends_with(w))
}

/// Whether the name is one that the writer makes itself. One that differs only in case would replace the writer's file
/// on many file systems, so it stays behind too.
fn is_reserved(name: &OsStr, warnings: &mut Vec<String>) -> bool {
    let Some(name) = name.to_str() else { return false };
    if RESERVED.contains(&name) {
        return true;
    }
    let reserved = RESERVED.iter().find(|r| r.eq_ignore_ascii_case(name));
    if let Some(reserved) = reserved {
        warnings.push(format!("`{name}` differs from `{reserved}` only in case and is not copied"));
    }
    reserved.is_some()
}

/// Whether an entry that is no folder is a file to copy; links are followed.
fn is_copied(
    root: &Path,
    relative: &Path,
    kind: fs::FileType,
    allowed: &[PathBuf],
    warnings: &mut Vec<String>,
) -> bool {
    if kind.is_file() {
        return true;
    }
    let name = printable_path(relative);
    let path = root.join(relative);
    let found = if kind.is_symlink() { fs::metadata(&path).ok().map(|m| m.file_type()) } else { Some(kind) };
    let reason = match found {
        None => Some("a link that leads nowhere"),
        Some(kind) if kind.is_dir() => Some("a link to a folder"),
        Some(kind) => special(kind),
    };
    if let Some(reason) = reason {
        warnings.push(format!("`{name}` is {reason} and is not copied"));
        return false;
    }
    // The files of a hub cache are links; one that leads elsewhere may carry a private file into the output.
    if let Ok(target) = fs::canonicalize(&path)
        && !allowed.iter().any(|root| target.starts_with(root))
    {
        let target = printable_path(&target);
        warnings.push(format!("`{name}` is a link out of the model folder, to `{target}`, whose content is copied"));
    }
    true
}

/// Where links may lead without a word: the folder itself, and the blobs of the hub cache entry that it is part of
/// (`models--…/snapshots/REVISION` beside `models--…/blobs`).
fn allowed_roots(root: &Path) -> Vec<PathBuf> {
    let Ok(root) = fs::canonicalize(root) else { return Vec::new() };
    let snapshots = root.parent().filter(|p| p.file_name() == Some(OsStr::new("snapshots")));
    let blobs = snapshots.and_then(Path::parent).map(|entry| entry.join("blobs"));
    std::iter::once(root.clone()).chain(blobs).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_of_every_format_stay_behind() {
        for name in [
            "model.safetensors",
            "pytorch_model.BIN",
            "a.gguf",
            "tf_model.h5",
            "model.safetensors.index.json",
            "pytorch_model.bin.index.json",
            "model.safetensors.index.fp16.json",
            "consolidated.00.pth",
            "m.onnx_data",
        ] {
            assert!(is_weights(OsStr::new(name)), "{name}");
        }
        for name in ["tokenizer.json", "tokenizer.model", "vocab.index.json", "binary.json", "README.md", "bin"] {
            assert!(!is_weights(OsStr::new(name)), "{name}");
        }
    }
}
