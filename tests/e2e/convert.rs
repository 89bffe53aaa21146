//! `lite convert` and `lite inspect` on what the other verbs write.

use std::path::Path;
use std::process::Output;

use safetensors::Dtype;

use super::support::*;

fn convert(from: &Path, to: &Path, flags: &[&str]) -> Output {
    lite().arg("convert").arg(from).arg("--work-dir").arg(to).args(flags).output().unwrap()
}

fn convert_ok(from: &Path, to: &Path, flags: &[&str]) -> String {
    let output = convert(from, to, flags);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn inspect(dir: &Path) -> serde_json::Value {
    let output = lite().arg("inspect").arg(dir).args(["--format", "json"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn awq_goes_around_all_integer_layouts_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    auto_awq_ok(&model(), &at("awq"), &QUICK);
    convert_ok(&at("awq"), &at("ct"), &["--layout", "compressed-tensors"]);
    convert_ok(&at("ct"), &at("gptq"), &["--layout", "gptq", "--max-shard-size", "1MB"]);
    let report = convert_ok(&at("gptq"), &at("back"), &["--layout", "awq", "--format", "json"]);
    let report: serde_json::Value = serde_json::from_str(report.lines().last().unwrap()).unwrap();
    assert_eq!((report["exact"].as_u64(), report["from"].as_str()), (Some(42), Some("gptq")));

    let (awq, ct) = (tensors(&at("awq")), tensors(&at("ct")));
    for module in awq.keys().filter_map(|name| name.strip_suffix(".qweight")) {
        assert_eq!(decode_awq(&awq, module), decode_compressed_tensors(&ct, module), "{module}");
    }
    assert!(files(&at("gptq")).keys().filter(|name| name.ends_with(".safetensors")).count() > 1);
    assert_eq!(tensors(&at("back")), awq);
    assert_eq!(config(&at("back")), config(&at("awq")));
    for name in ["tokenizer.json", "generation_config.json"] {
        assert_eq!(files(&at("back"))[name], files(&model())[name]);
    }
    assert!(!at("back").join("quantize_config.json").exists());
}

#[test]
fn what_cannot_be_held_is_refused_and_rounded_on_request() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let flags = ["--calib-samples", "0", "--w-bits", "8", "--layout", "compressed-tensors", "--eval-samples", "0"];
    auto_awq_ok(&model(), &at("ct"), &flags);
    let refused = convert(&at("ct"), &at("awq"), &["--layout", "awq"]);
    let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(4), "{stderr}");
    assert!(
        stderr.contains("model.layers.0.") && stderr.contains("8-bit") && stderr.contains("--requantize"),
        "{stderr}"
    );
    assert!(!at("awq").exists());
    let text = convert_ok(&at("ct"), &at("awq"), &["--layout", "awq", "--requantize"]);
    assert!(text.contains("rounded       42 linears"), "{text}");
    let (ct, awq) = (inspect(&at("ct")), inspect(&at("awq")));
    assert_eq!((ct["linears"][0]["bits"].as_u64(), awq["linears"][0]["bits"].as_u64()), (Some(8), Some(4)));

    let target = convert(&at("awq"), &at("x"), &["--target", "turbomind"]);
    assert!(target.status.success(), "{}", String::from_utf8_lossy(&target.stderr));
    assert_eq!(inspect(&at("x"))["layout"], "awq");
    for (flags, code) in [
        (&["--layout", "marlin"][..], 2),
        (&[], 2),
        (&["--layout", "plain", "--target", "vllm"], 2),
        (&["--layout", "awq", "--dtype", "float16"], 2),
    ] {
        assert_eq!(convert(&at("awq"), &at("y"), flags).status.code(), Some(code), "{flags:?}");
    }
    assert_eq!(convert(&at("awq"), &at("x"), &["--layout", "gptq"]).status.code(), Some(2), "no --overwrite");
    convert_ok(&at("awq"), &at("x"), &["--layout", "gptq", "--overwrite"]);
    assert_eq!(inspect(&at("x"))["layout"], "gptq");
    assert_eq!(convert(&model(), &at("y"), &["--layout", "awq"]).status.code(), Some(4), "nothing to convert");
    assert!(!at("y").exists());
}

#[test]
fn a_plain_checkpoint_holds_what_the_codes_stand_for() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    auto_awq_ok(&model(), &at("awq"), &QUICK);
    convert_ok(&at("awq"), &at("plain"), &["--layout", "plain"]);
    let (awq, plain, original) = (tensors(&at("awq")), tensors(&at("plain")), tensors(&model()));
    assert_eq!(plain.keys().collect::<Vec<_>>(), original.keys().collect::<Vec<_>>());
    for (name, raw) in &plain {
        let Some(module) = name.strip_suffix(".weight").filter(|m| awq.contains_key(&format!("{m}.qweight"))) else {
            assert_eq!(raw, &awq[name]);
            continue;
        };
        assert_eq!((raw.dtype, &raw.shape), (Dtype::BF16, &original[name].shape));
        let wanted: Vec<f32> =
            decode_awq(&awq, module).iter().map(|value| half::bf16::from_f32(*value).to_f32()).collect();
        assert_eq!(raw.floats(), wanted, "{module}");
    }
    assert!(config(&at("plain")).get("quantization_config").is_none());
    // It is a model again: every verb takes it.
    auto_awq_ok(&at("plain"), &at("again"), &QUICK);
}

