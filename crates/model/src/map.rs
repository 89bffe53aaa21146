//! The one place with `unsafe`: read-only memory maps of shards.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::time::SystemTime;

use memmap2::{Mmap, UncheckedAdvice};

/// A shard, mapped read-only, and the open file it came from.
#[derive(Debug)]
pub(crate) struct ShardMap {
    map: Mmap,
    file: File,
    modified: Option<SystemTime>,
}

impl ShardMap {
    /// Maps the whole of `file`.
    pub(crate) fn new(file: File) -> io::Result<Self> {
        let modified = file.metadata()?.modified().ok();
        // SAFETY: the map is private to this type, read-only, and lent out as `&[u8]`, for which every bit pattern is
        // valid. The one obligation that cannot be proven is that nobody else changes the file meanwhile; every
        // reader of mapped checkpoints takes that on. It is kept small: headers are parsed from a copy and never from
        // the map, and `is_unchanged` is asked before a tensor is handed out, so that a file cut by another process is
        // an error and not a SIGBUS except in the instant between the two.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self { map, file, modified })
    }

    /// The bytes of the file.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Whether length and modification time are still those of the moment it was mapped.
    pub(crate) fn is_unchanged(&self) -> bool {
        self.file
            .metadata()
            .is_ok_and(|now| u64::try_from(self.map.len()) == Ok(now.len()) && now.modified().ok() == self.modified)
    }

    /// Tells the kernel that the pages of `range` are not needed for now, so that they stop counting as resident.
    ///
    /// Only speed and the resident size depend on it, so a refusal (locked pages, an odd file system) is ignored: the
    /// kernel then drops the pages when it needs the memory, as it does for every clean file page.
    pub(crate) fn forget(&self, range: Range<usize>) {
        let end = range.end.min(self.map.len());
        if range.start >= end {
            return;
        }
        // SAFETY: MADV_DONTNEED on a shared read-only file mapping changes no byte: the next access reads the page
        // from the file again, also for the neighbours that share the first and the last page. The range is in bounds.
        let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, end - range.start) };
    }
}
