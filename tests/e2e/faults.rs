//! Every write, every fsync, every rename fails once: a clean error, nothing that looks finished, and the same command
//! goes on to the bytes of an undisturbed run.
//!
//! The real binary runs on a file layer that fails (`tests/faults/layer.c`, loaded before the C library), so that no
//! call is forgotten, whichever crate makes it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

use super::support::*;

/// The compiled layer; `None`, with a notice, where there is no C compiler.
fn layer() -> Option<&'static Path> {
    static LAYER: OnceLock<Option<(tempfile::TempDir, PathBuf)>> = OnceLock::new();
    let found = LAYER.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer.so");
        let source = root().join("tests/faults/layer.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O1", "-pthread", "-o"]).arg(&path).arg(source).arg("-ldl");
        match compiler.output() {
            Ok(output) if output.status.success() => Some((dir, path)),
            Ok(output) => panic!("{}", String::from_utf8_lossy(&output.stderr)),
            Err(error) => {
                eprintln!("skipped: no C compiler for the file layer: {error}");
                None
            }
        }
    });
    found.as_ref().map(|(_, path)| path.as_path())
}

/// What becomes of a call, and of those after it: see `tests/faults/layer.c`.
const MODES: [&str; 3] = ["once", "full", "power"];

/// The first two blocks of the bundled model.
fn two_blocks() -> tempfile::TempDir {
    let dir = copy_of(&model());
    let mut all = tensors(dir.path());
    all.retain(|name, _| !(2..6).any(|block| name.starts_with(&format!("model.layers.{block}."))));
    write_tensors(dir.path(), &all, &[("format", "pt")]);
    let mut config = config(dir.path());
    config["num_hidden_layers"] = 2.into();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

struct Job {
    name: &'static str,
    arguments: Vec<String>,
    /// A checkpoint that is in the folder before.
    before: Option<BTreeMap<String, Vec<u8>>>,
    wanted: BTreeMap<String, Vec<u8>>,
}

impl Job {
    fn command(&self, out: &Path) -> Command {
        let mut command = lite();
        command.args(["--threads", "1"]).args(&self.arguments).arg("--work-dir").arg(out);
        command
    }

    fn prepare(&self, out: &Path) {
        for (name, bytes) in self.before.iter().flatten() {
            std::fs::create_dir_all(out).unwrap();
            std::fs::write(out.join(name), bytes).unwrap();
        }
    }

    /// A run with call number `at` (0 for none) going wrong.
    fn faulty(&self, layer: &Path, out: &Path, mode: &str, at: usize) -> (Output, Vec<String>) {
        let list = out.with_extension("calls");
        let mut command = self.command(out);
        command.env("LD_PRELOAD", layer).env("FAULT_ROOT", out).env("FAULT_LIST", &list);
        let output = command.env("FAULT_MODE", mode).env("FAULT_AT", at.to_string()).output().unwrap();
        let calls = std::fs::read_to_string(&list).unwrap().lines().map(ToOwned::to_owned).collect();
        (output, calls)
    }

    /// Lets a call go wrong, looks at what is left, and runs the same command again.
    fn check(&self, layer: &Path, dir: &Path, mode: &str, at: usize) -> Result<(), String> {
        let out = dir.join(format!("{}-{mode}-{at}", self.name));
        self.prepare(&out);
        let (output, calls) = self.faulty(layer, &out, mode, at);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let call = calls.get(at - 1).cloned().unwrap_or_default();
        let held = |holds: bool, what: String| {
            let told = || format!("{}, {mode}, call {at} (`{call}`): {what}; {:?}: {stderr}", self.name, output.status);
            if holds { Ok(()) } else { Err(told()) }
        };
        let left = files(&out);
        let is = |whole: &BTreeMap<String, Vec<u8>>| whole.iter().all(|(name, bytes)| left.get(name) == Some(bytes));
        let finished = is(&self.wanted);
        let whole = finished || self.before.as_ref().is_some_and(is);
        held(whole || !left.contains_key("config.json"), format!("{:?} look finished", left.keys()))?;
        let (clean, why) = (stderr.contains("error: cannot "), ["No space left", "Input/output", "cross-device"]);
        let clean = clean && why.iter().any(|why| stderr.contains(why)) && !stderr.contains("panicked");
        // The log, and what is only swept away, stop no run; once a disk is full, nothing else may be left to write.
        let harmless = finished && (call.ends_with(LOG) || call.starts_with("remove ") || mode == "full");
        let ended = match output.status.code() {
            Some(137) => mode == "power",
            Some(0) => harmless,
            Some(7) => mode != "power" && clean,
            _ => false,
        };
        held(ended, "not a clean end".to_owned())?;
        let again = self.command(&out).output().unwrap();
        let stderr = String::from_utf8_lossy(&again.stderr);
        // Whoever failed after everything was published has a result.
        let over = finished && stderr.contains("already holds");
        held(again.status.success() || over, format!("run again: {stderr}"))?;
        let found = files(&out);
        let names: BTreeSet<&String> = found.keys().chain(self.wanted.keys()).collect();
        let differ: Vec<_> = names.into_iter().filter(|name| found.get(*name) != self.wanted.get(*name)).collect();
        held(differ.is_empty(), format!("{differ:?} differ from an undisturbed run's; run again: {stderr}"))?;
        std::fs::remove_dir_all(&out).unwrap();
        Ok(())
    }
}

/// Of equal calls in a row the first, the one in the middle and the last.
fn sample(calls: &[String]) -> Vec<usize> {
    let mut chosen = BTreeSet::new();
    let mut first = 0;
    for (i, call) in calls.iter().enumerate() {
        if calls.get(i + 1) != Some(call) {
            chosen.extend([first + 1, (first + i) / 2 + 1, i + 1]);
            first = i + 1;
        }
    }
    chosen.into_iter().collect()
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(ToOwned::to_owned).collect()
}

/// The jobs, each with its result when nothing goes wrong.
fn jobs(dir: &Path, source: &Path) -> Vec<Job> {
    let source = source.display().to_string();
    let tiny = "--calib-dataset builtin --calib-samples 2 --calib-seqlen 32 --batch-size 2 --eval-samples 1 \
                --eval-seqlen 16";
    let gptq = words(&format!("auto_gptq {source} {tiny} --w-group-size 64 --checkpoint-seconds 0"));
    // A budget that leaves no room for the hidden states: they go to a file.
    let mut plan = lite();
    plan.args(words(&format!(
        "--format json plan {source} --method gptq {tiny} --w-group-size 64 --max-memory 1TB --work-dir"
    )));
    let plan: serde_json::Value = serde_json::from_slice(&plan.arg(dir.join("none")).output().unwrap().stdout).unwrap();
    let part = |name: &str| plan["memory"][name].as_u64().unwrap();
    // 15 % of it stay free.
    let budget = (part("peak") - part("middle") - part("hidden") / 2) / 100 * 115;
    let spooled = [gptq, words(&format!("--max-memory {budget}"))].concat();
    let whole = |name: &'static str, arguments: Vec<String>, before: Option<&Job>| {
        let out = dir.join(name);
        let mut job = Job { name, arguments, before: before.map(|job| job.wanted.clone()), wanted: BTreeMap::new() };
        job.prepare(&out);
        let output = job.command(&out).output().unwrap();
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        job.wanted = files(&out);
        job
    };
    let gptq = whole("auto_gptq", spooled, None);
    let rtn = whole("rtn", words(&format!("rtn {source} --scheme W8A16 --max-shard-size 1MB")), None);
    let over = words(&format!("auto_awq {source} --calib-samples 0 --overwrite"));
    let over = whole("overwrite", over, Some(&rtn));
    let packed = dir.join("rtn").display().to_string();
    let convert = whole("convert", words(&format!("convert {packed} --layout gptq")), None);
    vec![gptq, rtn, over, convert]
}

