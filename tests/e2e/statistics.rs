//! Statistics gathered once and used by several runs.

use std::path::Path;
use std::process::Output;

use super::support::*;

/// The text of every run here.
const TEXT: [&str; 6] = ["--calib-dataset", "builtin", "--calib-samples", "6", "--calib-seqlen", "64"];

fn lite_on(verb: &str, model: &Path, work_dir: &Path, flags: &[&str]) -> Output {
    lite().arg(verb).arg(model).arg("--work-dir").arg(work_dir).args(flags).output().unwrap()
}

fn ok(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{:?}\nstdout: {stdout}\nstderr: {stderr}", output.status);
    (stdout, stderr)
}

/// Statistics of the bundled model in `dir/stats`.
fn gathered(dir: &Path) -> std::path::PathBuf {
    let stats = dir.join("stats");
    ok(&lite_on("calibrate", &model(), &stats, &TEXT));
    stats
}

/// A failed run: its code, its words, and nothing left behind.
fn refused(output: &Output, out: &Path, code: i32, says: &[&str], what: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{what}: {stderr}");
    for wanted in says {
        assert!(stderr.contains(wanted), "{what}: no `{wanted}` in: {stderr}");
    }
    assert!(output.stdout.is_empty(), "{what}: a failed run prints no result");
    assert!(!out.exists(), "{what}: {:?} was left behind", files(out).keys());
}

#[test]
fn every_input_of_every_block_is_there_and_is_what_its_name_says() {
    let dir = tempfile::tempdir().unwrap();
    let stats = dir.path().join("stats");
    let (stdout, stderr) = ok(&lite_on("calibrate", &model(), &stats, &TEXT));
    assert!(stdout.starts_with(stats.to_str().unwrap()), "{stdout}");
    for wanted in ["24 inputs in 6 blocks", "384 tokens"] {
        assert!(stdout.contains(wanted), "no `{wanted}` in:\n{stdout}");
    }
    let written = tensors(&stats);
    let bytes: usize = written.values().map(|raw| raw.data.len()).sum();
    // Known before the run, in the first line.
    assert!(stderr.contains(&format!("{:.1} MB on disk", bytes as f64 / 1e6)), "{bytes}: {stderr}");
    let config = config(&stats);
    assert_eq!(config["format"], "lite-calibration");
    assert_eq!(
        (config["samples"].as_u64(), config["seqlen"].as_u64(), config["tokens"].as_u64()),
        (Some(6), Some(64), Some(384))
    );
    assert_eq!(written.len(), 6 * 4 * 3);
    for block in 0..6 {
        for (input, k) in [("attn_in", 256), ("attn_out", 256), ("mlp_in", 256), ("mlp_mid", 768)] {
            let part = |name: &str| &written[&format!("blocks.{block}.{input}.{name}")];
            let (gram, mean, max) = (part("gram"), part("abs_mean"), part("abs_max"));
            assert_eq!((&gram.shape[..], &mean.shape[..], &max.shape[..]), (&[k, k][..], &[k][..], &[k][..]));
            let (gram, mean, max) = (gram.floats(), mean.floats(), max.floats());
            for c in 0..k {
                let square = gram[c * k + c];
                // (mean |x|)² ≤ mean x² ≤ (max |x|)², in exact arithmetic.
                assert!(
                    mean[c].powi(2) <= square * 1.0001 && square <= max[c].powi(2) * 1.0001,
                    "block {block} {input} {c}"
                );
                assert!(square > 0.0);
            }
        }
    }
    // Same input, same bytes; shards change where the tensors are, and nothing else.
    let again = dir.path().join("again");
    ok(&lite_on("calibrate", &model(), &again, &[&TEXT[..], &["--threads", "1"]].concat()));
    assert_eq!(files(&again), files(&stats));
    let sharded = dir.path().join("sharded");
    let output = lite_on(
        "calibrate",
        &model(),
        &sharded,
        &[&TEXT[..], &["--max-shard-size", "1MB", "--format", "json"]].concat(),
    );
    let events: Vec<serde_json::Value> =
        ok(&output).0.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&events[0]["event"], &events[0]["output_bytes"]), (&"plan".into(), &bytes.into()));
    assert_eq!(
        (&events[events.len() - 1]["event"], &events[events.len() - 1]["tokens"]),
        (&"summary".into(), &384.into())
    );
    assert_eq!(tensors(&sharded), written);
    let out = dir.path().join("out");
    ok(&lite_on("auto_awq", &model(), &out, &["--stats", sharded.to_str().unwrap(), "--eval-samples", "0"]));
}

