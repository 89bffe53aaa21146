//! Mixtures of experts: what few tokens reach is reported and acted upon, and interrupted runs go on to the same bytes.

use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

use super::families::write_tokenizer;
use super::resume::{finished, killed, result, same, stderr};
use super::support::*;

/// Three blocks, two of them with 8 experts, 3 for each token.
fn mixture() -> TempDir {
    let copy = copy_of(&root().join("tests/fixtures/families/qwen3-moe"));
    std::fs::remove_file(copy.path().join("expected.safetensors")).unwrap();
    write_tokenizer(copy.path(), 64);
    copy
}

const WINDOWS: usize = 8;
const TOKENS: usize = 32;
const EXPERTS: usize = 8;
const TOP_K: usize = 3;

fn run(verb: &str, model: &Path, out: &Path, more: &[&str]) -> Output {
    command(verb, model, out, more).output().unwrap()
}

fn command(verb: &str, model: &Path, out: &Path, more: &[&str]) -> Command {
    let mut command = lite();
    command.arg(verb).arg(model).arg("--work-dir").arg(out);
    command.args(["--calib-dataset", "random", "--calib-samples", "8", "--calib-seqlen", "32", "--eval-samples", "1"]);
    if verb != "smooth_quant" {
        command.args(["--w-group-size", "16", "--w-bits", "8", "--layout", "compressed-tensors"]);
    }
    command.args(more);
    command
}

fn report(out: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(out.join("report.json")).unwrap()).unwrap()
}

#[test]
fn tokens_of_every_expert_are_reported() {
    let model = mixture();
    let dir = tempfile::tempdir().unwrap();
    for (verb, more) in [
        ("auto_awq", &[][..]),
        ("auto_gptq", &[]),
        ("auto_gptq", &["--effort", "best"]),
        ("smooth_quant", &["--activations", "static-tensor"]),
    ] {
        let out = dir.path().join(format!("{verb}-{}", more.len()));
        let output = run(verb, model.path(), &out, &[more, &["--min-expert-tokens", "1"]].concat());
        assert!(output.status.success(), "{verb}: {}", stderr(&output));
        let report = report(&out);
        let layers = report["experts"].as_array().unwrap();
        assert_eq!(layers.iter().map(|l| l["layer"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 2], "{verb}");
        for layer in layers {
            let tokens: Vec<u64> = layer["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect();
            assert_eq!(tokens.len(), EXPERTS);
            assert_eq!(tokens.iter().sum::<u64>() as usize, WINDOWS * TOKENS * TOP_K, "{verb}: {tokens:?}");
        }
    }
}

/// A router that never picks expert 5 of block 2.
fn starved() -> TempDir {
    let model = mixture();
    edit_tensor(model.path(), "model.layers.2.mlp.gate.weight", |raw| {
        let row = raw.data.len() / EXPERTS;
        // A row of the router that is zero gives the middling score; the others are made to beat it by a pair of
        // opposites: whatever the token, half of them score higher.
        let other: Vec<u8> = raw.data[4 * row..5 * row].to_vec();
        for (expert, negate) in [(0, false), (1, true), (2, false), (3, true), (6, false), (7, true), (4, false)] {
            let target = &mut raw.data[expert * row..(expert + 1) * row];
            target.copy_from_slice(&other);
            // The sign is the top bit of each little-endian bfloat16.
            target.iter_mut().skip(1).step_by(2).for_each(|byte| *byte ^= if negate { 0x80 } else { 0 });
        }
        raw.data[5 * row..6 * row].fill(0);
    });
    model
}

#[test]
fn an_expert_that_no_token_reaches_is_acted_upon() {
    let model = starved();
    let dir = tempfile::tempdir().unwrap();
    let module = "model.layers.2.mlp.experts.5.";
    for verb in ["auto_awq", "auto_gptq", "smooth_quant"] {
        let at = |name: &str| dir.path().join(format!("{verb}-{name}"));
        for (policy, words) in
            [("weighted", "used all tokens as the router weights them"), ("nearest", "rounded to nearest")]
        {
            let out = at(policy);
            let output = run(verb, model.path(), &out, &["--min-expert-tokens", "8", "--expert-policy", policy]);
            assert!(output.status.success(), "{verb}: {}", stderr(&output));
            assert!(stderr(&output).contains("expert 5: 0"), "{verb}: {}", stderr(&output));
            let report = report(&out);
            assert_eq!(report["experts"][1]["tokens"][5], 0, "{verb}");
            let poor: Vec<&serde_json::Value> = report["fallbacks"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|f| f["module"].as_str().unwrap().starts_with(module))
                .collect();
            assert_eq!(poor.len(), 3, "{verb} {policy}: gate, up and down");
            assert!(poor.iter().all(|f| f["reason"].as_str().unwrap().starts_with(words)), "{poor:?}");
            let verified = lite().arg("verify").arg(&out).arg("--against").arg(model.path()).output().unwrap();
            assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stdout));
        }
        let mut refusals = vec![&["--expert-policy", "fail"][..]];
        if verb != "smooth_quant" {
            refusals.push(&["--no-fallback"]);
        }
        for (i, flags) in refusals.into_iter().enumerate() {
            let out = at(&format!("refused-{i}"));
            let output = run(verb, model.path(), &out, &[&["--min-expert-tokens", "8"], flags].concat());
            assert_eq!(output.status.code(), Some(6), "{verb}: {}", stderr(&output));
            let text = stderr(&output);
            assert!(
                text.contains("block 2") && text.contains("expert 5: 0") && text.contains("--min-expert-tokens"),
                "{text}"
            );
            assert!(!out.join("config.json").exists());
        }
    }
}

#[test]
fn interrupted_runs_go_on_to_the_same_bytes() {
    let model = mixture();
    let dir = tempfile::tempdir().unwrap();
    let mut resumed = 0;
    for verb in ["auto_awq", "auto_gptq", "smooth_quant"] {
        let whole = dir.path().join(verb);
        let output = run(verb, model.path(), &whole, &[]);
        assert!(output.status.success(), "{verb}: {}", stderr(&output));
        let wanted = result(&whole);
        for block in 1..=2 {
            let out = dir.path().join(format!("{verb}-{block}"));
            killed(command(verb, model.path(), &out, &[]), || finished(&out) >= block);
            let output = run(verb, model.path(), &out, &[]);
            let over = stderr(&output).contains("already holds a checkpoint");
            assert!(output.status.success() || over, "{verb}: {}", stderr(&output));
            resumed += usize::from(stderr(&output).contains("resuming after block"));
            same(&result(&out), &wanted, &format!("{verb} killed after {block} blocks"));
        }
    }
    assert!(resumed >= 1, "every run ended before it was killed");
}
