//! What a run finished, in its job folder, so that the next one goes on there.
//!
//! `journal.jsonl` has one entry a line, brought to disk before the run goes on: first what run this is, then each
//! finished block with the SHA-256 of its [record](crate::record), and now and then the hidden states behind a block.
//! Every line carries a hash of itself. Whatever is damaged, with all that comes after it, counts as not done.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lite_model::atomic_write;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::hidden::HiddenStates;
use crate::identity::{Identity, differences, hex};
use crate::record::{Record, Recorded, decode};
use crate::workdir::{JOURNAL, WorkDir};
use crate::{JobError, Plan, Recipe};

/// Version of these files.
const FORMAT: u32 = 1;
/// Longest journal that is read.
const MOST: u64 = 64 << 20;
/// Free bytes that saved hidden states leave on the disk.
const MARGIN: u64 = 256 << 20;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Entry {
    /// What run this is.
    Run { format: u32, identity: BTreeMap<String, String>, command: Vec<String>, directory: PathBuf },
    /// A block is finished.
    Block { index: usize, sha256: String },
    /// The hidden states behind a block are in `states-SLOT`.
    States { behind: usize, slot: usize, sha256: String },
}

#[derive(Deserialize)]
struct Line<'a> {
    check: String,
    #[serde(borrow)]
    entry: &'a serde_json::value::RawValue,
}

/// The command that began a run, for `lite resume`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedCommand {
    /// The arguments, the program first.
    pub arguments: Vec<String>,
    /// The folder it was called in: relative paths begin there.
    pub directory: PathBuf,
}

/// The journal of a run, open at its end.
#[derive(Debug)]
pub(crate) struct Journal {
    folder: PathBuf,
    file: File,
    entries: Vec<Entry>,
    done: usize,
    /// What is being gathered of the block at work.
    pub(crate) record: Record,
    every: Duration,
    saved: Instant,
}

impl Journal {
    /// Opens the journal in `work`, or begins one. Beside it what there is to say.
    ///
    /// # Errors
    /// [`JobError::State`] if blocks are finished there with other settings; [`JobError::Io`].
    pub(crate) fn open(
        work: &WorkDir,
        remains: bool,
        identity: Identity,
        recipe: &Recipe,
        plan: &Plan,
    ) -> Result<(Self, Vec<String>), JobError> {
        let folder = work.job_folder().to_owned();
        let (old, mut damaged) = read(&folder)?;
        let mut notes = Vec::new();
        let (mut kept, blocks) = match old.split_first() {
            Some((Entry::Run { format, identity: before, .. }, rest)) if !recipe.resume.restart => {
                let blocks = rest.iter().filter(|entry| matches!(entry, Entry::Block { .. })).count();
                if blocks > 0 && (*format != FORMAT || *before != identity) {
                    return Err(other_run(&recipe.work_dir, blocks, &differences(before, &identity)));
                }
                (rest.to_vec(), blocks)
            }
            _ => (Vec::new(), 0),
        };
        // One block after the other, each as it was written; nothing behind the first that is not.
        let mut done = 0;
        kept.retain(|entry| match entry {
            Entry::Run { .. } => false,
            Entry::Block { index, .. } if *index != done => false,
            Entry::Block { index, sha256 } => match load(&folder, *index, sha256, plan) {
                Ok(_) => {
                    done += 1;
                    true
                }
                Err(error) => {
                    notes.push(format!("block {} is done again: {error}", index + 1));
                    // No later index fits either.
                    false
                }
            },
            Entry::States { behind, .. } => *behind < done,
        });
        damaged |= done < blocks;
        if recipe.resume.restart && remains {
            notes.push("--restart: what an interrupted run left here was removed".to_owned());
        } else if done == 0 && remains {
            notes.push(
                "an earlier run did not finish here; no finished block was found, and the run starts over".to_owned(),
            );
        } else if done > 0 {
            if damaged {
                notes.push("the end of what an interrupted run left here is damaged or missing".to_owned());
            }
            notes.push(format!("resuming after block {done} of {}", plan.folds.len()));
        }
        if done == 0 {
            work.clear()?;
        }
        fs::create_dir_all(folder.join("blocks")).map_err(JobError::io("create", folder.join("blocks")))?;
        kept.insert(0, run_entry(recipe, identity));
        let mut text = String::new();
        for entry in &kept {
            text.push_str(&line(entry)?);
        }
        let path = folder.join(JOURNAL);
        atomic_write(&path, text.as_bytes())?;
        let file = File::options().append(true).open(&path).map_err(JobError::io("open", &path))?;
        let every = Duration::from_secs(recipe.resume.checkpoint_seconds);
        let this = Self { folder, file, entries: kept, done, record: Record::default(), every, saved: Instant::now() };
        Ok((this, notes))
    }

