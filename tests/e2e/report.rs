//! The documents and the log of a run.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::support::*;

const DOCUMENTS: [&str; 3] = ["README.md", "report.json", "report.html"];

fn text(dir: &Path, name: &str) -> String {
    std::fs::read_to_string(dir.join(name)).unwrap()
}

fn report(dir: &Path) -> Value {
    serde_json::from_str(&text(dir, "report.json")).unwrap()
}

fn log(dir: &Path) -> Vec<Value> {
    text(dir, LOG).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn events<'a>(log: &'a [Value], kind: &str) -> Vec<&'a Value> {
    log.iter().filter(|line| line["event"] == kind).collect()
}

#[test]
fn a_run_leaves_its_documents_twice_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (out, again) = (dir.path().join("out"), dir.path().join("again"));
    auto_awq_ok(&model(), &out, &QUICK);
    auto_awq_ok(&model(), &again, &[&QUICK[..], &["--threads", "1"]].concat());
    for name in DOCUMENTS {
        assert_eq!(text(&out, name), text(&again, name), "{name}");
        assert!(!text(&out, name).contains(dir.path().to_str().unwrap()), "{name} tells of this machine");
    }

    let report = report(&out);
    assert_eq!(report["schema"], 1);
    assert_eq!(report["model"]["name"], "novels-llama-6m");
    assert_eq!(
        (report["settings"]["layout"].as_str(), report["settings"]["method"].as_str()),
        (Some("awq"), Some("AWQ"))
    );
    assert_eq!(report["linears"].as_array().unwrap().len(), 42);
    let layers = report["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 6);
    assert!(layers.iter().all(|layer| layer["own_error"].as_f64().unwrap() > 0.0 && layer.get("timing").is_none()));
    let comparison = &report["comparison"];
    let histogram = &comparison["kl_histogram"];
    let counts: u64 = histogram["counts"].as_array().unwrap().iter().map(|count| count.as_u64().unwrap()).sum();
    let outside = histogram["below"].as_u64().unwrap() + histogram["above"].as_u64().unwrap();
    assert_eq!(Some(counts + outside), comparison["tokens"].as_u64());
    // What is said of the files is true of the files.
    let files = report["files"].as_array().unwrap();
    for file in files {
        let bytes = std::fs::read(out.join(file["name"].as_str().unwrap())).unwrap();
        let hash: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!((file["sha256"].as_str(), file["bytes"].as_u64()), (Some(hash.as_str()), Some(bytes.len() as u64)));
    }
    let named: Vec<&str> = files.iter().map(|file| file["name"].as_str().unwrap()).collect();
    assert_eq!(
        named,
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    );

    let card = text(&out, "README.md");
    for wanted in [
        "\n# novels-llama-6m, quantized\n",
        "vllm serve DIR",
        "--model-format awq",
        "| mean KL",
        files[2]["sha256"].as_str().unwrap(),
    ] {
        assert!(card.contains(wanted), "no `{wanted}` in\n{card}");
    }
    assert!(!card.contains("base_model"), "nobody said what the base model is called");
    let page = text(&out, "report.html");
    assert!(page.starts_with("<!doctype html>") && page.contains("histogram of KL") && !page.contains("src="));
}

#[test]
fn the_source_card_is_kept_and_its_licence_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let source = copy_of(&model());
    let own = "---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# Novels\n";
    std::fs::write(source.path().join("README.md"), own).unwrap();
    std::fs::write(source.path().join("report.json"), "{\"theirs\": true}").unwrap();
    let config = std::fs::read_to_string(source.path().join("config.json")).unwrap();
    let named = config.replacen('{', "{\"_name_or_path\": \"novels/llama-6m\",", 1);
    std::fs::write(source.path().join("config.json"), named).unwrap();

    let out = dir.path().join("out");
    auto_awq_ok(source.path(), &out, &QUICK);
    assert_eq!(text(&out, "README.base.md"), own);
    assert_eq!(text(&out, "report.base.json"), "{\"theirs\": true}");
    let card = text(&out, "README.md");
    let wanted = "---\nbase_model: \"novels/llama-6m\"\nbase_model_relation: quantized\nlicense: \"apache-2.0\"\n";
    assert!(card.starts_with(wanted) && card.contains("`README.base.md`"), "{card}");
    assert_eq!(report(&out)["model"]["base_model"], "novels/llama-6m");

    // Without documents the source's files stay where they are.
    let plain = dir.path().join("plain");
    auto_awq_ok(source.path(), &plain, &[&QUICK[..], &["--no-report"]].concat());
    assert_eq!(text(&plain, "README.md"), own);
    assert_eq!(text(&plain, "report.json"), "{\"theirs\": true}");
    for name in ["report.html", "README.base.md", "report.base.json"] {
        assert!(!plain.join(name).exists(), "{name}");
    }
    assert!(plain.join(LOG).exists(), "the log is always there");
}

