//! One file from the hub into the cache: resumed where an earlier try stopped, its size and hash checked before it
//! gets its name.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use ureq::http::header;

use super::api::{FileMeta, RepoType};
use super::cache::{RepoCache, is_file_of};
use super::error::HubError;
use super::http::{Answer, Client, Failure, Method, Target, is_html, text};

/// A try that brings fewer new bytes than this counts as one without progress.
const PROGRESS: u64 = 1 << 20;

/// What is downloaded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) kind: RepoType,
    pub(super) repo: &'a str,
    pub(super) path: &'a str,
}

impl Client<'_> {
    /// Brings the content of a file into `cache` and returns its place in the snapshot of `meta.commit`.
    pub(super) fn download(&self, source: Source<'_>, meta: &FileMeta, cache: &RepoCache) -> Result<PathBuf, HubError> {
        let blob = cache.blob(&meta.blob);
        if !is_file_of(&blob, Some(meta.size)) {
            let folder = blob.parent().unwrap_or(&blob);
            fs::create_dir_all(folder).map_err(HubError::io("create the folder", folder))?;
            let lock = cache.lock(&meta.blob, source.path, self.events)?;
            // Another process may have been quicker.
            if !is_file_of(&blob, Some(meta.size)) {
                // Without a lock nobody else may write this file, at the price of not resuming it.
                let name = match &lock {
                    Some(_) => format!("{}.incomplete", meta.blob),
                    None => format!("{}.{}.incomplete", meta.blob, std::process::id()),
                };
                self.fill(source, meta, &blob, blob.with_file_name(name))?;
            }
        }
        cache.link(&meta.blob, &meta.commit, source.path)
    }

    fn fill(&self, source: Source<'_>, meta: &FileMeta, blob: &Path, partial: PathBuf) -> Result<(), HubError> {
        let events = self.events;
        let mut part = Partial::open(partial, meta.size, meta.sha256.is_some())?;
        events.to.started(source.path, part.len, meta.size);
        let mut best = part.len;
        let fetched = self.retry(|| {
            let tried = self.attempt(source, meta, &mut part);
            let gained = part.len.saturating_sub(best) >= PROGRESS;
            best = best.max(part.len);
            tried.map_err(|failure| match failure {
                Failure::Try { url, reason, wait, again, .. } => {
                    let reason = format!("{reason} (at byte {} of {})", part.len, meta.size);
                    Failure::Try { url, reason, wait, progress: gained, again }
                }
                fatal => fatal,
            })
        });
        if let Err(error) = fetched {
            if matches!(error, HubError::WrongSize { .. }) {
                part.remove();
            }
            return Err(error);
        }
        let (path, found) = part.close()?;
        if let (Some(wanted), Some(found)) = (&meta.sha256, found)
            && *wanted != found
        {
            fs::remove_file(&path).map_err(HubError::io("delete the damaged file", &path))?;
            return Err(HubError::WrongHash {
                repo: source.repo.to_owned(),
                file: source.path.to_owned(),
                found,
                wanted: wanted.clone(),
            });
        }
        match fs::rename(&path, blob) {
            Ok(()) => {}
            // Where locks do nothing, another process may have renamed the file that both wrote.
            Err(_) if is_file_of(blob, Some(meta.size)) => {}
            Err(error) => return Err(HubError::io("rename into place", blob)(error)),
        }
        events.to.finished(source.path);
        Ok(())
    }

    /// One request for what is missing.
    fn attempt(&self, source: Source<'_>, meta: &FileMeta, part: &mut Partial) -> Result<(), Failure> {
        if part.len == meta.size {
            return Ok(());
        }
        let url = self.file_url(source.kind, source.repo, &meta.commit, source.path);
        let target = Target { repo: source.repo, revision: &meta.commit, file: Some(source.path) };
        let answer = self.send(Method::Get { from: part.len }, &url, target)?;
        let final_url = answer.url.clone();
        if is_html(answer.response.headers()) && !source.path.ends_with(".html") {
            let reason = "found an HTML page, wanted a file".to_owned();
            return Err(HubError::NotAHub { url: final_url, reason }.into());
        }
        let wrong_size = |found| {
            Failure::Fatal(HubError::WrongSize {
                repo: source.repo.to_owned(),
                file: source.path.to_owned(),
                found,
                wanted: meta.size,
            })
        };
        let status = answer.response.status().as_u16();
        match (status, part.len) {
            (200, _) => {
                if let Some(length) = content_length(&answer).filter(|length| *length != meta.size) {
                    return Err(wrong_size(length));
                }
                if part.len > 0 {
                    // The server does not do ranges.
                    part.restart()?;
                    self.events.to.started(source.path, 0, meta.size);
                }
            }
            (206, from @ 1..) => match content_range(&answer) {
                Some((start, total)) if start == from && total.is_none_or(|total| total == meta.size) => {}
                Some((start, Some(total))) if start == from => return Err(wrong_size(total)),
                _ => return self.start_over(source, meta, part, &final_url, "it answered with another range"),
            },
            (416, _) => return self.start_over(source, meta, part, &final_url, "it refused the range (HTTP 416)"),
            _ => {
                let message = "an unexpected status for a file".to_owned();
                return Err(HubError::Status { url: final_url, status, message }.into());
            }
        }
        self.read(answer, |piece| {
            let len = part.len.saturating_add(piece.len() as u64);
            if len > meta.size {
                return Err(wrong_size(len));
            }
            part.write(piece)?;
            self.events.to.advanced(source.path, piece.len() as u64);
            Ok(())
        })?;
        if part.len < meta.size {
            return Err(Failure::again(&final_url, "the connection was cut"));
        }
        Ok(())
    }

    /// Forgets what has arrived, and asks for another try.
    fn start_over(
        &self,
        source: Source<'_>,
        meta: &FileMeta,
        part: &mut Partial,
        url: &str,
        reason: &str,
    ) -> Result<(), Failure> {
        part.restart()?;
        self.events.to.started(source.path, 0, meta.size);
        Err(Failure::again(url, reason))
    }
}

