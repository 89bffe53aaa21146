//! `--arch`: a family that only a file describes is quantized like the known one it is, and the file is part of the run.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Output;

use serde_json::json;

use super::families::{CALIBRATION, ok, write_tokenizer};
use super::support::*;

const FOUR_BITS: [&str; 4] = ["--w-group-size", "16", "--layout", "compressed-tensors"];

/// The committed example.
fn heron() -> String {
    root().join("configs/arch/heron.yaml").display().to_string()
}

/// A tensor of Qwen2 under Heron's names.
fn renamed(name: &str) -> String {
    let pairs = [
        ("model.embed_tokens", "transformer.wte"),
        ("model.layers.", "transformer.h."),
        ("model.norm", "transformer.ln_f"),
        (".input_layernorm", ".ln_1"),
        (".post_attention_layernorm", ".ln_2"),
        (".self_attn.q_proj", ".attn.query"),
        (".self_attn.k_proj", ".attn.key"),
        (".self_attn.v_proj", ".attn.value"),
        (".self_attn.o_proj", ".attn.out"),
        (".mlp.gate_proj", ".ffn.gate"),
        (".mlp.up_proj", ".ffn.up"),
        (".mlp.down_proj", ".ffn.down"),
    ];
    pairs.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// The Qwen2 fixture, and the same model as Heron's.
fn twins() -> (tempfile::TempDir, tempfile::TempDir) {
    let known = copy_of(&root().join("tests/fixtures/families/qwen2"));
    std::fs::remove_file(known.path().join("expected.safetensors")).unwrap();
    write_tokenizer(known.path(), 64);
    let other = copy_of(known.path());
    let all: BTreeMap<String, Raw> = tensors(known.path()).into_iter().map(|(name, t)| (renamed(&name), t)).collect();
    write_tensors(other.path(), &all, &[("format", "pt")]);
    edit(other.path(), |config| {
        config.insert("architectures".into(), json!(["HeronForCausalLM"]));
        config.insert("model_type".into(), json!("heron"));
        for (usual, own) in [
            ("hidden_size", "n_embd"),
            ("intermediate_size", "n_inner"),
            ("num_hidden_layers", "n_layer"),
            ("num_attention_heads", "n_head"),
            ("num_key_value_heads", "n_kv_head"),
            ("max_position_embeddings", "n_positions"),
            ("rms_norm_eps", "layer_norm_epsilon"),
            ("hidden_act", "activation_function"),
        ] {
            let value = config.remove(usual).unwrap();
            config.insert(own.into(), value);
        }
    });
    (known, other)
}

fn edit(dir: &Path, change: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>)) {
    let mut config = config(dir);
    change(config.as_object_mut().unwrap());
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_described_family_is_quantized_like_the_known_one() {
    let (known, other) = twins();
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let heron = heron();
    let output =
        lite().arg("auto_awq").arg(other.path()).arg("--work-dir").arg(at("no")).args(CALIBRATION).output().unwrap();
    assert_eq!(output.status.code(), Some(4), "{}", told(&output));
    assert!(told(&output).contains("`HeronForCausalLM` is unknown") && told(&output).contains("--arch FILE"));

    for verb in ["auto_awq", "auto_gptq", "smooth_quant"] {
        let flags: &[&str] = if verb == "smooth_quant" { &[] } else { &FOUR_BITS };
        let (ours, theirs) = (at(&format!("{verb}-heron")), at(&format!("{verb}-qwen2")));
        let command = |model: &Path, out: &Path| {
            let mut command = lite();
            command.arg(verb).arg(model).arg("--work-dir").arg(out).args(CALIBRATION).args(flags);
            command.args(["--eval-samples", "2"]);
            command
        };
        ok(command(other.path(), &ours).args(["--arch", &heron]));
        ok(&mut command(known.path(), &theirs));
        let wanted: BTreeMap<String, Raw> = tensors(&theirs).into_iter().map(|(name, t)| (renamed(&name), t)).collect();
        assert!(tensors(&ours) == wanted, "{verb}: other codes than the known family's");
        ok(lite().arg("verify").arg(&ours).arg("--against").arg(other.path()).args(["--arch", &heron]));
    }
    // The flag may stand before the verb. Perplexity and greedy tokens are the known family's.
    let figures = |model: &Path, original: &Path, arch: &[&str]| {
        let flags = ["--dataset", "builtin", "--seqlen", "32", "--windows", "2", "--format", "json", "--against"];
        let text = ok(lite().args(arch).arg("eval").arg(model).args(flags).arg(original));
        let value: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert!(value.to_string().contains("kl"), "{value}");
        let mut numbers = Vec::new();
        floats(&value, &mut numbers);
        numbers
    };
    let ours = figures(&at("auto_awq-heron"), other.path(), &["--arch", &heron]);
    let theirs = figures(&at("auto_awq-qwen2"), known.path(), &[]);
    assert!(!ours.is_empty() && ours == theirs, "{ours:?} {theirs:?}");
    let generate = |model: &Path, arch: &[&str]| {
        let flags = ["--prompt", "the old man", "--max-new-tokens", "16", "--ignore-eos"];
        ok(lite().arg("generate").arg(model).args(flags).args(arch))
    };
    assert_eq!(generate(&at("auto_awq-heron"), &["--arch", &heron]), generate(&at("auto_awq-qwen2"), &[]));
    // Without it the result is not run.
    let output = lite().arg("generate").arg(at("auto_awq-heron")).args(["--prompt", "a"]).output().unwrap();
    assert_eq!(output.status.code(), Some(4), "{}", told(&output));
}

/// Every number of the result that is not a time.
fn floats(value: &serde_json::Value, into: &mut Vec<f64>) {
    match value {
        serde_json::Value::Number(number) => into.extend(number.as_f64()),
        serde_json::Value::Array(items) => items.iter().for_each(|item| floats(item, into)),
        serde_json::Value::Object(map) => {
            map.iter()
                .filter(|(key, _)| ["second", "memory", "bytes", "rss"].iter().all(|word| !key.contains(word)))
                .for_each(|(_, value)| floats(value, into));
        }
        _ => {}
    }
}

#[test]
fn configs_of_a_described_family_are_checked() {
    let (_, other) = twins();
    let dir = tempfile::tempdir().unwrap();
    for (key, value, says) in [
        ("alibi", json!(true), "`alibi` is true, which is not supported; supported: null in this family"),
        ("parallel_residual", json!(true), "`parallel_residual` is true"),
        ("n_layer", json!(0), "`n_layer` is 0"),
        ("num_hidden_layers", json!(5), "`num_hidden_layers` is 5 and `n_layer` is 2"),
        ("model_type", json!("qwen2"), "`model_type` is `qwen2`, which belongs to `Qwen2ForCausalLM`"),
    ] {
        let copy = copy_of(other.path());
        edit(copy.path(), |config| drop(config.insert(key.to_owned(), value)));
        let output = lite()
            .arg("auto_awq")
            .arg(copy.path())
            .arg("--work-dir")
            .arg(dir.path().join("out"))
            .args(CALIBRATION)
            .args(["--arch", &heron()])
            .output()
            .unwrap();
        assert!(matches!(output.status.code(), Some(3 | 4)), "{key}: {}", told(&output));
        assert!(told(&output).contains(says), "{key}: {}", told(&output));
    }
}

#[test]
fn files_that_make_no_sense_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("arch.yaml");
    let head = "architecture: XForCausalLM\nmodel_type: x\nextends: LlamaForCausalLM\n";
    for (text, code, says) in [
        (head.replace("Llama", "Lama"), 2, ":3:10: `extends` is `LamaForCausalLM`; did you mean `LlamaForCausalLM`?"),
        (head.replace("XForCausalLM", "Qwen3ForCausalLM"), 2, "`Qwen3ForCausalLM`, which is known without a file"),
        (format!("{head}name: {{}}\n"), 2, ":4:1: `name` is no key here; did you mean `names`?"),
        (
            format!("{head}names: {{block: model.layers.0}}\n"),
            2,
            "wanted the module of a block with its number as `{i}`",
        ),
        (format!("{head}#{}\n", "x".repeat(1 << 16)), 2, "65536 at most"),
        (format!("{head}{head}"), 2, "is here twice"),
    ] {
        std::fs::write(&path, text).unwrap();
        for verb in [["inspect", "nothing"], ["plan", "nothing"]] {
            let output = lite().args(verb).arg("--arch").arg(&path).output().unwrap();
            assert_eq!(output.status.code(), Some(code), "{}", told(&output));
            assert!(told(&output).contains(says), "{says}: {}", told(&output));
        }
    }
    let output = lite().args(["inspect", "nothing", "--arch", "none.yaml"]).output().unwrap();
    assert_eq!(output.status.code(), Some(7), "{}", told(&output));
}

