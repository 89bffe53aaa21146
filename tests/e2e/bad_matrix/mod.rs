//! Bad inputs, one row each: how it is made, what is run, the exit code, and every word of the message.
//!
//! The messages are in `tests/fixtures/bad_matrix.txt`. Where one changes on purpose, run the test with `LITE_BLESS=1`
//! and read the difference. Rows are numbered as in the matrix that reliability research of this project drew up; those
//! that another test holds, or that cannot occur here, are in [`ELSEWHERE`] with the reason.

mod files;
mod model;
mod rest;

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::support::*;

/// One bad input.
struct Row {
    /// Number in the matrix, and a letter.
    id: &'static str,
    what: &'static str,
    /// Spoils a copy of the bundled model; the second folder is free for other files.
    make: fn(&Path, &Path),
    /// Words of the command: `MODEL`, `OUT` and `DIR` are the copy, the work directory and the free folder; `CAL` is a
    /// short calibrated run and `RTN` one without data, of MODEL into OUT.
    run: &'static str,
    code: i32,
}

const fn row(id: &'static str, what: &'static str, make: fn(&Path, &Path), run: &'static str, code: i32) -> Row {
    Row { id, what, make, run, code }
}

const NOTHING: fn(&Path, &Path) = |_, _| {};

/// Rows that are not here, and why.
const ELSEWHERE: &[(&str, &str)] = &[
    (
        "11",
        "a flipped bit of a weight is another weight: checkpoints have no checksums. Of records and outputs: resume.rs, poison/; files that change while they are read: crates/model/tests/checkpoint",
    ),
    ("27", "templates without end: crates/calib/src/template_tests.rs, with limits of time, depth and size"),
    ("35", "biases, fused and shared tensors: families.rs and crates/decoder/tests; unknown decoders are row 22"),
    ("37c", "other experts: fused.rs, and the tests of families that have them"),
    ("38", "singular and empty Gram matrices: crates/gptq/tests and gptq.rs"),
    ("43", "text that holds the begin token already: crates/calib/src/construct_tests.rs"),
    ("51", "a full disk at every write: faults.rs"),
    ("52", "errors of fsync and rename: faults.rs"),
    ("54", "kills and power cuts: resume.rs and faults.rs"),
    ("55", "two runs in one folder: resume.rs; no clock decides anything"),
    ("56", "changed inputs of an interrupted run: resume.rs"),
    ("57", "damaged state: resume.rs and crates/job/src/journal/tests.rs"),
    ("60", "answers of the hub: crates/model/tests/hub, against a local server"),
    ("61", "wrong hashes and names from the hub: crates/model/tests/hub"),
    ("63", "poisoned outputs: poison/"),
    ("64", "checkpoints of other tools: verify.rs and crates/pack/tests"),
];

/// Rows of the matrix.
const ROWS: usize = 65;

const CAL: &str = "auto_awq MODEL --work-dir OUT --calib-dataset builtin --calib-samples 2 --calib-seqlen 32 \
                   --batch-size 2 --eval-samples 1 --eval-seqlen 16 --no-report";
const RTN: &str = "rtn MODEL --scheme W4A16 --work-dir OUT --eval-samples 0 --no-report";