/// At block 0 the float and the quantized model still see the same.
#[test]
fn block_0_is_that_of_a_run_on_the_same_windows() {
    let dir = tempfile::tempdir().unwrap();
    let stats = gathered(dir.path());
    for (verb, more) in
        [("auto_awq", &[][..]), ("auto_gptq", &["--effort", "fast"]), ("auto_awq", &["--rounding", "refine"])]
    {
        let dir = tempfile::tempdir().unwrap();
        let (windows, from_stats) = (dir.path().join("windows"), dir.path().join("stats"));
        let check = [&["--eval-samples", "2"], more].concat();
        ok(&lite_on(verb, &model(), &windows, &[&TEXT[..], &check].concat()));
        let flags = [&["--stats", stats.to_str().unwrap()], &check[..]].concat();
        let (stdout, stderr) = ok(&lite_on(verb, &model(), &from_stats, &flags));
        assert!(stdout.contains("42 packed linears") && stdout.contains("mean KL"), "{stdout}");
        assert!(stderr.contains("float model's"), "{stderr}");
        let (a, b) = (tensors(&windows), tensors(&from_stats));
        assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
        let first = |name: &&String| name.contains("layers.0.");
        assert!(a.keys().filter(first).count() >= 7 * 3);
        for name in a.keys().filter(first) {
            assert_eq!(a[name], b[name], "{verb} {more:?}: {name}");
        }
        // Later blocks differ, or the windows were run after all.
        assert!(a.keys().any(|name| a[name] != b[name]), "{verb} {more:?}");

        if more.is_empty() {
            // The same bytes again; and the same text may be named beside the statistics.
            let again = dir.path().join("again");
            ok(&lite_on(verb, &model(), &again, &[&TEXT[..], &["--seed", "0", "--threads", "1"], &flags].concat()));
            assert_eq!(files(&again), files(&from_stats));
        }
    }
}

/// Jobs of one model: the first gathers, all others read; whatever comes of them is what `lite calibrate` and `--stats`
/// give.
#[test]
fn jobs_of_one_model_share_what_the_first_gathers() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let stats = gathered(dir.path());
    let shared = at("shared");
    let batch = format!(
        "defaults:\n  model: {}\n  calibration: {{dataset: builtin, samples: 6, seqlen: 64, statistics: {}, gather: true}}\n  \
         eval: {{samples: 0}}\njobs:\n- name: awq\n  stages: [awq: {{}}]\n  save: {{path: {}}}\n- name: gptq\n  stages: \
         [gptq: {{}}]\n  save: {{path: {}}}\n",
        model().display(),
        shared.display(),
        at("awq").display(),
        at("gptq").display()
    );
    std::fs::write(at("batch.yaml"), batch).unwrap();
    let run = |arguments: &[&str]| lite().args(arguments).arg(at("batch.yaml")).output().unwrap();
    // The plan knows what is not there yet, and promises nothing about it.
    let (stdout, _) = ok(&run(&["plan"]));
    assert_eq!(stdout.matches("statistics are gathered in").count(), 2, "{stdout}");
    let output =
        lite().args(["plan", "--only", "0", "--out"]).arg(at("p.json")).arg(at("batch.yaml")).output().unwrap();
    assert_eq!(output.status.code(), Some(8), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!shared.exists() && !at("p.json").exists());

    let (stdout, stderr) = ok(&run(&["run"]));
    assert_eq!(stderr.matches("statistics gathered in").count(), 1, "{stderr}");
    assert!(!stdout.contains("with --stats"), "{stdout}");
    assert_eq!(files(&shared), files(&stats));
    for (verb, name) in [("auto_awq", "awq"), ("auto_gptq", "gptq")] {
        let wanted = at(&format!("{name}-wanted"));
        ok(&lite_on(verb, &model(), &wanted, &["--stats", stats.to_str().unwrap(), "--eval-samples", "0"]));
        assert_eq!(tensors(&at(name)), tensors(&wanted), "{name}");
    }
    // The flags of a verb say the same, here to statistics that are there.
    let flags = ["--stats", shared.to_str().unwrap(), "--gather", "--eval-samples", "0"];
    let (_, stderr) = ok(&lite_on("auto_awq", &model(), &at("flags"), &flags));
    assert!(!stderr.contains("gathered in"), "{stderr}");
    assert_eq!(tensors(&at("flags")), tensors(&at("awq")));
}

