//! Files that appear whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::error::ModelError;

/// Longest file name in bytes on common file systems.
const MAX_FILE_NAME: usize = 255;

/// Writes `bytes` to `path`: into a temporary file in the same folder, to disk, then renamed over what was there.
/// Whoever looks sees the old file or the new one, never a part; a link at `path` is replaced, not followed.
///
/// # Errors
///
/// [`ModelError::Output`] where `path` names no file; [`ModelError::Io`], with nothing left behind.
pub fn atomic_write(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    atomically(path, |partial, file| file.write_all(bytes).map_err(ModelError::io("write", partial)))
}

/// Copies `source` (opened from `from`) to `path` as [`atomic_write`] does.
pub(crate) fn atomic_copy(mut source: File, from: &Path, path: &Path) -> Result<(), ModelError> {
    atomically(path, |_, file| {
        io::copy(&mut source, file).map(drop).map_err(|error| ModelError::Io {
            action: "copy",
            path: from.to_path_buf(),
            source: error,
        })
    })
}

/// Free space for this user, in bytes, on the file system that holds `path`, or will hold it once it is made.
/// `None` where the system does not say.
#[must_use]
pub fn free_space(path: &Path) -> Option<u64> {
    let absolute = std::path::absolute(path).ok()?;
    let existing = absolute.ancestors().find(|p| p.exists())?;
    let stat = rustix::fs::statvfs(existing).ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}

fn atomically(path: &Path, fill: impl FnOnce(&Path, &mut File) -> Result<(), ModelError>) -> Result<(), ModelError> {
    let partial = partial_path(path)?;
    let mut file = create_partial(&partial)?;
    let result = fill(&partial, &mut file)
        .and_then(|()| file.sync_all().map_err(ModelError::io("bring to disk", &partial)))
        .and_then(|()| fs::rename(&partial, path).map_err(ModelError::io("rename to", path)));
    if result.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&partial);
        return result;
    }
    sync_folder(folder_of(path))
}

/// The temporary name of a file, `.NAME.partial` in the same folder; a name too long for that gives way to its hash.
pub(super) fn partial_path(path: &Path) -> Result<PathBuf, ModelError> {
    let name = path.file_name().ok_or_else(|| ModelError::output(path, "the path names no file"))?;
    let mut partial = std::ffi::OsString::from(".");
    if name.len() + ".".len() + ".partial".len() > MAX_FILE_NAME {
        partial.push(Sha256::digest(name.as_bytes()).iter().map(|b| format!("{b:02x}")).collect::<String>());
    } else {
        partial.push(name);
    }
    partial.push(".partial");
    Ok(path.with_file_name(partial))
}

/// Creates a temporary file. One that an interrupted run left there is removed first, and creation never follows a
/// link, so nothing outside the folder is written to.
pub(super) fn create_partial(partial: &Path) -> Result<File, ModelError> {
    match fs::remove_file(partial) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(ModelError::io("replace", partial)(e)),
        _ => {}
    }
    OpenOptions::new().write(true).create_new(true).open(partial).map_err(ModelError::io("create", partial))
}

/// Brings the names in a folder to disk.
pub(super) fn sync_folder(dir: &Path) -> Result<(), ModelError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(ModelError::io("bring to disk", dir))
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn replaces_and_leaves_no_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        fs::write(dir.path().join(".config.json.partial"), "of a killed run").unwrap();
        atomic_write(&path, b"one").unwrap();
        atomic_write(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(names(dir.path()), ["config.json"]);
    }

    #[test]
    fn the_longest_name_works() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("n".repeat(MAX_FILE_NAME));
        atomic_write(&path, b"x").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"x");
    }

    #[test]
    fn links_are_replaced_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::write(&outside, "kept").unwrap();
        for link in ["f", ".f.partial"] {
            std::os::unix::fs::symlink(&outside, dir.path().join(link)).unwrap();
        }
        atomic_write(&dir.path().join("f"), b"new").unwrap();
        assert_eq!(fs::read(&outside).unwrap(), b"kept");
        assert_eq!(fs::read(dir.path().join("f")).unwrap(), b"new");
        assert!(fs::symlink_metadata(dir.path().join("f")).unwrap().is_file());
    }

    #[test]
    fn a_folder_in_the_way_is_an_error_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("taken");
        fs::create_dir(&path).unwrap();
        assert!(matches!(atomic_write(&path, b"x"), Err(ModelError::Io { .. })));
        assert_eq!(names(dir.path()), ["taken"]);
        assert!(matches!(atomic_write(Path::new("/"), b"x"), Err(ModelError::Output { .. })));
    }

    #[test]
    fn free_space_of_a_path_to_be() {
        let dir = tempfile::tempdir().unwrap();
        let free = free_space(&dir.path().join("a/b/c")).unwrap();
        assert!(free > 0);
        assert_eq!(free_space(Path::new("/proc/self")), Some(0));
    }
}
