//! The documents of a run, and the flags about them.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use lite_job::{Finished, JobError, Recipe};
use lite_report::{Context, FileFact, Record, SourceCard, json, model_card, page};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::log::RunLog;

/// The documents' names.
const CARD: &str = "README.md";
const JSON: &str = "report.json";
const PAGE: &str = "report.html";
/// Most of a source's card that is read, bytes: its front matter is at the beginning.
const CARD_BYTES: u64 = 1 << 20;

#[derive(Debug, Args)]
#[command(next_help_heading = "Report")]
pub(crate) struct ReportArgs {
    /// Write no report.json, report.html and model card, and leave the source's README.md in its place
    #[arg(long)]
    pub(crate) no_report: bool,

    /// Put time and memory of each layer into the report, which then differs from run to run; they are in
    /// lite.log.jsonl in any case
    #[arg(long, conflicts_with = "no_report")]
    pub(crate) report_timings: bool,
}

impl ReportArgs {
    /// The documents to publish, by name.
    ///
    /// # Errors
    /// I/O errors on reading the output; an interrupt.
    pub(crate) fn documents(
        &self,
        recipe: &Recipe,
        finished: &Finished<'_>,
        log: &RunLog<'_>,
        cancel: &AtomicBool,
    ) -> Result<Vec<(String, Vec<u8>)>, JobError> {
        if self.no_report {
            return Ok(Vec::new());
        }
        let mut in_the_way = Vec::new();
        for name in [CARD, JSON, PAGE] {
            in_the_way.extend(finished.kept(name)?);
        }
        let card = finished.kept(CARD)?;
        let source = match &card {
            Some((name, _)) => SourceCard::read(&beginning(&finished.staging.join(name))?),
            None => SourceCard::default(),
        };
        let go_on = || !cancel.load(Ordering::Relaxed);
        let skipped = |name: &str| in_the_way.iter().any(|(old, _)| old == name);
        let Some(files) = files(finished.staging, &skipped, &go_on)? else {
            return Err(JobError::Interrupted(recipe.work_dir.clone()));
        };
        let context = Context {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            header_sha256: finished.checkpoint.header_digest().to_owned(),
            name_or_path: (finished.checkpoint.config().get("_name_or_path"))
                .and_then(|name| name.as_str())
                .map(ToOwned::to_owned),
            files,
            times: if self.report_timings { log.times() } else { Vec::new() },
        };
        let record = Record::of(recipe, finished.plan, finished.report, context);
        let kept = card.as_ref().map(|(_, new)| new.as_str());
        let documents = [(CARD, model_card(&record, &source, kept)), (JSON, json(&record)), (PAGE, page(&record))];
        Ok(documents.into_iter().map(|(name, text)| (name.to_owned(), text.into_bytes())).collect())
    }
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> JobError {
    move |source| JobError::Io { what, path: path.to_owned(), source }
}

/// The first MiB of a file, what is not UTF-8 in it replaced.
pub(super) fn beginning(path: &Path) -> Result<String, JobError> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(CARD_BYTES).read_to_end(&mut bytes));
    read.map_err(io("read", path))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Size and SHA-256 of every file in `folder` (not of its sub-folders), by name; `None` if `go_on` says so.
fn files(
    folder: &Path,
    skipped: &dyn Fn(&str) -> bool,
    go_on: &(dyn Fn() -> bool + Sync),
) -> Result<Option<Vec<FileFact>>, JobError> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io("list", folder))? {
        let entry = entry.map_err(io("list", folder))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().is_ok_and(|kind| kind.is_file()) && !skipped(&name) {
            found.push((name, entry.path()));
        }
    }
    found.sort();
    // The order of the names whatever the order of the threads.
    found.into_par_iter().map(|(name, path)| file(name, &path, go_on)).collect()
}

fn file(name: String, path: &Path, go_on: &(dyn Fn() -> bool + Sync)) -> Result<Option<FileFact>, JobError> {
    let mut file = File::open(path).map_err(io("open", path))?;
    let (mut hash, mut bytes) = (Sha256::new(), 0u64);
    let mut part = vec![0; 1 << 20];
    while go_on() {
        let read = file.read(&mut part).map_err(io("read", path))?;
        if read == 0 {
            let sha256 = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
            return Ok(Some(FileFact { name, bytes, sha256 }));
        }
        hash.update(&part[..read]);
        bytes += read as u64;
    }
    Ok(None)
}
