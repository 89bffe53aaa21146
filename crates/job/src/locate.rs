//! From a name to files on this machine.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lite_calib::{DatasetFetcher, FetchError};
use lite_model::hub::{HubError, HubErrorKind, HubOptions, HubProgress, RepoType, fetch_file, resolve_model};

use crate::{ErrorKind, Event, JobError, Observer, Recipe};

/// The folder of the recipe's model, downloaded if it is a hub id.
///
/// # Errors
/// [`JobError::Hub`]; [`JobError::Interrupted`] once `cancel` is set.
pub fn locate_model(recipe: &Recipe, observer: &dyn Observer, cancel: &AtomicBool) -> Result<PathBuf, JobError> {
    if recipe.model.is_empty() {
        return Err(JobError::Usage(
            "the model name is empty: give a folder with config.json, or `org/name`".to_owned(),
        ));
    }
    let options = options(recipe)?;
    with_progress(observer, cancel, |progress| resolve_model(&recipe.model, &options, progress)).map_err(|error| {
        match error {
            HubError::Cancelled => JobError::Interrupted(recipe.work_dir.clone()),
            other => JobError::Hub(other),
        }
    })
}

fn options(recipe: &Recipe) -> Result<HubOptions, HubError> {
    let mut options = HubOptions::from_env()?;
    options.revision = recipe.revision.clone().or(options.revision);
    options.download_dir = recipe.download_dir.clone().or(options.download_dir);
    Ok(options)
}

/// Fetches calibration files from the hub, as models are.
pub struct HubFetcher<'a> {
    options: HubOptions,
    observer: &'a dyn Observer,
    cancel: &'a AtomicBool,
}

impl std::fmt::Debug for HubFetcher<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubFetcher").field("options", &self.options).finish_non_exhaustive()
    }
}

impl<'a> HubFetcher<'a> {
    /// A fetcher with the settings of the environment and the recipe.
    ///
    /// # Errors
    /// [`JobError::Hub`] for a setting that cannot be used.
    pub fn new(recipe: &Recipe, observer: &'a dyn Observer, cancel: &'a AtomicBool) -> Result<Self, JobError> {
        let mut options = options(recipe)?;
        if recipe.calib.dataset.is_none() {
            // The default set has a stand-in: a machine without a route should not wait long for it.
            options.retry.tries = 2;
            options.timeouts.connect = Duration::from_secs(5);
        }
        Ok(Self { options, observer, cancel })
    }
}

impl DatasetFetcher for HubFetcher<'_> {
    fn fetch(&self, repo: &str, revision: Option<&str>, file: &str) -> Result<PathBuf, FetchError> {
        let revision = revision.unwrap_or("main");
        // Only the options go to the worker: observers stay on this thread.
        let options = &self.options;
        with_progress(self.observer, self.cancel, |progress| {
            fetch_file(repo, RepoType::Dataset, revision, file, options, progress)
        })
        .map_err(|error| match error.kind() {
            HubErrorKind::Offline => FetchError::Offline(error.to_string()),
            HubErrorKind::NotFound | HubErrorKind::Auth => FetchError::NotFound(error.to_string()),
            _ => FetchError::Failed(error.to_string()),
        })
    }

    fn offline(&self) -> bool {
        self.options.offline
    }
}

/// A message from a download thread.
enum Message {
    Progress { file: String, done: u64, total: u64 },
    Note(String),
    Warning(String),
}

/// Downloads run on threads of their own, observers on ours: progress is passed through a queue.
struct Queue<'a> {
    cancel: &'a AtomicBool,
    state: Mutex<QueueState>,
}

#[derive(Default)]
struct QueueState {
    messages: Vec<Message>,
    files: std::collections::BTreeMap<String, (u64, u64)>,
}

impl Queue<'_> {
    fn update(&self, file: &str, change: impl FnOnce(&mut (u64, u64))) {
        let Ok(mut state) = self.state.lock() else { return };
        let entry = state.files.entry(file.to_owned()).or_default();
        change(entry);
        let (done, total) = *entry;
        state.messages.push(Message::Progress { file: file.to_owned(), done, total });
    }

    fn push(&self, message: Message) {
        if let Ok(mut state) = self.state.lock() {
            state.messages.push(message);
        }
    }
}

impl HubProgress for Queue<'_> {
    fn started(&self, file: &str, have: u64, total: u64) {
        self.update(file, |entry| *entry = (have, total));
    }

    fn advanced(&self, file: &str, bytes: u64) {
        self.update(file, |entry| entry.0 += bytes);
    }

    fn retrying(&self, reason: &str, delay: Duration) {
        self.push(Message::Note(format!("{reason}; trying again in {:.0} s", delay.as_secs_f64().ceil())));
    }

    fn warning(&self, message: &str) {
        self.push(Message::Warning(message.to_owned()));
    }

    fn cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }
}

fn with_progress<T: Send>(
    observer: &dyn Observer,
    cancel: &AtomicBool,
    work: impl FnOnce(&dyn HubProgress) -> Result<T, HubError> + Send,
) -> Result<T, HubError> {
    let queue = Queue { cancel, state: Mutex::default() };
    let drain = || {
        let messages = queue.state.lock().map(|mut state| std::mem::take(&mut state.messages)).unwrap_or_default();
        for message in messages {
            match message {
                Message::Progress { file, done, total } => {
                    observer.event(Event::Download { file: &file, done, total: Some(total) });
                }
                Message::Note(text) => observer.event(Event::Note(&text)),
                Message::Warning(text) => observer.event(Event::Warning(&text)),
            }
        }
    };
    let result = std::thread::scope(|scope| {
        let worker = scope.spawn(|| work(&queue));
        while !worker.is_finished() {
            std::thread::sleep(Duration::from_millis(20));
            drain();
        }
        worker.join()
    });
    drain();
    match result {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// The exit-code class of a hub failure.
pub(crate) fn hub_error_kind(error: &HubError) -> ErrorKind {
    match error.kind() {
        HubErrorKind::Input => ErrorKind::Input,
        HubErrorKind::Space => ErrorKind::Resources,
        HubErrorKind::Cancelled => ErrorKind::Interrupted,
        HubErrorKind::Io
        | HubErrorKind::Network
        | HubErrorKind::Auth
        | HubErrorKind::NotFound
        | HubErrorKind::Offline => ErrorKind::Io,
    }
}