    /// Blocks that are finished: all before this index.
    pub(crate) fn done(&self) -> usize {
        self.done
    }

    /// What was decided for block `index`, if it is finished.
    ///
    /// # Errors
    /// [`JobError::State`] if the record changed since this run began; [`JobError::Io`].
    pub(crate) fn recorded<'p>(&self, index: usize, plan: &'p Plan) -> Result<Option<Recorded<'p>>, JobError> {
        let found = self.entries.iter().find_map(|entry| match entry {
            Entry::Block { index: at, sha256 } if *at == index => Some(sha256),
            _ => None,
        });
        found.map(|sha256| load(&self.folder, index, sha256, plan)).transpose()
    }

    /// Brings what was gathered of block `index` to disk: from here on it is finished.
    ///
    /// # Errors
    /// [`JobError::Io`] and [`JobError::Model`], with the block not finished.
    pub(crate) fn finish(&mut self, index: usize) -> Result<(), JobError> {
        let bytes = std::mem::take(&mut self.record).encode()?;
        atomic_write(&record_file(&self.folder, index), &bytes)?;
        self.append(Entry::Block { index, sha256: hex(&Sha256::digest(&bytes)) })?;
        self.done = index + 1;
        Ok(())
    }

    /// Saves the hidden states behind block `index`, if the last time is long enough ago. Two files take turns, so that
    /// one is whole at any time.
    ///
    /// # Errors
    /// [`JobError::Io`].
    pub(crate) fn save_states(&mut self, behind: usize, lanes: &[&HiddenStates]) -> Result<(), JobError> {
        if self.saved.elapsed() < self.every {
            return Ok(());
        }
        let bytes: u64 = lanes.iter().map(|lane| lane.bytes()).sum();
        // They only save time: the result comes first.
        if lite_model::free_space(&self.folder).is_some_and(|free| free < bytes.saturating_add(MARGIN)) {
            return Ok(());
        }
        let last = self.entries.iter().rev().find_map(|entry| match entry {
            Entry::States { slot, .. } => Some(*slot),
            _ => None,
        });
        let slot = if last == Some(0) { 1 } else { 0 };
        let path = states_file(&self.folder, slot);
        let mut file = File::create(&path).map_err(JobError::io("create", &path))?;
        let mut hash = Sha256::new();
        for lane in lanes {
            for window in 0..lane.windows() {
                let part: Vec<u8> = lane.read(window, 1)?.iter().flat_map(|v| v.to_le_bytes()).collect();
                hash.update(&part);
                file.write_all(&part).map_err(JobError::io("write", &path))?;
            }
        }
        file.sync_all().map_err(JobError::io("bring to disk", &path))?;
        self.append(Entry::States { behind, slot, sha256: hex(&hash.finalize()) })?;
        self.saved = Instant::now();
        Ok(())
    }

    /// Fills `lanes` with the newest hidden states that are whole, and gives the block they are behind.
    ///
    /// # Errors
    /// [`JobError::Io`].
    pub(crate) fn load_states(&mut self, lanes: &mut [&mut HiddenStates]) -> Result<Option<usize>, JobError> {
        let wanted: u64 = lanes.iter().map(|lane| lane.bytes()).sum();
        for entry in self.entries.iter().rev() {
            let Entry::States { behind, slot, sha256 } = entry else { continue };
            let path = states_file(&self.folder, *slot);
            if fs::metadata(&path).map_or(0, |meta| meta.len()) != wanted || file_hash(&path)? != *sha256 {
                continue;
            }
            let mut file = File::open(&path).map_err(JobError::io("open", &path))?;
            for lane in lanes.iter_mut() {
                let mut part = vec![0; lane.window_values() * 4];
                for window in 0..lane.windows() {
                    file.read_exact(&mut part).map_err(JobError::io("read", &path))?;
                    let values: Vec<f32> =
                        part.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
                    lane.write(window, &values)?;
                }
            }
            return Ok(Some(*behind));
        }
        Ok(None)
    }

    fn append(&mut self, entry: Entry) -> Result<(), JobError> {
        let path = self.folder.join(JOURNAL);
        let line = line(&entry)?;
        self.file.write_all(line.as_bytes()).map_err(JobError::io("write", &path))?;
        self.file.sync_all().map_err(JobError::io("bring to disk", &path))?;
        self.entries.push(entry);
        Ok(())
    }
}

