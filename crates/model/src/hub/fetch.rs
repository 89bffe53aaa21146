//! From an id to files on disk: what is cached, what is asked, what is downloaded, what offline means.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::api::{FileMeta, RemoteFile, RepoListing, RepoType};
use super::cache::RepoCache;
use super::download::Source;
use super::error::HubError;
use super::files::{WeightPlan, is_document, plan, side_files, weight_files, weight_names};
use super::http::Client;
use super::names::{check_file_name, check_repo_id, check_revision, is_commit, looks_like_hub_id};
use super::options::HubOptions;
use super::progress::{Events, HubProgress};
use crate::free_space;

/// What a `MODEL` argument means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// A path that exists.
    Local(PathBuf),
    /// An id of the hub.
    Hub(String),
}

/// Decides what a `MODEL` argument means: a path that exists goes first, then an id of the hub.
///
/// # Errors
/// [`HubError::NotAModel`] if it is neither.
pub fn model_source(model: &str) -> Result<ModelSource, HubError> {
    let path = Path::new(model);
    // A broken link exists too: what is wrong with it is for whoever opens it to say.
    if !model.is_empty() && fs::symlink_metadata(path).is_ok() {
        return Ok(ModelSource::Local(path.to_path_buf()));
    }
    if looks_like_hub_id(model) {
        return Ok(ModelSource::Hub(model.to_owned()));
    }
    Err(HubError::NotAModel { name: model.to_owned() })
}

/// The folder of a model: `model` itself if it exists, else its snapshot, downloaded as by [`fetch_model`].
///
/// # Errors
/// Those of [`model_source`] and [`fetch_model`].
pub fn resolve_model(model: &str, options: &HubOptions, progress: &dyn HubProgress) -> Result<PathBuf, HubError> {
    match model_source(model)? {
        ModelSource::Local(path) => Ok(path),
        ModelSource::Hub(id) => fetch_model(&id, options, progress),
    }
}

/// Brings the files of a model that are needed to quantize it into the cache and returns the folder of its snapshot,
/// `…/models--org--name/snapshots/<commit>`.
///
/// The revision becomes one commit first, and every file is of that commit, whatever happens to the branch meanwhile.
/// Files already there with the right size are not downloaded again. If the hub cannot be reached and the cache holds
/// everything of the commit that the revision meant last, that is used, with a warning.
///
/// # Errors
/// Any [`HubError`]. What has arrived stays in the cache, and the next call goes on there.
pub fn fetch_model(id: &str, options: &HubOptions, progress: &dyn HubProgress) -> Result<PathBuf, HubError> {
    let revision = options.model_revision();
    check_repo_id(id)?;
    check_revision(revision)?;
    let cache = RepoCache::new(options.cache(), RepoType::Model, id);
    if options.offline {
        return cached_model(id, revision, &cache, progress);
    }
    let events = Events::new(progress);
    let client = Client::new(options, &events)?;
    let listing = match client.list(RepoType::Model, id, revision) {
        Ok(listing) => listing,
        Err(error @ HubError::Network { .. }) => {
            return or_cached(error, cached_model(id, revision, &cache, progress), progress);
        }
        Err(error) => return Err(error),
    };
    let plan = plan(id, &listing)?;
    let snapshot = cache.snapshot(&listing.commit);
    let job = Job { client: &client, cache: &cache, id, listing: &listing };
    job.fetch_all(&side_files(&listing, &plan))?;
    let names = weight_names(id, &listing.commit, &plan, &snapshot)?;
    job.fetch_all(&weight_files(id, &listing, &names)?)?;
    // Last, so that a download cut short leaves the branch at the commit that is complete.
    cache.write_tree(&listing, &events);
    cache.write_ref(revision, &listing.commit, &events);
    Ok(snapshot)
}