/// Checks of a usual run of the test, besides one of each kind of call and every removal; `LITE_FAULTS=all` does all of them,
/// `LITE_FAULTS=once` (`full`, `power`) all of one mode, `LITE_FAULTS=convert` all of one job.
const CHECKS: usize = 36;

#[test]
fn every_call_that_writes_fails_once() {
    let Some(layer) = layer() else { return };
    let source = two_blocks();
    let dir = tempfile::tempdir().unwrap();
    let jobs = jobs(dir.path(), source.path());
    let mut all: Vec<(&Job, &str, usize)> = Vec::new();
    // The first of each kind, and how many there are.
    let mut kinds: BTreeMap<String, (usize, &Job, usize)> = BTreeMap::new();
    // Where an old checkpoint goes, and where what is published is swept up behind, much is half done.
    let mut removals: Vec<(&Job, &str, usize)> = Vec::new();
    for job in &jobs {
        let out = dir.path().join(format!("{}-counted", job.name));
        job.prepare(&out);
        let (output, calls) = job.faulty(layer, &out, "once", 0);
        assert!(output.status.success() && files(&out) == job.wanted, "{}: the layer changes the result", job.name);
        for (i, call) in calls.iter().enumerate() {
            let kind = call.split(' ').next().unwrap_or_default();
            kinds.entry(kind.to_owned()).or_insert((0, job, i + 1)).0 += 1;
        }
        if job.name != "auto_gptq" {
            let removes = calls.iter().enumerate().filter(|(_, call)| call.starts_with("remove "));
            removals.extend(removes.map(|(i, _)| (job, "once", i + 1)));
        }
        all.extend(sample(&calls).into_iter().flat_map(|at| MODES.map(|mode| (job, mode, at))));
    }
    for kind in ["create", "write", "size", "sync", "rename", "mkdir", "remove"] {
        assert!(kinds.contains_key(kind), "no {kind}");
    }
    // By mode, so that an even sample has all of them.
    all.sort_by_key(|(_, mode, _)| *mode);
    let asked = std::env::var("LITE_FAULTS").unwrap_or_default();
    let checks: Vec<(&Job, &str, usize)> = if asked == "all" {
        all.clone()
    } else if MODES.contains(&asked.as_str()) || jobs.iter().any(|job| job.name == asked) {
        all.iter().filter(|(job, mode, _)| *mode == asked || job.name == asked).copied().collect()
    } else {
        let even = (0..CHECKS).map(|i| all[i * all.len() / CHECKS]);
        even.chain(kinds.values().map(|(_, job, at)| (*job, "once", *at))).chain(removals).collect()
    };
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((job, mode, at)) = checks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    failed.lock().unwrap().extend(job.check(layer, dir.path(), mode, *at).err());
                }
            });
        }
    });
    let counts: Vec<String> = kinds.iter().map(|(kind, (count, ..))| format!("{count} {kind}")).collect();
    let count = |mode: &str| checks.iter().filter(|check| check.1 == mode).count();
    eprintln!(
        "calls that change files: {}; {} failed once, {} began a full disk, {} a power cut",
        counts.join(", "),
        count("once"),
        count("full"),
        count("power")
    );
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} went wrong:\n{}", failed.len(), failed.join("\n"));
}
