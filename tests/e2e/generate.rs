//! `lite generate`: the text of transformers, and the same tokens from a packed checkpoint as from its dequantized twin.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Output;

use lite_decoder::{Block, Compute, DecoderError, Embedding, Head, Rope, with_cpu_slice};
use lite_runtime::Engine;
use lite_runtime::eval::EvalModel;
use lite_runtime::generate::{KvCache, KvPrecision, ResidentModel, Wanted};
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

/// Logits of all tokens by the decoder's blocks, with what `engine` makes of their inputs and of the cache.
fn block_logits(model: &EvalModel, engine: Option<&Engine>, tokens: &[u32]) -> Vec<f32> {
    let (spec, source, compute) = (model.spec(), model.source(), Compute::cpu());
    let logits = || -> Result<Vec<f32>, DecoderError> {
        let rope = Rope::new(spec, tokens.len(), compute.device())?;
        let mut x = Embedding::load(spec, &source, compute.device())?.embed(&[tokens.to_vec()])?;
        for index in 0..spec.blocks.len() {
            let cache = engine.and_then(|engine| engine.cache(index)).map(|scales| scales as _);
            let block = Block::load(spec, index, &source, &compute)?;
            x = block.forward_as_engine(&x, &rope, engine.map(|engine| engine as _), cache)?;
        }
        let logits = Head::load(spec, &source, compute.device())?.logits(&x.flatten(0, 1)?)?;
        with_cpu_slice(&logits, <[f32]>::to_vec)
    };
    logits().unwrap()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
}

/// A copy of the checkpoint without all blocks but the first.
fn only_first_block(from: &Path, to: &Path) -> PathBuf {
    std::fs::create_dir(to).unwrap();
    let mut all = tensors(from);
    all.retain(|name, _| !name.contains("layers.") || name.contains("layers.0."));
    write_tensors(to, &all, &[("format", "pt")]);
    let mut config = config(from);
    config["num_hidden_layers"] = 1.into();
    std::fs::write(to.join("config.json"), config.to_string()).unwrap();
    to.to_owned()
}

/// Holds generation with a checkpoint against the decoder's blocks: nearer to them with the engine's rounding than
/// `part` of what that changes, and the same without it.
fn agrees(dir: &Path, tokens: &[u32], part: f64) {
    let files = EvalModel::open(dir).unwrap();
    let wanted = block_logits(&files, Some(files.engine().unwrap()), tokens);
    let float = block_logits(&files, None, tokens);
    let changed = distance(&float, &wanted);
    let rounded = ResidentModel::from_checkpoint(&files).unwrap();
    // All at once, and a prompt that goes on token by token.
    for cuts in [vec![tokens.len()], [vec![20], vec![1; tokens.len() - 20]].concat()] {
        let mut cache = KvCache::new(rounded.spec(), KvPrecision::Float);
        let (mut found, mut at) = (Vec::new(), 0);
        for cut in cuts {
            found.extend(rounded.forward(&mut cache, &tokens[at..at + cut], Wanted::All).unwrap());
            at += cut;
        }
        let off = distance(&found, &wanted);
        assert!(changed > 0.0 && off < part * changed, "{}: {off}, rounding changes {changed}", dir.display());
    }
    let plain = rounded.with_float_activations();
    let mut cache = KvCache::new(plain.spec(), KvPrecision::Float);
    let found = plain.forward(&mut cache, tokens, Wanted::All).unwrap();
    assert!(distance(&found, &float) < 1e-3 * changed, "{}", dir.display());
}