/// Brings one file into the cache and returns its path there. A file of a full commit hash that is cached needs no
/// network; for branches and tags the hub is asked, and the cache used with a warning if it cannot be reached.
///
/// # Errors
/// Any [`HubError`].
pub fn fetch_file(
    id: &str,
    kind: RepoType,
    revision: &str,
    path: &str,
    options: &HubOptions,
    progress: &dyn HubProgress,
) -> Result<PathBuf, HubError> {
    check_repo_id(id)?;
    check_revision(revision)?;
    check_file_name(id, path)?;
    let cache = RepoCache::new(options.cache(), kind, id);
    let cached = || cache.commit_of(revision).and_then(|commit| cache.find(&commit, path, None));
    let offline = || HubError::Offline {
        repo: id.to_owned(),
        revision: revision.to_owned(),
        cache: cache.folder(),
        missing: vec![path.to_owned()],
    };
    if options.offline {
        return cached().ok_or_else(offline);
    }
    if is_commit(revision)
        && let Some(file) = cached()
    {
        return Ok(file);
    }
    let events = Events::new(progress);
    let client = Client::new(options, &events)?;
    let meta = match client.head(kind, id, revision, path) {
        Ok(meta) => meta,
        Err(error @ HubError::Network { .. }) => return or_cached(error, cached().ok_or_else(offline), progress),
        Err(error) => return Err(error),
    };
    progress.planned(1, meta.size);
    let file = match cache.find(&meta.commit, path, Some(meta.size)) {
        Some(file) => {
            progress.cached(path, meta.size);
            file
        }
        None => {
            check_space(id, &cache, options.cache(), [(meta.blob.as_str(), meta.size)])?;
            client.download(Source { kind, repo: id, path }, &meta, &cache)?
        }
    };
    cache.write_ref(revision, &meta.commit, &events);
    Ok(file)
}

/// The files of a repository and the commit that `revision` means now; offline, what the cache knows about the commit
/// that it meant last.
///
/// # Errors
/// Any [`HubError`]; [`HubError::NotAHub`] also for repositories of 50,000 files or more, of which the hub lists only
/// some.
pub fn list_repo(
    id: &str,
    kind: RepoType,
    revision: &str,
    options: &HubOptions,
    progress: &dyn HubProgress,
) -> Result<RepoListing, HubError> {
    check_repo_id(id)?;
    check_revision(revision)?;
    if options.offline {
        let cache = RepoCache::new(options.cache(), kind, id);
        return cache.commit_of(revision).and_then(|commit| cache.read_tree(&commit)).ok_or_else(|| {
            let (repo, revision) = (id.to_owned(), revision.to_owned());
            HubError::Offline {
                repo,
                revision,
                cache: cache.folder(),
                missing: vec!["the list of its files".to_owned()],
            }
        });
    }
    let events = Events::new(progress);
    Client::new(options, &events)?.list(kind, id, revision)
}

/// The files of [`list_repo`].
///
/// # Errors
/// As [`list_repo`].
pub fn list_files(
    id: &str,
    kind: RepoType,
    revision: &str,
    options: &HubOptions,
    progress: &dyn HubProgress,
) -> Result<Vec<RemoteFile>, HubError> {
    list_repo(id, kind, revision, options, progress).map(|listing| listing.files)
}

/// What the cache has, after the hub could not be reached; the network's error if that is not everything.
fn or_cached(
    error: HubError,
    cached: Result<PathBuf, HubError>,
    progress: &dyn HubProgress,
) -> Result<PathBuf, HubError> {
    match cached {
        Ok(path) => {
            progress.warning(&format!("{error}; using what was downloaded earlier, `{}`", path.display()));
            Ok(path)
        }
        Err(_) => Err(error),
    }
}

/// The snapshot of a model if the cache holds all of it. Where the list of its files is not known (downloaded by an
/// older `huggingface_hub`), all of it is `config.json` and the weights. Licence and model card may be absent, with a
/// warning: other programs leave them out.
fn cached_model(id: &str, revision: &str, cache: &RepoCache, progress: &dyn HubProgress) -> Result<PathBuf, HubError> {
    let offline = |missing: Vec<String>| HubError::Offline {
        repo: id.to_owned(),
        revision: revision.to_owned(),
        cache: cache.folder(),
        missing,
    };
    let Some(commit) = cache.commit_of(revision) else {
        return Err(offline(vec!["config.json".to_owned(), "*.safetensors".to_owned()]));
    };
    let snapshot = cache.snapshot(&commit);
    let known = cache.read_tree(&commit);
    let listing = known.clone().unwrap_or_else(|| local_listing(&commit, &snapshot));
    let plan = match plan(id, &listing) {
        Ok(plan) => plan,
        // Without the hub's list, what is not here may be there.
        Err(_) if known.is_none() => {
            let wanted = [("config.json", "config.json"), (".safetensors", "*.safetensors")];
            let absent = |end: &str| !listing.files.iter().any(|file| file.path.ends_with(end));
            let missing: Vec<String> =
                wanted.iter().filter(|(end, _)| absent(end)).map(|(_, name)| (*name).to_owned()).collect();
            let index = || vec!["model.safetensors.index.json".to_owned()];
            return Err(offline(if missing.is_empty() { index() } else { missing }));
        }
        Err(error) => return Err(error),
    };
    let absent = |name: &str, size| cache.find(&commit, name, size).is_none();
    let (documents, mut missing): (Vec<String>, Vec<String>) = side_files(&listing, &plan)
        .into_iter()
        .filter(|file| absent(&file.path, file.size))
        .map(|file| file.path.clone())
        .partition(|path| is_document(path));
    match &plan {
        WeightPlan::Index(index) if missing.contains(index) => missing.push("the weights it names".to_owned()),
        _ => {
            let names = weight_names(id, &commit, &plan, &snapshot)?;
            let size = |name: &str| listing.files.iter().find(|file| file.path == name).and_then(|file| file.size);
            missing.extend(names.into_iter().filter(|name| absent(name, size(name))));
        }
    }
    if !missing.is_empty() {
        return Err(offline(missing));
    }
    if !documents.is_empty() {
        progress.warning(&format!("not in the cache of `{id}`, and left out: {}", documents.join(", ")));
    }
    Ok(snapshot)
}