/// Gathering may take hours: what would stop the job afterwards stops it before.
#[test]
fn nothing_is_gathered_for_a_job_that_cannot_run() {
    let dir = tempfile::tempdir().unwrap();
    let (stats, out) = (dir.path().join("stats"), dir.path().join("out"));
    let run = |flags: &[&str]| {
        let flags = [&TEXT[..], &["--stats", stats.to_str().unwrap(), "--gather"], flags].concat();
        lite_on("auto_awq", &model(), &out, &flags)
    };
    refused(&run(&["--w-group-size", "96"]), &out, 2, &["96"], "a group size that is none");
    refused(&run(&["--max-memory", "1MB"]), &out, 5, &["memory"], "a budget that is too small");
    let same = lite_on("auto_awq", &model(), &stats, &["--stats", stats.to_str().unwrap(), "--gather"]);
    refused(&same, &stats, 2, &["--work-dir"], "one folder for both");
    refused(&lite_on("auto_awq", &model(), &out, &["--gather"]), &out, 2, &["--stats"], "no folder");
    assert!(!stats.exists());
    // Statistics of other text are not gathered anew.
    ok(&run(&["--eval-samples", "0"]));
    let again = dir.path().join("again");
    let output = lite_on(
        "auto_awq",
        &model(),
        &again,
        &["--stats", stats.to_str().unwrap(), "--gather", "--calib-samples", "7"],
    );
    refused(&output, &again, 8, &["--calib-samples 7"], "other windows");
}

#[test]
fn gptq_says_that_error_aware_targets_are_off() {
    let dir = tempfile::tempdir().unwrap();
    let stats = gathered(dir.path());
    let flags = ["--stats", stats.to_str().unwrap(), "--effort", "default", "--eval-samples", "4"];
    let (stdout, stderr) = ok(&lite_on("auto_gptq", &model(), &dir.path().join("out"), &flags));
    assert!(stderr.contains("error-aware targets are off"), "{stderr}");
    let kl = stdout.lines().find_map(|l| l.trim().strip_prefix("mean KL")).unwrap();
    let kl: f64 = kl.split_whitespace().next().unwrap().parse().unwrap();
    assert!(kl > 0.0 && kl < 0.03, "{kl}");
}

#[test]
fn statistics_of_another_model_or_text_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let stats = gathered(dir.path());
    let out = dir.path().join("out");
    let quantize = |model: &Path, flags: &[&str]| {
        lite_on("auto_awq", model, &out, &[&["--stats", stats.to_str().unwrap()], flags].concat())
    };
    let other = copy_of(&model());
    let text = std::fs::read_to_string(other.path().join("config.json")).unwrap();
    std::fs::write(other.path().join("config.json"), format!("{text}\n")).unwrap();
    refused(
        &quantize(other.path(), &[]),
        &out,
        8,
        &["another model", "config.json", "lite calibrate"],
        "another config",
    );

    // A fine-tune: the same headers, other weights.
    let other = copy_of(&model());
    let path = other.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let name = "model.layers.3.mlp.down_proj.weight";
    let data = &tensors(&model())[name].data;
    let start = bytes.windows(data.len()).position(|w| w == &data[..]).unwrap();
    bytes[start + 100] ^= 0x40;
    std::fs::write(&path, bytes).unwrap();
    refused(&quantize(other.path(), &[]), &out, 8, &["another model", "weights"], "a fine-tune");

    let file = dir.path().join("text.txt");
    std::fs::write(&file, "It was a dark and stormy night. ".repeat(400)).unwrap();
    for (flags, says) in [
        (["--calib-samples", "7"], ["--calib-samples 7", "--calib-samples 6"]),
        (["--calib-seqlen", "32"], ["--calib-seqlen 32", "--calib-seqlen 64"]),
        (["--seed", "1"], ["--seed 1", "--seed 0"]),
        (["--calib-dataset", "c4"], ["--calib-dataset c4", "--calib-dataset builtin"]),
        (["--calib-dataset", file.to_str().unwrap()], ["text.txt", "--calib-dataset builtin"]),
    ] {
        refused(&quantize(&model(), &flags), &out, 8, &says, &format!("{flags:?}"));
    }
    refused(&quantize(&model(), &["--calib-samples", "0"]), &out, 2, &["--calib-samples 0", "--stats"], "no data");
}

