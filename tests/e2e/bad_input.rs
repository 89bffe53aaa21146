//! Each way a user's input can be wrong: a message that names the thing, what was found, what was wanted and
//! what to do; the right exit code; nothing that looks finished; the input untouched.

use std::path::Path;

use super::support::*;

/// What is done to a copy of the model before the run.
type Damage = fn(&Path);

struct Case {
    name: &'static str,
    damage: Damage,
    flags: &'static [&'static str],
    code: i32,
    says: &'static [&'static str],
}

const NONE: Damage = |_| {};

fn edit_config(dir: &Path, change: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>)) {
    let path = dir.join("config.json");
    let mut value: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(value.as_object_mut().unwrap());
    std::fs::write(path, value.to_string()).unwrap();
}

const DOWN: &str = "model.layers.3.mlp.down_proj.weight";

const CASES: &[Case] = &[
    Case { name: "bits 0", damage: NONE, flags: &["--w-bits", "0"], code: 2, says: &["0 bits", "2, 3, 4"] },
    Case { name: "bits 1", damage: NONE, flags: &["--w-bits", "1"], code: 2, says: &["1 bits"] },
    Case { name: "bits 9", damage: NONE, flags: &["--w-bits", "9"], code: 2, says: &["9 bits"] },
    Case { name: "group 0", damage: NONE, flags: &["--w-group-size", "0"], code: 2, says: &["group size 0", "128"] },
    Case { name: "group 7", damage: NONE, flags: &["--w-group-size", "7"], code: 2, says: &["group size 7"] },
    Case {
        name: "samples -1",
        damage: NONE,
        flags: &["--calib-samples", "-1"],
        code: 2,
        says: &["--calib-samples -1"],
    },
    Case {
        name: "seqlen beyond the model",
        damage: NONE,
        flags: &["--calib-seqlen", "4096"],
        code: 2,
        says: &["--calib-seqlen 4096", "2048", "max_position_embeddings"],
    },
    Case { name: "seqlen 0", damage: NONE, flags: &["--calib-seqlen", "0"], code: 2, says: &["--calib-seqlen 0"] },
    Case { name: "batch 0", damage: NONE, flags: &["--batch-size", "0"], code: 2, says: &["--batch-size 0"] },
    Case { name: "unknown layout", damage: NONE, flags: &["--layout", "zip"], code: 2, says: &["`zip`", "awq"] },
    Case { name: "unknown target", damage: NONE, flags: &["--target", "excel"], code: 2, says: &["excel", "vllm"] },
    Case {
        name: "AWQ layout with 8 bits",
        damage: NONE,
        flags: &["--w-bits", "8", "--layout", "awq"],
        code: 4,
        says: &["awq", "8", "4"],
    },
    Case {
        name: "a group TurboMind has no kernel for",
        damage: NONE,
        flags: &["--w-group-size", "64", "--target", "turbomind"],
        code: 4,
        says: &["turbomind", "64", "128"],
    },
    Case { name: "no GPU in this build", damage: NONE, flags: &["--device", "cuda"], code: 5, says: &["cuda", "cpu"] },
    Case { name: "no memory", damage: NONE, flags: &["--max-memory", "10MB"], code: 5, says: &["--max-memory"] },
    Case {
        name: "an unknown dataset",
        damage: NONE,
        flags: &["--calib-dataset", "wikitext99"],
        code: 2,
        says: &["wikitext99", "wikitext2"],
    },
    Case {
        name: "a named dataset offline",
        damage: NONE,
        flags: &["--calib-dataset", "c4"],
        code: 7,
        says: &["c4", "builtin"],
    },
    Case {
        name: "no config.json",
        damage: |dir| std::fs::remove_file(dir.join("config.json")).unwrap(),
        flags: &[],
        code: 3,
        says: &["config.json"],
    },
    Case {
        name: "config.json is no JSON",
        damage: |dir| std::fs::write(dir.join("config.json"), "{\"a\": ").unwrap(),
        flags: &[],
        code: 3,
        says: &["config.json"],
    },
    Case {
        name: "no weights",
        damage: |dir| std::fs::remove_file(dir.join("model.safetensors")).unwrap(),
        flags: &[],
        code: 3,
        says: &["safetensors"],
    },
    Case {
        name: "pickle weights only",
        damage: |dir| std::fs::rename(dir.join("model.safetensors"), dir.join("pytorch_model.bin")).unwrap(),
        flags: &[],
        code: 4,
        says: &["pytorch_model.bin", "safe"],
    },
    Case {
        name: "a cut file",
        damage: |dir| {
            let path = dir.join("model.safetensors");
            let length = std::fs::metadata(&path).unwrap().len();
            std::fs::File::options().write(true).open(path).unwrap().set_len(length - 1000).unwrap();
        },
        flags: &[],
        code: 3,
        says: &["model.safetensors", "bytes"],
    },
    Case {
        name: "a missing shard",
        damage: |dir| {
            std::fs::rename(dir.join("model.safetensors"), dir.join("model-00001-of-00002.safetensors")).unwrap();
            let index = r#"{"metadata":{},"weight_map":{"model.norm.weight":"model-00002-of-00002.safetensors"}}"#;
            std::fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
        },
        flags: &[],
        code: 3,
        says: &["model-00002-of-00002.safetensors"],
    },
    Case {
        name: "a shard outside the folder",
        damage: |dir| {
            let index = r#"{"weight_map":{"model.norm.weight":"../../etc/passwd"}}"#;
            std::fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
        },
        flags: &[],
        code: 3,
        says: &["passwd"],
    },
    Case {
        name: "NaN in a linear",
        damage: |dir| edit_tensor(dir, DOWN, |raw| raw.data[10..12].copy_from_slice(&[0xc0, 0x7f])),
        flags: &[],
        code: 3,
        says: &["NaN"],
    },
    Case {
        name: "NaN in a linear, without data",
        damage: |dir| edit_tensor(dir, DOWN, |raw| raw.data[10..12].copy_from_slice(&[0xc0, 0x7f])),
        flags: &["--calib-samples", "0"],
        code: 3,
        says: &[DOWN, "NaN"],
    },
    Case {
        name: "a weight whose scale does not fit float16",
        // About 1e30.
        damage: |dir| edit_tensor(dir, DOWN, |raw| raw.data[10..12].copy_from_slice(&[0x49, 0x71])),
        flags: &["--calib-samples", "0", "--dtype", "float16"],
        code: 3,
        says: &["model.layers.3.mlp.down_proj", "1 of its scales", "--dtype bfloat16"],
    },
    Case {
        name: "Inf in the embedding",
        damage: |dir| {
            edit_tensor(dir, "model.embed_tokens.weight", |raw| raw.data[10..12].copy_from_slice(&[0x80, 0x7f]));
        },
        flags: &[],
        code: 3,
        says: &["model.embed_tokens.weight", "Inf"],
    },
    Case {
        name: "a shape that disagrees with the config",
        damage: |dir| edit_config(dir, |c| drop(c.insert("intermediate_size".into(), 1024.into()))),
        flags: &[],
        code: 3,
        says: &["768", "1024", "intermediate_size"],
    },
    Case {
        name: "more layers than tensors",
        damage: |dir| edit_config(dir, |c| drop(c.insert("num_hidden_layers".into(), 8.into()))),
        flags: &[],
        code: 3,
        says: &["model.layers.6"],
    },
    Case {
        name: "fewer layers than tensors",
        damage: |dir| edit_config(dir, |c| drop(c.insert("num_hidden_layers".into(), 4.into()))),
        flags: &[],
        code: 3,
        says: &["model.layers.4", "num_hidden_layers"],
    },
    Case {
        name: "a hidden size of zero",
        damage: |dir| edit_config(dir, |c| drop(c.insert("hidden_size".into(), 0.into()))),
        flags: &[],
        code: 3,
        says: &["hidden_size"],
    },
    Case {
        name: "already quantized",
        damage: |dir| {
            edit_config(dir, |c| {
                c.insert("quantization_config".into(), serde_json::json!({"quant_method": "gptq", "bits": 4}));
            });
        },
        flags: &[],
        code: 4,
        says: &["already quantized", "gptq"],
    },
    Case {
        name: "no tokenizer",
        damage: |dir| std::fs::remove_file(dir.join("tokenizer.json")).unwrap(),
        flags: &[],
        code: 3,
        says: &["tokenizer.json"],
    },
    Case {
        name: "a tokenizer of another model",
        damage: |dir| {
            // The embedding has fewer rows than the tokenizer has ids.
            edit_tensor(dir, "model.embed_tokens.weight", |raw| {
                raw.shape[0] = 1000;
                raw.data.truncate(1000 * 256 * 2);
            });
            edit_config(dir, |c| drop(c.insert("vocab_size".into(), 1000.into())));
        },
        flags: &[],
        code: 3,
        says: &["1000", "tokenizer that belongs to this model"],
    },
    Case {
        name: "too little text",
        damage: |dir| std::fs::write(dir.join("text.txt"), "a few words").unwrap(),
        flags: &["--calib-dataset", "MODEL/text.txt", "--calib-samples", "10"],
        code: 3,
        says: &["text.txt", "640"],
    },
];

