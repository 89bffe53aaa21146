//! Opening and reading untrusted files with a bound.

use std::fs::{self, File, FileType};
use std::io::{self, Read as _};
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use crate::error::ModelError;
use crate::sniff;

/// Opens a regular file, or a link that ends at one, and returns its length in bytes.
///
/// The type is looked up first: opening a FIFO would wait for a writer for ever.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64), ModelError> {
    let not_regular = |found| ModelError::NotRegular { path: path.to_path_buf(), found };
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(path).is_ok() => {
            return Err(not_regular("a link to a file that does not exist"));
        }
        Err(e) if e.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
            return Err(not_regular("a link that leads back to itself"));
        }
        Err(e) => return Err(ModelError::io("open", path)(e)),
    };
    if let Some(found) = special(meta.file_type()) {
        return Err(not_regular(found));
    }
    let file = File::open(path).map_err(ModelError::io("open", path))?;
    let meta = file.metadata().map_err(ModelError::io("open", path))?;
    match special(meta.file_type()) {
        Some(found) => Err(not_regular(found)),
        None => Ok((file, meta.len())),
    }
}

/// What a file type is called when it is not that of a regular file.
pub(crate) fn special(kind: FileType) -> Option<&'static str> {
    if kind.is_file() {
        None
    } else if kind.is_dir() {
        Some("a folder")
    } else if kind.is_fifo() {
        Some("a named pipe")
    } else if kind.is_socket() {
        Some("a socket")
    } else if kind.is_block_device() || kind.is_char_device() {
        Some("a device")
    } else {
        Some("no regular file")
    }
}

/// Reads a whole JSON file of at most `limit` bytes; what the caller makes of too long a file is `too_long`.
pub(crate) fn read_bounded(
    path: &Path,
    limit: u64,
    too_long: impl FnOnce(u64) -> ModelError,
) -> Result<Vec<u8>, ModelError> {
    let (file, len) = open_regular(path)?;
    if len > limit {
        return Err(too_long(len));
    }
    let mut bytes = Vec::new();
    // The file may grow between the look and the read.
    let read = file.take(limit + 1).read_to_end(&mut bytes).map_err(ModelError::io("read", path))?;
    if read as u64 > limit { Err(too_long(read as u64)) } else { Ok(bytes) }
}

/// The error for a JSON file that does not parse: what it really is where that is recognised, else `otherwise`.
pub(crate) fn not_json(path: &Path, bytes: &[u8], otherwise: ModelError) -> ModelError {
    let prefix = &bytes[..bytes.len().min(sniff::PREFIX)];
    match sniff::recognise(prefix) {
        Some((found, next)) if !found.starts_with("JSON") => {
            ModelError::Foreign { path: path.to_path_buf(), wanted: "JSON", found, next }
        }
        _ => otherwise,
    }
}