/// A text in a file is known by what it says, not by its path.
#[test]
fn the_text_of_a_file_is_compared() {
    let dir = tempfile::tempdir().unwrap();
    let (stats, out) = (dir.path().join("stats"), dir.path().join("out"));
    let (file, copy) = (dir.path().join("text.txt"), dir.path().join("copy.txt"));
    let text: String = (0..2000).map(|i| format!("The number {} follows {i}. ", i + 1)).collect();
    std::fs::write(&file, &text).unwrap();
    std::fs::write(&copy, &text).unwrap();
    let shape = ["--calib-samples", "4", "--calib-seqlen", "32"];
    ok(&lite_on("calibrate", &model(), &stats, &[&shape[..], &["--calib-dataset", file.to_str().unwrap()]].concat()));
    let flags = ["--stats", stats.to_str().unwrap(), "--eval-samples", "0", "--calib-dataset"];
    ok(&lite_on("auto_awq", &model(), &out, &[&flags[..], &[copy.to_str().unwrap()]].concat()));
    std::fs::remove_dir_all(&out).unwrap();
    std::fs::write(&file, text.replace("number", "letter")).unwrap();
    let output = lite_on("auto_awq", &model(), &out, &[&flags[..], &[file.to_str().unwrap()]].concat());
    refused(&output, &out, 8, &["text.txt", "digest"], "a changed file");
}

/// What is done to a copy of the statistics.
type Damage = fn(&Path);

fn edit(dir: &Path, name: &str, change: impl FnOnce(&mut Raw)) {
    let mut all = tensors(dir);
    change(all.get_mut(name).unwrap());
    write_tensors(dir, &all, &[("format", "pt")]);
}

fn edit_config(dir: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let mut value = config(dir);
    change(&mut value);
    std::fs::write(dir.join("config.json"), value.to_string()).unwrap();
}

const GRAM: &str = "blocks.4.mlp_in.gram";

