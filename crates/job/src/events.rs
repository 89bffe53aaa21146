//! What a run tells the outside while it goes on.

use std::path::Path;

use crate::{Plan, RunReport, StatisticsPlan};

/// One thing that happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// A file is being fetched from the hub.
    Download {
        /// File name.
        file: &'a str,
        /// Bytes there so far.
        done: u64,
        /// Bytes in all, if the server said.
        total: Option<u64>,
    },
    /// Everything is checked and known; the run begins.
    Planned(&'a Plan),
    /// The same of a run that only gathers statistics.
    PlannedStatistics(&'a StatisticsPlan),
    /// The work directory is locked for this run.
    Opened {
        /// Where a log of the run belongs: see [`crate::WorkDir::log_file`].
        log: &'a Path,
    },
    /// The calibration windows are cut.
    Calibration {
        /// Number of windows.
        windows: usize,
        /// Tokens per window.
        seqlen: usize,
        /// Where the text came from.
        source: &'a str,
        /// SHA-256 over all token ids.
        digest: &'a str,
    },
    /// Something the user should know.
    Note(&'a str),
    /// Something the user should worry about.
    Warning(&'a str),
    /// A block begins.
    LayerStarted {
        /// Block index.
        block: usize,
        /// Number of blocks.
        of: usize,
    },
    /// A step within a block.
    LayerStep {
        /// Block index.
        block: usize,
        /// Which step: calibrate, search, pack, propagate.
        step: &'static str,
    },
    /// A block's scales and codes were tuned.
    Tuned {
        /// Block index.
        block: usize,
        /// Mean squared error of the block's output on windows not tuned on, before.
        before: f64,
        /// The same after.
        after: f64,
        /// Whether the tuned values were kept.
        kept: bool,
    },
    /// A block is written.
    LayerDone {
        /// Block index.
        block: usize,
        /// Number of blocks.
        of: usize,
        /// Relative output error of its linears on the calibration tokens (root mean square), if calibrated.
        error: Option<f64>,
        /// Seconds it took.
        seconds: f64,
    },
    /// The output is being reopened and compared.
    Checking {
        /// What is compared.
        step: &'static str,
        /// Steps done.
        done: usize,
        /// Steps in all.
        of: usize,
    },
    /// Everything is in place.
    Finished(&'a RunReport),
}

/// Receives [`Event`]s, on the thread that runs the job.
pub trait Observer {
    /// Called for each event, in order.
    fn event(&self, event: Event<'_>);
}

/// Ignores everything.
#[derive(Debug, Clone, Copy)]
pub struct Silent;

impl Observer for Silent {
    fn event(&self, _: Event<'_>) {}
}
