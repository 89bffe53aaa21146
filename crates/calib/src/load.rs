//! From a request to windows: which data is meant, and where it is.

use std::path::{Path, PathBuf};

use crate::builtin;
use crate::construct::Cutter;
use crate::document::{Document, Fields};
use crate::error::CalibError;
use crate::registry::{Construction, DatasetSpec, find, known_names};
use crate::source::{Collector, Limits, SourceFile, files_of, read_file};
use crate::stream::{JOIN, Refused, text_of, tokenise};
use crate::tokenizer::ModelTokenizer;
use crate::windows::{SourceInfo, Windows, consecutive, too_little};

/// What to calibrate on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CalibRequest {
    /// A registered name ([`registry`](crate::registry)) or the path of a file or folder. A name wins over a file of
    /// that name: `./c4` is the file.
    pub dataset: String,
    /// Windows wanted, 1 to 1 000 000.
    pub samples: usize,
    /// Tokens per window, at least 8.
    pub seqlen: usize,
    /// Seed of all random draws; LMDeploy's is 0.
    pub seed: u64,
    /// Whether the user named the set. A default that cannot be fetched is replaced by `builtin`, with a note.
    pub explicit: bool,
}

/// Why a file of the hub could not be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FetchError {
    /// The network may not be used, or is not there, and the file is not in the cache.
    #[error("offline, and not in the cache ({0})")]
    Offline(String),
    /// The hub has no such repository or file, or does not show it without a token.
    #[error("not found ({0})")]
    NotFound(String),
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}

/// Gets dataset files of the Hugging Face hub, from its cache or the network.
pub trait DatasetFetcher {
    /// The local path of `file` of the dataset repository `repo` at `revision` (default: main branch).
    ///
    /// # Errors
    /// The file cannot be had.
    fn fetch(&self, repo: &str, revision: Option<&str>, file: &str) -> Result<PathBuf, FetchError>;

    /// Whether the network is known to be out of reach, so that only the cache can answer.
    fn offline(&self) -> bool;
}

/// Longest request, in windows; more is surely a slip.
const MAX_SAMPLES: usize = 1_000_000;
/// Longest request, in tokens: 16 GiB of ids.
const MAX_TOKENS: usize = 1 << 32;
const MIN_SEQLEN: usize = 8;

fn check(samples: usize, seqlen: usize) -> Result<(), CalibError> {
    let wrong = if seqlen < MIN_SEQLEN {
        format!("a window of {seqlen} tokens is too short to calibrate on; use --calib-seqlen {MIN_SEQLEN} or more")
    } else if samples == 0 {
        "0 windows were asked for; use --calib-samples 1 or more".to_owned()
    } else if samples > MAX_SAMPLES {
        format!("{samples} windows are more than the limit of {MAX_SAMPLES}; use --calib-samples 128, say")
    } else if samples.checked_mul(seqlen).is_none_or(|tokens| tokens > MAX_TOKENS) {
        format!("{samples} windows of {seqlen} tokens are more than 2^32 tokens; use smaller numbers")
    } else {
        return Ok(());
    };
    Err(CalibError::BadRequest(wrong))
}