/// The bundled model under a name that only `a.yaml` knows, a recipe for it, and a file with other bytes.
fn novel() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let model_dir = dir.path().join("m");
    std::fs::create_dir(&model_dir).unwrap();
    for (name, bytes) in files(&model()) {
        std::fs::write(model_dir.join(name), bytes).unwrap();
    }
    edit(&model_dir, |config| {
        config.insert("architectures".into(), json!(["NovelForCausalLM"]));
        config.insert("model_type".into(), json!("novel"));
    });
    let text = "architecture: NovelForCausalLM\nmodel_type: novel\nextends: LlamaForCausalLM\n";
    std::fs::write(dir.path().join("a.yaml"), text).unwrap();
    std::fs::write(dir.path().join("b.yaml"), format!("{text}# another text\n")).unwrap();
    let job = "model: m\narch: a.yaml\nscheme: W4A16\nstages: [awq: {}]\n\
               calibration: {dataset: builtin, samples: 4, seqlen: 64}\neval: {samples: 1, seqlen: 32}\nsave: {path: out}\n";
    std::fs::write(dir.path().join("job.yaml"), job).unwrap();
    dir
}

#[test]
fn recipes_and_plans_carry_the_file() {
    let dir = novel();
    let run = |words: &[&str]| lite().current_dir(dir.path()).args(words).output().unwrap();
    let fine = |words: &[&str]| {
        let output = run(words);
        assert!(output.status.success(), "{words:?}: {}", told(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(fine(&["run", "job.yaml", "--print-recipe"]).contains("arch: a.yaml"));
    let flags = ["auto_awq", "m", "--print-recipe", "--arch", "a.yaml"];
    assert!(fine(&flags).contains("arch: a.yaml"));
    fine(&["plan", "job.yaml", "--out", "plan.json"]);
    // The same text is the same plan, wherever it is; another text is not.
    for (arch, code) in [("b.yaml", 8), ("a.yaml", 0)] {
        let output = run(&["run", "job.yaml", "--plan", "plan.json", "--arch", arch]);
        assert_eq!(output.status.code(), Some(code), "{}", told(&output));
        assert!(code == 0 || told(&output).contains("\n  arch: "), "{}", told(&output));
    }
    let output = run(&["run", "job.yaml", "--set", "arch=b.yaml", "--work-dir", "other", "--arch", "a.yaml"]);
    assert_eq!(output.status.code(), Some(2), "{}", told(&output));
    assert!(told(&output).contains("another file of this run"), "{}", told(&output));
    // A job does not live on the file of another one.
    let job = std::fs::read_to_string(dir.path().join("job.yaml")).unwrap();
    let entry = |text: &str| format!("- {}\n", text.trim_end().replace('\n', "\n  "));
    let other = job.replace("arch: a.yaml\n", "").replace("path: out", "path: second");
    let both = format!("jobs:\n{}{}", entry(&job.replace("path: out", "path: first")), entry(&other));
    std::fs::write(dir.path().join("both.yaml"), both).unwrap();
    let output = run(&["run", "both.yaml", "--keep-going"]);
    assert_eq!(output.status.code(), Some(2), "{}", told(&output));
    assert!(told(&output).contains("described by a file that another job names"), "{}", told(&output));
    assert!(dir.path().join("first/config.json").exists() && !dir.path().join("second/config.json").exists());
    // As the known family, but for its name.
    edit(&dir.path().join("m"), |config| {
        config.insert("architectures".into(), json!(["LlamaForCausalLM"]));
        config.insert("model_type".into(), json!("llama"));
    });
    fine(&["run", "job.yaml", "--work-dir", "known"]);
    assert!(tensors(&dir.path().join("out")) == tensors(&dir.path().join("known")));
}

/// A run that was killed goes on with the same file only.
#[test]
fn an_interrupted_run_wants_the_same_file() {
    let dir = novel();
    let at = dir.path();
    let command = |arch: &str| {
        let mut command = lite();
        command.current_dir(at).args(["auto_awq", "m", "--work-dir", "out", "--arch", arch, "--eval-samples", "0"]);
        command.args(["--calib-dataset", "builtin", "--calib-samples", "24", "--calib-seqlen", "64", "--no-report"]);
        command
    };
    let mut child = command("a.yaml").stderr(std::process::Stdio::null()).spawn().unwrap();
    while !at.join("out/.lite/blocks/0001.safetensors").exists() {
        assert!(child.try_wait().unwrap().is_none(), "the run ended");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let output = command("b.yaml").output().unwrap();
    assert_eq!(output.status.code(), Some(8), "{}", told(&output));
    assert!(told(&output).contains("arch: "), "{}", told(&output));
    // The recorded command holds the flag.
    let output = lite().current_dir(at).args(["resume", "out"]).output().unwrap();
    assert!(output.status.success(), "{}", told(&output));
    assert!(told(&output).contains("resuming after block"), "{}", told(&output));
    assert!(at.join("out/config.json").exists());
}
