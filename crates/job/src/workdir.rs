//! The folder a result appears in.
//!
//! Work happens in `<work-dir>/.lite`; finished files are renamed out of it, `config.json` last, so a
//! folder without `config.json` is never mistaken for a checkpoint.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::{JobError, Recipe};

pub(crate) const JOB_FOLDER: &str = ".lite";
/// What a run finished: see [`crate::journal`].
pub(crate) const JOURNAL: &str = "journal.jsonl";
/// There while files are being published: until it is gone, what else is in the folder is this run's.
const PUBLISHING: &str = "publishing";
/// There once all of them are.
const PUBLISHED: &str = "published";
/// The run's log: no part of the checkpoint, so no folder counts as used for it alone.
const LOG_FILE: &str = "lite.log.jsonl";
/// What an earlier run told of its result; the first two are always together.
const DOCUMENTS: [&str; 4] = ["report.json", "report.html", "README.md", "README.base.md"];

/// A work directory, locked for this run.
#[derive(Debug)]
pub struct WorkDir {
    root: PathBuf,
    job: PathBuf,
    created: bool,
    /// Whether an earlier run's log is there.
    logged: bool,
    /// Held for as long as the run lives; the system releases it when the process dies.
    _lock: File,
}

impl WorkDir {
    /// Whether `root` could hold the result, before anything is read or written.
    ///
    /// # Errors
    /// If it is a file, is or contains the input or lies inside it, or holds something that
    /// `overwrite` does not cover.
    pub fn check(root: &Path, model: Option<&Path>, overwrite: bool) -> Result<(), JobError> {
        let shown = root.display();
        if let Some(model) = model {
            let (out, input) = (resolve(root), resolve(model));
            if out == input {
                return Err(JobError::Usage(format!(
                    "the work directory `{shown}` is the model itself; choose another --work-dir"
                )));
            }
            if out.starts_with(&input) {
                return Err(JobError::Usage(format!(
                    "the work directory `{shown}` lies inside the model folder `{}`; choose one outside",
                    model.display()
                )));
            }
            if input.starts_with(&out) && root.exists() && !overwrite_leaves(&out, &input) {
                return Err(JobError::Usage(format!(
                    "the model `{}` lies inside the work directory `{shown}`; choose another --work-dir",
                    model.display()
                )));
            }
        }
        let kind = match fs::symlink_metadata(root) {
            Ok(meta) if meta.is_symlink() => fs::metadata(root).map_err(JobError::io("read", root))?,
            Ok(meta) => meta,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(JobError::io("read", root)(error)),
        };
        if !kind.is_dir() {
            return Err(JobError::Usage(format!("the work directory `{shown}` is a file; choose another --work-dir")));
        }
        if root.join(JOB_FOLDER).join(PUBLISHING).exists() {
            return Ok(());
        }
        let entries = entries(root)?;
        let foreign = entries.iter().filter(|name| !matches!(name.as_str(), JOB_FOLDER | LOG_FILE)).count();
        if foreign == 0 {
            return Ok(());
        }
        let is_checkpoint = entries.iter().any(|name| name == "config.json");
        match (overwrite, is_checkpoint) {
            (false, true) => Err(JobError::Usage(format!(
                "the work directory `{shown}` already holds a checkpoint; add --overwrite to replace it, or choose another"
            ))),
            (false, false) => Err(JobError::Usage(format!(
                "the work directory `{shown}` is not empty ({foreign} entries); choose a new or empty folder"
            ))),
            (true, false) => Err(JobError::Usage(format!(
                "--overwrite replaces a checkpoint, and `{shown}` holds none (no config.json among {foreign} entries); choose a new or empty folder"
            ))),
            (true, true) => Ok(()),
        }
    }

    /// [`WorkDir::check`] before the model was looked for: against its name, where that is a folder.
    ///
    /// # Errors
    /// As [`WorkDir::check`].
    pub fn check_named(recipe: &Recipe) -> Result<(), JobError> {
        let model = Path::new(&recipe.model);
        Self::check(&recipe.work_dir, Some(model).filter(|model| model.is_dir()), recipe.overwrite)
    }

