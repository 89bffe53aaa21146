//! From files to jobs.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use lite_job::Recipe;
use lite_runtime::eval::Gate;

use crate::batch::{Draft, expand};
use crate::de::read;
use crate::error::{Fault, Place, Problem, RecipeError, Sources};
use crate::file::Job;
use crate::lower::lower;
use crate::node::{Node, Value};
use crate::{compressor, llmc, yaml};

/// One job, ready to run.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its name; no other job has it.
    pub name: String,
    /// What to run.
    pub recipe: Recipe,
    /// What the comparison with the original must show.
    pub gates: Vec<Gate>,
    /// Where the same weights go as plain floats, if they are asked for.
    pub plain: Option<PathBuf>,
}

impl Entry {
    /// The file of this one job, with every setting.
    pub fn to_yaml(&self) -> String {
        let mut job = crate::print::job(&self.recipe, &self.gates);
        job.name = Some(self.name.clone());
        if let (Some(save), Some(plain)) = (&mut job.save, &self.plain) {
            save.plain = Some(plain.to_string_lossy().into_owned());
        }
        crate::print::yaml(&job)
    }
}

/// The jobs of some files, and what must be said about them.
#[derive(Debug, Clone, Default)]
pub struct Loaded {
    /// The jobs, in the order of the files.
    pub jobs: Vec<Entry>,
    /// Keys that mean nothing here, and the like.
    pub warnings: Vec<String>,
}

/// Which dialect a file is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// lite's own.
    Own,
    /// `base/model/calib/eval/quant/save` of ModelTC/llmc (LightCompress).
    Llmc,
    /// `recipe.yaml` of llm-compressor: modifiers, in stages or not.
    LlmCompressor,
}

/// Reads the jobs of all `files`.
///
/// `sets` are `key=value` of lite's own keys, put into every job after all else was read; a key is dotted, and chooses from
/// lists by number or, in `stages`, by name. Paths in the jobs are as written: relative to the current folder, as on the
/// command line. All jobs are returned, also where `only` one is to be run; then a `--set` may name its folder.
///
/// # Errors
/// The first thing that is wrong, with its place; jobs that write the same folder.
pub fn load(files: &[PathBuf], sets: &[String], only: Option<usize>) -> Result<Loaded, RecipeError> {
    let texts = files.iter().map(|path| Ok((path, file(path)?))).collect::<Result<Vec<_>, RecipeError>>()?;
    jobs(&texts, sets, only)
}

/// [`load`] of one text that is in no file; `path` stands for where it is from.
///
/// # Errors
/// As [`load`].
pub fn load_text(text: String, path: &Path) -> Result<Loaded, RecipeError> {
    jobs(&[(&path.to_owned(), text)], &[], None)
}

fn jobs(texts: &[(&PathBuf, String)], sets: &[String], only: Option<usize>) -> Result<Loaded, RecipeError> {
    let mut loaded = Loaded::default();
    let mut many = Vec::new();
    for (path, text) in texts {
        let name = lite_model::printable_path(path);
        let (drafts, sources) = drafts(text, &name, sets, &mut loaded.warnings)?;
        many.push((path, drafts, sources));
    }
    let alone = many.iter().map(|(_, drafts, _)| drafts.len()).sum::<usize>() == 1;
    let mut folders: BTreeMap<PathBuf, String> = BTreeMap::new();
    for (path, drafts, sources) in &many {
        for (index, draft) in drafts.iter().enumerate() {
            let entry = entry(draft, path, index, drafts.len() == 1, alone).map_err(|fault| sources.error(fault))?;
            if let Some(other) = loaded.jobs.iter().find(|other| other.name == entry.name) {
                let message =
                    format!("the job `{}` has the name of an earlier one; give each its own `name`", other.name);
                return Err(sources.error(Fault::value(draft.tree.place("name"), message)));
            }
            let given = only.is_some() && draft.tree.place("save.path").source > 0;
            for folder in [Some(&entry.recipe.work_dir), entry.plain.as_ref()].into_iter().flatten().filter(|_| !given)
            {
                if let Some(other) = folders.insert(folder.clone(), entry.name.clone()) {
                    let message = format!(
                        "`{}` writes `{}`, and so does `{other}`; put {{name}} into `save.path`",
                        entry.name,
                        folder.display()
                    );
                    return Err(sources.error(Fault::value(draft.tree.place("save.path"), message)));
                }
            }
            loaded.jobs.push(entry);
        }
    }
    Ok(loaded)
}

fn file(path: &Path) -> Result<String, RecipeError> {
    read_bounded(path, yaml::LONGEST as u64)
}

