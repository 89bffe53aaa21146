//! Files to documents: formats, compression, size limits.

mod footer;
mod json;
mod parquet;
mod rows;
mod text;

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::document::{Document, Fields};
use crate::error::CalibError;

pub(crate) use self::parquet::{ParquetInput, read as read_parquet};
pub(crate) use self::rows::each_row;

/// Bounds on what is read, so that a small hostile file cannot fill the memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Bytes of decompressed data, all files of a dataset together.
    pub(crate) total: u64,
    /// Bytes of one line of JSON.
    pub(crate) line: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { total: 2 << 30, line: 64 << 20 }
    }
}

/// A file of a dataset that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// Its name: the path for local files, the path inside the repository for hub files.
    pub name: String,
    /// SHA-256 of its bytes as stored, lower-case hex.
    pub sha256: String,
    /// Its size as stored, in bytes.
    pub bytes: u64,
}

/// Where documents are gathered, under the limits.
pub(crate) struct Collector {
    pub(crate) documents: Vec<Document>,
    limits: Limits,
    used: u64,
    max_rows: usize,
}

impl Collector {
    pub(crate) fn new(limits: Limits, max_rows: Option<usize>) -> Self {
        Self { documents: Vec::new(), limits, used: 0, max_rows: max_rows.unwrap_or(usize::MAX) }
    }

    /// Adds a document; false when no more are wanted.
    fn push(&mut self, document: Document) -> Result<bool, String> {
        // A row costs memory even when it is empty.
        let cost = document.bytes().saturating_add(size_of::<Document>() as u64);
        self.used = self.used.saturating_add(cost);
        if self.used > self.limits.total {
            return Err(too_large(self.limits.total));
        }
        self.documents.push(document);
        Ok(!self.is_full())
    }

    fn is_full(&self) -> bool {
        self.documents.len() >= self.max_rows
    }
}

fn too_large(limit: u64) -> String {
    format!("more than {} MiB of data after decompression; use a part of the file", limit >> 20)
}

/// What a file holds, judged by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Text,
    Json,
    Parquet,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

/// Extensions that are certainly not text, or text without a field called `text`.
const REFUSED: &[&str] = &[
    "csv",
    "tsv",
    "zip",
    "tar",
    "tgz",
    "bz2",
    "xz",
    "7z",
    "rar",
    "arrow",
    "feather",
    "orc",
    "avro",
    "bin",
    "pt",
    "pth",
    "safetensors",
    "gguf",
    "npy",
    "npz",
    "pkl",
    "pickle",
    "xls",
    "xlsx",
    "pdf",
    "doc",
    "docx",
    "h5",
];

/// Format and compression of a file name, or why it is refused.
fn format_of(name: &str) -> Result<(Format, Compression), String> {
    let lower = name.to_ascii_lowercase();
    let (stem, compression) = if let Some(stem) = lower.strip_suffix(".gz") {
        (stem, Compression::Gzip)
    } else if let Some(stem) = lower.strip_suffix(".zst").or_else(|| lower.strip_suffix(".zstd")) {
        (stem, Compression::Zstd)
    } else {
        (lower.as_str(), Compression::None)
    };
    let extension = Path::new(stem).extension().and_then(|e| e.to_str()).unwrap_or("");
    let format = match extension {
        "jsonl" | "ndjson" | "json" => Format::Json,
        "parquet" if compression == Compression::None => Format::Parquet,
        "parquet" => return Err(format!("`{name}`: parquet compresses inside; unpack the outer compression first")),
        other if REFUSED.contains(&other) => {
            return Err(format!(
                "`{name}`: `.{other}` files cannot be read as calibration data; \
                 convert to .txt, .jsonl (rows with `text` or `messages`) or .parquet"
            ));
        }
        _ => Format::Text,
    };
    Ok((format, compression))
}

/// The files of a path: itself, or the readable files of a folder in the order of their names, and the names passed over.
///
/// # Errors
/// Nothing there, nothing readable in the folder, neither file nor folder.
pub(crate) fn files_of(path: &Path) -> Result<(Vec<PathBuf>, Vec<String>), CalibError> {
    let meta = std::fs::metadata(path).map_err(|e| CalibError::io(path, e))?;
    if meta.is_file() {
        return Ok((vec![path.to_path_buf()], Vec::new()));
    }
    if !meta.is_dir() {
        return Err(CalibError::Unsupported(format!("`{}` is neither a file nor a folder", path.display())));
    }
    let (mut files, mut passed) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(path).map_err(|e| CalibError::io(path, e))? {
        let entry = entry.map_err(|e| CalibError::io(path, e))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        let known = match format_of(&name) {
            Ok((Format::Text, _)) => {
                let lower = name.to_ascii_lowercase();
                [".txt", ".txt.gz", ".txt.zst", ".txt.zstd"].iter().any(|e| lower.ends_with(e))
            }
            Ok(_) => true,
            Err(_) => false,
        };
        if known && std::fs::metadata(entry.path()).is_ok_and(|m| m.is_file()) {
            files.push(entry.path());
        } else {
            passed.push(name);
        }
    }
    files.sort();
    passed.sort();
    if files.is_empty() {
        return Err(CalibError::bad(
            path.display().to_string(),
            "the folder holds no .txt, .jsonl, .json or .parquet file (subfolders are not searched)",
        ));
    }
    Ok((files, passed))
}

