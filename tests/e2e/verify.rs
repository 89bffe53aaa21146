//! `lite verify`: sound checkpoints pass, damaged ones are caught.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Output;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use lite_runtime::verify::{Finding, FindingSeverity, VerifyOptions, verify};

use super::poison::{Checkpoint, MADE, Poison, Sound, codes, files, floats, integers};
use super::support::{auto_awq_ok, lite, model};

fn findings(dir: &Path, against: Option<&Path>) -> Vec<Finding> {
    let options = VerifyOptions { against, ..VerifyOptions::default() };
    verify(dir, &options, &|_, _, _| true).unwrap().findings
}

fn errors(found: &[Finding]) -> Vec<String> {
    let errors = found.iter().filter(|finding| finding.severity == FindingSeverity::Error);
    errors.map(|f| format!("{} {}: {}", f.code, f.place.as_deref().unwrap_or(""), f.message)).collect()
}

/// Runs `work` over all items on as many threads as there are cores.
fn on_all_cores<T: Sync>(items: &[T], work: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    work(item);
                }
            });
        }
    });
}

#[test]
fn every_poison_is_caught_and_no_sound_checkpoint_is_suspected() {
    let sound = Sound::make();
    let original = Some(sound.original.as_path());
    let mut alarms = Vec::new();
    let mut read = BTreeMap::new();
    for (name, dir) in &sound.made {
        for against in [None, original] {
            alarms.extend(errors(&findings(dir, against)).into_iter().map(|error| format!("{name}: {error}")));
        }
        read.insert(*name, dir);
    }
    let poisons: Vec<&Poison> =
        [files::POISONS, codes::POISONS, integers::POISONS, floats::POISONS].into_iter().flatten().collect();
    let labels: BTreeSet<(&str, &str)> = poisons.iter().map(|poison| (poison.base, poison.name)).collect();
    assert_eq!(labels.len(), poisons.len(), "each poison counts once");
    let missed = Mutex::new(Vec::new());
    let alone = AtomicUsize::new(0);
    on_all_cores(&poisons, |poison| {
        let mut checkpoint = Checkpoint::read(read[poison.base], &sound.original);
        (poison.apply)(&mut checkpoint);
        let dir = checkpoint.write();
        let caught = |against: Option<&Path>| {
            let found = findings(dir.path(), against);
            let hit = |f: &Finding| f.severity == FindingSeverity::Error && poison.codes.contains(&f.code);
            (found.iter().any(hit), errors(&found))
        };
        let (with, what) = caught(original);
        if !with {
            missed.lock().unwrap().push(format!("{} ({}): {what:?}", poison.name, poison.base));
        }
        alone.fetch_add(usize::from(caught(None).0), Ordering::Relaxed);
    });
    let missed = missed.into_inner().unwrap();
    eprintln!(
        "caught {} of {} poisons ({} of them without the original); {} false alarms on {} good checkpoints",
        poisons.len() - missed.len(),
        poisons.len(),
        alone.into_inner(),
        alarms.len(),
        sound.made.len()
    );
    assert!(missed.is_empty() && alarms.is_empty(), "missed:\n{}\nalarms:\n{}", missed.join("\n"), alarms.join("\n"));
    assert_eq!(sound.made.len(), MADE.len());
}

fn run(dir: &Path, flags: &[&str]) -> (i32, String, Output) {
    let output = lite().arg("verify").arg(dir).args(flags).output().unwrap();
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    (output.status.code().unwrap(), text, output)
}

