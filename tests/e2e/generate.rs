//! `lite generate`: the text of transformers, and the same tokens from a packed checkpoint as from its dequantized twin.

use std::path::Path;
use std::process::Output;

use safetensors::Dtype;
use serde_json::Value;

use super::support::*;

fn generate(model: &Path, flags: &[&str]) -> Output {
    lite().arg("generate").arg(model).args(flags).output().unwrap()
}

fn ok(model: &Path, flags: &[&str]) -> (String, String) {
    let output = generate(model, flags);
    let (stdout, stderr) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{flags:?}: {stderr}");
    (stdout, stderr)
}

/// The one object that `--format json` prints.
fn json(model: &Path, flags: &[&str]) -> Value {
    let (stdout, _) = ok(model, &[flags, &["--format", "json"]].concat());
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    serde_json::from_str(&stdout).unwrap()
}

fn fails(model: &Path, flags: &[&str], code: i32, says: &[&str]) {
    let output = generate(model, flags);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{flags:?}: {stderr}");
    for wanted in says {
        assert!(stderr.contains(wanted), "{flags:?}: no `{wanted}` in: {stderr}");
    }
    assert!(!stderr.contains("panicked") && output.stdout.is_empty(), "{flags:?}: {stderr}");
}

/// The bundled model's case of `tests/generators/greedy_tokens.py`.
fn golden() -> Value {
    let text = std::fs::read(root().join("tests/fixtures/generate/greedy.json")).unwrap();
    serde_json::from_slice::<Value>(&text).unwrap()["novels-llama-6m"].clone()
}

#[test]
fn greedy_text_is_that_of_transformers() {
    let golden = golden();
    let (prompt, text) = (golden["prompt_text"].as_str().unwrap(), golden["text"].as_str().unwrap());
    let flags = ["--prompt", prompt, "--max-new-tokens", "64", "--ignore-eos"];
    let (stdout, stderr) = ok(&model(), &flags);
    assert_eq!(stdout, format!("{text}\n"));
    assert!(stderr.contains("10 tokens") && stderr.contains("64 tokens") && stderr.contains("tokens/s"), "{stderr}");
    let (stdout, stderr) = ok(&model(), &[&flags[..], &["--format", "quiet"]].concat());
    assert_eq!((stdout, stderr.as_str()), (format!("{text}\n"), ""));

    let found = json(&model(), &flags);
    assert_eq!((&found["tokens"], &found["text"]), (&golden["tokens"], &golden["text"]));
    assert_eq!((found["finish_reason"].as_str(), found["prompt_tokens"].as_u64()), (Some("length"), Some(10)));
    assert!(
        found["prefill_tokens_per_second"].as_f64() > Some(0.0)
            && found["decode_tokens_per_second"].as_f64() > Some(0.0)
    );

    // The same prompt from a file, and among others.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompt.txt");
    std::fs::write(&file, prompt).unwrap();
    let from_file =
        json(&model(), &["--prompt-file", file.to_str().unwrap(), "--max-new-tokens", "64", "--ignore-eos"]);
    assert_eq!(from_file["tokens"], golden["tokens"]);
    let (stdout, _) = ok(&model(), &[&flags[..], &["--prompt", "Once", "--format", "json"]].concat());
    let lines: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((lines.len(), &lines[0]["tokens"], &lines[1]["prompt"]), (2, &golden["tokens"], &"Once".into()));
}

#[test]
fn draws_depend_on_the_seed_alone() {
    let run = |seed: &str, threads: &str| {
        let flags =
            ["--prompt", "Once upon a time", "--max-new-tokens", "40", "--temperature", "0.9", "--top-p", "0.95"];
        let more = ["--top-k", "50", "--repetition-penalty", "1.1", "--seed", seed, "--threads", threads];
        json(&model(), &[&flags[..], &more].concat())["tokens"].clone()
    };
    let first = run("1", "1");
    assert_eq!(first, run("1", "2"));
    assert_ne!(first, run("2", "1"));
}

