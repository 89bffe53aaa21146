//! Model folders built by hand, byte by byte, so that no code under test is trusted to make its own input.

use std::fs;
use std::path::{Path, PathBuf};

use lite_model::{Checkpoint, ErrorKind, ModelError};
use tempfile::TempDir;

/// A small config.
pub(crate) const CONFIG: &str = "{\"model_type\": \"llama\"}";

/// Length field, JSON, data.
pub(crate) fn container(json: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(json.as_bytes());
    file.extend_from_slice(data);
    file
}

/// U8 tensors one after the other, every byte of tensor `i` being `i`.
pub(crate) fn bytes_file(tensors: &[(&str, usize)]) -> Vec<u8> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for (i, (name, len)) in tensors.iter().enumerate() {
        let begin = data.len();
        data.resize(begin + len, i as u8);
        let end = data.len();
        entries.push(format!("\"{name}\":{{\"dtype\":\"U8\",\"shape\":[{len}],\"data_offsets\":[{begin},{end}]}}"));
    }
    container(&format!("{{{}}}", entries.join(",")), &data)
}

/// An index: tensor and shard, and the total size.
pub(crate) fn index(places: &[(&str, &str)], total: u64) -> Vec<u8> {
    let map: Vec<_> = places.iter().map(|(t, s)| format!("{:?}:{:?}", t, s)).collect();
    format!("{{\"metadata\":{{\"total_size\":{total}}},\"weight_map\":{{{}}}}}", map.join(",")).into_bytes()
}

/// A folder with these files.
pub(crate) fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    dir
}

/// A folder with a config and one weight file.
pub(crate) fn model(weights: &[u8]) -> TempDir {
    folder(&[("config.json", CONFIG.as_bytes()), ("model.safetensors", weights)])
}

/// Opens a folder that must be refused with a message of these words, and returns the error.
#[track_caller]
pub(crate) fn refused(dir: &Path, kind: ErrorKind, words: &[&str]) -> ModelError {
    let error = match Checkpoint::open(dir) {
        Ok(_) => panic!("the folder was accepted, wanted a refusal with {words:?}"),
        Err(error) => error,
    };
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
    assert_eq!(error.kind(), kind, "{message}");
    assert!(!message.chars().any(char::is_control), "raw control characters: {message:?}");
    assert!(message.len() < 6000, "{} bytes of message", message.len());
    error
}

/// The folder of shared test data, where this checkout has one.
pub(crate) fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(path);
    path.is_dir().then_some(path)
}

/// Resident bytes of the mapping of a file, as the kernel counts them; `None` where it does not say.
pub(crate) fn resident(path: &Path) -> Option<u64> {
    let maps = fs::read_to_string("/proc/self/smaps").ok()?;
    let (_, after) = maps.split_once(path.to_str()?)?;
    let line = after.lines().find(|l| l.starts_with("Rss:"))?;
    Some(1024 * line.split_whitespace().nth(1)?.parse::<u64>().ok()?)
}