#[test]
fn every_bad_input_is_named_and_leaves_nothing_behind() {
    for case in CASES {
        let copy = copy_of(&model());
        (case.damage)(copy.path());
        let before = files(copy.path());
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let flags: Vec<String> =
            case.flags.iter().map(|f| f.replace("MODEL", &copy.path().display().to_string())).collect();
        let quick = ["--calib-samples", "4", "--calib-seqlen", "64", "--eval-samples", "2"];
        // Later flags win only where clap lets them: leave out what the case sets itself.
        let mut all: Vec<&str> = Vec::new();
        for pair in quick.chunks(2) {
            if !flags.iter().any(|f| f == pair[0]) {
                all.extend(pair);
            }
        }
        if !flags.iter().any(|f| f == "--calib-dataset") {
            all.extend(["--calib-dataset", "builtin"]);
        }
        all.extend(flags.iter().map(String::as_str));
        let output = auto_awq(copy.path(), &out, &all);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(case.code), "{}: {stderr}", case.name);
        assert!(stderr.contains("error: "), "{}: {stderr}", case.name);
        for wanted in case.says {
            assert!(stderr.contains(wanted), "{}: no `{wanted}` in: {stderr}", case.name);
        }
        assert!(!stderr.contains("panicked"), "{}: {stderr}", case.name);
        assert!(!out.exists(), "{}: {:?} was left behind", case.name, files(&out).keys());
        assert!(output.stdout.is_empty(), "{}: a failed run prints no result", case.name);
        assert_eq!(files(copy.path()), before, "{}: the input was touched", case.name);
    }
}

