//! Where a task's files are.

use std::path::{Path, PathBuf};

use super::TaskName;
use crate::error::CalibError;

/// Folders below a task's folder that are searched.
const DEPTH: usize = 4;

/// The files of the scored split, in order.
pub(super) fn find(task: TaskName, dir: &Path) -> Result<Vec<PathBuf>, CalibError> {
    let name = task.name();
    for extension in ["jsonl", "parquet"] {
        let path = dir.join(format!("{name}.{extension}"));
        if path.is_file() {
            return Ok(vec![path]);
        }
    }
    let all = below(&dir.join(name))?;
    for split in task.splits() {
        let found = of_split(&all, split);
        if !found.is_empty() {
            return Ok(found);
        }
    }
    let [first, second] = task.splits();
    Err(CalibError::bad(
        dir.display().to_string(),
        format!(
            "no questions of `{name}`: wanted {name}.jsonl, {name}.parquet, or {name}/**/{first}*.parquet (or {second}*, or .jsonl), \
             as `huggingface-cli download --repo-type dataset` leaves them; say where they are with --task-data"
        ),
    ))
}

/// The files of MMLU's `dev` split.
pub(super) fn dev(dir: &Path) -> Result<Vec<PathBuf>, CalibError> {
    let found = of_split(&below(&dir.join("mmlu"))?, "dev");
    if found.is_empty() {
        return Err(CalibError::bad(
            dir.display().to_string(),
            "no examples for mmlu: wanted mmlu/**/dev*.parquet or .jsonl; use --num-fewshot 0, or add them",
        ));
    }
    Ok(found)
}

/// The files whose name begins with `split`; MMLU comes whole in `all/` and again by subject.
fn of_split(all: &[PathBuf], split: &str) -> Vec<PathBuf> {
    let name = |path: &Path| path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let found: Vec<PathBuf> = all.iter().filter(|path| name(path).starts_with(split)).cloned().collect();
    let in_all = |path: &PathBuf| path.parent().and_then(Path::file_name).is_some_and(|n| n == "all");
    if found.iter().any(in_all) { found.into_iter().filter(in_all).collect() } else { found }
}

/// Readable files below a folder, sorted; nothing if there is no folder.
fn below(dir: &Path) -> Result<Vec<PathBuf>, CalibError> {
    fn walk(dir: &Path, depth: usize, into: &mut Vec<PathBuf>) -> Result<(), CalibError> {
        for entry in std::fs::read_dir(dir).map_err(|e| CalibError::io(dir, e))? {
            let path = entry.map_err(|e| CalibError::io(dir, e))?.path();
            if path.is_dir() {
                if depth > 0 {
                    walk(&path, depth - 1, into)?;
                }
            } else if path.extension().is_some_and(|e| e == "jsonl" || e == "parquet") {
                into.push(path);
            }
        }
        Ok(())
    }
    let mut found = Vec::new();
    if dir.is_dir() {
        walk(dir, DEPTH, &mut found)?;
    }
    found.sort();
    Ok(found)
}
