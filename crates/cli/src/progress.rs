//! Progress on standard error: bars on a terminal, lines elsewhere, JSON on request.

use std::cell::{Cell, RefCell};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lite_job::{Event, Observer};
use lite_model::printable;
use serde_json::{Value, json};

use crate::args::Format;
use crate::memory::resident;
use crate::output::{duration, mib, size};

/// Shows the events of a run.
pub(crate) struct Progress {
    format: Format,
    bar: ProgressBar,
    /// On a terminal: the bar says it all. Otherwise one line now and then.
    terminal: bool,
    last_line: Cell<Option<Instant>>,
    download: RefCell<String>,
    layers: Cell<f64>,
}

impl Progress {
    pub(crate) fn new(format: Format) -> Self {
        let terminal = std::io::stderr().is_terminal() && format == Format::Auto;
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(0), target);
        if let Ok(style) = ProgressStyle::with_template("{prefix:10} {bar:30} {pos}/{len}  {wide_msg}") {
            bar.set_style(style);
        }
        Self { format, bar, terminal, last_line: Cell::new(None), download: RefCell::default(), layers: Cell::new(0.0) }
    }

    /// A line of the story; above the bar, if there is one.
    fn say(&self, text: &str) {
        if self.terminal {
            self.bar.suspend(|| self.line(text));
        } else {
            self.line(text);
        }
    }

    fn line(&self, text: &str) {
        // Nowhere to report a standard error that is closed.
        let _ = writeln!(std::io::stderr(), "{text}");
    }

    fn json(&self, value: &Value) {
        let _ = writeln!(std::io::stdout(), "{value}");
    }

    /// At most one line every two seconds where there is no terminal.
    fn due(&self, last: bool) -> bool {
        let due = last || self.last_line.get().is_none_or(|at| at.elapsed() >= Duration::from_secs(2));
        if due {
            self.last_line.set(Some(Instant::now()));
        }
        due
    }

    fn position(&self, prefix: &'static str, done: usize, of: usize, message: String) {
        if self.terminal {
            self.bar.set_length(of as u64);
            self.bar.set_position(done as u64);
            self.bar.set_prefix(prefix);
            self.bar.set_message(message);
        }
    }

    fn layer_message(&self, block: usize, of: usize, seconds: f64, error: Option<f64>) -> String {
        let left = (of - block - 1) as f64 * seconds;
        let mut parts = vec![format!("{:.1} s", seconds)];
        parts.extend(error.map(|e| format!("error {e:.4}")));
        parts.extend(resident().map(|r| format!("{} in memory", mib(r.now))));
        if left > 0.0 {
            parts.push(format!("{} left", duration(left)));
        }
        parts.join(", ")
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

impl Observer for Progress {
    fn event(&self, event: Event<'_>) {
        match self.format {
            Format::Quiet => {}
            Format::Json => {
                if let Some(value) = as_json(&event) {
                    self.json(&value);
                }
            }
            Format::Auto | Format::Human => self.human(&event),
        }
    }
}

impl Progress {
    fn human(&self, event: &Event<'_>) {
        match event {
            Event::Download { file, done, total } => {
                let total = total.unwrap_or(*done);
                self.position("download", (*done >> 10) as usize, (total >> 10) as usize, (*file).to_owned());
                let mut shown = self.download.borrow_mut();
                if !self.terminal && *shown != *file {
                    self.line(&format!("downloading {file} ({})", size(total)));
                    (*file).clone_into(&mut shown);
                }
            }
            Event::Planned(plan) => self.say(&format!(
                "{}: {} linears in {} blocks, {} → {}, about {} of memory",
                plan.arch,
                plan.sites.len(),
                plan.sites.last().map_or(0, |s| s.block + 1),
                size(plan.source_bytes),
                size(plan.output_bytes),
                mib(plan.memory.peak()),
            )),
            Event::PlannedStatistics(plan) => self.say(&format!(
                "{}: statistics of {} inputs in {} blocks, {} on disk, about {} of memory",
                printable(&plan.arch),
                plan.inputs,
                plan.blocks,
                size(plan.bytes),
                mib(plan.memory.peak()),
            )),
            Event::Calibration { windows, seqlen, source, .. } => {
                self.say(&format!("calibrating on {windows} windows of {seqlen} tokens: {source}"));
            }
            Event::Note(text) => self.say(&format!("note: {text}")),
            Event::Warning(text) => self.say(&format!("warning: {text}")),
            Event::Opened { .. } => {}
            Event::LayerStarted { block, of } => self.position("layers", *block, *of, String::new()),
            Event::LayerStep { block, step } => {
                if self.terminal {
                    self.bar.set_message(format!("layer {block}: {step}"));
                }
            }
            Event::Tuned { block, before, after, kept } => {
                let change = 100.0 * (after / before - 1.0);
                let kept = if *kept { "" } else { ", not kept" };
                self.say(&format!(
                    "layer {}: tuning changed the block's held-out error by {change:+.1} %{kept}",
                    block + 1
                ));
            }
            Event::LayerDone { block, of, error, seconds } => {
                self.layers.set(self.layers.get() + seconds);
                let mean = self.layers.get() / (*block as f64 + 1.0);
                let message = self.layer_message(*block, *of, mean, *error);
                self.position("layers", block + 1, *of, format!("layer {block}: {message}"));
                if !self.terminal && self.due(block + 1 == *of) {
                    self.line(&format!("layer {}/{of}: {message}", block + 1));
                }
            }
            Event::Checking { step, done, of } => self.position("check", *done, *of, (*step).to_owned()),
            Event::Finished(_) => self.bar.finish_and_clear(),
        }
    }
}

/// One event as a JSON line. Steps of the check are too many to be of use.
pub(crate) fn as_json(event: &Event<'_>) -> Option<Value> {
    Some(match event {
        Event::Download { file, done, total } => {
            json!({"event": "download", "file": file, "done": done, "total": total})
        }
        Event::Planned(plan) => crate::output::plan_json(plan),
        Event::PlannedStatistics(plan) => crate::output::statistics_plan_json(plan),
        Event::Calibration { windows, seqlen, source, digest } => {
            json!({"event": "calibration", "windows": windows, "seqlen": seqlen, "source": source, "sha256": digest})
        }
        Event::Note(text) => json!({"event": "note", "message": text}),
        Event::Warning(text) => json!({"event": "warning", "message": text}),
        Event::LayerDone { block, of, error, seconds } => {
            json!({"event": "layer_done", "layer": block, "layers": of, "relative_error": error, "seconds": seconds,
                   "resident_bytes": resident().map(|r| r.now)})
        }
        Event::Tuned { block, before, after, kept } => {
            json!({"event": "tuned", "layer": block, "before": before, "after": after, "kept": kept})
        }
        Event::Opened { .. } | Event::LayerStarted { .. } | Event::LayerStep { .. } | Event::Checking { .. } => {
            return None;
        }
        Event::Finished(report) => crate::output::report_json(report),
    })
}
