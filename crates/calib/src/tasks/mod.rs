//! Multiple-choice tasks from local files: rows to prompts, prompts to token ids, as EleutherAI's
//! lm-evaluation-harness (0.4.13) makes them.

mod files;
mod prompts;

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::CalibError;
use crate::source::each_row;
use crate::tokenizer::ModelTokenizer;

/// A task by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskName {
    /// Endings of everyday situations (Zellers et al. 2019).
    Hellaswag,
    /// Exam questions of 57 subjects (Hendrycks et al. 2021).
    Mmlu,
    /// Science questions, the hard part (Clark et al. 2018).
    ArcChallenge,
    /// Science questions, the easy part.
    ArcEasy,
    /// Whom a pronoun means (Sakaguchi et al. 2020); the part after the option is scored.
    Winogrande,
    /// Physical common sense (Bisk et al. 2020).
    Piqa,
}

impl TaskName {
    /// All tasks.
    pub const ALL: [Self; 6] =
        [Self::Hellaswag, Self::Mmlu, Self::ArcChallenge, Self::ArcEasy, Self::Winogrande, Self::Piqa];

    /// The name as lm-evaluation-harness has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hellaswag => "hellaswag",
            Self::Mmlu => "mmlu",
            Self::ArcChallenge => "arc_challenge",
            Self::ArcEasy => "arc_easy",
            Self::Winogrande => "winogrande",
            Self::Piqa => "piqa",
        }
    }

    /// The task of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|task| task.name() == name)
    }

    /// Whether the harness reports accuracy by length as well.
    pub fn has_acc_norm(self) -> bool {
        !matches!(self, Self::Mmlu | Self::Winogrande)
    }

    /// The split that is scored, and the one that stands in for it.
    fn splits(self) -> [&'static str; 2] {
        match self {
            Self::Mmlu | Self::ArcChallenge | Self::ArcEasy => ["test", "validation"],
            Self::Hellaswag | Self::Winogrande | Self::Piqa => ["validation", "test"],
        }
    }
}

/// One question: what is scored for each choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskItem {
    /// Context and continuation of each choice; the continuation begins with a space.
    pub requests: Vec<(String, String)>,
    /// Characters of each choice, what `acc_norm` divides by.
    pub lengths: Vec<usize>,
    /// The right choice.
    pub gold: usize,
}

/// A task's questions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Which task.
    pub name: TaskName,
    /// The files they were read from.
    pub files: Vec<String>,
    /// The questions, in the order of the files.
    pub items: Vec<TaskItem>,
}

/// Reads a task from `dir`: `NAME.jsonl`, `NAME.parquet`, or below `NAME/` the files of its scored split.
///
/// `limit` keeps the first so many questions (of each subject, for MMLU). `num_fewshot` is for MMLU only: the first
/// so many questions of the same subject in the files of the `dev` split go before each question.
///
/// # Errors
/// No such files, rows that lack a field or hold a label out of range, few-shot of a task that has none here.
pub fn load_task(name: TaskName, dir: &Path, limit: Option<usize>, num_fewshot: usize) -> Result<Task, CalibError> {
    if num_fewshot > 0 && name != TaskName::Mmlu {
        return Err(CalibError::Unsupported(format!(
            "`{}` with {num_fewshot} examples before each question: only mmlu is scored with examples here; use --num-fewshot 0",
            name.name()
        )));
    }
    let paths = files::find(name, dir)?;
    let shots = if num_fewshot > 0 { Some(examples(dir, num_fewshot)?) } else { None };
    let mut items = Vec::new();
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for path in &paths {
        let folder = path.parent().and_then(Path::file_name).map(|n| n.to_string_lossy().into_owned());
        each_row(path, &mut |row| {
            let subject =
                if name == TaskName::Mmlu { prompts::subject(&row, folder.as_deref())? } else { String::new() };
            let count = counts.entry(subject.clone()).or_default();
            if limit.is_none_or(|limit| *count < limit) {
                *count += 1;
                let shots = shots.as_ref().map(|all| all.get(&subject).map(String::as_str).unwrap_or_default());
                items.push(prompts::item(name, &row, &subject, shots.unwrap_or_default())?);
            }
            Ok(name == TaskName::Mmlu || limit.is_none_or(|limit| *count < limit))
        })?;
    }
    if items.is_empty() {
        return Err(CalibError::bad(name.name(), format!("no questions in `{}`", dir.display())));
    }
    let files = paths.iter().map(|p| p.display().to_string()).collect();
    Ok(Task { name, files, items })
}

/// MMLU's answered questions by subject, the first `count` of each.
fn examples(dir: &Path, count: usize) -> Result<BTreeMap<String, String>, CalibError> {
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for path in files::dev(dir)? {
        let folder = path.parent().and_then(Path::file_name).map(|n| n.to_string_lossy().into_owned());
        each_row(&path, &mut |row: Map<String, Value>| {
            let shots = found.entry(prompts::subject(&row, folder.as_deref())?).or_default();
            if shots.len() < count {
                shots.push(prompts::mmlu_example(&row)?);
            }
            Ok(true)
        })?;
    }
    let short = found.iter().find(|(_, shots)| shots.len() < count);
    if let Some((subject, shots)) = short {
        return Err(CalibError::bad(
            "mmlu",
            format!("`{subject}` has {} questions in the dev split, --num-fewshot asks for {count}", shots.len()),
        ));
    }
    Ok(found.into_iter().map(|(subject, shots)| (subject, shots.concat())).collect())
}

impl ModelTokenizer {
    /// Token ids of a context and of its continuation, by the harness's rule: spaces at the end of the context move to
    /// the continuation, context and whole are encoded with the tokenizer's special tokens, and the continuation is
    /// what the whole has more.
    ///
    /// # Errors
    /// As [`ModelTokenizer::encode`].
    pub fn encode_pair(&self, context: &str, continuation: &str) -> Result<(Vec<u32>, Vec<u32>), CalibError> {
        let kept = context.trim_end_matches(prompts::is_python_space);
        let whole = self.encode(&format!("{context}{continuation}"), true)?;
        let context = self.encode(kept, true)?;
        let rest = whole.get(context.len()..).unwrap_or_default().to_vec();
        Ok((context, rest))
    }
}

#[cfg(test)]
#[path = "../tasks_tests.rs"]
mod tests;