fn content_length(answer: &Answer) -> Option<u64> {
    text(answer.response.headers(), header::CONTENT_LENGTH.as_str())?.trim().parse().ok()
}

/// First byte and total size of `Content-Range: bytes FIRST-LAST/TOTAL` (RFC 9110, 14.4); the total may be `*`.
fn content_range(answer: &Answer) -> Option<(u64, Option<u64>)> {
    parse_range(text(answer.response.headers(), header::CONTENT_RANGE.as_str())?)
}

fn parse_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes")?.trim().split_once('/')?;
    let (first, _) = range.split_once('-')?;
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    Some((first.trim().parse().ok()?, total))
}

/// A file that is being filled, and the hash of what it holds.
///
/// Written by position, never appended to: on file systems whose locks do nothing (some network ones), two processes
/// put the same bytes in the same places.
struct Partial {
    path: PathBuf,
    file: File,
    len: u64,
    hash: Option<Sha256>,
}

impl Partial {
    /// Opens what an earlier run left, or begins; more bytes than `size` cannot be right and are dropped.
    fn open(path: PathBuf, size: u64, hashed: bool) -> Result<Self, HubError> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(HubError::io("open", &path))?;
        let len = file.metadata().map_err(HubError::io("look at", &path))?.len();
        let mut part = Self { path, file, len: 0, hash: hashed.then(Sha256::new) };
        if len > size {
            part.restart()?;
        } else {
            part.take_in(len)?;
        }
        Ok(part)
    }

    /// Hashes the `len` bytes that are there and moves behind them.
    fn take_in(&mut self, len: u64) -> Result<(), HubError> {
        let mut buffer = vec![0; 1 << 20];
        if let Some(hash) = &mut self.hash {
            let mut left = (&mut self.file).take(len);
            loop {
                match left.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(count) => {
                        hash.update(&buffer[..count]);
                        self.len = self.len.saturating_add(count as u64);
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(HubError::io("read", &self.path)(error)),
                }
            }
        } else {
            self.len = len;
        }
        self.file.seek(SeekFrom::Start(self.len)).map(drop).map_err(HubError::io("read", &self.path))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), HubError> {
        self.file.write_all(bytes).map_err(HubError::io("write", &self.path))?;
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
        self.len = self.len.saturating_add(bytes.len() as u64);
        Ok(())
    }

    fn restart(&mut self) -> Result<(), HubError> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)).map(drop))
            .map_err(HubError::io("truncate", &self.path))?;
        self.len = 0;
        if let Some(hash) = &mut self.hash {
            *hash = Sha256::new();
        }
        Ok(())
    }

    /// Brings everything to disk; the path and the SHA-256 in hex.
    fn close(self) -> Result<(PathBuf, Option<String>), HubError> {
        self.file.sync_all().map_err(HubError::io("bring to disk", &self.path))?;
        let hash = self.hash.map(|hash| hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        Ok((self.path, hash))
    }

    /// Deletes the file; a leftover would only be found too long or resumed, so a failure here is not worth hiding
    /// the error that led here.
    fn remove(self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges() {
        assert_eq!(parse_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(parse_range("bytes 5-9/*"), Some((5, None)));
        for bad in ["", "bytes", "bytes */10", "items 5-9/10", "bytes 5/10", "bytes -9/10", "bytes 5-9/x"] {
            assert_eq!(parse_range(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_partial_file_goes_on_with_its_hash() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.incomplete");
        fs::write(&path, b"abc").unwrap();
        let mut part = Partial::open(path.clone(), 6, true).unwrap();
        assert_eq!(part.len, 3);
        part.write(b"def").unwrap();
        let (path, hash) = part.close().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"abcdef");
        // sha256sum of "abcdef".
        assert_eq!(hash.unwrap(), "bef57ec7f53a6d40beb640a780a639c83bc29ac8a9816f1fc6c5c6dcd93c4721");
        // More than the file can have: begun again.
        assert_eq!(Partial::open(path, 5, true).unwrap().len, 0);
    }
}