    /// Creates and locks the folder. Remains of a run that died are cleared.
    ///
    /// # Errors
    /// As [`WorkDir::check`]; [`JobError::State`] if another run holds the lock, or one that can go on left its blocks.
    pub fn open(root: &Path, model: Option<&Path>, overwrite: bool) -> Result<(Self, bool), JobError> {
        let (this, remains) = Self::open_kept(root, model, overwrite)?;
        if this.job.join("blocks").join("0000.safetensors").exists() {
            let shown = root.display();
            return Err(JobError::State(format!(
                "`{shown}` holds finished blocks of an interrupted run; go on with `lite resume {shown}`, remove them with `lite clean {shown}`, or choose another --work-dir"
            )));
        }
        this.clear()?;
        Ok((this, remains))
    }

    /// Creates and locks the folder; of a run that died, only the staged files are cleared. Beside it whether there are
    /// remains of one.
    ///
    /// # Errors
    /// As [`WorkDir::check`]; [`JobError::State`] if another run holds the lock.
    pub(crate) fn open_kept(root: &Path, model: Option<&Path>, overwrite: bool) -> Result<(Self, bool), JobError> {
        Self::check(root, model, overwrite)?;
        let created = !root.exists();
        let job = root.join(JOB_FOLDER);
        fs::create_dir_all(&job).map_err(JobError::io("create", &job))?;
        let lock = lock(root, &job)?;
        let remains = entries(&job)?.iter().any(|name| name != "lock");
        let logged = root.join(LOG_FILE).exists();
        let this = Self { root: root.to_owned(), job, created, logged, _lock: lock };
        if this.staging().exists() {
            remove(&this.staging())?;
        }
        fs::create_dir(this.staging()).map_err(JobError::io("create", this.staging()))?;
        Ok((this, remains))
    }

    /// Removes what an earlier run left, but for the lock and the marker of files being published.
    pub(crate) fn clear(&self) -> Result<(), JobError> {
        for name in entries(&self.job)? {
            if !matches!(name.as_str(), "lock" | "out" | PUBLISHING) {
                remove(&self.job.join(name))?;
            }
        }
        Ok(())
    }

    /// The folder that runs work in.
    pub(crate) fn job_folder(&self) -> &Path {
        &self.job
    }

    /// Where the files of the result are written before they are published.
    pub fn staging(&self) -> PathBuf {
        self.job.join("out")
    }

    /// Where the log of the run belongs. It stays after [`commit`](Self::commit) and when the process dies;
    /// [`abandon`](Self::abandon) removes it unless it was there before.
    pub fn log_file(&self) -> PathBuf {
        self.root.join(LOG_FILE)
    }

    /// Where hidden states go when they do not fit the memory budget.
    pub fn spool_file(&self, name: &str) -> PathBuf {
        self.job.join(format!("{name}.f32"))
    }

