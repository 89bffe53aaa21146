//! The log of a run: JSON lines in the work folder, each handed to the system before the run goes on, so that a process
//! that is killed leaves where it was and what memory it had.
//!
//! Times make two logs differ. The log is no part of the checkpoint; everything that is holds no times.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lite_job::{Event, JobError, Observer};
use lite_model::printable_path;
use lite_report::{LayerTime, Timing};
use serde_json::{Map, Value, json};

use crate::memory::{available, resident};
use crate::progress::as_json;

/// Writes events to the log, and passes them on.
pub(crate) struct RunLog<'a> {
    shown: &'a dyn Observer,
    start: Instant,
    sink: RefCell<Sink>,
    /// Step of the check, or file of the download, that was written last.
    last: RefCell<String>,
    times: RefCell<Vec<LayerTime>>,
    broken: Cell<bool>,
}

enum Sink {
    /// Lines of before the work folder was there.
    Waiting(Vec<String>),
    Open(File),
}

impl<'a> RunLog<'a> {
    pub(crate) fn new(shown: &'a dyn Observer) -> Self {
        let this = Self {
            shown,
            start: Instant::now(),
            sink: RefCell::new(Sink::Waiting(Vec::new())),
            last: RefCell::default(),
            times: RefCell::default(),
            broken: Cell::new(false),
        };
        let arguments: Vec<String> = std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
        this.write(json!({"event": "start", "schema": 1, "version": env!("CARGO_PKG_VERSION"), "arguments": arguments,
                          "process": std::process::id(), "available_bytes": available()}));
        this
    }

    /// What each block took so far.
    pub(crate) fn times(&self) -> Vec<LayerTime> {
        self.times.borrow().clone()
    }

    /// The last line of a run that failed. It stays only where an earlier run's log was there already: otherwise the run
    /// leaves nothing behind.
    pub(crate) fn failed(&self, error: &JobError) {
        self.write(json!({"event": "error", "message": error.to_string()}));
    }

    /// One line: the event, the time, seconds since the start, memory now and at its peak.
    fn write(&self, event: Value) {
        let Value::Object(mut line) = event else { return };
        stamp(&mut line, self.start.elapsed());
        let text = format!("{}\n", Value::Object(line));
        let written = match &mut *self.sink.borrow_mut() {
            Sink::Waiting(lines) => {
                lines.push(text);
                Ok(())
            }
            Sink::Open(file) => file.write_all(text.as_bytes()),
        };
        if let Err(error) = written {
            self.cannot("write", &error);
        }
    }

    fn open(&self, path: &Path) {
        let opened = File::options().create(true).append(true).open(path).and_then(|mut file| {
            if let Sink::Waiting(lines) = &*self.sink.borrow() {
                file.write_all(lines.concat().as_bytes())?;
            }
            Ok(file)
        });
        match opened {
            Ok(file) => *self.sink.borrow_mut() = Sink::Open(file),
            Err(error) => self.cannot(&format!("write `{}`", printable_path(path)), &error),
        }
    }

    /// A log that fails stops no run; it is said once.
    fn cannot(&self, what: &str, error: &std::io::Error) {
        if !self.broken.replace(true) {
            self.shown.event(Event::Warning(&format!("the log of this run is not complete: cannot {what}: {error}")));
        }
    }

    /// Whether this is another step, or another file, than in the last line.
    fn is_new(&self, what: &str) -> bool {
        let new = *self.last.borrow() != what;
        if new {
            what.clone_into(&mut self.last.borrow_mut());
        }
        new
    }
}

impl Observer for RunLog<'_> {
    fn event(&self, event: Event<'_>) {
        match &event {
            Event::Opened { log } => self.open(log),
            Event::LayerStarted { block, of } => {
                self.write(json!({"event": "layer_started", "layer": block, "layers": of}));
            }
            Event::LayerStep { block, step } => {
                self.write(json!({"event": "layer_step", "layer": block, "step": step}))
            }
            Event::Checking { step, done, of } if self.is_new(step) => {
                self.write(json!({"event": "checking", "step": step, "done": done, "of": of}));
            }
            Event::Download { file, total, .. } if self.is_new(file) => {
                self.write(json!({"event": "download", "file": file, "total": total}));
            }
            Event::Checking { .. } | Event::Download { .. } => {}
            event => {
                if let Event::LayerDone { block, seconds, .. } = event {
                    let timing = Timing { seconds: *seconds, resident_bytes: resident().map(|r| r.now) };
                    self.times.borrow_mut().push(LayerTime { layer: *block, timing });
                }
                if let Some(mut value) = as_json(event) {
                    // Long lists are in the plan and in the report.
                    if let Some(keys) = value.as_object_mut() {
                        keys.shift_remove("tensors");
                        keys.shift_remove("linears");
                    }
                    self.write(value);
                }
            }
        }
        self.shown.event(event);
    }
}

fn stamp(line: &mut Map<String, Value>, elapsed: Duration) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    line.insert("time".to_owned(), utc(now).into());
    line.insert("elapsed".to_owned(), json!((elapsed.as_secs_f64() * 1000.0).round() / 1000.0));
    if let Some(memory) = resident() {
        line.insert("resident_bytes".to_owned(), memory.now.into());
        line.insert("peak_resident_bytes".to_owned(), memory.peak.into());
    }
}

/// RFC 3339 of a time since 1970, in UTC. Days to dates as in Howard Hinnant's `civil_from_days`
/// (<https://howardhinnant.github.io/date_algorithms.html>), eras of 400 years from 1 March of year 0.
fn utc(since: Duration) -> String {
    let (seconds, millis) = (since.as_secs(), since.subsec_millis());
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second % 3600 / 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_dates() {
        // `date -u -d @N` of GNU coreutils.
        for (seconds, wanted) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
            (1_795_266_000, "2026-11-21T13:00:00.000Z"),
        ] {
            assert_eq!(utc(Duration::from_secs(seconds)), wanted);
        }
    }
}