/// The calibration windows of a request.
///
/// # Errors
/// The request is out of range, the dataset is unknown, cannot be had or read, has too little text, or needs a chat
/// template the tokenizer does not have.
pub fn load(
    request: &CalibRequest,
    tokenizer: &ModelTokenizer,
    fetch: &dyn DatasetFetcher,
) -> Result<Windows, CalibError> {
    check(request.samples, request.seqlen)?;
    let Some(spec) = find(&request.dataset)? else {
        return local(&request.dataset, tokenizer, request.samples, request.seqlen, true);
    };
    let cutter =
        Cutter { spec: &spec, tokenizer, samples: request.samples, seqlen: request.seqlen, seed: request.seed };
    if spec.construction == Construction::Builtin {
        return built_in(tokenizer, request.samples, request.seqlen);
    }
    if spec.construction == Construction::RandomTokens {
        let (tokens, tokens_available) = cutter.random_tokens()?;
        let description = format!("{} (seed {})", spec.description, request.seed);
        let source =
            SourceInfo { name: spec.name.clone(), description, files: Vec::new(), documents: 0, tokens_available };
        return Ok(Windows::new(tokens, source, Vec::new()));
    }
    let files = match fetch_all(&spec, fetch, false) {
        Ok(files) => files,
        Err(CalibError::Fetch { reason, .. }) if !request.explicit => {
            return stand_in(&spec.name, &reason, fetch.offline(), tokenizer, request);
        }
        Err(e) => return Err(e),
    };
    let fields = Fields::of(spec.content, spec.column.as_deref(), &spec.roles);
    let (documents, files) = read_all(&files, &fields, spec.rows)?;
    let (tokens, tokens_available) = match spec.construction {
        Construction::RandomWindows => cutter.random_windows(&documents)?,
        Construction::RandomDocuments => cutter.random_documents(&documents)?,
        _ => cutter.concatenate(&documents)?,
    };
    let description = describe(&spec, request.seed);
    let source = SourceInfo { name: spec.name, description, files, documents: documents.len(), tokens_available };
    Ok(Windows::new(tokens, source, Vec::new()))
}

/// Evaluation windows from text that is in no calibration corpus of this program: at most `windows` consecutive windows of
/// `seqlen` tokens. If the text has fewer than `seqlen` tokens, one window of all of them.
///
/// # Errors
/// The numbers are out of range, or the tokenizer fails.
pub fn held_out(tokenizer: &ModelTokenizer, windows: usize, seqlen: usize) -> Result<Windows, CalibError> {
    check(windows, seqlen)?;
    let (documents, files) = builtin::held_out()?;
    let stream = tokenise(&documents, tokenizer, "held-out", Refused::Error, usize::MAX)?;
    let found = stream.ids.len();
    if found < MIN_SEQLEN {
        return Err(too_little("held-out", found as u64, windows, seqlen));
    }
    let mut notes = stream.notes;
    let length = seqlen.min(found);
    if length < seqlen {
        notes.push(format!("the held-out text gives one window of {found} tokens, not {seqlen}"));
    }
    let tokens = consecutive(&stream.ids, windows, length);
    let source = SourceInfo {
        name: "held-out".to_owned(),
        description: "the held-out text inside this program, consecutive windows".to_owned(),
        files,
        documents: documents.len(),
        tokens_available: found as u64,
    };
    Ok(Windows::new(tokens, source, notes))
}

/// Evaluation windows of a text the user names: at most `windows` consecutive ones from its start, tokenised once.
///
/// A registered name means that set's evaluation split (`wikitext2`: test, rows joined with two newlines, the usual
/// perplexity protocol); `builtin` means [`held_out`].
///
/// # Errors
/// As [`load`]; a set without an evaluation split is unsupported; a text that gives no window is too short.
pub fn eval_windows(
    path_or_name: &str,
    tokenizer: &ModelTokenizer,
    windows: usize,
    seqlen: usize,
    fetch: &dyn DatasetFetcher,
) -> Result<Windows, CalibError> {
    check(windows, seqlen)?;
    let Some(spec) = find(path_or_name)? else {
        return local(path_or_name, tokenizer, windows, seqlen, false);
    };
    if spec.construction == Construction::Builtin {
        return held_out(tokenizer, windows, seqlen);
    }
    has_eval_split(&spec)?;
    let files = fetch_all(&spec, fetch, true)?;
    let fields = Fields::of(spec.content, spec.column.as_deref(), &spec.roles);
    let (documents, files) = read_all(&files, &fields, spec.eval_rows)?;
    let join = spec.eval_join.as_deref().unwrap_or(JOIN);
    let text = documents.iter().map(text_of).collect::<Vec<_>>().join(join);
    let ids = tokenizer.encode(&text, true)?;
    let split = spec.eval_split.as_deref().unwrap_or("evaluation");
    let description = format!("{} {split} split, consecutive windows", spec.name);
    let source = SourceInfo {
        name: spec.name,
        description,
        files,
        documents: documents.len(),
        tokens_available: ids.len() as u64,
    };
    some_windows(&ids, windows, seqlen, source, Vec::new())
}

