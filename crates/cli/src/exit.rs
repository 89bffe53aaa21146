//! Exit codes: 0 done · 2 usage · 3 input · 4 unsupported · 5 resources · 6 a check failed · 7 I/O · 8 state · 130 interrupted.

use std::io::Write;
use std::process::ExitCode;

use lite_convert::ConvertError;
use lite_job::{ErrorKind, JobError};
use lite_recipe::RecipeError;
use serde_json::json;

use crate::args::Format;
use crate::commands::run::BatchFailed;

/// The exit code of a failure, and its name in JSON.
pub(crate) fn code(kind: ErrorKind) -> (u8, &'static str) {
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

/// The failure and its causes; a cause that the text already tells is not told again.
fn message(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Prints a failure and gives its exit code. A reader of standard output that went away is no failure.
pub(crate) fn report(error: &anyhow::Error, format: Format) -> ExitCode {
    let broken_pipe = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    };
    if error.chain().any(broken_pipe) {
        return ExitCode::SUCCESS;
    }
    ExitCode::from(tell(error, format))
}

/// What kind of failure.
pub(crate) fn kind(error: &anyhow::Error) -> ErrorKind {
    let converting = error.chain().find_map(|cause| cause.downcast_ref::<ConvertError>()).map(ConvertError::kind);
    let batch = || error.chain().find_map(|cause| cause.downcast_ref::<BatchFailed>()).map(|batch| batch.kind);
    let recipe = || error.chain().find_map(|cause| cause.downcast_ref::<RecipeError>()).map(RecipeError::kind);
    let job = || error.chain().find_map(|cause| cause.downcast_ref::<JobError>()).map(JobError::kind);
    converting.or_else(batch).or_else(recipe).or_else(job).unwrap_or(ErrorKind::Io)
}

/// Prints a failure; returns its exit code.
pub(crate) fn tell(error: &anyhow::Error, format: Format) -> u8 {
    let (code, name) = code(kind(error));
    let message = message(error);
    if format == Format::Json {
        let line = json!({ "event": "error", "code": code, "kind": name, "message": message });
        let _ = writeln!(std::io::stdout(), "{line}");
    }
    let _ = writeln!(std::io::stderr(), "error: {message}");
    code
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn causes_are_told_once() {
        let told = anyhow::anyhow!("no space").context("cannot write `x`: no space (free some)");
        assert_eq!(message(&told), "cannot write `x`: no space (free some)");
        let untold = Err::<(), _>(anyhow::anyhow!("no space")).context("cannot write `x`").unwrap_err();
        assert_eq!(message(&untold), "cannot write `x`: no space");
    }
}