/// Generation computes what `eval` measures: activations and cache as the checkpoint tells engines to round them.
#[test]
fn activations_are_rounded_as_engines_do() {
    let dir = tempfile::tempdir().unwrap();
    let golden = golden();
    let tokens: Vec<u32> = golden["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect();
    let data = ["--calib-dataset", "builtin", "--calib-samples", "4", "--calib-seqlen", "64", "--eval-samples", "0"];
    for (name, verb, flags) in [
        ("int8", "rtn", &["--scheme", "W8A8"][..]),
        ("fp8", "rtn", &["--scheme", "FP8_DYNAMIC"]),
        ("fp8-static-cache", "rtn", &["--scheme", "FP8", "--kv-cache", "fp8-head"]),
        ("fp4", "rtn", &["--scheme", "NVFP4"]),
        ("cache", "auto_awq", &["--kv-cache", "fp8", "--layout", "compressed-tensors"]),
    ] {
        let out = dir.path().join(name);
        let made = lite().arg(verb).arg(model()).arg("--work-dir").arg(&out).args(flags).args(data).output().unwrap();
        assert!(made.status.success(), "{name}: {}", String::from_utf8_lossy(&made.stderr));
        // Sums in another order tip a code over here and there, and every rounding after that makes more of it: a single
        // block shows that the rounding is the same one, all six that it is everywhere.
        agrees(&only_first_block(&out, &dir.path().join(format!("{name}-1"))), &tokens, 0.2);
        agrees(&out, &tokens, 0.7);

        let flags = ["--prompt", "It was a bright morning", "--max-new-tokens", "8"];
        let activations = name != "cache";
        assert_eq!(json(&out, &flags)["quantized_activations"], activations, "{name}");
        let said = |flags: &[&str]| ok(&out, flags).1.contains("rounded as engines do for this checkpoint");
        let floats = [&flags[..], &["--float-activations"]].concat();
        assert!(said(&flags) && !said(&floats), "{name}");
        assert_eq!(json(&out, &floats)["quantized_activations"], false, "{name}");
    }
    assert!(!ok(&model(), &["--prompt", "It", "--max-new-tokens", "2"]).1.contains("rounded as engines"));
}

/// A model whose headers promise more than any machine has; its file is a hole.
fn write_enormous(dir: &Path) -> std::io::Result<()> {
    let (hidden, layers) = (65_536usize, 16);
    let mut config = config(&model());
    for (key, value) in [("hidden_size", hidden), ("intermediate_size", 4 * hidden), ("num_hidden_layers", layers)] {
        config[key] = value.into();
    }
    for key in ["num_attention_heads", "num_key_value_heads"] {
        config[key] = (hidden / 128).into();
    }
    config["head_dim"] = 128.into();
    std::fs::copy(model().join("tokenizer.json"), dir.join("tokenizer.json"))?;
    std::fs::write(dir.join("config.json"), config.to_string())?;
    let spec = lite_decoder::DecoderSpec::from_config(config.as_object().unwrap()).unwrap();
    let (mut header, mut end) = (serde_json::Map::new(), 0usize);
    for tensor in spec.tensors() {
        let bytes = 2 * tensor.shape.iter().product::<usize>();
        let entry = serde_json::json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": [end, end + bytes]});
        header.insert(tensor.name, entry);
        end += bytes;
    }
    let header = Value::from(header).to_string();
    let mut file = std::fs::File::create(dir.join("model.safetensors"))?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    file.set_len((8 + header.len() + end) as u64)
}

/// Memory is compared before anything is read.
#[test]
fn a_model_that_does_not_fit_is_refused() {
    let flags = ["--prompt", "It", "--max-new-tokens", "8"];
    let with = |memory| [&flags[..], &["--max-memory", memory]].concat();
    fails(&model(), &with("4MB"), 5, &["of it for weights", "--max-memory allows 4", "fewer bits", "lite eval"]);
    ok(&model(), &with("1GB"));
    // 2000 tokens of keys and values are larger than the model.
    let long = [&flags[..2], &["--max-new-tokens", "2000", "--max-memory", "35MB"]].concat();
    fails(&model(), &long, 5, &["2001 tokens", "lower --max-new-tokens"]);
    ok(&model(), &with("35MB"));

    let dir = tempfile::tempdir().unwrap();
    if let Err(error) = write_enormous(dir.path()) {
        eprintln!("skipped: this file system takes no file of some terabytes: {error}");
        return;
    }
    fails(dir.path(), &flags, 5, &["GB of it for weights", "are free", "fewer bits"]);
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
