//! What the hub says about a repository: its commit and files, and the headers of one file.
//!
//! `GET /api/{models,datasets}/ID/revision/REV?blobs=true` and `HEAD …/resolve/REV/PATH`, the requests behind
//! `HfApi.repo_info(files_metadata=True)` and `get_hf_file_metadata` of `huggingface_hub`.

use std::collections::BTreeSet;

use serde::Deserialize;
use ureq::http::header;

use super::error::HubError;
use super::http::{Answer, Client, Method, Target, X_REPO_COMMIT, is_html, text};
use super::names::{blob_name, check_file_name, is_commit, is_sha256, percent_encode};

/// From this number of files on, the hub leaves files out of its answer
/// (`constants.VERY_LARGE_REPO_THRESHOLD` of `huggingface_hub`).
const TOO_MANY_FILES: usize = 50_000;

/// The two kinds of repository that hold what this program reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RepoType {
    /// Weights, tokenizer, configuration.
    Model,
    /// Text.
    Dataset,
}

impl RepoType {
    /// The same kind in `hf-hub`, which knows the names of cache folders.
    pub(super) fn in_hf_hub(self) -> hf_hub::RepoType {
        match self {
            Self::Model => hf_hub::RepoType::Model,
            Self::Dataset => hf_hub::RepoType::Dataset,
        }
    }

    fn api_path(self) -> &'static str {
        match self {
            Self::Model => "models/",
            Self::Dataset => "datasets/",
        }
    }

    fn resolve_path(self) -> &'static str {
        match self {
            Self::Model => "",
            Self::Dataset => "datasets/",
        }
    }
}

/// A file of a repository, as the hub lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteFile {
    /// Name in the repository, `/` between parts. Relative, without `..`, backslash or control characters.
    pub path: String,
    /// Size in bytes; mirrors may leave it out.
    pub size: Option<u64>,
    /// SHA-256 of the content in lower-case hex, for files in large file storage.
    pub sha256: Option<String>,
    /// Git object id, which names the content of small files; for large ones it names their pointer.
    pub blob_id: Option<String>,
}

/// The files of a repository at one commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepoListing {
    /// Full hash of the commit that the revision meant when the hub was asked.
    pub commit: String,
    /// Its files, sorted by name.
    pub files: Vec<RemoteFile>,
}

/// What must be known to download a file.
#[derive(Debug, Clone)]
pub(super) struct FileMeta {
    pub(super) commit: String,
    /// Name of the blob in the cache.
    pub(super) blob: String,
    pub(super) size: u64,
    pub(super) sha256: Option<String>,
}

#[derive(Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    // Repository answers say `sha256`, tree answers `oid`.
    #[serde(alias = "oid")]
    sha256: Option<String>,
}

impl Client<'_> {
    /// Commit and files of `repo` at `revision`, in one answer, so that both belong together.
    pub(super) fn list(&self, kind: RepoType, repo: &str, revision: &str) -> Result<RepoListing, HubError> {
        let url = format!(
            "{}/api/{}{repo}/revision/{}?blobs=true",
            self.options.endpoint,
            kind.api_path(),
            percent_encode(revision, "")
        );
        let info: Info = self.json(&url, Target { repo, revision, file: None })?;
        let not_a_hub = |reason: String| HubError::NotAHub { url: url.clone(), reason };
        self.check_commit(&url, revision, &info.sha)?;
        if info.siblings.len() >= TOO_MANY_FILES {
            return Err(not_a_hub(format!(
                "`{repo}` has at least {TOO_MANY_FILES} files, of which the hub lists only some; name the file wanted"
            )));
        }
        let mut seen = BTreeSet::new();
        let mut files = Vec::with_capacity(info.siblings.len());
        for sibling in info.siblings {
            check_file_name(repo, &sibling.rfilename)?;
            if !seen.insert(sibling.rfilename.clone()) {
                return Err(not_a_hub(format!("it lists `{}` twice", sibling.rfilename)));
            }
            let sha256 = sibling.lfs.and_then(|lfs| lfs.sha256);
            if let Some(hash) = sha256.as_ref().filter(|hash| !is_sha256(hash)) {
                return Err(not_a_hub(format!("the hash of `{}` is `{hash}`, wanted a SHA-256", sibling.rfilename)));
            }
            let blob_id = sibling.blob_id.filter(|id| blob_name(id) == Some(id));
            files.push(RemoteFile { path: sibling.rfilename, size: sibling.size, sha256, blob_id });
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(RepoListing { commit: info.sha, files })
    }

    /// The headers of one file.
    pub(super) fn head(&self, kind: RepoType, repo: &str, revision: &str, path: &str) -> Result<FileMeta, HubError> {
        let url = self.file_url(kind, repo, revision, path);
        let target = Target { repo, revision, file: Some(path) };
        let answer = self.retry(|| self.send(Method::Head, &url, target))?;
        self.meta(&url, revision, &answer)
    }

    fn meta(&self, url: &str, revision: &str, answer: &Answer) -> Result<FileMeta, HubError> {
        let not_a_hub = |reason: &str| HubError::NotAHub { url: url.to_owned(), reason: reason.to_owned() };
        let headers = answer.response.headers();
        let Some(commit) = text(headers, X_REPO_COMMIT) else {
            return Err(not_a_hub(if is_html(headers) {
                "found an HTML page, wanted a file"
            } else {
                "it lacks the header `X-Repo-Commit`"
            }));
        };
        self.check_commit(url, revision, commit)?;
        let linked = text(headers, "x-linked-etag");
        let blob = linked
            .or_else(|| text(headers, header::ETAG.as_str()))
            .and_then(blob_name)
            .ok_or_else(|| not_a_hub("it has no usable `ETag`"))?;
        // The length of a redirect is not that of the file.
        let own = || text(headers, header::CONTENT_LENGTH.as_str()).filter(|_| answer.response.status().is_success());
        let size = text(headers, "x-linked-size")
            .or_else(own)
            .and_then(|size| size.trim().parse().ok())
            .ok_or_else(|| not_a_hub("it does not say how large the file is"))?;
        Ok(FileMeta {
            commit: commit.to_owned(),
            blob: blob.to_owned(),
            size,
            sha256: Some(blob.to_owned()).filter(|blob| is_sha256(blob)),
        })
    }

    /// A commit asked for must be the one answered; any other revision must have become a full commit hash.
    fn check_commit(&self, url: &str, revision: &str, commit: &str) -> Result<(), HubError> {
        let not_a_hub = |reason: String| Err(HubError::NotAHub { url: url.to_owned(), reason });
        if !is_commit(commit) {
            return not_a_hub(format!("its commit is `{commit}`, wanted a full hash"));
        }
        if is_commit(revision) && revision != commit {
            return not_a_hub(format!("it is about commit {commit}, wanted {revision}"));
        }
        Ok(())
    }

    /// Where the content of a file is.
    pub(super) fn file_url(&self, kind: RepoType, repo: &str, revision: &str, path: &str) -> String {
        format!(
            "{}/{}{repo}/resolve/{}/{}",
            self.options.endpoint,
            kind.resolve_path(),
            percent_encode(revision, ""),
            percent_encode(path, "/")
        )
    }
}
