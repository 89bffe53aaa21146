//! `lite run`: recipes of three dialects, batches, limits, and `--print-recipe`.

use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::Value;

use super::support::*;

/// Settings that make any job on the bundled model take about a second.
const QUICK_SETS: [&str; 8] = [
    "--set",
    "calibration={dataset: builtin, samples: 6, seqlen: 64}",
    "--set",
    "eval.dataset=",
    "--set",
    "eval.samples=4",
    "--set",
    "eval.seqlen=64",
];

fn run(args: &[&str]) -> Output {
    lite().arg("run").args(args).current_dir(root()).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn ok(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {:?}\n{}\n{}", output.status, stdout(&output), stderr(&output));
    stdout(&output)
}

/// The failure of a run; returns its exit code and standard error.
fn fails(args: &[&str]) -> (i32, String) {
    let output = run(args);
    assert!(!output.status.success(), "{args:?}: {}", stdout(&output));
    (output.status.code().unwrap(), stderr(&output))
}

fn write(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, text.replace("MODEL", model().to_str().unwrap())).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The JSON lines of a run, by event.
fn events(text: &str, event: &str) -> Vec<Value> {
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap_or_else(|e| panic!("{line}: {e}")));
    lines.filter(|line| line["event"] == event).collect()
}

/// The checkpoint itself: the documents beside it tell folders apart.
fn checkpoint(dir: &Path) -> (Value, std::collections::BTreeMap<String, Raw>) {
    (config(dir), tensors(dir))
}

/// Every recipe below `configs/`, without the manifests of `k8s/` and the architectures of `arch/`.
fn recipes() -> Vec<PathBuf> {
    fn walk(dir: &Path, into: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, into);
            } else if path.extension().is_some_and(|e| e == "yaml" || e == "yml") {
                into.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join("configs"), &mut found);
    found.retain(|path| !path.components().any(|part| ["k8s", "arch"].iter().any(|other| part.as_os_str() == *other)));
    found.sort();
    found
}

#[test]
fn the_committed_schema_is_that_of_the_program() {
    let committed = std::fs::read_to_string(root().join("configs/schema.json")).unwrap();
    assert_eq!(ok(&["--print-schema"]), committed, "run `lite run --print-schema > configs/schema.json`");
}

#[test]
fn flags_and_the_file_that_equals_them_give_the_same_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let model = model();
    let model = model.to_str().unwrap();
    let quick = ["--calib-dataset", "builtin", "--calib-samples", "6", "--calib-seqlen", "64", "--eval-samples", "0"];
    for (i, (verb, flags)) in [
        (
            "auto_awq",
            &["--w-group-size", "64", "--override", "mlp.down_proj:bits=8", "--layout", "compressed-tensors"][..],
        ),
        ("auto_gptq", &["--damp-percent", "0.02", "--no-act-order", "--ignore", r"layers\.5\.mlp"]),
        ("rtn", &["--scheme", "W4A16", "--range", "mse"]),
        ("smooth_quant", &["--alpha", "0.7", "--kv-cache", "fp8"]),
    ]
    .iter()
    .enumerate()
    {
        let (by_flags, by_file) = (dir.path().join(format!("a{i}")), dir.path().join(format!("b{i}")));
        let all = |out: &Path| -> Vec<String> {
            let start = [verb, model, "--work-dir", out.to_str().unwrap()];
            start.iter().chain(*flags).chain(&quick).map(|s| (*s).to_owned()).collect()
        };
        let direct = lite().args(all(&by_flags)).output().unwrap();
        assert!(direct.status.success(), "{}", stderr(&direct));
        let printed = lite().args(all(&by_file)).arg("--print-recipe").output().unwrap();
        assert!(printed.status.success() && !by_file.exists(), "{}", stderr(&printed));
        let file = write(dir.path(), &format!("{i}.yaml"), &stdout(&printed));
        // Printed once more, it is the same file but for the name it then has.
        let again = ok(&[&file, "--print-recipe"]);
        assert_eq!(again, format!("name: '{i}'\n{}", stdout(&printed)), "{verb}");
        ok(&[&file]);
        assert!(checkpoint(&by_flags) == checkpoint(&by_file), "{verb}");
    }
}