    /// Publishes the staged files and removes the job folder.
    ///
    /// # Errors
    /// [`JobError::Io`]; what was published so far lacks `config.json`.
    pub fn commit(self) -> Result<(), JobError> {
        let staging = self.staging();
        let marker = self.job.join(PUBLISHING);
        // One that ended in here may have left some of the old files, its config.json gone already.
        let interrupted = marker.exists();
        File::create(&marker).and_then(|file| file.sync_all()).map_err(JobError::io("create", &marker))?;
        sync_folder(&self.job)?;
        // An old checkpoint stops being one before its files are replaced.
        let old_config = self.root.join("config.json");
        let replaces = old_config.exists();
        if replaces {
            remove(&old_config)?;
        }
        if replaces || interrupted {
            for name in entries(&self.root)? {
                if name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json") {
                    remove(&self.root.join(name))?;
                }
            }
            self.remove_documents(interrupted)?;
        }
        let mut names = entries(&staging)?;
        names.sort_by_key(|name| (name == "config.json", name.clone()));
        for name in names {
            let (from, to) = (staging.join(&name), self.root.join(&name));
            if to.is_dir() {
                remove(&to)?;
            }
            if name == "config.json" {
                sync_folder(&self.root)?;
            }
            fs::rename(&from, &to).map_err(JobError::io("publish", &to))?;
        }
        sync_folder(&self.root)?;
        let done = self.job.join(PUBLISHED);
        fs::rename(&marker, &done).map_err(JobError::io("rename", &done))?;
        remove_published(&self.job)
    }

    /// Removes what an earlier run told of the checkpoint that is being replaced, if one did; what tells so goes last, so
    /// that one of them is there where this was interrupted.
    fn remove_documents(&self, interrupted: bool) -> Result<(), JobError> {
        let there = |name: &&str| self.root.join(name).is_file();
        let telling = DOCUMENTS[..2].iter().filter(|name| there(name)).count();
        if telling < if interrupted { 1 } else { 2 } {
            return Ok(());
        }
        DOCUMENTS.iter().rev().filter(|name| there(name)).try_for_each(|name| remove(&self.root.join(name)))
    }

    /// Removes what a run left in `root` that died after it had published everything. Best effort: it is in nobody's way.
    pub fn finish_published(root: &Path) {
        let job = root.join(JOB_FOLDER);
        let bare = || entries(&job).is_ok_and(|names| names.iter().all(|name| name == "lock"));
        if root.join("config.json").exists()
            && (job.join(PUBLISHED).exists() || bare())
            && let Ok(_lock) = lock(root, &job)
        {
            let _ = remove_published(&job);
        }
    }

    /// Ends a run whose finished blocks are worth keeping. Best effort, as [`abandon`](Self::abandon).
    pub(crate) fn keep(self) {
        let _ = fs::remove_dir_all(self.staging());
    }

    /// Removes what a run that ended or died left in `root`, but for its log; a result is never touched.
    ///
    /// # Errors
    /// [`JobError::State`] if nothing is there, or the run is alive; [`JobError::Io`].
    pub fn clean(root: &Path) -> Result<(), JobError> {
        let job = root.join(JOB_FOLDER);
        if !fs::symlink_metadata(&job).is_ok_and(|meta| meta.is_dir()) {
            return Err(JobError::State(format!(
                "`{}` holds nothing of an interrupted run; give the --work-dir of one",
                root.display()
            )));
        }
        let _lock = lock(root, &job)?;
        remove(&job)
    }

    /// Removes everything this run made. Best effort: the failure that led here matters more.
    pub fn abandon(self) {
        let _ = fs::remove_dir_all(&self.job);
        if !self.logged {
            let _ = fs::remove_file(self.log_file());
        }
        if self.created {
            // Only if empty.
            let _ = fs::remove_dir(&self.root);
        }
    }
}

/// Takes the lock; the system gave back that of a process that died.
fn lock(root: &Path, job: &Path) -> Result<File, JobError> {
    let path = job.join("lock");
    let lock =
        File::options().create(true).write(true).truncate(false).open(&path).map_err(JobError::io("open", &path))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(fs::TryLockError::WouldBlock) => Err(JobError::State(format!(
            "another run is working in `{}`; wait for it, or choose another --work-dir",
            root.display()
        ))),
        Err(fs::TryLockError::Error(error)) => Err(JobError::io("lock", &path)(error)),
    }
}

/// `path`, or the closest folder above it that exists.
pub(crate) fn nearest_existing(path: &Path) -> Option<PathBuf> {
    let absolute = std::path::absolute(path).ok()?;
    absolute.ancestors().find(|p| p.exists()).map(Path::to_owned)
}

/// Whether the input, somewhere below `out`, is untouched by replacing the checkpoint in `out`.
fn overwrite_leaves(out: &Path, input: &Path) -> bool {
    input != out && input.strip_prefix(out).is_ok_and(|rest| !rest.starts_with(JOB_FOLDER))
}

/// An absolute path without links, of a path that need not exist yet.
fn resolve(path: &Path) -> PathBuf {
    let mut missing = Vec::new();
    let mut at = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    loop {
        if let Ok(real) = at.canonicalize() {
            return missing.iter().rev().fold(real, |path, name| path.join(name));
        }
        match (at.file_name().map(ToOwned::to_owned), at.parent().map(Path::to_owned)) {
            (Some(name), Some(parent)) => {
                missing.push(name);
                at = parent;
            }
            _ => return path.to_owned(),
        }
    }
}

pub(crate) fn entries(dir: &Path) -> Result<Vec<String>, JobError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(JobError::io("list", dir))? {
        let entry = entry.map_err(JobError::io("list", dir))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn remove(path: &Path) -> Result<(), JobError> {
    let result = if path.is_dir() && !path.is_symlink() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    result.map_err(JobError::io("remove", path))
}

/// Removes a job folder whose files are published, the sign of that last.
fn remove_published(job: &Path) -> Result<(), JobError> {
    for name in entries(job)?.iter().filter(|name| *name != PUBLISHED) {
        remove(&job.join(name))?;
    }
    remove(job)
}

fn sync_folder(path: &Path) -> Result<(), JobError> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(JobError::io("sync", path))
}

#[cfg(test)]
mod tests;
