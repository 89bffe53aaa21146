//! Python's `json.dumps(ensure_ascii=False)` for template values.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// Deepest nesting and longest text written, against templates that build monsters.
const MAX_DEPTH: usize = 64;
const MAX_BYTES: usize = 16 << 20;
const MAX_INDENT: usize = 64;

/// JSON text of a value, spaced as Python spaces it.
///
/// # Errors
/// Too deep, too long, or not JSON (a function, an undefined value).
pub(crate) fn to_json(
    value: &Value,
    indent: Option<usize>,
    separators: Option<[String; 2]>,
    sort: bool,
) -> Result<String, Error> {
    let default = || [if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()];
    let [item, key] = separators.unwrap_or_else(default);
    let mut writer = Writer { out: String::new(), indent: indent.map(|i| i.min(MAX_INDENT)), item, key, sort };
    writer.value(value, 0)?;
    Ok(writer.out)
}

struct Writer {
    out: String,
    indent: Option<usize>,
    item: String,
    key: String,
    sort: bool,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH || self.out.len() > MAX_BYTES {
            return Err(bad("`tojson` of a value that is too deep or too long".into()));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value)?,
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.out.push('[');
                let mut first = true;
                for item in value.try_iter()? {
                    self.separate(&mut first, depth);
                    self.value(&item, depth + 1)?;
                }
                self.close(']', first, depth);
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort {
                    keys.sort();
                }
                self.out.push('{');
                let mut first = true;
                for key in &keys {
                    self.separate(&mut first, depth);
                    self.string(&key.to_string());
                    self.out.push_str(&self.key);
                    self.value(&value.get_item(key)?, depth + 1)?;
                }
                self.close('}', first, depth);
            }
            other => return Err(bad(format!("`tojson` of a value of kind {other}"))),
        }
        Ok(())
    }

    fn separate(&mut self, first: &mut bool, depth: usize) {
        if !std::mem::take(first) {
            self.out.push_str(&self.item);
        }
        self.line(depth + 1);
    }

    fn close(&mut self, bracket: char, empty: bool, depth: usize) {
        if !empty {
            self.line(depth);
        }
        self.out.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn number(&mut self, value: &Value) -> Result<(), Error> {
        if value.is_integer() {
            self.out.push_str(&value.to_string());
            return Ok(());
        }
        let number = f64::try_from(value.clone())?;
        // Python's spelling of the special values; its exponents start at 1e16 and below 1e-4.
        self.out.push_str(&match number {
            n if n.is_nan() => "NaN".to_owned(),
            n if n.is_infinite() => if n > 0.0 { "Infinity" } else { "-Infinity" }.to_owned(),
            n if n != 0.0 && !(1e-4..1e16).contains(&n.abs()) => exponent(n),
            n => format!("{n:?}"),
        });
        Ok(())
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' => self.out.push_str(&format!("\\u{:04x}", u32::from(c))),
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// `1e+16`, `1.5e-07`: Python writes a sign and at least two digits.
fn exponent(number: f64) -> String {
    let text = format!("{number:e}");
    match text.split_once('e') {
        Some((mantissa, power)) => {
            let (sign, digits) = power.strip_prefix('-').map_or(('+', power), |d| ('-', d));
            format!("{mantissa}e{sign}{digits:0>2}")
        }
        None => text,
    }
}

fn bad(message: String) -> Error {
    Error::new(ErrorKind::BadSerialization, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::Environment;

    /// `json.dumps(x, ensure_ascii=False, …)`, CPython 3.11.
    #[test]
    fn text_equals_python() {
        let value =
            |source: &str| Environment::new().compile_expression(source).expect("parses").eval(()).expect("evaluates");
        let nested = value(r#"{"b": [1, 2.5, true, none], "a": {"é": "q\"\\\n\t<>&'"}, "e": [], "f": {}}"#);
        assert_eq!(
            to_json(&nested, None, None, false).expect("json"),
            r#"{"b": [1, 2.5, true, null], "a": {"é": "q\"\\\n\t<>&'"}, "e": [], "f": {}}"#
        );
        assert_eq!(
            to_json(&nested, Some(2), None, true).expect("json"),
            "{\n  \"a\": {\n    \"é\": \"q\\\"\\\\\\n\\t<>&'\"\n  },\n  \"b\": [\n    1,\n    2.5,\n    true,\n    null\n  ],\n  \"e\": [],\n  \"f\": {}\n}"
        );
        let compact = Some([",".to_owned(), ":".to_owned()]);
        assert_eq!(to_json(&value("[1, {'a': 2}]"), None, compact, false).expect("json"), r#"[1,{"a":2}]"#);
        for (number, wanted) in [
            (1.0, "1.0"),
            (1e16, "1e+16"),
            (1.5e-7, "1.5e-07"),
            (0.0001, "0.0001"),
            (123456.789, "123456.789"),
            (0.0, "0.0"),
        ] {
            assert_eq!(to_json(&Value::from(number), None, None, false).expect("json"), wanted);
        }
        assert!(to_json(&Value::UNDEFINED, None, None, false).is_err());
    }
}
