//! Vision-language models: the decoder is quantized, everything else passes through byte for byte under its name.

use super::families::{CALIBRATION, ok, write_tokenizer};
use super::support::*;

#[test]
fn the_decoder_is_quantized_and_the_rest_is_untouched() {
    let mut ran = 0;
    for entry in std::fs::read_dir(root().join("tests/fixtures/wrappers")).unwrap() {
        let fixture = entry.unwrap().path();
        if !fixture.join("config.json").exists() {
            continue;
        }
        let copy = copy_of(&fixture);
        std::fs::remove_file(copy.path().join("expected.safetensors")).unwrap();
        write_tokenizer(copy.path(), 64);
        let name = fixture.display();
        let before = tensors(copy.path());
        let is_text = |name: &str| {
            name.starts_with("model.layers")
                || name.contains("language_model")
                || ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"].contains(&name)
        };
        let dir = tempfile::tempdir().unwrap();
        for (verb, layout, suffix) in
            [("auto_awq", "awq", "qweight"), ("auto_gptq", "compressed-tensors", "weight_packed")]
        {
            let out = dir.path().join(verb);
            let flags = ["--w-group-size", "16", "--layout", layout, "--eval-samples", "2"];
            ok(lite().arg(verb).arg(copy.path()).arg("--work-dir").arg(&out).args(CALIBRATION).args(flags));
            ok(lite().arg("verify").arg(&out).arg("--against").arg(copy.path()));
            let after = tensors(&out);
            let vision: Vec<&String> = before.keys().filter(|name| !is_text(name)).collect();
            assert!(vision.len() > 5, "{name}");
            for tensor in &vision {
                let (a, b) = (&before[*tensor], &after[*tensor]);
                assert!(a.data == b.data && a.dtype == b.dtype && a.shape == b.shape, "{name}: {tensor}");
            }
            let packed = after.keys().filter(|tensor| tensor.ends_with(suffix)).count();
            // Of each layer: attention and feed-forward, or all experts one by one.
            let experts = config(copy.path())["text_config"]["num_local_experts"].as_u64();
            assert_eq!(packed as u64, 2 * (4 + 3 * experts.unwrap_or(1)), "{name}");
            assert!(after.keys().filter(|tensor| tensor.ends_with(suffix)).all(|tensor| is_text(tensor)), "{name}");
            // Engines are told of every vision linear; convolutions are none.
            let config = config(&out);
            let quantization = &config["quantization_config"];
            let ignored =
                quantization["modules_to_not_convert"].as_array().or(quantization["ignore"].as_array()).unwrap();
            for tensor in vision.iter().filter(|tensor| before[**tensor].shape.len() == 2) {
                let Some(module) = tensor.strip_suffix(".weight") else { continue };
                assert!(ignored.iter().any(|entry| entry == module), "{name}: {module} is not in {ignored:?}");
            }
            // The rest of config.json is the original's.
            let original = super::support::config(copy.path());
            for key in ["architectures", "vision_config", "text_config", "llm_config"] {
                assert_eq!(config.get(key), original.get(key), "{name}: {key}");
            }
        }
        ran += 1;
    }
    assert!(ran >= 9, "only {ran} models were found");
}

#[test]
fn a_vision_tower_that_is_declared_must_be_there() {
    let copy = copy_of(&root().join("tests/fixtures/wrappers/llava"));
    std::fs::remove_file(copy.path().join("expected.safetensors")).unwrap();
    write_tokenizer(copy.path(), 64);
    let mut left = tensors(copy.path());
    left.retain(|name, _| name.contains("language_model") || name.starts_with("lm_head"));
    assert!(left.len() > 10);
    write_tensors(copy.path(), &left, &[("format", "pt")]);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    for verb in ["auto_awq", "auto_gptq"] {
        let output = lite().arg(verb).arg(copy.path()).arg("--work-dir").arg(&out).args(CALIBRATION).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{stderr}");
        assert!(stderr.contains("`vision_config`") && stderr.contains("no tensor besides"), "{stderr}");
    }
}
