//! `lite plan` of recipe files, plan files that hold a run to what was planned, and batches that share and resume.

use std::path::Path;
use std::process::Output;

use super::support::*;

const JOB: &str = "scheme: {bits: 4, group_size: 64, symmetric: true}\nstages: [gptq: {rounding: gptq, error_aware: false}]\n\
                   calibration: {dataset: DATA, samples: 2, seqlen: 64}\neval: {samples: 1, seqlen: 32}\n";

fn run(dir: &Path, words: &[&str]) -> Output {
    lite().current_dir(dir).args(words).output().unwrap()
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn ok(dir: &Path, words: &[&str]) -> String {
    let output = run(dir, words);
    assert!(output.status.success(), "{words:?}: {}", told(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// A folder with a copy of the model, a text and a job.
fn folder() -> tempfile::TempDir {
    let dir = copy_of(&model());
    std::fs::create_dir(dir.path().join("m")).unwrap();
    for name in files(&model()).keys() {
        std::fs::rename(dir.path().join(name), dir.path().join("m").join(name)).unwrap();
    }
    let text: String =
        (0..400).map(|i| format!("Line {i} of a text that is long enough to be cut into windows.\n")).collect();
    std::fs::write(dir.path().join("text.txt"), text).unwrap();
    let job = format!("model: m\n{JOB}save: {{path: out}}\n").replace("DATA", "text.txt");
    std::fs::write(dir.path().join("job.yaml"), job).unwrap();
    dir
}

#[test]
fn a_plan_holds_a_run_to_what_was_planned() {
    let dir = folder();
    let at = dir.path();
    let shown = ok(at, &["plan", "job.yaml", "--out", "plan.json"]);
    assert!(shown.contains("LlamaForCausalLM") && shown.contains("memory"), "{shown}");
    assert!(!at.join("out").exists());
    let file: serde_json::Value = serde_json::from_slice(&std::fs::read(at.join("plan.json")).unwrap()).unwrap();
    assert!(file["plan"]["memory"]["peak"].as_u64().unwrap() > 0 && file["identity"]["calibration text"].is_string());

    let refused = |words: &[&str], difference: &str| {
        let output = run(at, words);
        assert_eq!(output.status.code(), Some(8), "{words:?}: {}", told(&output));
        assert!(told(&output).contains(difference), "no `{difference}`: {}", told(&output));
        assert!(!at.join("out/config.json").exists());
    };
    // The recipe.
    refused(&["run", "job.yaml", "--plan", "plan.json", "--set", "scheme.group_size=128"], "w-group-size: 64 → 128");
    // The text.
    let text = std::fs::read(at.join("text.txt")).unwrap();
    std::fs::write(at.join("text.txt"), [b"Another beginning. ", text.as_slice()].concat()).unwrap();
    refused(&["run", "--plan", "plan.json"], "calibration text: ");
    std::fs::write(at.join("text.txt"), text).unwrap();
    // The model.
    let norm = "model.layers.3.input_layernorm.weight";
    edit_tensor(&at.join("m"), norm, |raw| raw.data[0] ^= 1);
    refused(&["run", "--plan", "plan.json"], "model: ");
    edit_tensor(&at.join("m"), norm, |raw| raw.data[0] ^= 1);
    // The plan file itself.
    let changed = std::fs::read_to_string(at.join("plan.json")).unwrap().replace("group_size: 64", "group_size: 32");
    std::fs::write(at.join("changed.json"), changed).unwrap();
    refused(&["run", "--plan", "changed.json"], "w-group-size: 64 → 32");

    ok(at, &["run", "--plan", "plan.json"]);
    ok(at, &["run", "job.yaml", "--work-dir", "other"]);
    let (planned, direct) = (files(&at.join("out")), files(&at.join("other")));
    assert_eq!(planned["model.safetensors"], direct["model.safetensors"]);
}

#[test]
fn plans_that_cannot_be_are_refused() {
    let dir = folder();
    let at = dir.path();
    let jobs = "defaults: {model: m, scheme: W8A16, stages: [rtn: {}]}\njobs: [{name: a}, {name: b}]\n";
    std::fs::write(at.join("jobs.yaml"), jobs).unwrap();
    for (words, code, says) in [
        (&["plan", "job.yaml", "--w-bits", "8"][..], 2, "--set"),
        (&["plan", "m", "--set", "model=x"], 2, "recipe files"),
        (&["plan", "jobs.yaml", "--out", "plan.json"], 2, "--only"),
        (&["plan", "jobs.yaml", "--only", "7"], 2, "0 to 1"),
        (&["plan", "none.yaml"], 7, "none.yaml"),
        (&["run", "--plan", "none.json"], 7, "none.json"),
        (&["run", "--plan", "job.yaml"], 3, "no plan of `lite plan --out`"),
        (&["run"], 2, "FILE"),
    ] {
        let output = run(at, words);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {}", told(&output));
        assert!(told(&output).contains(says), "{words:?}: {}", told(&output));
    }
    // Several jobs are shown one after the other; without data there is no text to read.
    let shown = ok(at, &["plan", "jobs.yaml"]);
    assert_eq!(shown.matches("LlamaForCausalLM").count(), 2, "{shown}");
    ok(at, &["plan", "jobs.yaml", "--only", "1", "--out", "plan.json"]);
    ok(at, &["run", "--plan", "plan.json", "--work-dir", "x", "jobs.yaml", "--only", "1"]);
    assert!(at.join("x/config.json").exists());
}

/// The second job of one model does not read tokenizer and text again: they may be gone by then.
#[test]
fn jobs_of_one_model_share_their_text() {
    let dir = folder();
    let at = dir.path();
    let jobs = "defaults: {model: m, stages: [awq: {}], calibration: {dataset: text.txt, samples: 2, seqlen: 32}, \
                eval: {samples: 0}}\njobs: [{name: a, scheme: W4A16}, {name: b, scheme: W4A16}]\n";
    std::fs::write(at.join("jobs.yaml"), jobs).unwrap();
    let words = ["run", "jobs.yaml", "--work-dir", "{name}", "--no-report"];
    let mut child = lite().current_dir(at).args(words).stderr(std::process::Stdio::piped()).spawn().unwrap();
    // Once the first job is calibrating, the text goes.
    while !at.join("a/.lite").exists() {
        assert!(child.try_wait().unwrap().is_none(), "the run ended");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    std::fs::remove_file(at.join("text.txt")).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", told(&output));
    assert_eq!(files(&at.join("a")), files(&at.join("b")));
}

/// A batch killed in its second job: `lite resume` of that job's folder finishes it, and it alone.
#[test]
fn a_job_of_a_batch_resumes_by_its_folder() {
    let dir = folder();
    let at = dir.path();
    let jobs = format!(
        "defaults:\n  model: m\n  {}\njobs: [{{name: a}}, {{name: b}}, {{name: c}}]\n",
        JOB.trim_end().replace('\n', "\n  ")
    )
    .replace("DATA", "text.txt");
    std::fs::write(at.join("jobs.yaml"), jobs).unwrap();
    let words = ["run", "jobs.yaml", "--work-dir", "{name}", "--no-report"];
    let mut child = lite().current_dir(at).args(words).stderr(std::process::Stdio::null()).spawn().unwrap();
    while !at.join("b/.lite/blocks/0001.safetensors").exists() {
        assert!(child.try_wait().unwrap().is_none(), "the run ended");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let output = run(at, &["resume", "b"]);
    assert!(output.status.success(), "{}", told(&output));
    assert!(told(&output).contains("resuming after block"), "{}", told(&output));
    assert_eq!(files(&at.join("a")), files(&at.join("b")));
    assert!(!at.join("c").exists());
}