#[test]
fn every_config_is_read_and_runs_on_the_bundled_model() {
    let dir = tempfile::tempdir().unwrap();
    // The models of the matrix, by their names.
    for name in ["Qwen3-4B", "Qwen3-8B"] {
        copy_into(&model(), &dir.path().join("models").join(name));
    }
    let one = model();
    let all = recipes();
    assert!(all.len() >= 18, "{all:?}");
    for (i, file) in all.iter().enumerate() {
        let file = file.to_str().unwrap();
        let run = |args: &[&str]| {
            let out = format!("{}/{i}-{{name}}", dir.path().display());
            let mut command = lite();
            command.current_dir(root()).args(["run", file, "--work-dir", &out]).args(args);
            if !file.ends_with("batch.yaml") {
                command.arg("--model").arg(&one);
            }
            let output = command.env("MODELS", dir.path().join("models")).output().unwrap();
            assert!(output.status.success(), "{file}: {}\n{}", stdout(&output), stderr(&output));
            stdout(&output)
        };
        let jobs = run(&["--list"]).lines().count();
        assert_eq!(jobs, if file.ends_with("batch.yaml") { 6 } else { 1 }, "{file}");
        let args = ["--format", "json", "--no-report", "--set", "eval.max_kl=0.5"];
        let summaries = events(&run(&[&args[..], &QUICK_SETS].concat()), "summary");
        assert_eq!(summaries.len(), jobs, "{file}");
        for summary in summaries {
            let kl = summary["comparison"]["kl_mean"].as_f64().unwrap();
            assert!(kl > 0.0 && kl < 0.1, "{file}: {kl}");
        }
    }
}

#[test]
fn a_batch_goes_on_after_a_failure_and_its_exit_code_is_the_worst() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let file = write(
        dir.path(),
        "batch.yaml",
        &format!(
            "defaults:\n  model: MODEL\n  scheme: W8A16\n  stages: [rtn: {{}}]\n  eval: {{samples: 2, seqlen: 64}}\n  save: {{path: '{}/{{name}}'}}\njobs:\n- name: good\n- name: absent\n  model: /nonexistent/model\n- name: strict\n  eval: {{max_kl: 1.0e-12}}\n- name: last\n",
            out.display()
        ),
    );
    let output = run(&[&file, "--keep-going", "--format", "json"]);
    assert_eq!(output.status.code(), Some(6), "{}", stderr(&output));
    let batch = events(&stdout(&output), "batch").remove(0);
    let of = |key: &str| batch["jobs"].as_array().unwrap().iter().map(|job| job[key].clone()).collect::<Vec<_>>();
    assert_eq!(of("name"), ["good", "absent", "strict", "last"]);
    assert_eq!(of("status"), ["done", "input", "verification", "done"]);
    assert_eq!(of("code"), [0, 3, 6, 0]);
    assert!(of("kl_mean")[2].as_f64().unwrap() > 1e-12);
    assert!(stderr(&output).contains("2 of 4 jobs failed: `absent`, `strict`"), "{}", stderr(&output));
    // The bytes of a job do not depend on its neighbours.
    assert!(checkpoint(&out.join("good")) == checkpoint(&out.join("last")));

    // What is there is passed over; without --keep-going the first failure is the end.
    let output = run(&[&file, "--skip-existing"]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    let text = stdout(&output);
    for (name, word) in [("good", "already there"), ("absent", "input"), ("strict", "not run"), ("last", "not run")] {
        let line =
            text.lines().find(|line| line.contains(&format!("  {name}"))).unwrap_or_else(|| panic!("{name}: {text}"));
        assert!(line.contains(word), "{line}");
    }

    // One job of them, as an indexed pod takes it.
    std::fs::remove_dir_all(&out).unwrap();
    ok(&[&file, "--only", "3"]);
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 1);
    assert!(out.join("last/config.json").is_file());
    // One job may be told its folder; all of them may not.
    let other = dir.path().join("other");
    ok(&[&file, "--only", "0", "--work-dir", other.to_str().unwrap()]);
    assert!(other.join("config.json").is_file());
    let (code, text) = fails(&[&file, "--work-dir", other.to_str().unwrap()]);
    assert!(code == 2 && text.contains("and so does `good`"), "{text}");
    let (code, text) = fails(&[&file, "--only", "4"]);
    assert!(code == 2 && text.contains("0 to 3"), "{text}");
}