#[test]
fn damaged_statistics_are_named_and_leave_nothing_behind() {
    let cases: [(&str, Damage, i32, &[&str]); 14] = [
        (
            "a file cut short",
            |dir| {
                let path = dir.join("model.safetensors");
                let bytes = std::fs::read(&path).unwrap();
                std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
            },
            3,
            &["model.safetensors", "lite calibrate"],
        ),
        (
            "no weights",
            |dir| std::fs::remove_file(dir.join("model.safetensors")).unwrap(),
            3,
            &["--stats", "lite calibrate"],
        ),
        (
            "no config",
            |dir| std::fs::remove_file(dir.join("config.json")).unwrap(),
            3,
            &["config.json", "lite calibrate"],
        ),
        (
            "a model",
            |dir| {
                for name in ["config.json", "model.safetensors"] {
                    std::fs::copy(model().join(name), dir.join(name)).unwrap();
                }
            },
            3,
            &["not a folder of statistics", "lite calibrate"],
        ),
        ("a later version", |dir| edit_config(dir, |c| c["version"] = 2.into()), 4, &["version 2", "version 1"]),
        (
            "no seed",
            |dir| edit_config(dir, |c| drop(c.as_object_mut().unwrap().remove("seed"))),
            3,
            &["config.json", "`seed`"],
        ),
        ("no tokens", |dir| edit_config(dir, |c| c["tokens"] = 0.into()), 3, &["0 tokens"]),
        (
            "a missing tensor",
            |dir| {
                let mut all = tensors(dir);
                all.remove(GRAM);
                write_tensors(dir, &all, &[]);
            },
            3,
            &[GRAM, "missing"],
        ),
        (
            "a tensor too many",
            |dir| {
                let mut all = tensors(dir);
                all.insert("blocks.6.mlp_in.abs_max".to_owned(), all["blocks.5.mlp_in.abs_max"].clone());
                write_tensors(dir, &all, &[]);
            },
            3,
            &["blocks.6.mlp_in.abs_max"],
        ),
        (
            "another shape",
            |dir| edit(dir, GRAM, |raw| raw.shape = vec![128, 512]),
            3,
            &[GRAM, "[128, 512]", "[256, 256]"],
        ),
        ("another type", |dir| edit(dir, GRAM, |raw| raw.dtype = safetensors::Dtype::I32), 3, &[GRAM, "I32", "F32"]),
        (
            "NaN in a Gram matrix",
            |dir| edit(dir, GRAM, |raw| raw.data[4 * 300..4 * 301].copy_from_slice(&f32::NAN.to_le_bytes())),
            3,
            &["blocks.4.mlp_in", "NaN", "row 44, column 1"],
        ),
        (
            "a flipped bit",
            |dir| edit(dir, GRAM, |raw| raw.data[4 * 300 + 1] ^= 1),
            3,
            &["blocks.4.mlp_in", "not symmetric"],
        ),
        (
            "a negative mean",
            |dir| edit(dir, "blocks.5.mlp_mid.abs_mean", |raw| raw.data[3] |= 0x80),
            3,
            &["blocks.5.mlp_mid", "channel 0"],
        ),
    ];
    let dir = tempfile::tempdir().unwrap();
    let stats = gathered(dir.path());
    let out = dir.path().join("out");
    for (what, damage, code, says) in cases {
        let copy = copy_of(&stats);
        damage(copy.path());
        let before = files(copy.path());
        let output =
            lite_on("auto_awq", &model(), &out, &["--stats", copy.path().to_str().unwrap(), "--eval-samples", "0"]);
        refused(&output, &out, code, says, what);
        assert_eq!(files(copy.path()), before, "{what}: the statistics were touched");
    }
    let nowhere = dir.path().join("nowhere");
    let output = lite_on("auto_awq", &model(), &out, &["--stats", nowhere.to_str().unwrap()]);
    refused(&output, &out, 3, &["nowhere", "lite calibrate"], "no folder");
    let before = files(&stats);
    let output = lite_on("auto_awq", &model(), &stats, &["--stats", stats.to_str().unwrap(), "--overwrite"]);
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(files(&stats), before, "the statistics are not replaced by what is made from them");
}

#[test]
fn a_calibration_that_fails_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let run = |model: &Path, flags: &[&str]| lite_on("calibrate", model, &out, flags);
    refused(&run(&model(), &["--calib-samples", "0"]), &out, 2, &["--calib-samples 0"], "no windows");
    refused(&run(&model(), &["--calib-seqlen", "4096"]), &out, 2, &["--calib-seqlen 4096", "2048"], "too long");
    refused(&run(&model(), &["--max-memory", "10MB"]), &out, 5, &["--max-memory"], "no memory");
    refused(&run(&dir.path().join("nowhere"), &[]), &out, 3, &["nowhere"], "no model");
    // Weights that overflow: found in block 2, when two blocks are written.
    let copy = copy_of(&model());
    let name = "model.layers.2.input_layernorm.weight";
    edit(copy.path(), name, |raw| raw.data = f32::NAN.to_le_bytes()[2..].repeat(raw.data.len() / 2));
    refused(&run(copy.path(), &TEXT), &out, 3, &["block 2", "NaN"], "NaN");

    // What is in the way stays, unless it may be replaced.
    ok(&run(&model(), &TEXT));
    let before = files(&out);
    assert_eq!(run(&model(), &TEXT).status.code(), Some(2));
    assert_eq!(files(&out), before);
    ok(&run(&model(), &[&TEXT[..], &["--overwrite"]].concat()));
    assert_eq!(files(&out), before);
}
