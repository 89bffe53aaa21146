//! Killed at any moment, a run goes on after its last finished block and gives the bytes of an uninterrupted one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::support::*;

const BLOCKS: usize = 6;

const VERBS: [(&str, &[&str]); 3] = [
    ("auto_awq", &[]),
    ("auto_gptq", &["--w-group-size", "64"]),
    ("smooth_quant", &["--activations", "static-tensor", "--alpha", "auto"]),
];

const TINY: [&str; 12] = [
    "--calib-dataset",
    "builtin",
    "--calib-samples",
    "4",
    "--calib-seqlen",
    "64",
    "--batch-size",
    "2",
    "--eval-samples",
    "1",
    "--eval-seqlen",
    "32",
];

fn command(verb: &str, flags: &[&str], model: &Path, out: &Path, more: &[&str]) -> Command {
    let mut command = lite();
    command.arg(verb).arg(model).arg("--work-dir").arg(out).args(TINY).args(flags).args(more);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn awq(out: &Path, more: &[&str]) -> Output {
    command("auto_awq", &[], &model(), out, more).output().unwrap()
}

pub(super) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// All files but the log, which has times.
pub(super) fn result(out: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = files(out);
    found.remove("lite.log.jsonl");
    found
}

pub(super) fn same(found: &BTreeMap<String, Vec<u8>>, wanted: &BTreeMap<String, Vec<u8>>, what: &str) {
    let differ: Vec<&String> =
        wanted.keys().chain(found.keys()).filter(|name| found.get(*name) != wanted.get(*name)).collect();
    assert!(differ.is_empty(), "{what}: {differ:?} differ");
}

/// Lines of finished blocks.
pub(super) fn finished(out: &Path) -> usize {
    let journal = std::fs::read_to_string(out.join(".lite/journal.jsonl")).unwrap_or_default();
    journal.lines().filter(|line| line.contains("\"kind\":\"block\"")).count()
}

/// Starts the run and kills it once `when` says so; `None` if it came to its end before.
pub(super) fn killed(mut command: Command, mut when: impl FnMut() -> bool) -> Option<Output> {
    let mut child = command.spawn().unwrap();
    while child.try_wait().unwrap().is_none() {
        if when() {
            // SIGKILL.
            child.kill().unwrap();
            child.wait().unwrap();
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Some(child.wait_with_output().unwrap())
}

/// A run of `auto_awq` in `out` with `blocks` finished blocks, killed.
fn interrupted(out: &Path, blocks: usize) {
    let ended = killed(command("auto_awq", &[], &model(), out, &[]), || finished(out) >= blocks);
    assert!(ended.is_none(), "the run ended before it was killed");
}

/// xorshift64: the moments differ from kill to kill and are those of every run of the test.
fn random(state: &mut u64) -> f64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 11) as f64 / (1u64 << 53) as f64
}

/// Verb, flags, seconds and files of a run that nobody killed.
type Whole = (&'static str, &'static [&'static str], f64, BTreeMap<String, Vec<u8>>);

#[test]
fn killed_runs_go_on_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let wanted_kills: usize = std::env::var("LITE_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(12);
    let mut state = 0x9e37_79b9_7f4a_7c15;
    let (mut kills, mut resumed, mut at_boundary) = (0, 0, 0);
    let mut runs: Vec<Whole> = Vec::new();
    for (verb, flags) in VERBS {
        let out = dir.path().join(verb);
        let start = Instant::now();
        let output = command(verb, flags, &model(), &out, &[]).output().unwrap();
        assert!(output.status.success(), "{verb}: {}", stderr(&output));
        runs.push((verb, flags, start.elapsed().as_secs_f64(), result(&out)));
    }
    // Every second run saves its hidden states behind every block.
    let rerun = |name: &str, verb: &str, flags: &[&str], out: &Path, wanted, resumed: &mut usize, more: &[&str]| {
        let output = command(verb, flags, &model(), out, more).output().unwrap();
        // Whoever is killed after everything was published has a result.
        let over = stderr(&output).contains("already holds a checkpoint");
        assert!(output.status.success() || over, "{name}: {}", stderr(&output));
        *resumed += usize::from(stderr(&output).contains("resuming after block"));
        same(&result(out), wanted, name);
        std::fs::remove_dir_all(out).unwrap();
    };
    let saving = |i: usize| -> &[&str] { if i.is_multiple_of(2) { &["--checkpoint-seconds", "0"] } else { &[] } };
    // One run of each verb, killed at every boundary in turn.
    for (verb, flags, _, wanted) in &runs {
        let out = dir.path().join("boundaries");
        for block in 1..=BLOCKS {
            let run = command(verb, flags, &model(), &out, saving(block));
            if killed(run, || finished(&out) >= block).is_none() {
                at_boundary += 1;
            }
        }
        rerun(&format!("{verb} at every block"), verb, flags, &out, wanted, &mut resumed, &[]);
    }
    let mut attempt = 0;
    while kills < wanted_kills {
        let (verb, flags, seconds, wanted) = &runs[attempt % runs.len()];
        let out = dir.path().join(format!("random-{attempt}"));
        let (start, after) = (Instant::now(), random(&mut state) * seconds);
        let run = command(verb, flags, &model(), &out, saving(attempt / runs.len()));
        kills += usize::from(killed(run, || start.elapsed().as_secs_f64() >= after).is_none());
        attempt += 1;
        rerun(&format!("{verb} killed after {after:.3} s"), verb, flags, &out, wanted, &mut resumed, &[]);
        assert!(attempt < 3 * wanted_kills + 10, "runs end before they are killed");
    }
    eprintln!("{at_boundary} kills at block boundaries, {kills} at random moments; {resumed} reruns resumed");
    assert!(at_boundary >= 2 * BLOCKS && resumed > VERBS.len());
}

#[test]
fn another_recipe_or_model_is_refused_until_restart_or_clean() {
    let dir = tempfile::tempdir().unwrap();
    let (out, reference) = (dir.path().join("out"), dir.path().join("reference"));
    assert!(awq(&reference, &[]).status.success());
    interrupted(&out, 2);
    let other = awq(&out, &["--w-group-size", "64"]);
    assert_eq!(other.status.code(), Some(8), "{}", stderr(&other));
    assert!(stderr(&other).contains("w-group-size: 128 → 64"), "{}", stderr(&other));
    assert!(stderr(&other).contains("--restart") && stderr(&other).contains("lite clean"));

    let changed = copy_of(&model());
    edit_tensor(changed.path(), "model.layers.3.self_attn.o_proj.weight", |raw| raw.data[0] ^= 1);
    let refused = command("auto_awq", &[], changed.path(), &out, &[]).output().unwrap();
    assert_eq!(refused.status.code(), Some(8), "{}", stderr(&refused));
    assert!(stderr(&refused).contains("model: "), "{}", stderr(&refused));

    // Other verbs do not clear what took hours.
    let converted = lite().arg("calibrate").arg(model()).arg("--work-dir").arg(&out).args(&TINY[..6]).output().unwrap();
    assert_eq!(converted.status.code(), Some(8), "{}", stderr(&converted));

    // What no block depends on may change, and nothing was lost.
    let output = awq(&out, &["--threads", "1", "--max-memory", "4GB"]);
    assert!(output.status.success() && stderr(&output).contains("resuming after block"), "{}", stderr(&output));
    same(&result(&out), &result(&reference), "other threads");

    let again = dir.path().join("again");
    interrupted(&again, 2);
    let output = awq(&again, &["--w-group-size", "64", "--restart"]);
    assert!(output.status.success() && !stderr(&output).contains("resuming"), "{}", stderr(&output));
    assert_ne!(result(&again), result(&reference));
}

#[test]
fn damage_is_redone() {
    let dir = tempfile::tempdir().unwrap();
    let (out, reference) = (dir.path().join("out"), dir.path().join("reference"));
    assert!(awq(&reference, &[]).status.success());
    interrupted(&out, 3);
    let path = out.join(".lite/blocks/0001.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 16;
    std::fs::write(&path, bytes).unwrap();
    let output = awq(&out, &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("block 2 is done again"), "{}", stderr(&output));
    assert!(stderr(&output).contains("resuming after block 1 of 6"), "{}", stderr(&output));
    same(&result(&out), &result(&reference), "a damaged record");
}

#[test]
fn resume_and_clean() {
    let dir = tempfile::tempdir().unwrap();
    let reference = dir.path().join("reference");
    assert!(awq(&reference, &[]).status.success());
    let none = lite().arg("resume").arg(dir.path()).output().unwrap();
    assert_eq!(none.status.code(), Some(8), "{}", stderr(&none));
    let none = lite().arg("clean").arg(&reference).output().unwrap();
    assert_eq!(none.status.code(), Some(8), "{}", stderr(&none));

    // Relative paths, from another folder, and the work folder was moved.
    let relative = PathBuf::from("out");
    let model_parent = model().parent().unwrap().to_owned();
    std::os::unix::fs::symlink(&model_parent, dir.path().join("models")).unwrap();
    let mut run = command("auto_awq", &[], Path::new("models/novels-llama-6m"), &relative, &[]);
    run.current_dir(dir.path());
    let out = dir.path().join("out");
    assert!(killed(run, || finished(&out) >= 2).is_none());
    let moved = dir.path().join("moved");
    std::fs::rename(&out, &moved).unwrap();
    let output = lite().arg("resume").arg("moved").current_dir(dir.path()).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("resuming after block"), "{}", stderr(&output));
    same(&result(&moved), &result(&reference), "lite resume");

    interrupted(&out, 1);
    let output = lite().arg("clean").arg(&out).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(result(&out).is_empty());

    // A live run is refused.
    let mut child = command("auto_awq", &[], &model(), &out, &[]).spawn().unwrap();
    while finished(&out) < 1 {
        assert!(child.try_wait().unwrap().is_none(), "the run ended");
        std::thread::sleep(Duration::from_millis(1));
    }
    let output = lite().arg("clean").arg(&out).output().unwrap();
    assert_eq!(output.status.code(), Some(8), "{}", stderr(&output));
    assert!(stderr(&output).contains("another run"), "{}", stderr(&output));
    // Being interrupted is no loss either.
    let stop = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(stop.success());
    let output = child.wait_with_output().unwrap();
    if output.status.code() == Some(130) {
        let text = stderr(&output);
        assert!(text.contains("finished and kept") && text.contains("lite resume"), "{text}");
        assert!(finished(&out) >= 1);
    }
    let output = awq(&out, &[]);
    assert!(output.status.success() || stderr(&output).contains("already holds"), "{}", stderr(&output));
    same(&result(&out), &result(&reference), "after Ctrl-C");
}
