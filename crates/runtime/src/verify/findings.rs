//! What a verification finds.

use serde::Serialize;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FindingSeverity {
    /// The checkpoint is damaged, or engines read something else than was meant.
    Error,
    /// It works under a condition, or looks unusual.
    Warning,
    /// Worth knowing.
    Note,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// A stable identifier; the table in the module's documentation lists them.
    pub code: &'static str,
    /// How bad it is.
    pub severity: FindingSeverity,
    /// The tensor, module or file concerned, as it is in the checkpoint: print it through
    /// [`printable`](lite_model::printable).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub place: Option<String>,
    /// What was found, what was wanted, what to do. Safe to print.
    pub message: String,
}

/// Findings as they are gathered.
#[derive(Debug, Default)]
pub(super) struct Findings(Vec<Finding>);

impl Findings {
    pub(super) fn error(&mut self, code: &'static str, place: Option<&str>, message: impl Into<String>) {
        self.add(FindingSeverity::Error, code, place, message.into());
    }

    pub(super) fn warning(&mut self, code: &'static str, place: Option<&str>, message: impl Into<String>) {
        self.add(FindingSeverity::Warning, code, place, message.into());
    }

    pub(super) fn note(&mut self, code: &'static str, place: Option<&str>, message: impl Into<String>) {
        self.add(FindingSeverity::Note, code, place, message.into());
    }

    fn add(&mut self, severity: FindingSeverity, code: &'static str, place: Option<&str>, message: String) {
        self.0.push(Finding { code, severity, place: place.map(str::to_owned), message });
    }

    /// Whether there is an error with one of these codes.
    pub(super) fn has_error(&self, codes: &[&str]) -> bool {
        self.0.iter().any(|finding| finding.severity == FindingSeverity::Error && codes.contains(&finding.code))
    }

    /// Errors first, otherwise in the order they were found.
    pub(super) fn finish(mut self) -> Vec<Finding> {
        self.0.sort_by_key(|finding| finding.severity);
        self.0
    }
}
