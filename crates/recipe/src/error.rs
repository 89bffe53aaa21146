//! What is wrong with a recipe, and where.

use std::fmt;
use std::io;
use std::path::PathBuf;

use lite_job::ErrorKind;
use thiserror::Error;

/// A place in a recipe: `configs/a.yaml:12:7`, or the `--set` that holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// The file, or the text of a `--set`.
    pub source: String,
    /// Line and column, from 1; `None` within a `--set`.
    pub line_column: Option<(u32, u32)>,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line_column {
            Some((line, column)) => write!(f, "{}:{line}:{column}", self.source),
            None => write!(f, "{}", self.source),
        }
    }
}

/// Why a recipe cannot be run.
#[derive(Debug, Error)]
pub enum RecipeError {
    /// The file cannot be read.
    #[error("cannot read the recipe `{}`: {source}", .path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Larger than any recipe is.
    #[error("{source_name}: {what}; a recipe is a small file: check that this is one")]
    Budget {
        /// Which file.
        source_name: String,
        /// Which limit was passed.
        what: String,
    },
    /// Not YAML, or YAML with parts that recipes do not have.
    #[error("{at}: {message}")]
    Syntax {
        /// Where.
        at: Position,
        /// What was found, and what to do.
        message: String,
    },
    /// A key that is not known here.
    #[error("{at}: `{key}` is no key here; {}", hint(near, known))]
    UnknownKey {
        /// Where.
        at: Position,
        /// The key.
        key: String,
        /// The valid key nearest to it, if one is near.
        near: Option<String>,
        /// All valid keys.
        known: Vec<String>,
    },
    /// A value that cannot be, or settings that contradict each other.
    #[error("{at}: {message}")]
    Value {
        /// Where.
        at: Position,
        /// What was found, what was wanted.
        message: String,
    },
    /// Something that another tool does and this one does not.
    #[error("{at}: {message}")]
    Unsupported {
        /// Where.
        at: Position,
        /// What, and what to use instead.
        message: String,
    },
}

impl RecipeError {
    /// What kind of failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { .. } => ErrorKind::Io,
            Self::Unsupported { .. } => ErrorKind::Unsupported,
            Self::Budget { .. } | Self::Syntax { .. } | Self::UnknownKey { .. } | Self::Value { .. } => {
                ErrorKind::Usage
            }
        }
    }
}

fn hint(near: &Option<String>, known: &[String]) -> String {
    match near {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("known are {}", known.join(", ")),
    }
}

/// What is wrong, before it is known in which file: the readers below carry this, [`Sources::error`] finishes it.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) at: Place,
    pub(crate) problem: Problem,
}

/// The part of a [`Fault`] that is not its place.
#[derive(Debug)]
pub(crate) enum Problem {
    Budget(String),
    Syntax(String),
    UnknownKey { key: String, known: Vec<String> },
    Value(String),
    Unsupported(String),
}

impl Fault {
    pub(crate) fn value(at: Place, message: impl Into<String>) -> Self {
        Self { at, problem: Problem::Value(message.into()) }
    }

    pub(crate) fn unsupported(at: Place, message: impl Into<String>) -> Self {
        Self { at, problem: Problem::Unsupported(message.into()) }
    }
}

/// Where a node was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// 0 is the file, n the n-th `--set`.
    pub(crate) source: usize,
    pub(crate) line: u32,
    pub(crate) column: u32,
}

/// The names behind [`Place::source`].
#[derive(Debug)]
pub(crate) struct Sources {
    pub(crate) file: String,
    pub(crate) sets: Vec<String>,
}

impl Sources {
    pub(crate) fn position(&self, at: Place) -> Position {
        match at.source.checked_sub(1).and_then(|set| self.sets.get(set)) {
            Some(set) => Position { source: format!("--set {set}"), line_column: None },
            None => Position { source: self.file.clone(), line_column: Some((at.line, at.column)) },
        }
    }

    /// The fault as users see it.
    pub(crate) fn error(&self, fault: Fault) -> RecipeError {
        let at = self.position(fault.at);
        match fault.problem {
            Problem::Budget(what) => RecipeError::Budget { source_name: at.source, what },
            Problem::Syntax(message) => RecipeError::Syntax { at, message },
            Problem::Value(message) => RecipeError::Value { at, message },
            Problem::Unsupported(message) => RecipeError::Unsupported { at, message },
            Problem::UnknownKey { key, known } => {
                let near = nearest(&key, known.iter().map(String::as_str)).map(str::to_owned);
                RecipeError::UnknownKey { at, key: lite_model::printable(&key), near, known }
            }
        }
    }
}

/// The name that is most like `wanted`, if one is like it: at most a third of its letters differ.
pub(crate) fn nearest<'k>(wanted: &str, known: impl Iterator<Item = &'k str>) -> Option<&'k str> {
    let plain = |text: &str| text.to_lowercase().replace(['-', ' '], "_");
    let wanted = plain(wanted);
    let distance = |name: &str| {
        let name = plain(name);
        let (long, short) = if name.len() > wanted.len() { (&name, &wanted) } else { (&wanted, &name) };
        // One that begins with the other counts as near: `calib` and `calibration`.
        if short.len() >= 3 && long.starts_with(short.as_str()) { 1 } else { strsim::osa_distance(&name, &wanted) }
    };
    let (found, name) = known.map(|name| (distance(name), name)).min_by_key(|(distance, _)| *distance)?;
    let longest = wanted.chars().count().max(name.chars().count());
    (found * 3 <= longest).then_some(name)
}