/// Refuses a set without an evaluation split.
pub(crate) fn has_eval_split(spec: &DatasetSpec) -> Result<(), CalibError> {
    if spec.sources.iter().all(|s| s.eval_files.is_empty()) {
        return Err(CalibError::Unsupported(format!(
            "`{}` has no evaluation split; use wikitext2, ptb, c4, builtin or the path of a text file",
            spec.name
        )));
    }
    Ok(())
}

/// As many windows as there are, at least one.
fn some_windows(
    ids: &[u32],
    windows: usize,
    seqlen: usize,
    source: SourceInfo,
    mut notes: Vec<String>,
) -> Result<Windows, CalibError> {
    let tokens = consecutive(ids, windows, seqlen);
    if tokens.is_empty() {
        return Err(too_little(&source.name, ids.len() as u64, 1, seqlen));
    }
    if tokens.len() < windows {
        notes.push(format!("`{}` gives {} windows of {seqlen} tokens, not {windows}", source.name, tokens.len()));
    }
    Ok(Windows::new(tokens, source, notes))
}

/// Consecutive windows from a file or folder; `all`: fewer than asked for is an error.
fn local(
    name: &str,
    tokenizer: &ModelTokenizer,
    samples: usize,
    seqlen: usize,
    all: bool,
) -> Result<Windows, CalibError> {
    let LocalText { documents, files, notes } = local_documents(name)?;
    let needed = samples.saturating_mul(seqlen);
    let mut stream = tokenise(&documents, tokenizer, name, Refused::Error, needed)?;
    stream.notes.extend(notes);
    let found = stream.ids.len();
    if all && found < needed {
        return Err(too_little(name, found as u64, samples, seqlen));
    }
    let source = SourceInfo {
        name: name.to_owned(),
        description: format!("`{name}`, consecutive windows from the start"),
        files,
        documents: documents.len(),
        tokens_available: found as u64,
    };
    some_windows(&stream.ids, samples, seqlen, source, stream.notes)
}

/// What a file or folder holds.
pub(crate) struct LocalText {
    pub(crate) documents: Vec<Document>,
    pub(crate) files: Vec<SourceFile>,
    /// What there is to say about them.
    pub(crate) notes: Vec<String>,
}

/// The documents of a file or folder.
pub(crate) fn local_documents(name: &str) -> Result<LocalText, CalibError> {
    let path = Path::new(name);
    if name.contains("://") {
        return Err(CalibError::Unsupported(format!("`{name}` is an address; download the file and pass its path")));
    }
    if !path.try_exists().map_err(|e| CalibError::io(path, e))? {
        return Err(CalibError::UnknownDataset { name: name.to_owned(), known: known_names()? });
    }
    let (paths, passed) = files_of(path)?;
    let named: Vec<_> = paths.into_iter().map(|p| (p.display().to_string(), p)).collect();
    let (documents, files) = read_all(&named, &Fields::Any, None)?;
    let mut notes = Vec::new();
    if !passed.is_empty() {
        notes.push(format!("{} files of the folder were passed over: {}", passed.len(), list(&passed)));
    }
    Ok(LocalText { documents, files, notes })
}

/// The built-in corpus in place of a default set that cannot be had; one line says both facts.
fn stand_in(
    name: &str,
    reason: &str,
    offline: bool,
    tokenizer: &ModelTokenizer,
    request: &CalibRequest,
) -> Result<Windows, CalibError> {
    let mut windows = built_in(tokenizer, request.samples, request.seqlen)?;
    let count = windows.tokens.len();
    let all = if count < request.samples {
        format!(", all it gives (of {} asked for)", request.samples)
    } else {
        String::new()
    };
    let reason = if offline { "offline" } else { reason };
    // Replaces the corpus's own note on its length.
    windows.notes.retain(|note| !note.starts_with(ALL_IT_GIVES));
    let note = format!(
        "`{name}` cannot be fetched ({reason}): calibrating on the built-in corpus instead, {count} windows of {} tokens{all}",
        request.seqlen
    );
    windows.notes.insert(0, note);
    Ok(windows)
}

