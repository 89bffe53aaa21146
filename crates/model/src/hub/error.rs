//! What can go wrong with the hub.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::progress::Cancelled;
use crate::text::{escape, printable, printable_path};

/// Broad class of a [`HubError`], for whoever maps errors to exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HubErrorKind {
    /// A wrong name, setting, size or hash, or a repository without usable weights (exit code 3).
    Input,
    /// The operating system refused to read or write the cache (exit code 7).
    Io,
    /// Not enough room on the disk (exit code 5).
    Space,
    /// The hub could not be reached, or what answered is not a hub (exit code 7).
    Network,
    /// The hub refused access: no token, a wrong token, or terms not accepted (exit code 7).
    Auth,
    /// No such repository, revision or file on the hub (exit code 7).
    NotFound,
    /// Offline mode, and the cache does not hold everything (exit code 7).
    Offline,
    /// Stopped on request (exit code 130).
    Cancelled,
}

/// What can go wrong with the hub. No variant holds a token, a header or the query of a URL (signed links), and text
/// from outside is escaped when displayed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HubError {
    /// Neither an existing path nor a hub id.
    #[error("`{}` is neither an existing folder nor a hub id: give a folder with config.json, or `org/name`", printable(.name))]
    NotAModel {
        /// What was given.
        name: String,
    },
    /// A repository id that the hub would not accept.
    #[error("`{}` is not a hub id ({reason}): wanted `org/name` of letters, digits, `-`, `_` and `.`", printable(.id))]
    BadId {
        /// The id as given.
        id: String,
        /// The rule it breaks.
        reason: &'static str,
    },
    /// A revision that cannot be a branch, tag or commit.
    #[error("`{}` is not a revision ({reason}): give a branch, a tag or a commit hash", printable(.revision))]
    BadRevision {
        /// The revision as given.
        revision: String,
        /// The rule it breaks.
        reason: &'static str,
    },
    /// A file name that would leave the folder of the model, or that no file should have.
    #[error("file name `{}` in `{repo}` is refused ({reason}): do not use this repository", printable(.name))]
    BadName {
        /// Repository id.
        repo: String,
        /// The name.
        name: String,
        /// The rule it breaks.
        reason: &'static str,
    },
    /// A setting that cannot be used; its value is left out, since it may be a secret.
    #[error("`{name}` cannot be used: {reason}")]
    BadSetting {
        /// Name of the setting, an environment variable where there is one.
        name: &'static str,
        /// What is wrong, what is wanted.
        reason: String,
    },
    /// HTTP 401 or 403.
    #[error("access to `{repo}` (revision `{}`) was refused (HTTP {status}, {}){}: {}", printable(.revision),
        if *.token_sent { "a token was sent" } else { "no token was sent" }, detail(.message), access_hint(.repo, *.gated, *.token_sent))]
    Denied {
        /// Repository id.
        repo: String,
        /// Revision asked for.
        revision: String,
        /// 401 or 403.
        status: u16,
        /// Whether the request carried a token.
        token_sent: bool,
        /// Whether the hub said that the repository is gated.
        gated: bool,
        /// The hub's own words, where it gave some.
        message: String,
    },
    /// HTTP 404.
    #[error("no such {what} on the hub: {} (HTTP 404){}: check the spelling{}", place(.repo, .revision, .file.as_deref()), detail(.message),
        if *.token_sent { ", and that the token of `HF_TOKEN` may read it if it is private" } else { ", and set `HF_TOKEN` if it is private" })]
    NotFound {
        /// `repository`, `revision`, `file` or `repository or revision`.
        what: &'static str,
        /// Repository id.
        repo: String,
        /// Revision asked for.
        revision: String,
        /// File asked for, if any.
        file: Option<String>,
        /// Whether the request carried a token.
        token_sent: bool,
        /// The hub's own words, where it gave some.
        message: String,
    },
    /// Any other HTTP status that trying again does not change.
    #[error("`{}` answered HTTP {status}{}: check `HF_ENDPOINT` and the proxy", printable_url(.url), detail(.message))]
    Status {
        /// URL without its query.
        url: String,
        /// The status.
        status: u16,
        /// The hub's own words, where it gave some.
        message: String,
    },
    /// Every try failed.
    #[error("`{}` could not be fetched ({tries} {}): {}; check the network, the proxy and `HF_ENDPOINT`, then run again (what has arrived is kept), or set `HF_HUB_OFFLINE=1` to use only the cache",
        printable_url(.url), if *.tries == 1 { "try" } else { "tries" }, escape(.reason, 300))]
    Network {
        /// URL without its query.
        url: String,
        /// Number of tries.
        tries: u32,
        /// What the last try met.
        reason: String,
    },
    /// Something answered, but not a hub: a login page, a proxy, a damaged answer.
    #[error("the answer of `{}` is not one of a hub: {}; a login page or a proxy may be in the way, or `HF_ENDPOINT` is wrong", printable_url(.url), escape(.reason, 300))]
    NotAHub {
        /// URL without its query.
        url: String,
        /// What was found, what was wanted.
        reason: String,
    },
    /// A file of another size than the hub announced.
    #[error("`{}` of `{repo}` has {found} bytes where the hub announced {wanted}: what arrived was deleted, run again", printable(.file))]
    WrongSize {
        /// Repository id.
        repo: String,
        /// File name in the repository.
        file: String,
        /// Bytes found.
        found: u64,
        /// Bytes announced.
        wanted: u64,
    },
    /// A file whose SHA-256 is not the one the hub announced.
    #[error("`{}` of `{repo}` is damaged: its SHA-256 is {found}, the hub announced {wanted}; what arrived was deleted, run again", printable(.file))]
    WrongHash {
        /// Repository id.
        repo: String,
        /// File name in the repository.
        file: String,
        /// SHA-256 of what arrived, in hex.
        found: String,
        /// SHA-256 announced, in hex.
        wanted: String,
    },
    /// The repository holds no model in a format that is read.
    #[error("`{repo}` (commit {commit}) cannot be used: {}", escape(.reason, 500))]
    NoModel {
        /// Repository id.
        repo: String,
        /// The commit looked at.
        commit: String,
        /// What is missing, what was found instead.
        reason: String,
    },
    /// Offline, and the cache does not hold everything.
    #[error("`{repo}` (revision `{}`) is not complete in `{}` and the hub is not asked (offline): missing {}; unset `HF_HUB_OFFLINE` or copy the files there",
        printable(.revision), printable_path(.cache), list(.missing))]
    Offline {
        /// Repository id.
        repo: String,
        /// Revision asked for.
        revision: String,
        /// Folder of the repository in the cache.
        cache: PathBuf,
        /// What is missing, in the order of the repository.
        missing: Vec<String>,
    },
    /// The files do not fit on the disk; nothing was downloaded.
    #[error("`{repo}` needs {needed} more bytes in `{}`, where {free} are free: make room, or choose another cache with `HF_HUB_CACHE`", printable_path(.cache))]
    NoSpace {
        /// Repository id.
        repo: String,
        /// The cache.
        cache: PathBuf,
        /// Bytes still to download.
        needed: u64,
        /// Bytes free for this user.
        free: u64,
    },
    /// The cache could not be read or written.
    #[error("could not {action} `{}`: {source}; check permissions and free space, or choose another cache with `HF_HUB_CACHE`", printable_path(.path))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Stopped on request.
    #[error("download stopped on request: run again to go on where it stopped")]
    Cancelled,
}

