//! How a download tells what it does, and how it is stopped.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What a caller may want to show. Every method does nothing by default. Called from several threads at once; calls
/// that name a file come in order for that file.
pub trait HubProgress: Sync {
    /// About to look at `files` files of `bytes` bytes together, cached ones included.
    fn planned(&self, files: usize, bytes: u64) {
        let _ = (files, bytes);
    }
    /// `file` is complete in the cache and is not downloaded.
    fn cached(&self, file: &str, bytes: u64) {
        let _ = (file, bytes);
    }
    /// A download of `file` begins, or begins again: `have` of `total` bytes are already there. A second call for the
    /// same file resets its count to `have` (the server did not honour a range).
    fn started(&self, file: &str, have: u64, total: u64) {
        let _ = (file, have, total);
    }
    /// `bytes` more bytes of `file` are on disk.
    fn advanced(&self, file: &str, bytes: u64) {
        let _ = (file, bytes);
    }
    /// `file` is complete and its hash, where the hub knows one, was checked.
    fn finished(&self, file: &str) {
        let _ = file;
    }
    /// A try failed for `reason`; the next one follows after `delay`.
    fn retrying(&self, reason: &str, delay: Duration) {
        let _ = (reason, delay);
    }
    /// Something the user should know although the download goes on.
    fn warning(&self, message: &str) {
        let _ = message;
    }
    /// Asked often; `true` ends the download with [`HubError::Cancelled`](super::HubError::Cancelled), keeping what
    /// has arrived.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Shows nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl HubProgress for Silent {}

/// Somebody asked to stop.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cancelled;

/// The caller's progress, plus a flag by which one worker stops the others.
pub(super) struct Events<'a> {
    pub(super) to: &'a dyn HubProgress,
    stop: AtomicBool,
}

impl<'a> Events<'a> {
    pub(super) fn new(to: &'a dyn HubProgress) -> Self {
        Self { to, stop: AtomicBool::new(false) }
    }

    /// Makes every later [`Self::check`] fail.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Fails when the caller or another worker wants to stop.
    pub(super) fn check(&self) -> Result<(), Cancelled> {
        if self.stop.load(Ordering::Relaxed) || self.to.cancelled() { Err(Cancelled) } else { Ok(()) }
    }

    /// Sleeps for `delay`, in slices, so that a wait of minutes can be stopped.
    pub(super) fn sleep(&self, delay: Duration) -> Result<(), Cancelled> {
        const SLICE: Duration = Duration::from_millis(100);
        let start = Instant::now();
        loop {
            self.check()?;
            let left = delay.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(SLICE));
        }
    }
}
