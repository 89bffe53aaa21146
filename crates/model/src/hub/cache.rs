//! The cache on disk, in the layout of `huggingface_hub`, so that both find each other's files:
//!
//! ```text
//! <cache>/models--org--name/blobs/<etag>                  contents (SHA-256 or git object id)
//!                           snapshots/<commit>/<path>     relative links into blobs/
//!                           refs/<revision>               the commit a branch or tag meant last
//!                           trees/<commit>.json           the files of a commit (huggingface_hub ≥ 2)
//! <cache>/.locks/models--org--name/<etag>.lock            held while a blob is written
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hf_hub::{Cache, CacheRepo, Repo};
use serde::{Deserialize, Serialize};

use super::api::{RemoteFile, RepoListing, RepoType};
use super::error::HubError;
use super::names::{blob_name, check_file_name, is_commit, is_sha256};
use super::progress::Events;

/// One repository in the cache.
pub(super) struct RepoCache {
    repo: String,
    root: PathBuf,
    folder_name: String,
    paths: CacheRepo,
}

#[derive(Serialize, Deserialize)]
struct Tree {
    format_version: u32,
    files: BTreeMap<String, TreeEntry>,
}

#[derive(Serialize, Deserialize)]
struct TreeEntry {
    size: u64,
    blob_id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lfs_sha256: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lfs_size: Option<u64>,
}

impl RepoCache {
    /// `repo` has passed [`check_repo_id`](super::names::check_repo_id).
    pub(super) fn new(root: &Path, kind: RepoType, repo: &str) -> Self {
        let named = Repo::new(repo.to_owned(), kind.in_hf_hub());
        Self {
            repo: repo.to_owned(),
            root: root.to_path_buf(),
            folder_name: named.folder_name(),
            paths: Cache::new(root.to_path_buf()).repo(named),
        }
    }

    /// The folder of the repository.
    pub(super) fn folder(&self) -> PathBuf {
        self.root.join(&self.folder_name)
    }

