//! Whole rows of JSON lines and parquet files, for data that is no text.

use std::io::{BufRead, Read};
use std::path::Path;

use serde_json::{Map, Value};

use super::parquet::{ParquetInput, read_rows as parquet_rows};
use super::{Compression, Format, Limits, format_of, open, read_error, too_large};
use crate::error::CalibError;

/// Hands each row of a `.jsonl` or `.parquet` file to `sink`, until that says that it has enough. An error of the sink
/// is given the row's place.
pub(crate) fn each_row(
    path: &Path,
    sink: &mut dyn FnMut(Map<String, Value>) -> Result<bool, String>,
) -> Result<(), CalibError> {
    let name = path.display().to_string();
    match format_of(&name).map_err(CalibError::Unsupported)? {
        (Format::Parquet, _) => parquet_rows(ParquetInput::Path(path), &name, &|_| true, "any", sink),
        (_, compression) => lines(path, &name, compression, sink),
    }
}

fn lines(
    path: &Path,
    name: &str,
    compression: Compression,
    sink: &mut dyn FnMut(Map<String, Value>) -> Result<bool, String>,
) -> Result<(), CalibError> {
    let limits = Limits::default();
    let mut reader = open(path, compression, limits.total)?;
    let (mut total, mut line) = (0u64, Vec::new());
    for number in 1u64.. {
        let at = || format!("{name}:{number}");
        line.clear();
        let read = (&mut reader)
            .take(limits.line.saturating_add(1))
            .read_until(b'\n', &mut line)
            .map_err(|e| read_error(path, name, e))? as u64;
        total = total.saturating_add(read);
        if total > limits.total {
            return Err(CalibError::bad(name, too_large(limits.total)));
        }
        if read > limits.line {
            return Err(CalibError::bad(at(), format!("the line is longer than {} MiB", limits.line >> 20)));
        }
        if read == 0 {
            break;
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let row = serde_json::from_slice(&line)
            .map_err(|e| CalibError::bad(at(), format!("not a JSON object: {e}; wanted one per line")))?;
        if !sink(row).map_err(|e| CalibError::bad(at(), e))? {
            break;
        }
    }
    Ok(())
}
