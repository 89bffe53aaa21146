//! Every family's tiny checkpoint through the whole run: folds are asserted exact on the way.

use std::path::Path;

use super::support::*;

/// One token per character, so that any text becomes ids below `vocab`.
pub(super) fn write_tokenizer(dir: &Path, vocab: usize) {
    let characters = " etaoinshrdlucmfwypvbgkqjxz.,ETAOINSHRDLUCMFWYPVBGK0123456789";
    let mut table = serde_json::Map::new();
    table.insert("<unk>".to_owned(), 0.into());
    for (i, c) in characters.chars().take(vocab - 1).enumerate() {
        table.insert(c.to_string(), (i + 1).into());
    }
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": false},
        "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": table, "unk_token": "<unk>"},
    });
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

pub(super) const CALIBRATION: [&str; 6] = ["--calib-dataset", "random", "--calib-samples", "8", "--calib-seqlen", "32"];

/// Eight bits: the quantized model is the original, nearly.
pub(super) const EIGHT_BITS: [&str; 6] = ["--w-group-size", "16", "--w-bits", "8", "--layout", "compressed-tensors"];

/// Copies of all families with a tokenizer, by name.
pub(super) fn families() -> Vec<(String, tempfile::TempDir)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root().join("tests/fixtures/families")).unwrap() {
        let family = entry.unwrap().path();
        if !family.join("config.json").exists() {
            continue;
        }
        let copy = copy_of(&family);
        std::fs::remove_file(copy.path().join("expected.safetensors")).unwrap();
        let config = config(copy.path());
        let vocab = config.get("vocab_size").unwrap_or(&config["padded_vocab_size"]).as_u64().unwrap() as usize;
        write_tokenizer(copy.path(), vocab);
        found.push((family.file_name().unwrap().to_str().unwrap().to_owned(), copy));
    }
    assert!(found.len() >= 30, "only {} families were found", found.len());
    found
}

pub(super) fn has_experts(model: &Path) -> bool {
    let config = config(model);
    ["num_experts", "num_local_experts", "n_routed_experts"].iter().any(|key| config.get(key).is_some())
}

/// Runs a command that must succeed; returns standard output.
pub(super) fn ok(command: &mut std::process::Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Quantizes into `out`, judges the result against the original, and gives the divergence.
pub(super) fn quantize(verb: &str, model: &Path, out: &Path, flags: &[&str]) -> f64 {
    let more = ["--eval-samples", "2", "--format", "json"];
    let stdout = ok(lite().arg(verb).arg(model).arg("--work-dir").arg(out).args(flags).args(more));
    let summary: serde_json::Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert_eq!(summary["event"], "summary");
    ok(lite().arg("verify").arg(out).arg("--against").arg(model));
    summary["comparison"]["kl_mean"].as_f64().unwrap()
}

#[test]
fn every_family_runs_end_to_end() {
    for (name, copy) in families() {
        if has_experts(copy.path()) {
            // Elsewhere: statistics of every expert are not kept.
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let kl = quantize("auto_awq", copy.path(), &at("awq"), &[&CALIBRATION[..], &EIGHT_BITS].concat());
        assert!((0.0..0.01).contains(&kl), "{name}: {kl}");
        // The same with statistics of the float model: their folds are asserted on random states.
        ok(lite().arg("calibrate").arg(copy.path()).arg("--work-dir").arg(at("stats")).args(CALIBRATION));
        let stats = at("stats");
        let flags = [&EIGHT_BITS[..], &["--stats", stats.to_str().unwrap()]].concat();
        quantize("auto_awq", copy.path(), &at("from-stats"), &flags);
    }
}

/// Biases of q and k beside v in one matrix: they lose bits on the way to 16 bits, and no fold may take that for a scale.
#[test]
fn stacked_biases_in_32_bits_are_folded_exactly() {
    let copy = copy_of(&root().join("tests/fixtures/families/glm4-chat"));
    std::fs::remove_file(copy.path().join("expected.safetensors")).unwrap();
    write_tokenizer(copy.path(), 64);
    let mut all = tensors(copy.path());
    all.retain(|name, _| !name.ends_with("inv_freq"));
    for raw in all.values_mut() {
        raw.data = raw.floats().iter().flat_map(|v| (v * 1.0003).to_le_bytes()).collect();
        raw.dtype = safetensors::Dtype::F32;
    }
    write_tensors(copy.path(), &all, &[("format", "pt")]);
    let dir = tempfile::tempdir().unwrap();
    let kl = quantize("auto_awq", copy.path(), &dir.path().join("awq"), &[&CALIBRATION[..], &EIGHT_BITS].concat());
    assert!((0.0..0.01).contains(&kl), "{kl}");
}

/// Second-order codes with block tuning, and scales moved from activations to weights.
#[test]
fn every_family_is_solved_and_smoothed() {
    for (name, copy) in families() {
        if has_experts(copy.path()) {
            // A handful of tokens per expert says nothing about solvers, and experts have no gradients.
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        let flags = [&CALIBRATION[..], &EIGHT_BITS, &["--effort", "best"]].concat();
        let kl = quantize("auto_gptq", copy.path(), &dir.path().join("gptq"), &flags);
        assert!((0.0..0.01).contains(&kl), "{name}: {kl}");
        let kl = quantize("smooth_quant", copy.path(), &dir.path().join("smooth"), &CALIBRATION);
        assert!((0.0..0.05).contains(&kl), "{name}: {kl}");
    }
}
