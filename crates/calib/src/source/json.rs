//! JSON rows: one per line, or an array of them.

use std::io::{BufRead, Read};
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::{Collector, read_error, too_large};
use crate::document::Fields;
use crate::error::CalibError;

/// Reads JSON lines, or one JSON array of rows if the first character is `[`. A byte order mark is dropped.
pub(super) fn read(
    reader: &mut dyn BufRead,
    path: &Path,
    name: &str,
    fields: &Fields,
    into: &mut Collector,
) -> Result<(), CalibError> {
    let buffer = reader.fill_buf().map_err(|e| read_error(path, name, e))?;
    let mark = if buffer.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
    let is_array = buffer[mark..].iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'[');
    reader.consume(mark);
    if is_array {
        array(reader, path, name, fields, into)
    } else {
        lines(reader, mark as u64, path, name, fields, into)
    }
}

fn lines(
    reader: &mut dyn BufRead,
    mark: u64,
    path: &Path,
    name: &str,
    fields: &Fields,
    into: &mut Collector,
) -> Result<(), CalibError> {
    let (limits, mut total) = (into.limits, mark);
    let mut line = Vec::new();
    for number in 1u64.. {
        let at = || format!("{name}:{number}");
        line.clear();
        let read = (&mut *reader)
            .take(limits.line.saturating_add(1))
            .read_until(b'\n', &mut line)
            .map_err(|e| read_error(path, name, e))? as u64;
        if read == 0 {
            break;
        }
        total = total.saturating_add(read);
        if total > limits.total {
            return Err(CalibError::bad(name, too_large(limits.total)));
        }
        if read > limits.line {
            return Err(CalibError::bad(at(), format!("the line is longer than {} MiB; split it", limits.line >> 20)));
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        if let Err(e) = std::str::from_utf8(&line) {
            let offset = total - read + e.valid_up_to() as u64;
            return Err(CalibError::bad(
                at(),
                format!("invalid UTF-8 at byte offset {offset}; convert the file to UTF-8"),
            ));
        }
        let row: Map<String, Value> = serde_json::from_slice(&line).map_err(|e| {
            let hint = if number == 1 { "; wanted one JSON object per line, or one array of objects" } else { "" };
            CalibError::bad(at(), format!("not a JSON object: {e}{hint}"))
        })?;
        let document = fields.document(row).map_err(|e| CalibError::bad(at(), e))?;
        if !into.push(document).map_err(|e| CalibError::bad(at(), e))? {
            break;
        }
    }
    Ok(())
}

fn array(
    reader: &mut dyn BufRead,
    path: &Path,
    name: &str,
    fields: &Fields,
    into: &mut Collector,
) -> Result<(), CalibError> {
    let limit = into.limits.total;
    let mut counted = reader.take(limit.saturating_add(1));
    let mut parser = serde_json::Deserializer::from_reader(&mut counted);
    let result = Rows { fields, into }.deserialize(&mut parser).and_then(|()| parser.end());
    drop(parser);
    match result {
        Ok(()) => Ok(()),
        Err(_) if counted.limit() == 0 => Err(CalibError::bad(name, too_large(limit))),
        // Stopped on purpose: enough rows.
        Err(_) if into.is_full() => Ok(()),
        Err(e) if e.is_io() => Err(read_error(path, name, e.into())),
        Err(e) => Err(CalibError::bad(format!("{name}:{}", e.line()), e.to_string())),
    }
}

/// Deserializes an array of rows straight into the collector, one row in memory at a time.
struct Rows<'a> {
    fields: &'a Fields,
    into: &'a mut Collector,
}

impl<'de> DeserializeSeed<'de> for Rows<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Rows<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an array of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rows: A) -> Result<(), A::Error> {
        use serde::de::Error;
        let mut number = 0u64;
        while let Some(row) = rows.next_element::<Map<String, Value>>()? {
            number += 1;
            let document = self.fields.document(row).map_err(|e| A::Error::custom(format!("row {number}: {e}")))?;
            if !self.into.push(document).map_err(A::Error::custom)? {
                return Err(A::Error::custom("enough rows"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Limits, read_file};
    use super::*;
    use crate::document::Document;
    use proptest::prelude::*;

    fn read_text(text: &[u8], limits: Limits, rows: Option<usize>) -> Result<Vec<Document>, CalibError> {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("a.json");
        std::fs::write(&path, text).expect("write");
        let mut into = Collector::new(limits, rows);
        read_file(&path, "a.json", &Fields::Any, &mut into).map(|_| into.documents)
    }

    fn texts(names: &[&str]) -> Vec<Document> {
        names.iter().map(|t| Document::Text((*t).to_owned())).collect()
    }

    #[test]
    fn lines_and_arrays_give_the_same_rows() {
        let wanted = texts(&["a", "b"]);
        let all = Limits::default();
        for text in [
            "{\"text\":\"a\"}\n\n{\"text\":\"b\"}",
            "\n \u{20}\n{\"text\":\"a\"}\r\n{\"text\":\"b\"}\r\n",
            "\u{feff}{\"text\":\"a\"}\n{\"text\":\"b\"}\n",
            "  [{\"text\":\"a\"},\n {\"text\":\"b\"}]\n",
        ] {
            assert_eq!(read_text(text.as_bytes(), all, None).expect(text), wanted, "{text}");
            assert_eq!(read_text(text.as_bytes(), all, Some(1)).expect(text), wanted[..1], "{text}");
        }
        assert!(read_text(b" \n\n", all, None).expect("empty").is_empty());
    }

    #[test]
    fn bad_rows_are_located() {
        let all = Limits::default();
        for (text, wanted) in [
            (&b"{\"text\":\"a\"}\n{\"text\":}\n"[..], "a.json:2: not a JSON object"),
            (b"{\"text\":\"a\"}\n\n{\"body\":\"b\"}\n", "a.json:3: the row has `body`"),
            (b"{\n  \"text\": \"a\"\n}\n", "a.json:1: not a JSON object"),
            (b"{\"text\":\"a\"}\n{\"text\":\"\xff\"}\n", "a.json:2: invalid UTF-8 at byte offset 22"),
            (b"[{\"text\":\"a\"},\n{\"body\":\"b\"}]", "a.json:2: row 2: the row has `body`"),
            (b"[{\"text\":\"a\"}\n", "a.json:"),
            (b"[1]", "a.json:1"),
        ] {
            let error = read_text(text, all, None).expect_err("bad").to_string();
            assert!(error.starts_with(wanted), "{error}");
        }
    }

    #[test]
    fn limits_hold() {
        let rows = "{\"text\":\"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"}\n".repeat(10);
        let total = Limits { total: 200, line: 100 };
        assert!(
            read_text(rows.as_bytes(), total, None).expect_err("total").to_string().contains("after decompression")
        );
        let line = Limits { total: 1 << 20, line: 20 };
        assert!(read_text(rows.as_bytes(), line, None).expect_err("line").to_string().contains("longer than"));
        let array = format!("[{}]", vec!["{\"text\":\"aaaaaaaaaaaaaaa\"}"; 30].join(","));
        assert!(
            read_text(array.as_bytes(), total, None).expect_err("array").to_string().contains("after decompression")
        );
        // serde_json's own depth limit: no stack overflow.
        let deep = format!("{{\"text\":{}", "[".repeat(100_000));
        assert!(read_text(deep.as_bytes(), Limits::default(), None).is_err());
    }

    proptest! {
        #[test]
        fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_text(&bytes, Limits::default(), None);
        }
    }
}
