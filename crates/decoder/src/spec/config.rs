//! Typed, checked access to config.json: every error names the key, the value found and what was wanted.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::DecoderError;
use crate::error::clean;

/// A JSON object and its place in config.json.
#[derive(Clone, Copy)]
pub(crate) struct Section<'a> {
    map: &'a Map<String, Value>,
    path: &'static str,
    /// Keys that have another name in this file: (the usual name, the name here).
    names: &'static [(&'static str, &'static str)],
}

impl<'a> Section<'a> {
    pub(crate) fn root(map: &'a Map<String, Value>) -> Self {
        Self { map, path: "", names: &[] }
    }

    /// The same object, whose file calls some keys by other names: (the usual name, the name here).
    ///
    /// # Errors
    /// [`DecoderError::Contradiction`] if a key is there under both names with different values.
    pub(crate) fn renamed(self, names: &'static [(&'static str, &'static str)]) -> Result<Self, DecoderError> {
        for (usual, own) in names {
            if let (Some(a), Some(b)) = (self.get(usual), self.get(own))
                && a != b
            {
                let reason = format!(
                    "`{usual}` is {} and `{own}` is {}, which mean the same in this family: wanted equal values",
                    self.found(usual),
                    self.found(own)
                );
                return Err(DecoderError::Contradiction { reason });
            }
        }
        Ok(Self { names, ..self })
    }

    /// What this file calls `key`.
    fn own<'k>(&self, key: &'k str) -> &'k str {
        self.names.iter().find(|(usual, _)| *usual == key).map_or(key, |(_, own)| own)
    }

    /// The value of `key`; JSON null counts as absent.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(self.own(key)).filter(|value| !value.is_null())
    }

    /// Whether `key` is there, even if null.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.map.contains_key(self.own(key))
    }

    /// The keys of this object.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str)
    }

    /// An object inside this one; absent, null and `{}` are `None`.
    pub(crate) fn section(&self, key: &'static str) -> Result<Option<Section<'a>>, DecoderError> {
        self.section_at(key, key)
    }

    /// [`Section::section`] of a section that is not the whole file; `path` is what errors call it.
    pub(crate) fn section_at(&self, key: &str, path: &'static str) -> Result<Option<Section<'a>>, DecoderError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) if map.is_empty() => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Section { map, path, names: &[] })),
            Some(_) => Err(self.wrong(key, "an object")),
        }
    }

    /// A whole number in `range`, if `key` is there.
    pub(crate) fn size(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>, DecoderError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let found = value.as_u64().and_then(|v| usize::try_from(v).ok()).filter(|v| range.contains(v));
        found
            .map(Some)
            .ok_or_else(|| self.wrong(key, &format!("a whole number from {} to {}", range.start(), range.end())))
    }

    /// A whole number in `range` that must be there.
    pub(crate) fn required_size(&self, key: &str, range: RangeInclusive<usize>) -> Result<usize, DecoderError> {
        let wanted = format!("a whole number from {} to {}", range.start(), range.end());
        self.size(key, range)?.ok_or_else(|| self.wrong(key, &wanted))
    }

    /// A finite number in `range`, if `key` is there.
    pub(crate) fn number(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, DecoderError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let found = value.as_f64().filter(|v| v.is_finite() && range.contains(v));
        found.map(Some).ok_or_else(|| self.wrong(key, &format!("a number from {} to {}", range.start(), range.end())))
    }

    /// A finite number in `range` that must be there.
    pub(crate) fn required_number(&self, key: &str, range: RangeInclusive<f64>) -> Result<f64, DecoderError> {
        let wanted = format!("a number from {} to {}", range.start(), range.end());
        self.number(key, range)?.ok_or_else(|| self.wrong(key, &wanted))
    }

    /// A list of `len` finite numbers in `range` that must be there.
    pub(crate) fn numbers(&self, key: &str, len: usize, range: RangeInclusive<f64>) -> Result<Vec<f64>, DecoderError> {
        let found: Option<Vec<f64>> = self
            .get(key)
            .and_then(Value::as_array)
            .and_then(|list| list.iter().map(|v| v.as_f64().filter(|v| v.is_finite() && range.contains(v))).collect());
        found
            .filter(|list| list.len() == len)
            .ok_or_else(|| self.wrong(key, &format!("{len} numbers from {} to {}", range.start(), range.end())))
    }

    /// A list of whole numbers, empty if `key` is not there.
    pub(crate) fn indices(&self, key: &str) -> Result<Vec<usize>, DecoderError> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let number = |v: &Value| v.as_u64().and_then(|v| usize::try_from(v).ok());
        let found: Option<Vec<usize>> = value.as_array().and_then(|list| list.iter().map(number).collect());
        found.ok_or_else(|| self.wrong(key, "a list of whole numbers"))
    }

    /// true or false, if `key` is there.
    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>, DecoderError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    /// A string, if `key` is there.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, DecoderError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(key, "a string")),
        }
    }

    /// A list of strings, if `key` is there.
    pub(crate) fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>, DecoderError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let found: Option<Vec<&str>> = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        found.map(Some).ok_or_else(|| self.wrong(key, "a list of strings"))
    }

    /// The error that `key` is not what was `wanted`.
    pub(crate) fn wrong(&self, key: &str, wanted: &str) -> DecoderError {
        DecoderError::Config { key: self.full(key), found: self.found(key), wanted: wanted.to_owned() }
    }

    /// The error that the value of `key` is legal, but not implemented.
    pub(crate) fn unsupported(&self, key: &str, supported: &str) -> DecoderError {
        let (key, found) = (self.full(key), self.found(key));
        DecoderError::UnsupportedConfig { key, found, supported: supported.to_owned() }
    }

    fn full(&self, key: &str) -> String {
        let key = self.own(key);
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    fn found(&self, key: &str) -> String {
        self.map.get(self.own(key)).map_or_else(|| "missing".to_owned(), |value| clean(&value.to_string()))
    }
}
