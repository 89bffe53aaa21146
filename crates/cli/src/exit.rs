//! Exit codes: 0 done · 2 usage · 3 input · 4 unsupported · 5 resources · 6 a check failed · 7 I/O · 8 state · 130 interrupted.

use std::io::Write;
use std::process::ExitCode;

use lite_job::{ErrorKind, JobError};
use serde_json::json;

use crate::args::Format;

/// The exit code of a failure, and its name in JSON.
fn code(kind: ErrorKind) -> (u8, &'static str) {
    match kind {
        ErrorKind::Usage => (2, "usage"),
        ErrorKind::Input => (3, "input"),
        ErrorKind::Unsupported => (4, "unsupported"),
        ErrorKind::Resources => (5, "resources"),
        ErrorKind::Verification => (6, "verification"),
        ErrorKind::Io => (7, "io"),
        ErrorKind::State => (8, "state"),
        ErrorKind::Interrupted => (130, "interrupted"),
    }
}

/// Prints a failure and gives its exit code. A reader of standard output that went away is no failure.
pub(crate) fn report(error: &anyhow::Error, format: Format) -> ExitCode {
    let broken_pipe = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    };
    if error.chain().any(broken_pipe) {
        return ExitCode::SUCCESS;
    }
    let kind = error.chain().find_map(|cause| cause.downcast_ref::<JobError>()).map_or(ErrorKind::Io, JobError::kind);
    let (code, name) = code(kind);
    let message = format!("{error:#}");
    if format == Format::Json {
        let line = json!({ "event": "error", "code": code, "kind": name, "message": message });
        let _ = writeln!(std::io::stdout(), "{line}");
    }
    let _ = writeln!(std::io::stderr(), "error: {message}");
    ExitCode::from(code)
}