/// The command that began the run whose blocks are kept in `work_dir`.
///
/// # Errors
/// [`JobError::State`] if no run can be resumed there, or none by its command.
pub fn recorded_command(work_dir: &Path) -> Result<RecordedCommand, JobError> {
    let (entries, _) = read(&work_dir.join(crate::workdir::JOB_FOLDER))?;
    match entries.into_iter().next() {
        Some(Entry::Run { command, directory, .. }) if !command.is_empty() => {
            Ok(RecordedCommand { arguments: command, directory })
        }
        Some(_) => Err(JobError::State(format!(
            "the run in `{}` did not note its command; run the same command again instead",
            work_dir.display()
        ))),
        None => Err(JobError::State(format!(
            "`{}` holds no interrupted run that can be resumed; give the --work-dir of one",
            work_dir.display()
        ))),
    }
}

fn run_entry(recipe: &Recipe, identity: Identity) -> Entry {
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string();
    let model = Path::new(&recipe.model);
    let of = |argument: &String| match argument.as_str() {
        text if text == recipe.model && model.exists() => absolute(model),
        text => text.to_owned(),
    };
    // Going on is not starting over.
    let command = recipe.resume.command.iter().filter(|argument| *argument != "--restart").map(of).collect();
    let directory = std::env::current_dir().unwrap_or_default();
    Entry::Run { format: FORMAT, identity, command, directory }
}

fn other_run(work_dir: &Path, blocks: usize, differences: &[String]) -> JobError {
    let shown = work_dir.display();
    JobError::State(format!(
        "`{shown}` holds {blocks} finished blocks of an interrupted run with other settings:\n  {}\nuse the same settings to go on, another --work-dir, --restart to start over, or `lite clean {shown}`",
        differences.join("\n  ")
    ))
}

fn line(entry: &Entry) -> Result<String, JobError> {
    let text = serde_json::to_string(entry).map_err(|error| JobError::State(format!("the journal: {error}")))?;
    Ok(format!("{{\"check\":\"{}\",\"entry\":{text}}}\n", hex(&Sha256::digest(&text))))
}

/// The entries of a journal up to the first line that is not whole, and whether there is such a line.
fn read(folder: &Path) -> Result<(Vec<Entry>, bool), JobError> {
    let path = folder.join(JOURNAL);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok((Vec::new(), false)),
        Err(error) => return Err(JobError::io("open", &path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(MOST).read_to_end(&mut bytes).map_err(JobError::io("read", &path))?;
    let mut entries = Vec::new();
    for text in bytes.split_inclusive(|byte| *byte == b'\n') {
        let Some(text) = text.strip_suffix(b"\n") else { return Ok((entries, true)) };
        match parse(text) {
            Some(entry) => entries.push(entry),
            None => return Ok((entries, true)),
        }
    }
    Ok((entries, false))
}

fn parse(text: &[u8]) -> Option<Entry> {
    let line: Line<'_> = serde_json::from_slice(text).ok()?;
    if hex(&Sha256::digest(line.entry.get())) != line.check {
        return None;
    }
    serde_json::from_str(line.entry.get()).ok()
}

fn load<'p>(folder: &Path, index: usize, sha256: &str, plan: &'p Plan) -> Result<Recorded<'p>, JobError> {
    let path = record_file(folder, index);
    let bytes = fs::read(&path).map_err(JobError::io("read", &path))?;
    if hex(&Sha256::digest(&bytes)) != sha256 {
        return Err(JobError::State(format!("`{}` is damaged", path.display())));
    }
    decode(&bytes, index, plan)
}

fn file_hash(path: &Path) -> Result<String, JobError> {
    let mut file = File::open(path).map_err(JobError::io("open", path))?;
    let (mut hash, mut part) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        let read = file.read(&mut part).map_err(JobError::io("read", path))?;
        if read == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&part[..read]);
    }
}

fn record_file(folder: &Path, index: usize) -> PathBuf {
    folder.join("blocks").join(format!("{index:04}.safetensors"))
}

fn states_file(folder: &Path, slot: usize) -> PathBuf {
    folder.join(format!("states-{slot}.f32"))
}

#[cfg(test)]
mod tests;
