//! The tokens that end a text.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use serde_json::{Map, Value};

use crate::RuntimeError;

const NAME: &str = "generation_config.json";
const KEY: &str = "eos_token_id";

/// Largest `generation_config.json` that is read; real ones have some hundred bytes.
const MAX_BYTES: u64 = 1 << 20;

/// `eos_token_id` of `generation_config.json`, or else of `config.json`: one id or a list.
pub(super) fn end_tokens(dir: &Path, config: &Map<String, Value>) -> Result<Vec<u32>, RuntimeError> {
    let path = dir.join(NAME);
    let unreadable = |reason: String| RuntimeError::Generate { reason: format!("`{NAME}` {reason}") };
    let mut text = Vec::new();
    match File::open(&path) {
        Ok(file) => {
            let read = file.take(MAX_BYTES + 1).read_to_end(&mut text);
            read.map_err(|e| unreadable(format!("cannot be read ({e})")))?;
        }
        Err(e) if e.kind() == ErrorKind::NotFound => return ids(config.get(KEY), "config.json"),
        Err(e) => return Err(unreadable(format!("cannot be read ({e})"))),
    }
    if text.len() as u64 > MAX_BYTES {
        return Err(unreadable("is larger than 1 MiB; no such file is that large".to_owned()));
    }
    let parsed: Value = serde_json::from_slice(&text).map_err(|e| unreadable(format!("is not valid JSON ({e})")))?;
    match parsed.get(KEY) {
        None | Some(Value::Null) => ids(config.get(KEY), "config.json"),
        found => ids(found, NAME),
    }
}

fn ids(value: Option<&Value>, file: &str) -> Result<Vec<u32>, RuntimeError> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let found = match value {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(id).collect(),
        // Some files write −1 for "none".
        Some(value) if value.as_i64() == Some(-1) => Some(Vec::new()),
        Some(value) => id(value).map(|id| vec![id]),
    };
    found.ok_or_else(|| {
        let found: String = value.map(Value::to_string).unwrap_or_default().chars().take(60).collect();
        let reason = format!("`{KEY}` in `{file}` is {found}, wanted a token id or a list of them");
        RuntimeError::Generate { reason }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_from_the_first_file_that_has_them() {
        let dir = tempfile::tempdir().unwrap();
        let config = |text: &str| serde_json::from_str::<Map<String, Value>>(text).unwrap();
        let ends = |text: &str| end_tokens(dir.path(), &config(text));
        assert_eq!(ends("{}").unwrap(), [] as [u32; 0]);
        assert_eq!(ends(r#"{"eos_token_id": 2}"#).unwrap(), [2]);
        assert_eq!(ends(r#"{"eos_token_id": -1}"#).unwrap(), [] as [u32; 0]);
        for bad in [r#"{"eos_token_id": "x"}"#, r#"{"eos_token_id": [1, null]}"#, r#"{"eos_token_id": 1e12}"#] {
            assert!(ends(bad).unwrap_err().to_string().contains("eos_token_id"), "{bad}");
        }
        let write = |text: &str| std::fs::write(dir.path().join(NAME), text).unwrap();
        write(r#"{"eos_token_id": [128001, 128009]}"#);
        assert_eq!(ends(r#"{"eos_token_id": 2}"#).unwrap(), [128_001, 128_009]);
        write("{}");
        assert_eq!(ends(r#"{"eos_token_id": 2}"#).unwrap(), [2]);
        write("{,}");
        assert!(ends("{}").unwrap_err().to_string().contains(NAME));
    }
}