#[test]
fn times_are_in_the_log_and_in_the_report_if_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    auto_awq_ok(&model(), &out, &[&QUICK[..], &["--report-timings"]].concat());
    let report = report(&out);
    let layers = report["layers"].as_array().unwrap();
    assert!(layers.iter().all(|layer| layer["timing"]["seconds"].as_f64().unwrap() > 0.0));
    assert!(text(&out, "report.html").contains("Time by layer"));

    let log = log(&out);
    assert_eq!(log.first().unwrap()["event"], "start");
    assert_eq!(log.last().unwrap()["event"], "summary");
    assert_eq!(events(&log, "layer_started").len(), 6);
    assert_eq!(events(&log, "layer_done").len(), 6);
    for step in events(&log, "layer_step") {
        assert!(step["time"].as_str().unwrap().ends_with('Z') && step["elapsed"].as_f64().is_some(), "{step}");
    }
    let clash = auto_awq(&model(), &dir.path().join("x"), &["--no-report", "--report-timings"]);
    assert_eq!(clash.status.code(), Some(2));
}

#[test]
fn data_free_verbs_have_documents_too() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut command = lite();
    command.arg("rtn").arg(model()).arg("--work-dir").arg(&out).args([
        "--scheme",
        "FP8_DYNAMIC",
        "--eval-samples",
        "0",
    ]);
    assert!(command.output().unwrap().status.success());
    let report = report(&out);
    assert!(report["comparison"].is_null() && report["calibration"].is_null());
    let card = text(&out, "README.md");
    assert!(card.contains("Not measured") && card.contains("without data"), "{card}");
}

/// A process that is killed cannot say anything any more; the log has said it before.
#[test]
fn a_killed_run_leaves_evidence() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let flags = ["--calib-dataset", "random", "--calib-samples", "2000", "--calib-seqlen", "512"];
    let mut child = lite()
        .arg("auto_awq")
        .arg(model())
        .arg("--work-dir")
        .arg(&out)
        .args(flags)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    let stepped = || std::fs::read_to_string(out.join(LOG)).is_ok_and(|text| text.contains("\"layer_step\""));
    while !stepped() {
        assert!(start.elapsed() < Duration::from_secs(120), "the run did not start");
        std::thread::sleep(Duration::from_millis(10));
    }
    // SIGKILL, as the kernel's when memory is out.
    child.kill().unwrap();
    child.wait().unwrap();
    let left = log(&out);
    let last = left.last().unwrap();
    assert_eq!(
        (last["event"].as_str(), last["layer"].as_u64(), last["step"].as_str()),
        (Some("layer_step"), Some(0), Some("calibrate"))
    );
    #[cfg(target_os = "linux")]
    assert!(last["resident_bytes"].as_u64().unwrap() > 1 << 20, "{last}");
    assert_eq!(events(&left, "start")[0]["arguments"][0], "auto_awq");
    assert!(!out.join("config.json").exists());

    // It is no obstacle, and is kept.
    auto_awq_ok(&model(), &out, &QUICK);
    let both = log(&out);
    assert_eq!(both[..left.len()], left);
    assert_eq!(events(&both, "start").len(), 2);
    assert_eq!(events(&both, "summary").len(), 1);
}
