//! Plain text: a file is one document.

use std::io::{BufRead, Read};
use std::path::Path;

use super::{Collector, read_error, too_large};
use crate::document::Document;
use crate::error::CalibError;

/// Reads a whole text file as one document. A byte order mark is dropped, line ends stay as they are.
pub(super) fn read(reader: &mut dyn BufRead, path: &Path, name: &str, into: &mut Collector) -> Result<(), CalibError> {
    let limit = into.limits.total;
    let mut bytes = Vec::new();
    reader.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(|e| read_error(path, name, e))?;
    if bytes.len() as u64 > limit {
        return Err(CalibError::bad(name, too_large(limit)));
    }
    if let Some(offset) = bytes.iter().position(|b| *b == 0) {
        return Err(CalibError::bad(
            name,
            format!("NUL byte at offset {offset}: this is not text; convert it to UTF-8 text, .jsonl or .parquet"),
        ));
    }
    let mut text = String::from_utf8(bytes).map_err(|e| {
        let offset = e.utf8_error().valid_up_to();
        CalibError::bad(name, format!("invalid UTF-8 at byte offset {offset}; convert the file to UTF-8"))
    })?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    into.push(Document::Text(text)).map(drop).map_err(|e| CalibError::bad(name, e))
}

#[cfg(test)]
mod tests {
    use super::super::{Limits, read_file};
    use super::*;
    use crate::document::Fields;
    use std::io::Write;

    fn read_bytes(name: &str, bytes: &[u8], limits: Limits) -> Result<Vec<Document>, CalibError> {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).expect("write");
        let mut into = Collector::new(limits, None);
        read_file(&path, name, &Fields::Any, &mut into).map(|_| into.documents)
    }

    #[test]
    fn text_comes_back_whole() {
        let got = read_bytes("a.tokens", "\u{feff}é\r\n b\n".as_bytes(), Limits::default()).expect("valid");
        assert_eq!(got, [Document::Text("é\r\n b\n".into())]);
    }

    #[test]
    fn bad_bytes_are_located() {
        for (bytes, wanted) in [(&b"ab\xff"[..], "invalid UTF-8 at byte offset 2"), (b"a\0b", "NUL byte at offset 1")] {
            let error = read_bytes("a.txt", bytes, Limits::default()).expect_err("not text").to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn compressed_text_is_read_and_bounded() {
        let gzip = |bytes: &[u8]| {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(bytes).expect("memory");
            encoder.finish().expect("memory")
        };
        let hello = [Document::Text("hello".into())];
        assert_eq!(read_bytes("a.txt.gz", &gzip(b"hello"), Limits::default()).expect("valid"), hello);
        // Two gzip members one after the other are one stream, as gzip(1) has it.
        let two = [gzip(b"hel"), gzip(b"lo")].concat();
        assert_eq!(read_bytes("a.txt.gz", &two, Limits::default()).expect("valid"), hello);
        let packed = zstd::encode_all(&b"hello"[..], 1).expect("memory");
        assert_eq!(read_bytes("a.txt.zst", &packed, Limits::default()).expect("valid"), hello);

        let bomb = gzip(&vec![b'a'; 1 << 20]);
        let small = Limits { total: 1 << 16, line: 1 << 16 };
        assert!(read_bytes("a.txt.gz", &bomb, small).expect_err("bomb").to_string().contains("after decompression"));

        let mut cut = gzip(b"hello world");
        cut.truncate(cut.len() - 9);
        let error = read_bytes("a.txt.gz", &cut, Limits::default()).expect_err("cut");
        assert!(error.to_string().contains("damaged or cut short"), "{error}");
        let error = read_bytes("a.txt.zst", b"not zstd at all", Limits::default()).expect_err("not zstd");
        assert!(error.to_string().contains("damaged"), "{error}");
    }
}
