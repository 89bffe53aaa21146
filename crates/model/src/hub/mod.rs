//! Models and datasets from the Hugging Face Hub or a mirror.
//!
//! [`resolve_model`] turns a `MODEL` argument (folder or `org/name`) into a folder; [`fetch_model`], [`fetch_file`] and
//! [`list_files`] ask the hub. Everything lands in the cache that `huggingface_hub` uses too, so what one downloaded
//! the other finds.
//!
//! # Whose part is what
//!
//! The crate `hf-hub` knows the layout of the cache ([`hf_hub::Cache`], [`hf_hub::Repo`]: names of folders, blobs and
//! snapshots), and is used for that. Its downloader (0.5) is not: it checks neither size nor hash, resumes without
//! looking at the answer's status, does not wait on HTTP 429, asks for each file at a branch that may move, puts names
//! from the hub into paths unchecked, and has no way to stop. Requests are therefore made here with `ureq` (rustls),
//! which `hf-hub` itself uses:
//!
//! * one commit: the revision is resolved once, and every URL names the commit;
//! * the token goes to the hub's scheme, host and port only; redirects to storage hosts are followed without it, and
//!   `https` never becomes `http`;
//! * tries, waits and time limits as in [`RetryPolicy`] and [`Timeouts`]; a cut download goes on with `Range` from
//!   `<etag>.incomplete`, in the same run or the next;
//! * a file gets its name only after its size, and its SHA-256 where the hub has one, were found right. The hub has
//!   one for every file in large file storage, which is every weight; small files are checked by size;
//! * names from the hub, from indexes and from the cache's lists are refused if they could leave the folder;
//! * code (`*.py`) is copied as a side file and never run.
//!
//! Files that are already in the cache are trusted if their size is right; their hash is not computed again.

mod api;
mod cache;
mod download;
mod error;
mod fetch;
mod files;
mod http;
mod names;
mod options;
mod progress;
mod token;
mod url;

pub use api::{RemoteFile, RepoListing, RepoType};
pub use error::{HubError, HubErrorKind};
pub use fetch::{ModelSource, fetch_file, fetch_model, list_files, list_repo, model_source, resolve_model};
pub use names::looks_like_hub_id;
pub use options::{DEFAULT_ENDPOINT, HubOptions, RetryPolicy, Timeouts};
pub use progress::{HubProgress, Silent};
pub use token::Token;
