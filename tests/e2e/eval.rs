//! `lite eval` of plain and quantized checkpoints: figures, gates, exit codes.

use std::path::Path;
use std::process::Output;

use serde_json::Value;

use super::support::*;

/// Windows that take about a second.
const SHORT: [&str; 6] = ["--dataset", "builtin", "--seqlen", "64", "--windows", "8"];

fn eval(dir: &Path, flags: &[&str]) -> Output {
    lite().arg("eval").arg(dir).args(flags).output().unwrap()
}

/// The result of a run that must succeed.
fn eval_json(dir: &Path, flags: &[&str]) -> Value {
    let output = eval(dir, &[flags, &["--format", "json"]].concat());
    assert_code(&output, 0);
    last_line(&output)
}

fn last_line(output: &Output) -> Value {
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = stdout.lines().rfind(|line| line.contains("\"event\":\"eval\"")).unwrap_or_else(|| panic!("{stdout}"));
    serde_json::from_str(line).unwrap()
}

fn assert_code(output: &Output, code: i32) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

fn number(value: &Value, path: &str) -> f64 {
    value.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no number at {path} in {value}"))
}

/// The bundled model, quantized coarsely.
fn quantized() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    auto_awq_ok(&model(), &dir.path().join("out"), &QUICK);
    dir
}

#[test]
fn a_plain_model_has_a_perplexity_and_a_protocol() {
    let found = eval_json(&model(), &SHORT);
    assert!((2.0..200.0).contains(&number(&found, "/perplexity/value")), "{found}");
    assert_eq!(number(&found, "/perplexity/predictions"), 8.0 * 63.0);
    assert!(number(&found, "/perplexity/standard_error") > 0.0);
    assert_eq!(found["layout"], Value::Null);
    let protocol = &found["protocol"];
    assert_eq!((number(protocol, "/windows"), number(protocol, "/seqlen")), (8.0, 64.0));
    assert_eq!(protocol["text_sha256"].as_str().unwrap().len(), 64);
    assert_eq!(found["comparison"], Value::Null);

    let output = eval(&model(), &SHORT);
    assert_code(&output, 0);
    let text = String::from_utf8(output.stdout).unwrap();
    for wanted in
        ["not quantized", "perplexity", "±", "8 of 64 tokens", "held-out", protocol["text_sha256"].as_str().unwrap()]
    {
        assert!(text.contains(wanted), "no `{wanted}` in: {text}");
    }
}

#[test]
fn a_quantized_checkpoint_is_compared_with_its_original() {
    let (dir, original) = (quantized(), model());
    let out = dir.path().join("out");
    let alone = eval_json(&out, &SHORT);
    assert_eq!(alone["layout"], "awq");
    let against = ["--against", original.to_str().unwrap(), "--canary", "0"];
    let found = eval_json(&out, &[&SHORT[..], &against].concat());
    let comparison = &found["comparison"];
    let same = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-6, "{a} {b}");
    same(number(comparison, "/perplexity/value"), number(&alone, "/perplexity/value"));
    let plain = eval_json(&original, &SHORT);
    same(number(comparison, "/perplexity_original/value"), number(&plain, "/perplexity/value"));
    same(
        number(comparison, "/perplexity_ratio/value"),
        number(comparison, "/perplexity/value") / number(comparison, "/perplexity_original/value"),
    );
    let quantiles = ["/kl/median", "/kl/p90", "/kl/p99", "/kl/p999", "/kl/max"].map(|path| number(comparison, path));
    assert!(quantiles.is_sorted() && quantiles[0] > 0.0, "{quantiles:?}");
    assert!((0.5..1.0).contains(&number(comparison, "/top1/value")));
    assert_eq!(comparison["layers"].as_array().unwrap().len(), 6);
    // A coarse cache on top makes it worse.
    let cache = eval_json(&out, &[&SHORT[..], &against, &["--kv-bits", "4"]].concat());
    assert!(number(&cache, "/comparison/kl/mean") > number(comparison, "/kl/mean"));

    // A model is no different from itself.
    let itself = eval_json(&original, &[&SHORT[..], &against[..2], &["--canary", "1"]].concat());
    let canary = &itself["canaries"][0];
    assert_eq!((number(canary, "/matching"), canary["identical"].as_bool()), (256.0, Some(true)), "{canary}");
    assert_eq!(canary["prompt"].as_array().unwrap().len(), 32);
    assert_eq!(number(&itself, "/comparison/kl/max"), 0.0);
    assert_eq!(number(&itself, "/comparison/top1/value"), 1.0);
    assert_eq!(number(&itself, "/comparison/perplexity_ratio/value"), 1.0);
}

