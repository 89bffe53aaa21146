//! A row of each task as the harness's templates turn it into prompts.

use serde_json::{Map, Value};

use super::{TaskItem, TaskName};

type Row = Map<String, Value>;

/// The question of a row. `shots` are the answered questions before it, for MMLU.
pub(super) fn item(task: TaskName, row: &Row, subject: &str, shots: &str) -> Result<TaskItem, String> {
    match task {
        TaskName::Hellaswag => hellaswag(row),
        TaskName::Mmlu => mmlu(row, subject, shots),
        TaskName::ArcChallenge | TaskName::ArcEasy => arc(row),
        TaskName::Winogrande => winogrande(row),
        TaskName::Piqa => piqa(row),
    }
}

/// `requests` of one context and several choices.
fn choices(context: &str, choices: &[String], gold: usize) -> Result<TaskItem, String> {
    if gold >= choices.len() {
        return Err(format!("the label says choice {gold} (from 0), but there are {}", choices.len()));
    }
    if choices.iter().any(String::is_empty) {
        return Err("a choice is empty".to_owned());
    }
    Ok(TaskItem {
        requests: choices.iter().map(|choice| (context.to_owned(), format!(" {choice}"))).collect(),
        lengths: choices.iter().map(|choice| choice.chars().count()).collect(),
        gold,
    })
}

fn hellaswag(row: &Row) -> Result<TaskItem, String> {
    let context = format!("{} {}", text(row, "ctx_a")?, capitalize(text(row, "ctx_b")?));
    let query = preprocess(&format!("{}: {context}", text(row, "activity_label")?));
    let endings: Vec<String> = texts(row, "endings")?.into_iter().map(preprocess).collect();
    choices(&query, &endings, number(row, "label")?)
}