/// The files at the top of a snapshot, as a listing without sizes.
fn local_listing(commit: &str, snapshot: &Path) -> RepoListing {
    let entries = fs::read_dir(snapshot).into_iter().flatten().flatten();
    let mut files: Vec<RemoteFile> = entries
        .filter(|entry| entry.path().is_file())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .map(|path| RemoteFile { path, size: None, sha256: None, blob_id: None })
        .collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    RepoListing { commit: commit.to_owned(), files }
}

/// Stops a download that cannot fit before it begins. Bytes that an earlier run left count as there.
fn check_space<'b>(
    id: &str,
    cache: &RepoCache,
    root: &Path,
    blobs: impl IntoIterator<Item = (&'b str, u64)>,
) -> Result<(), HubError> {
    let size_of = |path: PathBuf| fs::metadata(path).map_or(0, |meta| meta.len());
    let mut needed = 0u64;
    for (blob, size) in blobs {
        let have = size_of(cache.blob(blob)).max(size_of(cache.blob(&format!("{blob}.incomplete"))));
        needed = needed.saturating_add(size.saturating_sub(have));
    }
    match free_space(root) {
        Some(free) if free < needed => {
            Err(HubError::NoSpace { repo: id.to_owned(), cache: root.to_path_buf(), needed, free })
        }
        _ => Ok(()),
    }
}

/// The download of one model.
struct Job<'a> {
    client: &'a Client<'a>,
    cache: &'a RepoCache,
    id: &'a str,
    listing: &'a RepoListing,
}

impl Job<'_> {
    /// Downloads `files`, several at a time. The first error stops the others.
    fn fetch_all(&self, files: &[&RemoteFile]) -> Result<(), HubError> {
        let events = self.client.events;
        let bytes = files.iter().filter_map(|file| file.size).fold(0, u64::saturating_add);
        events.to.planned(files.len(), bytes);
        let options = self.client.options;
        let absent = files.iter().filter(|file| self.cache.find(&self.listing.commit, &file.path, file.size).is_none());
        let blobs =
            absent.filter_map(|file| Some((file.sha256.as_ref().or(file.blob_id.as_ref())?.as_str(), file.size?)));
        check_space(self.id, self.cache, options.cache(), blobs)?;

        let next = AtomicUsize::new(0);
        let first_error = Mutex::new(None);
        let work = || {
            while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Err(error) = self.fetch(file) {
                    // Those that this one stops come later, with nothing to tell.
                    let mut slot = first_error.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                    slot.get_or_insert(error);
                    events.stop();
                    return;
                }
            }
        };
        thread::scope(|scope| {
            for _ in 1..options.parallel.clamp(1, 32).min(files.len()) {
                scope.spawn(work);
            }
            work();
        });
        match first_error.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn fetch(&self, file: &RemoteFile) -> Result<(), HubError> {
        let commit = &self.listing.commit;
        self.client.events.check()?;
        if let Some(path) = self.cache.find(commit, &file.path, file.size) {
            let bytes = file.size.unwrap_or_else(|| fs::metadata(path).map_or(0, |meta| meta.len()));
            self.client.events.to.cached(&file.path, bytes);
            return Ok(());
        }
        let meta = match (file.sha256.as_ref().or(file.blob_id.as_ref()), file.size) {
            (Some(blob), Some(size)) => {
                FileMeta { commit: commit.clone(), blob: blob.clone(), size, sha256: file.sha256.clone() }
            }
            // A mirror that lists names only.
            _ => self.client.head(RepoType::Model, self.id, commit, &file.path)?,
        };
        let source = Source { kind: RepoType::Model, repo: self.id, path: &file.path };
        self.client.download(source, &meta, self.cache).map(drop)
    }
}