#[test]
fn folders_that_are_no_models_or_no_place_for_one() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let copy = copy_of(&model());
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let full = dir.path().join("full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(full.join("thesis.txt"), "x").unwrap();
    let out = dir.path().join("out");
    for (what, model, work_dir, code) in [
        ("a missing model", dir.path().join("nowhere"), out.clone(), 3),
        ("an empty model folder", empty, out.clone(), 3),
        ("a file as the model", file.clone(), out, 3),
        ("output is the input", copy.path().to_owned(), copy.path().to_owned(), 2),
        ("output inside the input", copy.path().to_owned(), copy.path().join("out"), 2),
        ("output is a file", copy.path().to_owned(), file, 2),
        ("output is not empty", copy.path().to_owned(), full.clone(), 2),
    ] {
        let before = files(dir.path());
        let output = auto_awq(&model, &work_dir, &QUICK);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{what}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains('`'), "{what}: {stderr}");
        assert_eq!(files(dir.path()), before, "{what}");
    }
    assert_eq!(files(copy.path()), files(&root().join("tests/fixtures/novels-llama-6m")));
    assert_eq!(files(&full).len(), 1);
}

/// A file system with less room than the result needs.
#[test]
fn a_full_disk_is_found_before_the_work_or_reported_cleanly() {
    // A tmpfs of 1 MiB needs privileges; without them the test says so and ends.
    let dir = tempfile::tempdir().unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
        .arg(dir.path())
        .output()
        .is_ok_and(|output| output.status.success());
    if !mounted {
        eprintln!("skipped: cannot mount a small file system here");
        return;
    }
    let output = auto_awq(&model(), &dir.path().join("out"), &QUICK);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let left = files(dir.path());
    let unmounted = std::process::Command::new("umount").arg(dir.path()).status().unwrap();
    assert!(unmounted.success());
    assert_eq!(output.status.code(), Some(5), "{stderr}");
    assert!(stderr.contains("free") && stderr.contains("--work-dir"), "{stderr}");
    assert!(left.is_empty(), "{:?}", left.keys());
}