/// Runs a row in folders of its own; gives its entry of the file of messages, or what is wrong.
fn entry(row: &Row) -> Result<String, String> {
    let copy = copy_of(&model());
    let dir = tempfile::tempdir().unwrap();
    (row.make)(copy.path(), dir.path());
    let out = dir.path().join("out");
    let snapshot = |path: &Path| -> Vec<(PathBuf, u64)> {
        let mut found: Vec<_> = std::fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.path(), entry.path().symlink_metadata().map_or(0, |meta| meta.len())))
            .collect();
        found.sort();
        found
    };
    let before = (snapshot(copy.path()), files_of(&dir.path().join("held")));
    let places = [("MODEL", copy.path()), ("OUT", out.as_path()), ("DIR", dir.path())];
    let put =
        |word: &str| places.iter().fold(word.to_owned(), |w, (name, path)| w.replace(name, path.to_str().unwrap()));
    let words = row.run.replace("CAL", CAL).replace("RTN", RTN);
    let words: Vec<&str> = words.split_whitespace().collect();
    // A flag that the row has itself stands for that of the short run.
    let again = |at: usize| words[at].starts_with("--") && words[at + 1..].contains(&words[at]);
    let keep = |at: &usize| !again(*at) && (*at == 0 || !again(at - 1));
    let arguments = (0..words.len()).filter(keep).map(|at| put(words[at]).replace('␣', " ").replace('¶', "\n"));
    let mut command = lite();
    command.env("HOME", dir.path()).current_dir(dir.path()).args(arguments);
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let told = |what: &str| Err(format!("{} {}: {what}: {:?}\n{stderr}", row.id, row.what, output.status));
    if output.status.code() != Some(row.code) {
        return told(&format!("exit code {} is wanted", row.code));
    }
    if stderr.contains("panicked") || stderr.chars().any(|c| c.is_control() && c != '\n') {
        return told("a panic, or control characters");
    }
    if row.code != 0 && (out.join("config.json").exists() || out.join("model.safetensors").exists()) {
        return told("something looks finished");
    }
    if before != (snapshot(copy.path()), files_of(&dir.path().join("held"))) {
        return told("the input was touched");
    }
    // Of a run that ended well, its warnings; of others, the error to its end.
    let message = match row.code {
        0 => stderr.lines().filter(|line| line.starts_with("warning: ")).collect::<Vec<_>>().join("\n"),
        _ => stderr.find("error: ").map_or(String::new(), |at| stderr[at..].trim_end().to_owned()),
    };
    if row.code != 0 && message.is_empty() {
        return told("no message");
    }
    let message = places.iter().fold(message, |text, (name, path)| text.replace(path.to_str().unwrap(), name));
    // The list of decoders grows.
    let decoders = |line: &str| match line.split_once("known: LlamaForCausalLM") {
        Some((before, after)) => format!("{before}known: …{}", after.find(". ").map_or("", |end| &after[end..])),
        None => line.to_owned(),
    };
    let message: String = message.lines().map(|line| format!("    {}\n", decoders(line))).collect();
    Ok(format!("{} {}: {}\n{message}", row.id, row.what, row.code))
}

fn files_of(dir: &Path) -> Vec<String> {
    files(dir).into_keys().collect()
}

#[test]
fn every_bad_input_has_its_code_and_its_message() {
    let rows: Vec<&Row> = [files::ROWS, model::ROWS, rest::ROWS].into_iter().flatten().collect();
    let number = |id: &str| id.trim_end_matches(|c: char| c.is_ascii_lowercase()).parse::<usize>().unwrap();
    for wanted in 1..=ROWS {
        let here = rows.iter().any(|row| number(row.id) == wanted);
        assert!(here || ELSEWHERE.iter().any(|(id, _)| number(id) == wanted), "row {wanted} is nowhere");
    }
    let results = Mutex::new(vec![None; rows.len()]);
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(row) = rows.get(at) else { break };
                    let result = entry(row);
                    results.lock().unwrap()[at] = Some(result);
                }
            });
        }
    });
    let (mut text, mut failed) = (String::new(), Vec::new());
    for result in results.into_inner().unwrap().into_iter().flatten() {
        match result {
            Ok(entry) => text.push_str(&entry),
            Err(why) => failed.push(why),
        }
    }
    let path = root().join("tests/fixtures/bad_matrix.txt");
    if std::env::var_os("LITE_BLESS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    assert!(failed.is_empty(), "{} of {} rows:\n{}", failed.len(), rows.len(), failed.join("\n"));
    let wanted = std::fs::read_to_string(&path).unwrap();
    let differ = text.lines().zip(wanted.lines()).find(|(found, wanted)| found != wanted);
    assert!(text == wanted, "messages differ from {}: {differ:#?}", path.display());
    eprintln!("{} bad inputs; {} rows of the matrix are held elsewhere", rows.len(), ELSEWHERE.len());
}