/// `preprocess` of the harness's `hellaswag/utils.py`.
pub(super) fn preprocess(text: &str) -> String {
    let text = text.trim_matches(is_python_space).replace(" [title]", ". ");
    // re.sub("\\[.*?\\]", "", text): the shortest stretch, and `.` stops at a newline.
    let mut out = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(open) = rest.find('[') {
        let after = &rest[open + 1..];
        let close = after.find([']', '\n']).filter(|at| after[*at..].starts_with(']'));
        match close {
            Some(close) => {
                out.push_str(&rest[..open]);
                rest = &after[close + 1..];
            }
            None => {
                out.push_str(&rest[..=open]);
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out.replace("  ", " ")
}

/// Python's `str.capitalize`.
fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    let first: String = chars.next().into_iter().flat_map(char::to_uppercase).collect();
    first + &chars.as_str().to_lowercase()
}

/// Python's `str.isspace`: Unicode white space and the four separators of ASCII.
pub(super) fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// The subject of an MMLU row, or of the folder it was found in.
pub(super) fn subject(row: &Row, folder: Option<&str>) -> Result<String, String> {
    match (row.get("subject"), folder) {
        (Some(Value::String(subject)), _) if !subject.is_empty() => Ok(subject.clone()),
        (_, Some(folder)) if !["all", "data", "mmlu"].contains(&folder) => Ok(folder.to_owned()),
        _ => Err("the row has no `subject`, which mmlu's prompt names".to_owned()),
    }
}

const LETTERS: [&str; 4] = ["A", "B", "C", "D"];

fn mmlu_question(row: &Row) -> Result<String, String> {
    let options = texts(row, "choices")?;
    let [a, b, c, d] = options.as_slice() else {
        return Err(format!("`choices` has {} entries, wanted 4", options.len()));
    };
    let question = text(row, "question")?.trim_matches(is_python_space);
    Ok(format!("{question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"))
}

fn mmlu_answer(row: &Row) -> Result<usize, String> {
    let answer = row.get("answer");
    if let Some(letter) = answer.and_then(Value::as_str).and_then(|a| LETTERS.iter().position(|l| *l == a)) {
        return Ok(letter);
    }
    number(row, "answer")
}

/// An answered MMLU question, with the blank line after it.
pub(super) fn mmlu_example(row: &Row) -> Result<String, String> {
    let answer = mmlu_answer(row)?;
    let letter = LETTERS.get(answer).ok_or_else(|| format!("`answer` is {answer}, wanted 0 to 3"))?;
    Ok(format!("{} {letter}\n\n", mmlu_question(row)?))
}

fn mmlu(row: &Row, subject: &str, shots: &str) -> Result<TaskItem, String> {
    let subject = subject.replace('_', " ");
    let context = format!(
        "The following are multiple choice questions (with answers) about {subject}.\n\n{shots}{}",
        mmlu_question(row)?
    );
    choices(&context, &LETTERS.map(str::to_owned), mmlu_answer(row)?)
}

fn arc(row: &Row) -> Result<TaskItem, String> {
    let Some(Value::Object(options)) = row.get("choices") else {
        return Err(unfit(row, "choices", "an object with `text` and `label`"));
    };
    let (answers, labels) = (texts(options, "text")?, texts(options, "label")?);
    let key = text(row, "answerKey")?;
    let gold = labels.iter().position(|label| *label == key);
    let gold = gold.ok_or_else(|| format!("`answerKey` is `{}`, which is no label of a choice", short(key)))?;
    let answers: Vec<String> = answers.into_iter().map(str::to_owned).collect();
    choices(&format!("Question: {}\nAnswer:", text(row, "question")?), &answers, gold)
}

fn winogrande(row: &Row) -> Result<TaskItem, String> {
    let sentence = text(row, "sentence")?;
    let (before, after) = sentence.split_once('_').ok_or("`sentence` has no `_` for the options")?;
    let ending = format!(" {}", after.trim_matches(is_python_space));
    let contexts = [text(row, "option1")?, text(row, "option2")?].map(|option| format!("{before}{option}"));
    let gold = match number(row, "answer")? {
        answer @ (1 | 2) => answer - 1,
        other => return Err(format!("`answer` is {other}, wanted 1 or 2")),
    };
    if contexts.iter().any(String::is_empty) {
        return Err("an option and what is before it are both empty".to_owned());
    }
    // The harness's lengths are those of the contexts here; it reports no acc_norm.
    let lengths = contexts.iter().map(|context| context.chars().count()).collect();
    Ok(TaskItem { requests: contexts.map(|context| (context, ending.clone())).into(), lengths, gold })
}

fn piqa(row: &Row) -> Result<TaskItem, String> {
    let answers = [text(row, "sol1")?.to_owned(), text(row, "sol2")?.to_owned()];
    choices(&format!("Question: {}\nAnswer:", text(row, "goal")?), &answers, number(row, "label")?)
}

fn text<'a>(row: &'a Row, key: &str) -> Result<&'a str, String> {
    row.get(key).and_then(Value::as_str).ok_or_else(|| unfit(row, key, "a text"))
}

fn texts<'a>(row: &'a Row, key: &str) -> Result<Vec<&'a str>, String> {
    let list = row.get(key).and_then(Value::as_array).ok_or_else(|| unfit(row, key, "a list of texts"))?;
    list.iter().map(|v| v.as_str().ok_or_else(|| unfit(row, key, "a list of texts"))).collect()
}

/// A label: a whole number, or the digits of one.
fn number(row: &Row, key: &str) -> Result<usize, String> {
    let found = row.get(key).and_then(|value| match value {
        Value::String(digits) => digits.trim().parse().ok(),
        other => other.as_u64().and_then(|n| usize::try_from(n).ok()),
    });
    found.ok_or_else(|| unfit(row, key, "a whole number (is this the split without labels?)"))
}

fn unfit(row: &Row, key: &str, wanted: &str) -> String {
    match row.get(key) {
        None => format!("the row has no `{key}`; wanted {wanted}"),
        Some(found) => format!("`{key}` is {}; wanted {wanted}", short(&found.to_string())),
    }
}

/// The start of a value from a file, for a message.
fn short(text: &str) -> String {
    let shown: String = text.chars().take(40).flat_map(char::escape_debug).collect();
    if text.chars().nth(40).is_some() { format!("{shown}…") } else { shown }
}