/// Reads one file into `into`. `name` decides the format and appears in messages; `path` is where it lies.
pub(crate) fn read_file(
    path: &Path,
    name: &str,
    fields: &Fields,
    into: &mut Collector,
) -> Result<SourceFile, CalibError> {
    let (format, compression) = format_of(name).map_err(CalibError::Unsupported)?;
    if format == Format::Parquet {
        parquet::read(ParquetInput::Path(path), name, fields, into)?;
    } else {
        let mut reader = open(path, compression, into.limits.total)?;
        match format {
            Format::Text => text::read(&mut reader, path, name, into)?,
            _ => json::read(&mut reader, path, name, fields, into)?,
        }
    }
    hash(path, name)
}

/// SHA-256 and size of a file.
fn hash(path: &Path, name: &str) -> Result<SourceFile, CalibError> {
    let mut file = File::open(path).map_err(|e| CalibError::io(path, e))?;
    let mut hasher = Sha256::new();
    let bytes = std::io::copy(&mut file, &mut hasher).map_err(|e| CalibError::io(path, e))?;
    Ok(SourceFile { name: name.to_owned(), sha256: hex(&hasher.finalize()), bytes })
}

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Opens a file, decompressing; at most one byte more than `total` comes out.
fn open(path: &Path, compression: Compression, total: u64) -> Result<Box<dyn BufRead>, CalibError> {
    let meta = std::fs::metadata(path).map_err(|e| CalibError::io(path, e))?;
    if !meta.is_file() {
        // A pipe or a device has no end to rely on, and could not be read twice.
        return Err(CalibError::Unsupported(format!("`{}` is not a regular file", path.display())));
    }
    let file = File::open(path).map_err(|e| CalibError::io(path, e))?;
    let reader: Box<dyn Read> = match compression {
        Compression::None => Box::new(file),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::new(file))),
        Compression::Zstd => Box::new(zstd::stream::read::Decoder::new(file).map_err(|e| CalibError::io(path, e))?),
    };
    Ok(Box::new(BufReader::with_capacity(1 << 16, reader.take(total.saturating_add(1)))))
}

/// A failed read: damaged compressed data is the data's fault, the rest the system's.
fn read_error(path: &Path, name: &str, error: std::io::Error) -> CalibError {
    let compressed = !matches!(format_of(name), Ok((_, Compression::None)));
    // Decoders report damage as invalid input, unexpected end or "other"; the system uses none of these for reads.
    let damage = matches!(
        error.kind(),
        std::io::ErrorKind::InvalidData
            | std::io::ErrorKind::InvalidInput
            | std::io::ErrorKind::UnexpectedEof
            | std::io::ErrorKind::Other
    );
    if compressed && damage {
        CalibError::bad(name, format!("the compressed data is damaged or cut short ({error})"))
    } else {
        CalibError::io(path, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn names_tell_formats() {
        use Compression as C;
        use Format as F;
        for (name, wanted) in [
            ("a.txt", (F::Text, C::None)),
            ("wiki.test.raw", (F::Text, C::None)),
            ("README", (F::Text, C::None)),
            ("a.JSONL", (F::Json, C::None)),
            ("c4.json.gz", (F::Json, C::Gzip)),
            ("val.jsonl.zst", (F::Json, C::Zstd)),
            ("a.parquet", (F::Parquet, C::None)),
        ] {
            assert_eq!(format_of(name), Ok(wanted), "{name}");
        }
        for name in ["a.csv", "b.zip", "a.parquet.gz", "a.csv.gz", "model.safetensors"] {
            assert!(format_of(name).is_err(), "{name}");
        }
    }

    #[test]
    fn a_folder_gives_its_files_in_order() {
        let dir = tempfile::tempdir().expect("temp dir");
        for name in ["b.txt", "a.jsonl.gz", ".hidden.txt", "README.md", "c.parquet"] {
            File::create(dir.path().join(name)).expect("create");
        }
        std::fs::create_dir(dir.path().join("d.txt")).expect("mkdir");
        let (files, passed) = files_of(dir.path()).expect("readable");
        let names: Vec<_> = files.iter().map(|f| f.file_name().unwrap_or_default().to_string_lossy()).collect();
        assert_eq!(names, ["a.jsonl.gz", "b.txt", "c.parquet"]);
        assert_eq!(passed, ["README.md", "d.txt"]);
        let empty = tempfile::tempdir().expect("temp dir");
        assert!(files_of(empty.path()).is_err());
    }

    #[test]
    fn hashes_are_sha256() {
        let mut file = tempfile::NamedTempFile::new().expect("temp file");
        file.write_all(b"abc").expect("write");
        let hashed = hash(file.path(), "x").expect("readable");
        // FIPS 180-2, appendix B.1.
        assert_eq!(hashed.sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(hashed.bytes, 3);
    }
}
