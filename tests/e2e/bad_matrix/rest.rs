//! Rows 40 to 65: calibration text, recipes, flags, folders, resources, the hub, the terminal.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::{NOTHING, Row, row};

fn data(dir: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    fs::write(dir.join(name), bytes).unwrap();
}

fn recipe(dir: &Path, text: &str) {
    data(dir, "job.yaml", text);
}

/// A job of the model without data, with more lines.
fn job(model: &Path, dir: &Path, more: &str) {
    recipe(dir, &format!("model: {}\n{more}\n", model.display()));
}

/// A bare rtn recipe would run: nothing of it does.
const RUN: &str = "run DIR/job.yaml --work-dir OUT";

pub(super) const ROWS: &[Row] = &[
    row("40a", "an empty text", |_, d| data(d, "a.txt", ""), "CAL --calib-dataset DIR/a.txt", 3),
    row("40b", "empty lines", |_, d| data(d, "a.txt", "\n\n\n"), "CAL --calib-dataset DIR/a.txt", 3),
    row("40c", "three words", |_, d| data(d, "a.txt", "one two three"), "CAL --calib-dataset DIR/a.txt", 3),
    row(
        "41a",
        "a bad row",
        |_, d| data(d, "a.jsonl", "{\"text\": \"one\"}\n{\"text\": \n"),
        "CAL --calib-dataset DIR/a.jsonl",
        3,
    ),
    row(
        "41b",
        "a row without text",
        |_, d| data(d, "a.jsonl", "{\"text\": \"one\"}\n{\"label\": 1}\n"),
        "CAL --calib-dataset DIR/a.jsonl",
        3,
    ),
    row("41c", "text that is no UTF-8", |_, d| data(d, "a.txt", b"one \xff two"), "CAL --calib-dataset DIR/a.txt", 3),
    row("41d", "a row that is a number", |_, d| data(d, "a.jsonl", "7\n"), "CAL --calib-dataset DIR/a.jsonl", 3),
    row("42a", "a zip", |_, d| data(d, "a.zip", "PK\u{3}\u{4}"), "CAL --calib-dataset DIR/a.zip", 4),
    row(
        "42b",
        "a broken parquet file",
        |_, d| data(d, "a.parquet", "PAR1 nothing PAR1"),
        "CAL --calib-dataset DIR/a.parquet",
        3,
    ),
    row("42c", "a table of commas", |_, d| data(d, "a.csv", "text\none\n"), "CAL --calib-dataset DIR/a.csv", 4),
    row("42d", "an empty folder", |_, d| fs::create_dir(d.join("texts")).unwrap(), "CAL --calib-dataset DIR/texts", 3),
    row("42e", "an address", NOTHING, "CAL --calib-dataset https://example.com/a.txt", 4),
    row("42f", "a data set while offline", NOTHING, "CAL --calib-dataset c4", 7),
    row("42g", "a data set nobody knows", NOTHING, "CAL --calib-dataset wikitext99", 2),
    row(
        "44a",
        "aliases of aliases",
        |_, d| {
            let lines: String =
                (1..12).map(|i| format!("l{i}: &l{i} [{}*l{}]\n", format!("*l{}, ", i - 1).repeat(9), i - 1)).collect();
            recipe(d, &format!("l0: &l0 [1]\n{lines}"));
        },
        RUN,
        2,
    ),
    row("44b", "10 000 levels", |_, d| recipe(d, &"[".repeat(10_000)), RUN, 2),
    row("44c", "a tag", |_, d| recipe(d, "model: !!python/object:os.system x\n"), RUN, 2),
    row("44d", "100 MB", |_, d| fs::File::create(d.join("job.yaml")).unwrap().set_len(100_000_000).unwrap(), RUN, 2),
    row("44e", "two documents", |_, d| recipe(d, "model: a\n---\nmodel: b\n"), RUN, 2),
    row("45a", "an unknown key", |m, d| job(m, d, "colour: red"), RUN, 2),
    row("45b", "a misspelt key", |m, d| job(m, d, "calibraton: {samples: 4}"), RUN, 2),
    row("45c", "a key twice", |m, d| job(m, d, "model: other"), RUN, 2),
    row("45d", "a number in words", |m, d| job(m, d, "calibration: {samples: many}"), RUN, 2),
    row("45e", "a number with a point", |m, d| job(m, d, "calibration: {samples: 1e3}"), RUN, 2),
    row("45f", "no where a truth is wanted", |m, d| job(m, d, "save: {overwrite: no}"), RUN, 2),
    row("45g", "a tab", |m, d| job(m, d, "calibration:\n\tsamples: 4"), RUN, 2),
    row("45h", "no recipe", NOTHING, RUN, 7),
    row(
        "46a",
        "two jobs into one folder",
        |m, d| {
            recipe(
                d,
                &format!(
                    "defaults: {{model: {}, scheme: W4A16, stages: [rtn: {{}}], save: {{path: out}}}}\njobs: [{{name: a}}, {{name: b}}]\n",
                    m.display()
                ),
            )
        },
        "run DIR/job.yaml",
        2,
    ),
    row("46b", "the output is the input", NOTHING, "rtn MODEL --scheme W4A16 --work-dir MODEL", 2),
    row("46c", "the output within the input", NOTHING, "rtn MODEL --scheme W4A16 --work-dir MODEL/out", 2),
    row("47a", "a pattern that matches nothing", NOTHING, "CAL --ignore layers[.]99", 2),
    row("47b", "a pattern that is none", NOTHING, "CAL --ignore layers[", 2),
    row("47c", "a pattern that matches everything", NOTHING, "CAL --ignore .", 2),
    row("47d", "a pattern without end", NOTHING, "CAL --ignore (a{1000}){1000}", 2),
    row("48a", "0 bits", NOTHING, "CAL --w-bits 0", 2),
    row("48b", "1 bit", NOTHING, "CAL --w-bits 1", 2),
    row("48c", "-4 bits", NOTHING, "CAL --w-bits -4", 2),
    row("48d", "99 bits", NOTHING, "CAL --w-bits 99", 2),
    row("48e", "bits in words", NOTHING, "CAL --w-bits four", 2),
    row("48f", "groups of 0", NOTHING, "CAL --w-group-size 0", 2),
    row("48g", "groups of 7", NOTHING, "CAL --w-group-size 7", 2),
    row("48h", "-1 samples", NOTHING, "auto_awq MODEL --work-dir OUT --calib-samples -1", 2),
    row("48i", "windows of 0 tokens", NOTHING, "auto_awq MODEL --work-dir OUT --calib-seqlen 0", 2),
    row("48j", "windows beyond the model", NOTHING, "auto_awq MODEL --work-dir OUT --calib-seqlen 4096", 2),
    row("48k", "damping NaN", NOTHING, "auto_gptq MODEL --work-dir OUT --damp-percent nan", 2),
    row("48l", "damping 0", NOTHING, "auto_gptq MODEL --work-dir OUT --damp-percent 0", 2),
    row("48m", "no window per batch", NOTHING, "auto_awq MODEL --work-dir OUT --batch-size 0", 2),
    row("48n", "a misspelt flag", NOTHING, "auto_awq MODEL --work-dir OUT --calib-sample 4", 2),
    row("48o", "a size that is none", NOTHING, "auto_awq MODEL --work-dir OUT --max-memory much", 2),
    row("48p", "no threads", NOTHING, "--threads 0 RTN", 2),
    row("49a", "3 bits for TurboMind", NOTHING, "CAL --w-bits 3 --target turbomind", 4),
    row("49b", "a layout that lacks 8 bits", NOTHING, "CAL --w-bits 8 --layout awq", 4),
    row("49c", "an engine nobody knows", NOTHING, "CAL --target excel", 2),
    row("49d", "a layout nobody knows", NOTHING, "CAL --layout zip", 2),
    row("49e", "a scheme nobody knows", NOTHING, "rtn MODEL --work-dir OUT --scheme W5A17", 2),
    row(
        "50a",
        "a folder with another model",
        |_, d| {
            fs::create_dir(d.join("held")).unwrap();
            data(d, "held/config.json", "{}");
        },
        "rtn MODEL --scheme W4A16 --work-dir DIR/held",
        2,
    ),
    row(
        "50b",
        "a folder with something else",
        |_, d| {
            fs::create_dir(d.join("held")).unwrap();
            data(d, "held/thesis.txt", "x");
        },
        "rtn MODEL --scheme W4A16 --work-dir DIR/held --overwrite",
        2,
    ),
    row("50c", "a file", |_, d| data(d, "file", "x"), "rtn MODEL --scheme W4A16 --work-dir DIR/file", 2),
    row("50d", "a folder that cannot be made", NOTHING, "rtn MODEL --scheme W4A16 --work-dir /dev/null/out", 7),
    row(
        "50e",
        "a link to a folder with something else",
        |_, d| {
            fs::create_dir(d.join("held")).unwrap();
            data(d, "held/thesis.txt", "x");
            symlink(d.join("held"), d.join("link")).unwrap();
        },
        "rtn MODEL --scheme W4A16 --work-dir DIR/link",
        2,
    ),
    row(
        "53a",
        "a folder with spaces and a line break",
        NOTHING,
        "rtn MODEL --scheme W4A16 --eval-samples 0 --work-dir DIR/a␣b¶c",
        0,
    ),
    row("53b", "a model with a leading dash", NOTHING, "rtn -model --scheme W4A16 --work-dir OUT", 2),
    row("58a", "too little memory", NOTHING, "CAL --max-memory 10MB", 5),
    row("58b", "512 threads", NOTHING, "--threads 512 RTN", 0),
    row("59", "no GPU", NOTHING, "CAL --device cuda", 5),
    row("62", "a hub model while offline", NOTHING, "rtn org/name --scheme W4A16 --work-dir OUT", 7),
    row("65", "a model name with escapes", NOTHING, "rtn DIR/\u{1b}[31mred --scheme W4A16 --work-dir OUT", 3),
];
