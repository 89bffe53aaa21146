//! What became of the jobs of a batch.

use std::fmt;
use std::io::Write;

use lite_job::{ErrorKind, RunReport};
use lite_model::printable;
use lite_recipe::Entry;
use serde_json::{Value, json};

use crate::args::Format;
use crate::exit;
use crate::output::duration;

/// Some jobs of several did not do what they were to do.
#[derive(Debug)]
pub(crate) struct BatchFailed {
    /// The kind with the largest exit code.
    pub(crate) kind: ErrorKind,
    message: String,
}

impl fmt::Display for BatchFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for BatchFailed {}

/// What became of a job.
pub(super) enum Outcome {
    Done(Box<RunReport>),
    Planned,
    Skipped,
    Failed { error: anyhow::Error, report: Option<Box<RunReport>> },
    NotRun,
}

pub(super) struct Row<'j> {
    pub(super) number: usize,
    pub(super) job: &'j Entry,
    pub(super) outcome: Outcome,
    pub(super) seconds: f64,
}

/// One line for each job.
pub(super) fn summary(rows: &[Row<'_>], format: Format) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    let kl = |report: &RunReport| report.check.comparison.as_ref().map(|c| c.summary.kl_mean);
    if format == Format::Json {
        let jobs: Vec<Value> = rows
            .iter()
            .map(|row| {
                let (status, code, report) = status(&row.outcome);
                json!({"number": row.number, "name": row.job.name, "status": status, "code": code, "output": row.job.recipe.work_dir,
                       "kl_mean": report.and_then(kl), "bits_per_weight": report.map(|r| r.bits_per_weight),
                       "output_bytes": report.map(|r| r.output_bytes), "seconds": row.seconds})
            })
            .collect();
        writeln!(stdout, "{}", json!({"event": "batch", "schema": 1, "jobs": jobs}))?;
        return Ok(());
    }
    if format == Format::Quiet {
        return Ok(());
    }
    let width = rows.iter().map(|row| printable(&row.job.name).chars().count()).max().unwrap_or(0).max(3);
    writeln!(stdout, "\n  {:>3}  {:<width$}  {:<18} {:>9} {:>10} {:>12}", "", "job", "", "bits", "mean KL", "took")?;
    for row in rows {
        let (word, _, report) = status(&row.outcome);
        let bits = report.map_or(String::new(), |r| format!("{:.2}", r.bits_per_weight));
        let kl = report.and_then(kl).map_or(String::new(), |kl| format!("{kl:.6}"));
        let name = printable(&row.job.name);
        let took = if matches!(row.outcome, Outcome::NotRun) { String::new() } else { duration(row.seconds) };
        writeln!(stdout, "  {:>3}  {name:<width$}  {word:<18} {bits:>9} {kl:>10} {took:>12}", row.number)?;
    }
    Ok(())
}

fn status(outcome: &Outcome) -> (&'static str, u8, Option<&RunReport>) {
    match outcome {
        Outcome::Done(report) => ("done", 0, Some(report)),
        Outcome::Planned => ("planned", 0, None),
        Outcome::Skipped => ("already there", 0, None),
        Outcome::NotRun => ("not run", 0, None),
        Outcome::Failed { error, report } => {
            let (code, name) = exit::code(exit::kind(error));
            (name, code, report.as_deref())
        }
    }
}

/// The failure of the whole: of a single job its own, of several the worst.
pub(super) fn verdict(rows: Vec<Row<'_>>) -> anyhow::Result<()> {
    let count = rows.len();
    let unrun = rows.iter().filter(|row| matches!(row.outcome, Outcome::NotRun)).count();
    let mut failed: Vec<(String, anyhow::Error)> = Vec::new();
    for row in rows {
        if let Outcome::Failed { error, .. } = row.outcome {
            failed.push((row.job.name.clone(), error));
        }
    }
    if count == 1 {
        return failed.pop().map_or(Ok(()), |(_, error)| Err(error));
    }
    let Some(kind) = failed.iter().map(|(_, error)| exit::kind(error)).max_by_key(|kind| exit::code(*kind).0) else {
        return Ok(());
    };
    let names: Vec<String> = failed.iter().map(|(name, _)| format!("`{}`", printable(name))).collect();
    let rest = match unrun {
        0 => String::new(),
        unrun => format!(", {unrun} not run (--keep-going goes on after a failure)"),
    };
    Err(BatchFailed { kind, message: format!("{} of {count} jobs failed: {}{rest}", failed.len(), names.join(", ")) }
        .into())
}
