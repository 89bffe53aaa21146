//! Every family's tiny checkpoint through the whole run: folds are asserted exact on the way.

use std::path::Path;

use super::support::*;

/// One token per character, so that any text becomes ids below `vocab`.
fn write_tokenizer(dir: &Path, vocab: usize) {
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

#[test]
fn every_family_runs_end_to_end() {
    let families = root().join("tests/fixtures/families");
    let mut ran = 0;
    for entry in std::fs::read_dir(&families).unwrap() {
        let family = entry.unwrap().path();
        if !family.join("config.json").exists() {
            continue;
        }
        let copy = copy_of(&family);
        std::fs::remove_file(copy.path().join("expected.safetensors")).unwrap();
        let vocab = config(copy.path())["vocab_size"].as_u64().unwrap() as usize;
        write_tokenizer(copy.path(), vocab);
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let flags = [
            "--calib-dataset",
            "random",
            "--calib-samples",
            "8",
            "--calib-seqlen",
            "32",
            "--eval-samples",
            "2",
            "--w-group-size",
            "16",
            "--w-bits",
            "8",
            "--layout",
            "compressed-tensors",
            "--format",
            "json",
        ];
        let stdout = auto_awq_ok(copy.path(), &out, &flags);
        let summary: serde_json::Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
        assert_eq!(summary["event"], "summary");
        // 8 bits: the quantized model is the original, nearly.
        let kl = summary["comparison"]["kl_mean"].as_f64().unwrap();
        assert!((0.0..0.01).contains(&kl), "{}: {kl}", family.display());
        // The same with statistics of the float model: their folds are asserted on random states.
        let (stats, out) = (dir.path().join("stats"), dir.path().join("from-stats"));
        let calibrate =
            lite().arg("calibrate").arg(copy.path()).arg("--work-dir").arg(&stats).args(&flags[..6]).output().unwrap();
        assert!(calibrate.status.success(), "{}: {}", family.display(), String::from_utf8_lossy(&calibrate.stderr));
        auto_awq_ok(copy.path(), &out, &[&flags[6..], &["--stats", stats.to_str().unwrap()]].concat());
        ran += 1;
    }
    assert!(ran >= 16, "only {ran} families were found");
}