#[test]
fn exit_codes_and_both_forms_of_the_verdict() {
    let out = tempfile::tempdir().unwrap();
    let dir = out.path().join("awq");
    let flags = ["--calib-dataset", "builtin", "--calib-samples", "2", "--calib-seqlen", "64", "--eval-samples", "0"];
    auto_awq_ok(&model(), &dir, &flags);
    let original = model();
    let against =
        ["--against", original.to_str().unwrap(), "--windows", "1", "--target", "vllm", "--target", "turbomind"];

    let (code, text, output) = run(&dir, &against);
    assert_eq!(code, 0, "{text}\n{output:?}");
    assert!(text.contains("mean KL") && text.ends_with("passed: 0 errors, 0 warnings, 0 notes\n"), "{text}");

    let (code, text, _) = run(&dir, &[&against[..], &["--format", "json"]].concat());
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, &value["verdict"], &value["packed_linears"]), (0, &"passed".into(), &42.into()));
    assert!(value["comparison"]["mean_kl"].as_f64().unwrap() < 0.1);

    let mut damaged = Checkpoint::read(&dir, &original);
    damaged.scales("model.layers.3.mlp.up_proj").set(0, 0.0);
    let damaged = damaged.write();
    let (code, text, output) = run(damaged.path(), &[]);
    assert_eq!(code, 6, "{text}");
    assert!(text.contains("error    scale-zero") && text.contains("failed: 1 error,"), "{text}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("error: verify found 1 error"));
    // Headers say nothing of values.
    assert_eq!(run(damaged.path(), &["--quick"]).0, 0);

    std::fs::write(damaged.path().join("model.safetensors"), [0; 20]).unwrap();
    let (code, text, _) = run(damaged.path(), &["--format", "json"]);
    let value: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!((code, &value["opened"], &value["findings"][0]["code"]), (3, &false.into(), &"shard-header".into()));

    assert_eq!(run(&dir, &["--target", "vlmm"]).0, 2);
    assert_eq!(run(&dir, &["--windows", "2"]).0, 2);
    assert_eq!(run(Path::new("/nonexistent/x"), &[]).0, 3);
}

#[test]
fn rules_of_engines_are_checked_on_what_is_stored() {
    let out = tempfile::tempdir().unwrap();
    let dir = out.path().join("g64");
    let made = lite()
        .args(["rtn", "--scheme", "W4A16_ASYM", "--layout", "awq"])
        .arg(model())
        .arg("--work-dir")
        .arg(&dir)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    assert_eq!(run(&dir, &["--target", "turbomind"]).0, 0);
    // 128-wide groups of 256 columns cannot be cut into four.
    let (code, text, _) = run(&dir, &["--target", "turbomind", "--tp", "4"]);
    assert!(code == 6 && text.contains("turbomind-"), "{text}");
}

/// What AutoRound's `fake` format and `lite convert --layout plain` write: the values of codes as floats.
#[test]
fn a_quantized_model_saved_as_floats_is_judged_by_its_bits() {
    let out = tempfile::tempdir().unwrap();
    let run = |args: &[&str], model: &Path, to: &Path| {
        let made = lite().arg(args[0]).arg(model).args(&args[1..]).arg("--work-dir").arg(to).output().unwrap();
        assert!(made.status.success(), "{args:?}: {}", String::from_utf8_lossy(&made.stderr));
    };
    for (scheme, bits) in [("W4A16", 4), ("W8A16", 8)] {
        let (packed, plain) = (out.path().join(scheme), out.path().join(format!("{scheme}-plain")));
        run(&["rtn", "--scheme", scheme, "--eval-samples", "0"], &model(), &packed);
        run(&["convert", "--layout", "plain"], &packed, &plain);
        let found = findings(&plain, Some(&model()));
        assert!(errors(&found).is_empty(), "{:?}", errors(&found));
        let noted: Vec<&Finding> = found.iter().filter(|finding| finding.code == "plain-on-grid").collect();
        // 8 bits differ by less than what a plain tensor may, and rows of 256 are too short to tell.
        assert!(bits == 8 || noted.len() == 42, "{scheme}: {}", noted.len());
        assert!(noted.iter().all(|finding| finding.message.contains(&format!("{bits}-bit"))), "{noted:?}");

        // Values between the levels are no codes' any more.
        let mut damaged = Checkpoint::read(&plain, &model());
        let weight = damaged.tensors.get_mut("model.layers.3.mlp.up_proj.weight").unwrap();
        assert_eq!(weight.dtype, safetensors::Dtype::BF16);
        for (at, value) in weight.data.chunks_exact_mut(2).enumerate() {
            let bits = u16::from_le_bytes([value[0], value[1]]);
            // By up to a quarter.
            value.copy_from_slice(&(bits ^ (at * 7 % 32) as u16).to_le_bytes());
        }
        let damaged = damaged.write();
        let found = errors(&findings(damaged.path(), Some(&model())));
        assert!(found.iter().any(|error| error.contains("up_proj") && error.starts_with("plain-differs")), "{found:?}");
    }
}
