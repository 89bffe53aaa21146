//! Strict JSON objects from untrusted files.
//!
//! serde_json bounds nesting at 128 levels but keeps the last of two equal keys, so that two readers of one file can
//! see different values. Here equal keys are an error at every depth.

use std::collections::HashSet;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::text::{escape, printable};

/// Most characters of a parser's message that an error repeats.
const MESSAGE_CHARS: usize = 300;

/// Parses one JSON object: UTF-8 with an optional byte order mark, no equal keys, at most 128 levels.
///
/// The error is a phrase for the caller's message.
pub(crate) fn parse_object(bytes: &[u8]) -> Result<(&str, Map<String, Value>), String> {
    let text = text_of(bytes)?;
    if text.trim_start().is_empty() {
        return Err("the file is empty, a JSON object is wanted".to_owned());
    }
    if !text.trim_start().starts_with('{') {
        return Err("found no `{` at the start: a JSON object is wanted".to_owned());
    }
    serde_json::from_str::<Distinct>(text).map_err(|e| explain(text, &e))?;
    let map = serde_json::from_str(text).map_err(|e| explain(text, &e))?;
    Ok((text, map))
}

/// `bytes` as text, without its byte order mark.
pub(crate) fn text_of(bytes: &[u8]) -> Result<&str, String> {
    let text = std::str::from_utf8(bytes)
        .map_err(|e| format!("not UTF-8 (first wrong byte at {}): JSON in UTF-8 is wanted", e.valid_up_to()))?;
    Ok(text.strip_prefix('\u{feff}').unwrap_or(text))
}

/// A parser's message, escaped, with the usual causes spelled out.
pub(crate) fn explain(text: &str, error: &serde_json::Error) -> String {
    let message = escape(&error.to_string(), MESSAGE_CHARS);
    if error.is_data() {
        return message;
    }
    let near = near(text, error.line(), error.column());
    if ["NaN", "Infinity", "-Infinity"].iter().any(|literal| near.starts_with(literal)) {
        return format!(
            "`{}` is not a JSON number ({message}): write a finite number or null",
            if near.starts_with("NaN") { "NaN" } else { "Infinity" }
        );
    }
    if near.starts_with("//") || near.starts_with("/*") || near.starts_with('#') {
        return format!("JSON has no comments ({message}): delete it");
    }
    format!("not valid JSON: {message}")
}

/// What stands at the position of a parse error, the word it is in from its start.
fn near(text: &str, line: usize, column: usize) -> &str {
    let Some(line) = text.split('\n').nth(line.saturating_sub(1)) else { return "" };
    // The column is that of the byte the parser stopped at, which for `-Infinity` is the one after the sign.
    let mut at = column.saturating_sub(1).min(line.len());
    let bytes = line.as_bytes();
    while at > 0 && (bytes[at - 1].is_ascii_alphabetic() || bytes[at - 1] == b'-' || bytes[at - 1] == b'/') {
        at -= 1;
    }
    line.get(at..).unwrap_or("")
}

/// Accepts any JSON whose objects have no equal keys; keeps nothing.
struct Distinct;

impl<'de> Deserialize<'de> for Distinct {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(DistinctVisitor)
    }
}

struct DistinctVisitor;

impl<'de> Visitor<'de> for DistinctVisitor {
    type Value = Distinct;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Distinct, E> {
        Ok(Distinct)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Distinct, E> {
        Ok(Distinct)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Distinct, E> {
        Ok(Distinct)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Distinct, E> {
        Ok(Distinct)
    }

    fn visit_str<E>(self, _: &str) -> Result<Distinct, E> {
        Ok(Distinct)
    }

    fn visit_unit<E>(self) -> Result<Distinct, E> {
        Ok(Distinct)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Distinct, A::Error> {
        while seq.next_element::<Distinct>()?.is_some() {}
        Ok(Distinct)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Distinct, A::Error> {
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            map.next_value::<Distinct>()?;
            if seen.contains(&key) {
                return Err(A::Error::custom(format!("key `{}` appears twice in one object", printable(&key))));
            }
            seen.insert(key);
        }
        Ok(Distinct)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        parse_object(text.as_bytes()).unwrap_err()
    }

    #[test]
    fn reads_an_object_with_a_byte_order_mark() {
        let (text, map) = parse_object("\u{feff}{\"b\": 1, \"a\": [1e-06, null]}".as_bytes()).unwrap();
        assert!(text.starts_with('{'));
        assert_eq!(map.keys().collect::<Vec<_>>(), ["b", "a"]);
    }

    #[test]
    fn refuses_equal_keys_at_every_depth() {
        assert!(refused(r#"{"a": 1, "a": 1}"#).contains("key `a` appears twice"));
        assert!(refused(r#"{"x": [{"a": {"b": 1, "b": 2}}]}"#).contains("key `b` appears twice"));
        assert!(parse_object(br#"{"a": {"a": 1}, "b": {"a": 1}}"#).is_ok());
    }

    #[test]
    fn names_literals_that_python_writes() {
        for (text, literal) in [
            ("{\"a\": NaN}", "`NaN`"),
            ("{\"a\": [0.0, Infinity]}", "`Infinity`"),
            ("{\n  \"a\": -Infinity\n}", "`Infinity`"),
        ] {
            let message = refused(text);
            assert!(message.contains(literal) && message.contains("finite number"), "{message}");
        }
        assert!(parse_object(br#"{"a": "NaN"}"#).is_ok());
    }

    #[test]
    fn names_comments() {
        assert!(refused("{\n  // heads\n  \"a\": 1}").contains("no comments"));
        assert!(refused("{\"a\": 1, # heads\n \"b\": 1}").contains("no comments"));
    }

    #[test]
    fn refuses_what_is_not_an_object() {
        for text in ["", "  \n", "[]", "1", "{", "{\"a\": 1}}", "{\"a\"}", "{\"a\": 1e999}", "{\"a\": \"\\ud800\"}"] {
            assert!(parse_object(text.as_bytes()).is_err(), "{text}");
        }
        assert!(parse_object(b"{\"a\": \"\xff\"}").unwrap_err().contains("first wrong byte at 7"));
    }

    #[test]
    fn deep_nesting_is_an_error_and_not_an_overflow() {
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            let text = format!("{{\"a\":{}1{}}}", open.repeat(100_000), close.repeat(100_000));
            assert!(refused(&text).contains("recursion limit"));
        }
    }

    #[test]
    fn messages_do_not_repeat_control_characters() {
        let message = refused("{\"\\u001b[31m\": 1, \"\\u001b[31m\": 2}");
        assert!(message.contains("\\u{1b}[31m") && !message.contains('\u{1b}'), "{message}");
    }
}
