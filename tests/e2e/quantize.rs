//! The main path: quantize, check, publish.

use super::support::*;

#[test]
fn a_bundled_model_becomes_an_awq_checkpoint_and_says_how_good_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let stdout = auto_awq_ok(&model(), &out, &QUICK);
    for wanted in ["mean KL", "same top-1", "perplexity", "worst first", "42 packed linears"] {
        assert!(stdout.contains(wanted), "no `{wanted}` in:\n{stdout}");
    }
    let kl = stdout.lines().find_map(|l| l.trim().strip_prefix("mean KL")).unwrap();
    let kl: f64 = kl.split_whitespace().next().unwrap().parse().unwrap();
    assert!(kl > 0.0 && kl < 0.02, "{kl}");
    assert!(!out.join(".lite").exists(), "the job folder is gone");

    let quantization = &config(&out)["quantization_config"];
    assert_eq!(quantization["quant_method"], "awq");
    assert_eq!(quantization["version"], "gemm");
    assert_eq!((quantization["bits"].as_u64(), quantization["group_size"].as_u64()), (Some(4), Some(128)));

    // Every plain tensor is there; every linear is packed and none is left plain beside its twin.
    let (source, written) = (tensors(&model()), tensors(&out));
    for (name, raw) in &source {
        match name.strip_suffix(".weight").filter(|m| m.contains("_proj")) {
            Some(module) => {
                assert!(!written.contains_key(name), "{name} is stored twice");
                let (n, k) = (raw.shape[0], raw.shape[1]);
                assert_eq!(written[&format!("{module}.qweight")].shape, [k, n / 8]);
                assert_eq!(written[&format!("{module}.qzeros")].shape, [k / 128, n / 8]);
                assert_eq!(written[&format!("{module}.scales")].shape, [k / 128, n]);
            }
            None => assert_eq!(written[name].shape, raw.shape),
        }
    }
    assert_eq!(written["model.embed_tokens.weight"], source["model.embed_tokens.weight"], "byte for byte");
}

#[test]
fn config_keys_and_side_files_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    auto_awq_ok(&model(), &out, &QUICK);
    let (before, after) = (files(&model()), files(&out));
    for (name, bytes) in &before {
        if name != "config.json" && name != "model.safetensors" {
            assert_eq!(&after[name], bytes, "{name}");
        }
    }
    let text =
        |files: &std::collections::BTreeMap<String, Vec<u8>>| String::from_utf8(files["config.json"].clone()).unwrap();
    let kept = text(&after);
    for line in text(&before).lines().filter(|l| l.contains(':')) {
        assert!(kept.contains(line.trim().trim_end_matches(',')), "`{line}` was changed");
    }
}

#[test]
fn the_two_layouts_hold_the_same_weights() {
    let dir = tempfile::tempdir().unwrap();
    let (awq, ct) = (dir.path().join("awq"), dir.path().join("ct"));
    auto_awq_ok(&model(), &awq, &QUICK);
    auto_awq_ok(&model(), &ct, &[&QUICK[..], &["--layout", "compressed-tensors"]].concat());
    let (a, c) = (tensors(&awq), tensors(&ct));
    let mut compared = 0;
    for module in a.keys().filter_map(|name| name.strip_suffix(".qweight")) {
        assert_eq!(decode_awq(&a, module), decode_compressed_tensors(&c, module), "{module}");
        compared += 1;
    }
    assert_eq!(compared, 42);
}

/// The folded, quantized linears still compute what the original does, to four bits: `Ŵ / s ≈ W`, where s is
/// read off the norms.
#[test]
fn dequantized_weights_are_close_to_the_original_once_scales_are_taken_out() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    auto_awq_ok(&model(), &out, &QUICK);
    let (source, written) = (tensors(&model()), tensors(&out));
    let floats = |tensors: &std::collections::BTreeMap<String, Raw>, name: &str| tensors[name].floats();
    for layer in 0..6 {
        let norm = format!("model.layers.{layer}.post_attention_layernorm.weight");
        let (old, new) = (floats(&source, &norm), floats(&written, &norm));
        let scales: Vec<f32> = old.iter().zip(&new).map(|(o, n)| o / n).collect();
        let module = format!("model.layers.{layer}.mlp.gate_proj");
        let (weight, back) = (floats(&source, &format!("{module}.weight")), decode_awq(&written, &module));
        let k = scales.len();
        let (mut error, mut size) = (0f64, 0f64);
        for (i, (w, b)) in weight.iter().zip(&back).enumerate() {
            error += f64::from(w - b / scales[i % k]).powi(2);
            size += f64::from(*w).powi(2);
        }
        assert!((error / size).sqrt() < 0.15, "{module}: {}", (error / size).sqrt());
    }
}

#[test]
fn every_width_group_and_symmetry_runs() {
    let dir = tempfile::tempdir().unwrap();
    for (i, flags) in [
        &["--w-bits", "3", "--w-group-size", "64"][..],
        &["--w-bits", "8", "--w-group-size", "-1", "--w-sym"],
        &["--w-bits", "2", "--w-group-size", "16"],
        &["--w-bits", "5", "--w-group-size", "32", "--no-search-scale"],
        &["--w-bits", "4", "--w-group-size", "256", "--range", "minmax"],
        &["--w-sym", "--dtype", "float16"],
    ]
    .iter()
    .enumerate()
    {
        let out = dir.path().join(i.to_string());
        auto_awq_ok(&model(), &out, &[&QUICK[..], flags].concat());
        assert_eq!(config(&out)["quantization_config"]["quant_method"], "compressed-tensors", "{flags:?}");
    }
    assert_eq!(config(&dir.path().join("5"))["dtype"], "float16");
    assert!(tensors(&dir.path().join("5")).values().all(|raw| raw.dtype != safetensors::Dtype::BF16));
}

#[test]
fn without_data_nothing_is_folded() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let stdout = auto_awq_ok(&model(), &out, &["--calib-samples", "0", "--eval-samples", "2"]);
    assert!(stdout.contains("without data") && stdout.contains("mean KL"), "{stdout}");
    let (source, written) = (tensors(&model()), tensors(&out));
    for (name, raw) in source.iter().filter(|(name, _)| name.contains("norm")) {
        assert_eq!(&written[name], raw);
    }
}

#[test]
fn an_unknown_architecture_can_be_quantized_without_data_only() {
    let copy = copy_of(&model());
    let path = copy.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap().replace("LlamaForCausalLM", "UnheardOfForCausalLM");
    std::fs::write(&path, text).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let output = auto_awq(copy.path(), &dir.path().join("a"), &QUICK);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{stderr}");
    for wanted in ["UnheardOfForCausalLM", "Qwen3ForCausalLM", "--calib-samples 0"] {
        assert!(stderr.contains(wanted), "{stderr}");
    }
    let stdout = auto_awq_ok(copy.path(), &dir.path().join("b"), &["--calib-samples", "0"]);
    assert!(stdout.contains("42 packed linears") && stdout.contains("not measured"), "{stdout}");
}

#[test]
fn an_old_checkpoint_is_replaced_only_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    auto_awq_ok(&model(), &out, &QUICK);
    let before = files(&out);
    let refused = auto_awq(&model(), &out, &QUICK);
    assert_eq!(refused.status.code(), Some(2));
    assert_eq!(files(&out), before);
    std::fs::write(out.join("model-00001-of-00002.safetensors"), b"stale").unwrap();
    auto_awq_ok(&model(), &out, &[&QUICK[..], &["--overwrite"]].concat());
    assert_eq!(files(&out), before, "same recipe, same bytes; stale shards are gone");
}