impl HubError {
    /// The class of this error.
    #[must_use]
    pub fn kind(&self) -> HubErrorKind {
        match self {
            Self::NotAModel { .. }
            | Self::BadId { .. }
            | Self::BadRevision { .. }
            | Self::BadName { .. }
            | Self::BadSetting { .. }
            | Self::WrongSize { .. }
            | Self::WrongHash { .. }
            | Self::NoModel { .. } => HubErrorKind::Input,
            Self::Denied { .. } => HubErrorKind::Auth,
            Self::NotFound { .. } => HubErrorKind::NotFound,
            Self::Status { .. } | Self::Network { .. } | Self::NotAHub { .. } => HubErrorKind::Network,
            Self::Offline { .. } => HubErrorKind::Offline,
            Self::NoSpace { .. } => HubErrorKind::Space,
            Self::Io { .. } => HubErrorKind::Io,
            Self::Cancelled => HubErrorKind::Cancelled,
        }
    }

    /// An [`HubError::Io`], for `map_err`.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_path_buf(), source }
    }
}

impl From<Cancelled> for HubError {
    fn from(_: Cancelled) -> Self {
        Self::Cancelled
    }
}

/// A URL for a message: no query (it may be a signed link), escaped.
fn printable_url(url: &str) -> String {
    escape(url.split(['?', '#']).next().unwrap_or_default(), 300)
}

/// The hub's own words, as an insertion.
fn detail(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(", \"{}\"", escape(message, 300)) }
}

fn place(repo: &str, revision: &str, file: Option<&str>) -> String {
    match file {
        Some(file) => format!("`{}` in `{repo}` at `{}`", printable(file), printable(revision)),
        None => format!("`{repo}` at `{}`", printable(revision)),
    }
}

/// What to do about a refusal. The hub answers 401 also for names that do not exist, so that nobody can probe for
/// private repositories.
fn access_hint(repo: &str, gated: bool, token_sent: bool) -> String {
    match (gated, token_sent) {
        (true, true) => format!("accept the terms on the page of `{repo}` with the account of the token"),
        (true, false) => format!("accept the terms on the page of `{repo}`, then set `HF_TOKEN`"),
        (false, true) => "the token of `HF_TOKEN` is invalid, has expired or may not read this repository".to_owned(),
        (false, false) => "check the spelling; if it is private or gated, set `HF_TOKEN`".to_owned(),
    }
}

/// At most 20 names, then how many more.
fn list(names: &[String]) -> String {
    const SHOWN: usize = 20;
    let mut text = names.iter().take(SHOWN).map(|name| format!("`{}`", printable(name))).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}