#[test]
fn an_end_token_ends_the_text() {
    let copy = copy_of(&model());
    let third = golden()["tokens"][2].as_u64().unwrap();
    std::fs::write(copy.path().join("generation_config.json"), format!(r#"{{"eos_token_id": [1, {third}]}}"#)).unwrap();
    let prompt = golden()["prompt_text"].as_str().unwrap().to_owned();
    let found = json(copy.path(), &["--prompt", &prompt]);
    let tokens = found["tokens"].as_array().unwrap();
    assert_eq!(found["finish_reason"], "stop");
    assert!(tokens.len() <= 3 && tokens.last().unwrap().as_u64() == Some(third), "{tokens:?}");
}

#[test]
fn chat_frames_the_prompt() {
    fails(&model(), &["--prompt", "Hello", "--chat"], 4, &["chat template"]);
    let copy = copy_of(&model());
    let template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}\
                    {% if add_generation_prompt %}[assistant]{% endif %}";
    std::fs::write(copy.path().join("chat_template.jinja"), template).unwrap();
    let limit = ["--max-new-tokens", "5"];
    let chat = json(copy.path(), &[&["--prompt", "Hello", "--chat", "--system", "Be brief"], &limit[..]].concat());
    let plain =
        json(copy.path(), &[&["--prompt", "[system] Be brief\n[user] Hello\n[assistant]"], &limit[..]].concat());
    assert_eq!((&chat["tokens"], &chat["prompt_tokens"]), (&plain["tokens"], &plain["prompt_tokens"]));
}

/// The kernels that read codes give the tokens of the same weights in f32, which this test unpacks by itself.
#[test]
fn packed_checkpoints_give_the_tokens_of_their_dequantized_twins() {
    let dir = tempfile::tempdir().unwrap();
    for layout in ["awq", "compressed-tensors"] {
        let (packed, plain) = (dir.path().join(layout), dir.path().join(format!("{layout}-plain")));
        auto_awq_ok(&model(), &packed, &[&QUICK[..], &["--layout", layout]].concat());
        let mut all = tensors(&packed);
        let suffix = if layout == "awq" { ".qweight" } else { ".weight_packed" };
        let modules: Vec<String> = all.keys().filter_map(|name| name.strip_suffix(suffix)).map(str::to_owned).collect();
        assert_eq!(modules.len(), 6 * 7);
        for module in modules {
            let (values, n) = if layout == "awq" {
                (decode_awq(&all, &module), all[&format!("{module}.scales")].shape[1])
            } else {
                (decode_compressed_tensors(&all, &module), all[&format!("{module}.weight_scale")].shape[0])
            };
            let shape = vec![n, values.len() / n];
            let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            all.retain(|name, _| name.strip_prefix(&module).is_none_or(|rest| rest.starts_with(".bias")));
            all.insert(format!("{module}.weight"), Raw { dtype: Dtype::F32, shape, data });
        }
        std::fs::create_dir(&plain).unwrap();
        std::fs::copy(packed.join("tokenizer.json"), plain.join("tokenizer.json")).unwrap();
        let mut config = config(&packed);
        config.as_object_mut().unwrap().remove("quantization_config").unwrap();
        std::fs::write(plain.join("config.json"), config.to_string()).unwrap();
        write_tensors(&plain, &all, &[("format", "pt")]);
        let flags = ["--prompt", "It was a bright morning, and the old man", "--max-new-tokens", "48", "--ignore-eos"];
        let (a, b) = (json(&packed, &flags), json(&plain, &flags));
        assert_eq!(a["tokens"], b["tokens"], "{layout}");
        for bits in ["8", "4", "fp8"] {
            let found = json(&packed, &[&flags[..], &["--kv-bits", bits]].concat());
            assert_eq!(found["tokens"].as_array().unwrap().len(), 48, "{bits}");
        }
    }
}

#[test]
fn what_cannot_run_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let long = dir.path().join("long.txt");
    std::fs::write(&long, "word ".repeat(5000)).unwrap();
    fails(&model(), &["--prompt-file", long.to_str().unwrap()], 3, &["context of 2048", "shorten the prompt"]);
    fails(&model(), &["--prompt", ""], 3, &["at least one token"]);
    let binary = dir.path().join("binary");
    std::fs::write(&binary, [0xff, 0xfe]).unwrap();
    fails(&model(), &["--prompt-file", binary.to_str().unwrap()], 3, &["not UTF-8"]);
    fails(&model(), &["--prompt-file", "/nonexistent/prompt"], 7, &["/nonexistent/prompt"]);
    fails(&dir.path().join("nowhere"), &["--prompt", "x"], 3, &["nowhere"]);
    for (flags, says) in [
        (&["--prompt", "x", "--temperature", "-1"][..], "--temperature"),
        (&["--prompt", "x", "--top-p", "0"], "--top-p"),
        (&["--prompt", "x", "--repetition-penalty", "0"], "--repetition-penalty"),
        (&["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (&["--prompt", "x", "--kv-bits", "5"], "--kv-bits"),
        (&["--prompt", "x", "--system", "y"], "--chat"),
        (&[], "--prompt"),
    ] {
        fails(&model(), flags, 2, &[says]);
    }
    let copy = copy_of(&model());
    let mut all = tensors(copy.path());
    let weight = all.get_mut("model.layers.3.mlp.up_proj.weight").unwrap();
    weight.data[..2].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    write_tensors(copy.path(), &all, &[("format", "pt")]);
    fails(copy.path(), &["--prompt", "x"], 3, &["block 3", "NaN"]);
}