#[test]
fn a_limit_is_looked_at_and_the_exit_code_tells() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let text = format!(
        "model: MODEL\nscheme: W4A16\nstages:\n- rtn: {{}}\neval: {{samples: 2, seqlen: 64, max_kl: 0.5, min_top1: 50, max_ppl_ratio: 2}}\nsave: {{path: '{}'}}\n",
        out.display()
    );
    let file = write(dir.path(), "job.yaml", &text);
    let printed = ok(&[&file]);
    assert_eq!(printed.matches(", kept").count(), 3, "{printed}");
    let (code, text) = fails(&[&file, "--set", "save.overwrite=true", "--set", "eval.min_top1=100"]);
    assert_eq!(code, 6);
    assert!(text.contains("min_top1 is ") && text.contains("limit 100") && !text.contains("max_kl"), "{text}");
    assert!(out.join("config.json").is_file(), "the checkpoint is sound, only not as good as asked for");
}

#[test]
fn plans_of_all_jobs_are_shown_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    write(
        dir.path(),
        "m.yaml",
        "defaults:\n  stages: [rtn: {}]\n  save: {path: 'out/{name}'}\nmatrix:\n  models: [MODEL]\n  schemes: [W4A16, FP8_DYNAMIC]\n",
    );
    let output = lite().args(["run", "m.yaml", "--plan-only"]).current_dir(dir.path()).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stdout(&output).matches("bits per quantized weight").count(), 2);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "only the recipe is there");
}

#[test]
fn paths_are_relative_to_the_current_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (here, elsewhere) = (dir.path().join("here"), dir.path().join("recipes"));
    std::fs::create_dir_all(&here).unwrap();
    std::fs::create_dir_all(&elsewhere).unwrap();
    copy_into(&model(), &here.join("tiny"));
    write(
        &elsewhere,
        "job.yaml",
        "model: ./tiny\nscheme: W8A16\nstages: [rtn: {}]\neval: {samples: 0}\nsave: {path: out}\n",
    );
    let output = lite().args(["run", "../recipes/job.yaml"]).current_dir(&here).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(here.join("out/config.json").is_file() && !elsewhere.join("out").exists());
}