#[test]
fn inspect_tells_what_is_there() {
    let plain = inspect(&model());
    assert_eq!((plain["layout"].as_str(), plain["linears"].as_array().map(Vec::len)), (None, Some(0)));
    assert_eq!((plain["tied_head"].as_bool(), plain["architecture"].as_str()), (Some(true), Some("LlamaForCausalLM")));
    let elements: usize = tensors(&model()).values().map(|raw| raw.shape.iter().product::<usize>()).sum();
    assert_eq!(plain["parameters"], elements);
    assert_eq!(plain["bits_per_weight"], 16.0);

    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    auto_awq_ok(&model(), &out, &QUICK);
    let found = inspect(&out);
    assert_eq!(
        (found["layout"].as_str(), found["warnings"].as_array().map(Vec::len)),
        (Some("awq"), Some(0)),
        "{found}"
    );
    assert_eq!(found["parameters"], elements, "codes count as the weights they stand for");
    let linears = found["linears"].as_array().unwrap();
    assert_eq!(linears.len(), 42);
    for linear in linears {
        assert_eq!((linear["bits"].as_u64(), linear["group_size"].as_i64()), (Some(4), Some(128)));
        // 4 bits, and 16 + 4 for every 128 weights.
        assert!((linear["bits_per_weight"].as_f64().unwrap() - (4.0 + 20.0 / 128.0)).abs() < 1e-9, "{linear}");
    }
    let text = lite().arg("inspect").arg(&out).arg("--tensors").output().unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    for wanted in ["int4 group 128 asymmetric: 42 linears", "model.layers.5.mlp.down_proj.qzeros", "tied", "ignored"] {
        assert!(text.contains(wanted), "no `{wanted}` in:\n{text}");
    }
    let missing = lite().arg("inspect").arg(dir.path()).output().unwrap();
    assert_eq!(missing.status.code(), Some(3), "{}", String::from_utf8_lossy(&missing.stderr));
}

#[test]
fn what_told_of_the_source_is_set_aside_and_a_card_tells_of_the_result() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let source = copy_of(&model());
    let card = "---\nlicense: mit\nbase_model: org/novels\n---\n# The original\n";
    std::fs::write(source.path().join("README.md"), card).unwrap();
    auto_awq_ok(source.path(), &at("awq"), &QUICK);
    convert_ok(&at("awq"), &at("gptq"), &["--layout", "gptq"]);
    let (awq, gptq) = (files(&at("awq")), files(&at("gptq")));
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let new = text(&gptq["README.md"]);
    assert!(new.contains("from the `awq` layout to the `gptq` layout") && new.contains("42 of 42 linears"), "{new}");
    assert!(new.contains("license: \"mit\"") && new.contains("`README.base.2.md`"), "{new}");
    assert!(!new.contains("perplexity"), "nothing was measured: {new}");
    // Byte for byte, under names that say whose they are.
    assert_eq!(text(&gptq["README.base.md"]), card);
    for (kept, name) in
        [("README.base.2.md", "README.md"), ("report.base.json", "report.json"), ("report.base.html", "report.html")]
    {
        assert_eq!(gptq[kept], awq[name], "{kept}");
    }
    assert!(!gptq.contains_key("report.json") && !gptq.contains_key("report.html"));

    convert_ok(&at("awq"), &at("bare"), &["--layout", "plain", "--no-report"]);
    let bare = files(&at("bare"));
    assert!(!bare.contains_key("README.md") && !bare.contains_key("report.json"), "{:?}", bare.keys());
}