/// The text of a file, or of a pipe, of at most `longest` bytes; no more than one byte beyond is read.
pub(crate) fn read_bounded(path: &Path, longest: u64) -> Result<String, RecipeError> {
    let io = |source| RecipeError::Io { path: path.to_owned(), source };
    let mut text = Vec::new();
    let file = std::fs::File::open(path).map_err(io)?;
    file.take(longest + 1).read_to_end(&mut text).map_err(io)?;
    if text.len() as u64 > longest {
        let what = format!("more than {longest} bytes, {longest} at most");
        return Err(RecipeError::Budget { source_name: lite_model::printable_path(path), what });
    }
    String::from_utf8(text).map_err(|error| io(std::io::Error::new(ErrorKind::InvalidData, error.utf8_error())))
}

/// The jobs of one text as trees in lite's own keys, `sets` applied.
fn drafts(
    text: &str,
    name: &str,
    sets: &[String],
    warnings: &mut Vec<String>,
) -> Result<(Vec<Draft>, Sources), RecipeError> {
    let sources = Sources { file: name.to_owned(), sets: sets.to_vec() };
    let result = (|| {
        let root = yaml::parse(text, 0)?;
        let mut found = Vec::new();
        let mut drafts = match dialect(&root) {
            Dialect::Own => expand(root)?,
            Dialect::Llmc => llmc::jobs(&root, &mut found)?,
            Dialect::LlmCompressor => compressor::jobs(&root, &mut found)?,
        };
        for draft in &mut drafts {
            for (index, set) in sets.iter().enumerate() {
                apply(&mut draft.tree, set, index + 1)?;
            }
        }
        Ok((drafts, found))
    })();
    let (drafts, found) = result.map_err(|fault| sources.error(fault))?;
    warnings
        .extend(found.into_iter().map(|(at, message): (Place, String)| format!("{}: {message}", sources.position(at))));
    Ok((drafts, sources))
}

/// Which dialect a tree is in, by its keys on top.
fn dialect(root: &Node) -> Dialect {
    let has = |key: &str| root.get(key).is_some();
    let method = |key: &str| root.get(key).is_some_and(|node| matches!(node.value, Value::Map(_)));
    let modifier = |name: &str| name.ends_with("_stage") || name.ends_with("_modifiers") || name.ends_with("Modifier");
    if method("quant") || method("sparse") || (has("base") && has("save")) {
        Dialect::Llmc
    } else if root.entries().iter().any(|(key, _)| modifier(&key.name)) {
        Dialect::LlmCompressor
    } else {
        Dialect::Own
    }
}

fn apply(tree: &mut Node, set: &str, source: usize) -> Result<(), Fault> {
    let at = Place { source, line: 1, column: 1 };
    let Some((path, value)) = set.split_once('=') else {
        return Err(Fault::value(at, "no `=`; write it like calibration.samples=64"));
    };
    let mut node = match value.trim() {
        "" => Node::scalar(at, ""),
        value => yaml::parse(value, source)?,
    };
    node.at = at;
    tree.set(path.trim(), node).map_err(|fault| Fault { at, ..fault })
}

fn entry(draft: &Draft, path: &Path, index: usize, single: bool, alone: bool) -> Result<Entry, Fault> {
    let job: Job = read(&draft.tree)?;
    let mut lowered = lower(&job, &draft.tree)?;
    let model = Path::new(&lowered.recipe.model).file_name().map_or("model".into(), |name| name.to_string_lossy());
    let parts: Vec<&str> =
        [Some(&*model), draft.scheme.as_deref(), draft.variant.as_deref()].into_iter().flatten().collect();
    let stem = path.file_stem().map_or("job".into(), |stem| stem.to_string_lossy());
    let scheme = draft.scheme.clone().or_else(|| job.scheme.as_ref().map(|choice| choice.label())).unwrap_or_default();
    let fill = |text: &str, name: &str| {
        text.replace("{name}", name)
            .replace("{model}", &model)
            .replace("{scheme}", &scheme)
            .replace("{variant}", draft.variant.as_deref().unwrap_or_default())
    };
    let name = match &job.name {
        Some(name) => fill(name, ""),
        None if parts.len() > 1 => parts.join("-"),
        None if single => stem.into_owned(),
        None => format!("{stem}-{index}"),
    };
    let unusable = name.is_empty() || name.contains(['/', '\\', '\0']) || name.starts_with('.');
    if unusable {
        let message = format!(
            "`{}` is no name for a job: it is part of paths; use letters, digits, `-` and `_`",
            lite_model::printable(&name)
        );
        return Err(Fault { at: draft.tree.place("name"), problem: Problem::Value(message) });
    }
    let filled = |path: &Path| PathBuf::from(fill(&path.to_string_lossy(), &name));
    let work_dir = &mut lowered.recipe.work_dir;
    let given = job.save.as_ref().is_some_and(|save| save.path.is_some());
    *work_dir = if given || alone { filled(work_dir) } else { work_dir.join(&name) };
    let plain = lowered.plain.as_deref().map(filled);
    Ok(Entry { name, recipe: lowered.recipe, gates: lowered.gates, plain })
}