fn copy_into(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

#[test]
fn variables_are_read_only_where_they_are_declared() {
    let dir = tempfile::tempdir().unwrap();
    let text = "env: {LITE_TEST_OUT: fallback, LITE_TEST_FROM: }\nmodel: ${LITE_TEST_FROM}\nscheme: W8A16\nstages: [rtn: {}]\nsave: {path: 'x/${LITE_TEST_OUT}'}\n";
    let file = write(dir.path(), "job.yaml", text);
    let list =
        |vars: &[(&str, &str)]| lite().args(["run", &file, "--list"]).envs(vars.iter().copied()).output().unwrap();
    let output = list(&[("LITE_TEST_FROM", "/m/some")]);
    assert!(stdout(&output).ends_with("\tx/fallback\n"), "{}{}", stdout(&output), stderr(&output));
    let output = list(&[("LITE_TEST_FROM", "/m/some"), ("LITE_TEST_OUT", "y")]);
    assert!(stdout(&output).ends_with("\tx/y\n"));
    let output = list(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("LITE_TEST_FROM` is not set"), "{}", stderr(&output));
    let file = write(dir.path(), "bad.yaml", "model: ${HOME}\nstages: [awq: {}]\n");
    let (code, text) = fails(&[&file, "--list"]);
    assert!(code == 2 && text.contains(":1:8: ") && text.contains("not declared"), "{text}");
}

#[test]
fn what_is_wrong_is_told_with_its_place_and_code() {
    let dir = tempfile::tempdir().unwrap();
    for (text, wanted_code, wanted) in [
        (
            "model: m\nstages: [awq: {}]\ncalibraton: {samples: 3}\n",
            2,
            ":3:1: `calibraton` is no key here; did you mean `calibration`?",
        ),
        ("model: m\nmodel: n\nstages: [awq: {}]\n", 2, ":2:1: `model` is here twice, first in line 1"),
        ("model: m\nstages:\n- awqq: {}\n", 2, ":3:3: `awqq` is none of the choices here; did you mean `awq`?"),
        ("model: m\nscheme: W4A61\nstages: [rtn: {}]\n", 2, ":2:9: `W4A61` is no scheme; did you mean"),
        ("model: m\nstages: [rtn: {}]\n", 2, "`rtn` needs a `scheme`"),
        ("model: m\nstages: [gptq: {}, awq: {}]\n", 2, ":2:9: found stages in an order that is not known"),
        ("stages: [awq: {}]\n", 2, "`model` is missing"),
        ("model: m\nstages: [awq: {}]\ncalibration: {samples: many}\n", 2, ":3:24: found `many`, wanted"),
        ("model: [m\n", 2, "not YAML"),
        (
            "base: {seed: 0}\nmodel: {type: Llama, path: m}\nquant:\n  method: OmniQuant\n  weight: {bit: 4, symmetric: True, granularity: per_channel}\nsave: {save_vllm: True, save_path: x}\n",
            4,
            ":4:11: `quant.method: OmniQuant` is not (yet) here",
        ),
        ("SpinQuantModifier: {}\n", 4, "`SpinQuantModifier` is not (yet) here"),
    ] {
        let file = write(dir.path(), "bad.yaml", text);
        let (code, told) = fails(&[&file]);
        assert_eq!(code, wanted_code, "{told}");
        assert!(told.contains(wanted), "{told}\nwanted {wanted}");
    }
    let (code, told) = fails(&["/nonexistent/recipe.yaml"]);
    assert!(code == 7 && told.contains("/nonexistent/recipe.yaml"), "{told}");
}

#[test]
fn an_llmc_file_runs_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("save");
    let text = format!(
        "base:\n    seed: &seed 42\nmodel:\n    type: Llama\n    path: MODEL\n    tokenizer_mode: slow\n    torch_dtype: auto\ncalib:\n    name: custom_txt\n    download: False\n    path: {0}/corpus.txt\n    n_samples: 6\n    bs: -1\n    seq_len: 64\n    preproc: txt_general_preproc\n    seed: *seed\nquant:\n    method: Awq\n    weight:\n        bit: 4\n        symmetric: True\n        granularity: per_group\n        group_size: 64\n        int_range: [-8, 7]\n        need_pack: True\n    special:\n        trans: True\n        trans_version: v2\n        weight_clip: True\n    quant_out: True\nsave:\n    save_vllm: True\n    save_fake: True\n    save_path: {1}\n",
        dir.path().display(),
        out.display()
    );
    let words =
        (0..4000).map(|i| ["the", "house", "river", "and", "old", "walked"][i * 7 % 6]).collect::<Vec<_>>().join(" ");
    std::fs::write(dir.path().join("corpus.txt"), words).unwrap();
    let file = write(dir.path(), "awq.yml", &text);
    let output = run(&[&file, "--set", "eval={samples: 2, seqlen: 64}"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let told = stderr(&output);
    assert!(told.contains("keys that mean nothing here: model.type (line 4), model.tokenizer_mode (line 6)"), "{told}");
    let (vllm, fake) = (out.join("vllm_quant_model"), out.join("fake_quant_model"));
    assert_eq!(config(&vllm)["quantization_config"]["quant_method"], "compressed-tensors");
    assert!(config(&fake).get("quantization_config").is_none());
    // The floats are those that the codes stand for, to bf16.
    let name = "model.layers.1.mlp.up_proj";
    let (codes, floats) =
        (decode_compressed_tensors(&tensors(&vllm), name), tensors(&fake)[&format!("{name}.weight")].floats());
    assert_eq!(codes.len(), floats.len());
    assert!(codes.iter().zip(&floats).all(|(a, b)| (a - b).abs() <= a.abs() / 128.0));
}

#[test]
fn an_llm_compressor_recipe_runs_with_a_model_from_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(
        dir.path(),
        "recipe.yaml",
        "default_stage:\n  default_modifiers:\n    SmoothQuantModifier: {smoothing_strength: 0.8}\n    GPTQModifier:\n      targets: [Linear]\n      ignore: [lm_head]\n      scheme: W8A8\n",
    );
    let (code, told) = fails(&[&file]);
    assert!(code == 2 && told.contains("`model` is missing"), "{told}");
    let out = dir.path().join("out");
    let model = model();
    let args = [&file, "--model", model.to_str().unwrap(), "--work-dir", out.to_str().unwrap(), "--format", "json"];
    let text = ok(&[&args[..], &QUICK_SETS].concat());
    let kl = events(&text, "summary")[0]["comparison"]["kl_mean"].as_f64().unwrap();
    assert!(kl > 0.0 && kl < 1e-3, "{kl}");
    let group = &config(&out)["quantization_config"]["config_groups"]["group_0"];
    assert_eq!((&group["weights"]["num_bits"], &group["weights"]["strategy"]), (&8.into(), &"channel".into()));
    assert_eq!(
        (&group["input_activations"]["dynamic"], &group["input_activations"]["strategy"]),
        (&true.into(), &"token".into())
    );
}