#[test]
fn gates_pass_and_fail() {
    let (dir, original) = (quantized(), model());
    let out = dir.path().join("out");
    let run = |gates: &[&str]| {
        let against = ["--against", original.to_str().unwrap(), "--canary", "0", "--format", "json"];
        eval(&out, &[&SHORT[..], &against, gates].concat())
    };
    let output = run(&["--max-kl", "5", "--max-ppl-ratio", "10", "--min-top1", "1"]);
    assert_code(&output, 0);
    let gates = last_line(&output)["gates"].clone();
    assert!(gates.as_array().unwrap().len() == 3 && gates.as_array().unwrap().iter().all(|g| g["passed"] == true));
    for (gate, limit) in [("--max-kl", "0.000001"), ("--max-ppl-ratio", "0.5"), ("--min-top1", "99.999")] {
        let output = run(&[gate, limit]);
        let stderr = assert_code(&output, 6);
        assert!(stderr.contains(gate), "{stderr}");
        let gates = last_line(&output)["gates"].clone();
        assert_eq!((&gates[0]["gate"], &gates[0]["passed"]), (&Value::from(gate), &Value::from(false)));
    }
}

#[test]
fn tasks_are_scored_from_local_files() {
    let data = root().join("tests/fixtures/eval/tasks");
    let golden: Value =
        serde_json::from_slice(&std::fs::read(root().join("tests/fixtures/eval/tasks.json")).unwrap()).unwrap();
    let names = "hellaswag,mmlu,arc_challenge,arc_easy,winogrande,piqa";
    let flags = ["--tasks", names, "--task-data", data.to_str().unwrap()];
    let found = eval_json(&model(), &flags);
    assert_eq!(found["perplexity"], Value::Null, "tasks alone need no text");
    for task in found["tasks"].as_array().unwrap() {
        let wanted = &golden[task["task"].as_str().unwrap()];
        assert!((number(task, "/score/acc/value") - number(wanted, "/acc")).abs() < 1e-9);
        for (item, wanted) in task["items"].as_array().unwrap().iter().zip(wanted["items"].as_array().unwrap()) {
            let lists = [&item["log_likelihoods"], &wanted["log_likelihoods"]].map(|l| l.as_array().unwrap());
            assert_eq!(lists[0].len(), lists[1].len());
            for (a, b) in lists[0].iter().zip(lists[1]) {
                assert!((a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-3, "{a} {b}");
            }
        }
    }
    let original = model();
    let both = [&flags[..], &["--limit", "2", "--against", original.to_str().unwrap()]].concat();
    let found = eval_json(&model(), &both);
    assert_eq!(found["tasks"][0]["questions"], 2);
    assert_eq!(found["tasks"][0]["score"], found["tasks"][0]["original"], "a model equals itself");
    assert_eq!(found["tasks"][0]["flips"], 0);
}

#[test]
fn what_cannot_be_measured_is_said() {
    let (dir, original) = (quantized(), model());
    let out = dir.path().join("out");
    let original = original.to_str().unwrap();
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&[], 3, &["wikitext2", "--dataset", "huggingface-cli download", "builtin"]),
        (&["--dataset", "wikitext99"], 3, &["wikitext99", "--dataset", ".jsonl"]),
        (&["--max-kl", "1"], 2, &["--max-kl", "--against"]),
        (&["--min-top1", "1"], 2, &["--against"]),
        (&["--canary", "1"], 2, &["--canary", "--against"]),
        (&["--against", original, "--max-kl", "NaN"], 2, &["NaN"]),
        (&["--against", original, "--min-top1", "101"], 2, &["percent"]),
        (&["--seqlen", "1"], 2, &["--seqlen 1"]),
        (&["--windows", "0"], 2, &["--windows"]),
        (&["--tasks", "piqa"], 2, &["--task-data"]),
        (&["--tasks", "boolq", "--task-data", "."], 2, &["boolq", "hellaswag"]),
        (&["--tasks", "piqa", "--task-data", "/nonexistent"], 3, &["piqa.jsonl", "--task-data"]),
        (&["--dataset", "builtin", "--max-memory", "1MB"], 5, &["--max-memory", "1.0 MB"]),
        (&["--against", "/nonexistent/model"], 3, &["/nonexistent/model"]),
    ];
    for (flags, code, says) in cases {
        let stderr = assert_code(&eval(&out, flags), *code);
        for wanted in *says {
            assert!(stderr.contains(wanted), "{flags:?}: no `{wanted}` in: {stderr}");
        }
    }
    // A window longer than the model's context is cut to it, with a note.
    let stderr = assert_code(&eval(&model(), &["--dataset", "builtin", "--seqlen", "4096", "--windows", "1"]), 0);
    assert!(stderr.contains("2048 tokens instead of 4096"), "{stderr}");
}