/// How the note on a short built-in corpus begins.
const ALL_IT_GIVES: &str = "all the built-in corpus gives";

fn built_in(tokenizer: &ModelTokenizer, samples: usize, seqlen: usize) -> Result<Windows, CalibError> {
    let (documents, files) = builtin::documents()?;
    let needed = samples.saturating_mul(seqlen);
    let stream = tokenise(&documents, tokenizer, "builtin", Refused::Skip, needed)?;
    let tokens = consecutive(&stream.ids, samples, seqlen);
    let found = stream.ids.len() as u64;
    if tokens.is_empty() {
        return Err(too_little("builtin", found, 1, seqlen));
    }
    let mut notes = stream.notes;
    if tokens.len() < samples {
        notes.push(format!("{ALL_IT_GIVES}: {} windows of {seqlen} tokens, {samples} were asked for", tokens.len()));
    }
    let source = SourceInfo {
        name: "builtin".to_owned(),
        description: "the corpora inside this program (encyclopedic, newswire, web and chat text), consecutive windows"
            .to_owned(),
        files,
        documents: documents.len(),
        tokens_available: found,
    };
    Ok(Windows::new(tokens, source, notes))
}

fn list(names: &[String]) -> String {
    let shown = names.iter().take(5).map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
    if names.len() > 5 { format!("{shown}, …") } else { shown }
}

/// One line for reports.
fn describe(spec: &DatasetSpec, seed: u64) -> String {
    let how = match spec.construction {
        Construction::RandomWindows => "random windows of the joined text",
        Construction::RandomDocuments => "random windows of random documents",
        Construction::Concatenate => "consecutive windows of the shuffled documents",
        Construction::RandomTokens | Construction::Builtin => "",
    };
    format!("{}; {how}, seed {seed}", spec.description)
}

/// All files of a set from the first place that has them: names inside the repository, and local paths.
pub(crate) fn fetch_all(
    spec: &DatasetSpec,
    fetch: &dyn DatasetFetcher,
    eval: bool,
) -> Result<Vec<(String, PathBuf)>, CalibError> {
    let mut first: Option<CalibError> = None;
    for source in &spec.sources {
        let names = if eval { &source.eval_files } else { &source.files };
        if names.is_empty() {
            continue;
        }
        let mut failed = None;
        let mut files = Vec::new();
        for file in names {
            match fetch.fetch(&source.repo, source.revision.as_deref(), file) {
                Ok(path) => files.push((format!("{}/{file}", source.repo), path)),
                Err(e) => {
                    failed = Some((file, e));
                    break;
                }
            }
        }
        let Some((file, e)) = failed else { return Ok(files) };
        let unreachable = matches!(e, FetchError::Failed(_));
        // The first place is the one to name: the others are older names and mirrors.
        first.get_or_insert_with(|| CalibError::Fetch {
            name: spec.name.clone(),
            repo: source.repo.clone(),
            revision: source.revision.as_ref().map(|r| format!(" --revision {r}")).unwrap_or_default(),
            file: file.clone(),
            reason: if fetch.offline() { format!("the hub is offline: {e}") } else { e.to_string() },
        });
        // A hub that does not answer will not answer for another name either.
        if unreachable {
            break;
        }
    }
    Err(first.unwrap_or_else(|| CalibError::Unsupported(format!("`{}` has no files on the hub", spec.name))))
}

/// All documents of some files, and the files with their hashes.
pub(crate) fn read_all(
    files: &[(String, PathBuf)],
    fields: &Fields,
    rows: Option<usize>,
) -> Result<(Vec<Document>, Vec<SourceFile>), CalibError> {
    let mut into = Collector::new(Limits::default(), rows);
    let read = files.iter().map(|(name, path)| read_file(path, name, fields, &mut into));
    let read = read.collect::<Result<_, _>>()?;
    Ok((into.documents, read))
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
