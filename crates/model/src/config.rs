//! `config.json`: reading it strictly, and changing top-level keys without touching the rest.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::discover::CONFIG;
use crate::error::ModelError;
use crate::json;
use crate::open_file::{not_json, read_bounded};

/// Longest config.json in bytes; real ones have a few thousand.
const MAX_CONFIG: u64 = 16_000_000;

/// config.json of a model folder.
#[derive(Debug)]
pub(crate) struct Config {
    /// Its text, without a byte order mark.
    pub(crate) text: String,
    /// Its keys and values, in order.
    pub(crate) keys: Map<String, Value>,
    /// The bytes of the file.
    pub(crate) raw: Vec<u8>,
}

/// Reads config.json of a model folder.
pub(crate) fn load(dir: &Path) -> Result<Config, ModelError> {
    let path = dir.join(CONFIG);
    if fs::symlink_metadata(&path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
        return Err(ModelError::NoConfig { path: dir.to_path_buf() });
    }
    let raw = read_bounded(&path, MAX_CONFIG, |len| {
        ModelError::config(&path, format!("found {len} bytes, the limit is {MAX_CONFIG}: not the config of a model"))
    })?;
    let (text, keys) = json::parse_object(&raw).map_err(|e| not_json(&path, &raw, ModelError::config(&path, e)))?;
    Ok(Config { text: text.to_owned(), keys, raw })
}

/// Sets top-level keys of config.json `text` and leaves every other key where it is, its value spelled as it was
/// (`1e-06` stays `1e-06`, nested objects keep their layout). A key that exists keeps its place, a new one goes to the
/// end. The result is indented by two spaces and ends with a newline, as `transformers` writes it.
///
/// # Errors
///
/// [`ModelError::Config`] where `text` is not a strict JSON object (equal keys, comments, NaN).
pub fn edit_config(text: &str, set: &[(&str, Value)]) -> Result<String, ModelError> {
    let mut entries = entries(text)?;
    for (key, value) in set {
        let value = pretty(value)?;
        match entries.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value,
            None => entries.push(((*key).to_owned(), value)),
        }
    }
    emit(&entries)
}

/// Removes top-level keys from config.json `text`; the rest stays as in [`edit_config`]. Absent keys are no error.
///
/// # Errors
///
/// [`ModelError::Config`] where `text` is not a strict JSON object.
pub fn remove_from_config(text: &str, keys: &[&str]) -> Result<String, ModelError> {
    let mut entries = entries(text)?;
    entries.retain(|(key, _)| !keys.contains(&key.as_str()));
    emit(&entries)
}

/// Top-level keys and the text of their values, in order.
fn entries(text: &str) -> Result<Vec<(String, String)>, ModelError> {
    let (text, _) = json::parse_object(text.as_bytes()).map_err(|e| ModelError::config(&unnamed(), e))?;
    let Raw(entries) = serde_json::from_str(text).map_err(|e| wrong(&e))?;
    Ok(entries)
}

fn emit(entries: &[(String, String)]) -> Result<String, ModelError> {
    if entries.is_empty() {
        return Ok("{}\n".to_owned());
    }
    let lines = entries
        .iter()
        .map(|(key, value)| Ok(format!("  {}: {value}", serde_json::to_string(key).map_err(|e| wrong(&e))?)))
        .collect::<Result<Vec<_>, ModelError>>()?;
    Ok(format!("{{\n{}\n}}\n", lines.join(",\n")))
}

/// A value indented as part of the top-level object. Strings hold no raw newlines in JSON, so only layout changes.
fn pretty(value: &Value) -> Result<String, ModelError> {
    Ok(serde_json::to_string_pretty(value).map_err(|e| wrong(&e))?.replace('\n', "\n  "))
}

fn wrong(error: &serde_json::Error) -> ModelError {
    ModelError::config(&unnamed(), error.to_string())
}

/// The name for text that came without a path.
fn unnamed() -> PathBuf {
    PathBuf::from(CONFIG)
}

/// An object whose values stay text.
struct Raw(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Raw;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
                let mut out = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, Box<RawValue>>()? {
                    out.push((key, value.get().to_owned()));
                }
                Ok(Raw(out))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const TEXT: &str = "\u{feff}{\n  \"a\": 1e-06,\n  \"b\": {\n    \"x\": [1,\n 2.50]\n  },\n  \"ü\": \"\\u00e9\",\n  \"c\": 10000000000000000000000\n}";

    #[test]
    fn replaces_in_place_and_appends_at_the_end() {
        let edited = edit_config(TEXT, &[("new", json!({"k": [1], "e": {}})), ("a", json!("A"))]).unwrap();
        let wanted = "{\n  \"a\": \"A\",\n  \"b\": {\n    \"x\": [1,\n 2.50]\n  },\n  \"ü\": \"\\u00e9\",\n  \"c\": 10000000000000000000000,\n  \"new\": {\n    \"k\": [\n      1\n    ],\n    \"e\": {}\n  }\n}\n";
        assert_eq!(edited, wanted);
    }

    #[test]
    fn an_edit_twice_is_an_edit_once() {
        let set = [("quantization_config", json!({"bits": 4}))];
        let once = edit_config(TEXT, &set).unwrap();
        assert_eq!(edit_config(&once, &set).unwrap(), once);
    }

    #[test]
    fn removes_keys() {
        assert_eq!(remove_from_config("{\"a\": 1, \"b\": 2e0}", &["a", "z"]).unwrap(), "{\n  \"b\": 2e0\n}\n");
        assert_eq!(remove_from_config("{\"a\": 1}", &["a"]).unwrap(), "{}\n");
    }

    #[test]
    fn strings_with_newlines_keep_them() {
        let edited = edit_config("{}", &[("t", json!("line\nline"))]).unwrap();
        assert_eq!(edited, "{\n  \"t\": \"line\\nline\"\n}\n");
    }

    #[test]
    fn refuses_what_the_reader_refuses() {
        for text in ["", "[]", "{\"a\": 1, \"a\": 2}", "{\"a\": NaN}", "{\"a\": {\"b\": 1, \"b\": 1}}"] {
            assert!(matches!(edit_config(text, &[]), Err(ModelError::Config { .. })), "{text}");
        }
    }
}