#[test]
fn models_that_do_not_belong_together_are_refused() {
    let original = model();
    let against = ["--against", original.to_str().unwrap(), "--dataset", "builtin"];
    let edit = |change: &dyn Fn(&mut serde_json::Map<String, Value>), tensors_too: &dyn Fn(&Path)| {
        let copy = copy_of(&model());
        let mut value = config(copy.path());
        change(value.as_object_mut().unwrap());
        std::fs::write(copy.path().join("config.json"), value.to_string()).unwrap();
        tensors_too(copy.path());
        copy
    };
    let vocab = edit(&|config| drop(config.insert("vocab_size".into(), 4090.into())), &|dir| {
        let mut all = tensors(dir);
        let table = all.get_mut("model.embed_tokens.weight").unwrap();
        table.shape[0] = 4090;
        table.data.truncate(4090 * 256 * 2);
        write_tensors(dir, &all, &[("format", "pt")]);
    });
    let stderr = assert_code(&eval(vocab.path(), &against), 3);
    assert!(stderr.contains("4096 tokens in the vocabulary, this checkpoint 4090"), "{stderr}");
    let depth = edit(&|config| drop(config.insert("num_hidden_layers".into(), 5.into())), &|dir| {
        let mut all = tensors(dir);
        all.retain(|name, _| !name.contains("layers.5."));
        write_tensors(dir, &all, &[("format", "pt")]);
    });
    let stderr = assert_code(&eval(depth.path(), &against), 3);
    assert!(stderr.contains("6 layers, this checkpoint 5"), "{stderr}");
    let nan = edit(&|_| (), &|dir| {
        let mut all = tensors(dir);
        let weight = all.get_mut("model.layers.3.mlp.down_proj.weight").unwrap();
        weight.data[10..12].copy_from_slice(&[0xc0, 0x7f]);
        write_tensors(dir, &all, &[("format", "pt")]);
    });
    for flags in [&SHORT[..], &[&SHORT[..], &["--against", original.to_str().unwrap(), "--max-kl", "9"]].concat()] {
        let stderr = assert_code(&eval(nan.path(), flags), 3);
        assert!(stderr.contains("block 3") && stderr.contains("NaN"), "{stderr}");
    }
}