    /// The folder that looks like the repository at `commit`.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.paths.pointer_path(commit)
    }

    /// The content named `blob`.
    pub(super) fn blob(&self, blob: &str) -> PathBuf {
        self.paths.blob_path(blob)
    }

    /// `path` at `commit` if it is there with the right size, where one is known.
    pub(super) fn find(&self, commit: &str, path: &str, size: Option<u64>) -> Option<PathBuf> {
        let file = self.snapshot(commit).join(path);
        is_file_of(&file, size).then_some(file)
    }

    /// The commit that `revision` meant last, or is.
    pub(super) fn commit_of(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let text = fs::read_to_string(self.folder().join("refs").join(revision)).ok()?;
        Some(text.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Remembers what `revision` means now. A cache that can be read but not written still serves: that is a warning.
    pub(super) fn write_ref(&self, revision: &str, commit: &str, events: &Events<'_>) {
        if self.commit_of(revision).as_deref() == Some(commit) {
            return;
        }
        let path = self.folder().join("refs").join(revision);
        if let Err(error) = write_atomic(&path, commit.as_bytes()) {
            events.to.warning(&format!("could not remember the commit of `{revision}`: {error}"));
        }
    }

    /// The files of `commit`, if a listing is there and makes sense.
    pub(super) fn read_tree(&self, commit: &str) -> Option<RepoListing> {
        const MAX_TREE: u64 = 64 << 20;
        let path = self.tree_path(commit);
        if fs::metadata(&path).ok()?.len() > MAX_TREE {
            return None;
        }
        let tree: Tree = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        if tree.format_version != 1 {
            return None;
        }
        let mut files = Vec::with_capacity(tree.files.len());
        for (path, entry) in tree.files {
            check_file_name(&self.repo, &path).ok()?;
            blob_name(&entry.blob_id)?;
            if !entry.lfs_sha256.as_deref().is_none_or(is_sha256) {
                return None;
            }
            let size = Some(entry.lfs_size.unwrap_or(entry.size));
            files.push(RemoteFile { path, size, sha256: entry.lfs_sha256, blob_id: Some(entry.blob_id) });
        }
        Some(RepoListing { commit: commit.to_owned(), files })
    }

    /// Remembers the files of a commit, so that offline runs know what is missing. Left out where the hub did not say
    /// enough about them.
    pub(super) fn write_tree(&self, listing: &RepoListing, events: &Events<'_>) {
        let path = self.tree_path(&listing.commit);
        if path.exists() {
            return;
        }
        let entry = |file: &RemoteFile| {
            let lfs_size = file.sha256.as_ref().and(file.size);
            let entry = TreeEntry {
                size: file.size?,
                blob_id: file.blob_id.clone()?,
                lfs_sha256: file.sha256.clone(),
                lfs_size,
            };
            Some((file.path.clone(), entry))
        };
        let Some(files) = listing.files.iter().map(entry).collect() else { return };
        let written = serde_json::to_vec(&Tree { format_version: 1, files })
            .map_err(io::Error::other)
            .and_then(|bytes| write_atomic(&path, &bytes));
        if let Err(error) = written {
            events.to.warning(&format!("could not remember the list of files of `{}`: {error}", self.repo));
        }
    }

    fn tree_path(&self, commit: &str) -> PathBuf {
        self.folder().join("trees").join(format!("{commit}.json"))
    }

    /// Makes `path` at `commit` show the content of `blob`: a relative link, or where the file system has none, a
    /// second name or a copy.
    pub(super) fn link(&self, blob: &str, commit: &str, path: &str) -> Result<PathBuf, HubError> {
        let pointer = self.snapshot(commit).join(path);
        let content = self.blob(blob);
        let folder = pointer.parent().unwrap_or(&pointer);
        fs::create_dir_all(folder).map_err(HubError::io("create the folder", folder))?;
        // From snapshots/<commit>/<parts…>: one step up for each part but the last, one for each of the two folders.
        let mut target = PathBuf::new();
        for _ in 0..path.split('/').count() + 1 {
            target.push("..");
        }
        target.push("blobs");
        target.push(blob);
        // Under a new name first: a link that is there may be broken, and another process may read it.
        let new = temporary(&pointer);
        symlink(&target, &new)
            .or_else(|_| fs::hard_link(&content, &new))
            .or_else(|_| fs::copy(&content, &new).map(|_| ()))
            .and_then(|()| fs::rename(&new, &pointer))
            .map_err(HubError::io("link", &pointer))?;
        Ok(pointer)
    }

    /// Waits until no other process downloads `blob`. `None` where the file system has no locks.
    pub(super) fn lock(&self, blob: &str, file: &str, events: &Events<'_>) -> Result<Option<File>, HubError> {
        let folder = self.root.join(".locks").join(&self.folder_name);
        fs::create_dir_all(&folder).map_err(HubError::io("create the folder", &folder))?;
        let path = folder.join(format!("{blob}.lock"));
        let lock = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(HubError::io("open the lock", &path))?;
        let mut told = false;
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(Some(lock)),
                Err(TryLockError::WouldBlock) => {
                    if !told {
                        events.to.warning(&format!("`{file}` is being downloaded elsewhere: waiting for that"));
                        told = true;
                    }
                    events.sleep(Duration::from_millis(200))?;
                }
                Err(TryLockError::Error(error)) => {
                    events.to.warning(&format!("`{}` has no file locks ({error})", self.root.display()));
                    return Ok(None);
                }
            }
        }
    }
}

/// Whether `path` is a file, of `size` bytes where one is known.
pub(super) fn is_file_of(path: &Path, size: Option<u64>) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && size.is_none_or(|size| size == meta.len()))
}

/// A name beside `path` that no other thread or process uses.
fn temporary(path: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = format!(".{}.{}.tmp", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    path.with_file_name(name)
}

/// Readers see the old content or the new one.
fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    fs::create_dir_all(path.parent().unwrap_or(path))?;
    let new = temporary(path);
    let mut file = File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, link)
}
