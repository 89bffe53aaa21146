//! Plans, formats, and being stopped.

use std::process::Stdio;
use std::time::{Duration, Instant};

use super::support::*;

#[test]
fn a_plan_tells_everything_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let run = |flags: &[&str]| {
        let output = lite().arg("plan").arg(model()).arg("--work-dir").arg(&out).args(flags).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let text = run(&[]);
    for wanted in
        ["down_proj", "[256, 768]", "quantized", "absorbs scales", "memory", "disk", "time", "vllm", "turbomind"]
    {
        assert!(text.contains(wanted), "no `{wanted}` in:\n{text}");
    }
    let plan: serde_json::Value = serde_json::from_str(&run(&["--format", "json"])).unwrap();
    let rows = plan["tensors"].as_array().unwrap();
    // Every source tensor has exactly one row.
    let mut named: Vec<&str> = rows.iter().map(|row| row["source"].as_str().unwrap()).collect();
    named.sort_unstable();
    assert_eq!(named, tensors(&model()).keys().map(String::as_str).collect::<Vec<_>>());
    assert!(!out.exists());

    // The plan's names, types and shapes are those of the result.
    auto_awq_ok(&model(), &out, &QUICK);
    let written = tensors(&out);
    let mut planned = 0;
    for output in rows.iter().flat_map(|row| row["outputs"].as_array().unwrap()) {
        let raw = &written[output["name"].as_str().unwrap()];
        assert_eq!(output["shape"], serde_json::json!(raw.shape));
        assert_eq!(output["dtype"], format!("{:?}", raw.dtype));
        planned += 1;
    }
    assert_eq!(planned, written.len());
    let bytes: usize = written.values().map(|raw| raw.data.len()).sum();
    assert_eq!(plan["output_bytes"], bytes);
}

#[test]
fn json_lines_end_with_a_summary_and_quiet_prints_the_path() {
    let dir = tempfile::tempdir().unwrap();
    let stdout = auto_awq_ok(&model(), &dir.path().join("a"), &[&QUICK[..], &["--format", "json"]].concat());
    let events: Vec<serde_json::Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let kinds: Vec<&str> = events.iter().map(|e| e["event"].as_str().unwrap()).collect();
    assert_eq!(kinds.iter().filter(|k| **k == "layer_done").count(), 6);
    assert!(kinds.contains(&"plan") && kinds.contains(&"calibration"));
    assert_eq!(kinds.last(), Some(&"summary"));
    assert_eq!(events.last().unwrap()["linears"].as_array().unwrap().len(), 42);

    let failed = auto_awq(&model(), &dir.path().join("b"), &["--w-bits", "9", "--format", "json"]);
    let event: serde_json::Value = serde_json::from_slice(&failed.stdout).unwrap();
    assert_eq!((event["event"].as_str(), event["code"].as_u64()), (Some("error"), Some(2)));

    let out = dir.path().join("c");
    let quiet = auto_awq(&model(), &out, &[&QUICK[..], &["--format", "quiet"]].concat());
    assert_eq!(String::from_utf8(quiet.stdout).unwrap().trim(), out.to_str().unwrap());
    assert!(quiet.stderr.is_empty());
}

#[test]
fn the_default_set_falls_back_offline_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--calib-samples", "1000", "--calib-seqlen", "512", "--eval-samples", "1"];
    let output = auto_awq(&model(), &dir.path().join("out"), &flags);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let line = stderr.lines().find(|l| l.contains("built-in")).unwrap();
    assert!(line.contains("wikitext2") && line.contains("windows"), "{line}");
}

#[test]
fn an_interrupted_run_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let flags = ["--calib-dataset", "random", "--calib-samples", "2000", "--calib-seqlen", "512"];
    let child = lite()
        .arg("auto_awq")
        .arg(model())
        .arg("--work-dir")
        .arg(&out)
        .args(flags)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Once the staging folder is there, the run is on its way.
    let start = Instant::now();
    while !out.join(".lite/out").exists() {
        assert!(start.elapsed() < Duration::from_secs(120), "the run did not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    let stop = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(stop.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout.is_empty());
    assert!(!out.exists(), "{:?}", files(&out).keys());
}

#[test]
fn a_killed_run_is_no_obstacle() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    std::fs::create_dir_all(out.join(".lite/out")).unwrap();
    std::fs::write(out.join(".lite/out/.model.safetensors.partial"), b"half").unwrap();
    let output = auto_awq(&model(), &out, &QUICK);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("earlier run"));
    assert!(!out.join(".lite").exists());
}
