//! Schemes by name, fp8 and int8: `rtn`, `blocked_fp8`, `smooth_quant`, scales of the cache.

use std::path::Path;
use std::process::Output;

use safetensors::Dtype;
use serde_json::Value;

use super::support::*;

/// Settings that make a calibrated run take about a second.
const DATA: [&str; 6] = ["--calib-dataset", "builtin", "--calib-samples", "6", "--calib-seqlen", "64"];
const CHECK: [&str; 2] = ["--eval-samples", "4"];

fn run(verb: &str, model: &Path, out: &Path, flags: &[&[&str]]) -> Output {
    lite().arg(verb).arg(model).arg("--work-dir").arg(out).args(flags.concat()).output().unwrap()
}

/// The summary of a run that must succeed.
fn summary(verb: &str, model: &Path, out: &Path, flags: &[&[&str]]) -> Value {
    let output = run(verb, model, out, &[flags, &[&["--format", "json"]]].concat());
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{verb} {flags:?}: {:?}\n{stdout}\n{stderr}", output.status);
    assert!(!out.join(".lite").exists(), "the job folder is gone");
    serde_json::from_str(stdout.lines().last().unwrap()).unwrap()
}

fn kl(summary: &Value) -> f64 {
    summary["comparison"]["kl_mean"].as_f64().unwrap_or_else(|| panic!("no comparison in {summary}"))
}

fn tensor<'t>(tensors: &'t std::collections::BTreeMap<String, Raw>, name: &str) -> &'t Raw {
    tensors.get(name).unwrap_or_else(|| panic!("no `{name}` among {:?}", tensors.keys().take(12).collect::<Vec<_>>()))
}

/// e4m3 by its definition.
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let size =
        if exponent == 0 { mantissa / 8.0 * 2f32.powi(-6) } else { (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7) };
    if code & 128 == 0 { size } else { -size }
}

const DOWN: &str = "model.layers.2.mlp.down_proj";

#[test]
fn every_scheme_by_name_runs_and_is_as_good_as_its_bits() {
    let dir = tempfile::tempdir().unwrap();
    for (scheme, most) in [
        ("W8A16", 1e-4),
        ("W8A8", 1e-3),
        ("INT8", 1e-3),
        ("W4A16", 0.03),
        ("w4a16_asym", 0.03),
        ("FP8_DYNAMIC", 5e-3),
        ("FP8_BLOCK", 5e-3),
        ("FP8", 5e-3),
        ("MXFP8", 5e-3),
        ("NVFP4", 0.06),
        ("NVFP4A16", 0.04),
        ("MXFP4A16", 0.1),
    ] {
        let out = dir.path().join(scheme);
        let found = summary("rtn", &model(), &out, &[&["--scheme", scheme], &DATA, &CHECK]);
        let kl = kl(&found);
        assert!(kl > 0.0 && kl < most, "{scheme}: {kl}");
        assert_eq!(found["linears_checked"], 42, "{scheme}");
    }
    let fp8 = tensors(&dir.path().join("FP8_DYNAMIC"));
    let weight = tensor(&fp8, &format!("{DOWN}.weight"));
    assert_eq!(weight.dtype, Dtype::F8_E4M3);
    // Code times scale is the weight, to the three bits of the mantissa.
    let source = tensors(&model())[&format!("{DOWN}.weight")].clone();
    let (wanted, scales) = (source.floats(), tensor(&fp8, &format!("{DOWN}.weight_scale")).floats());
    let k = source.shape[1];
    assert_eq!(scales.len(), source.shape[0]);
    for (i, (code, wanted)) in weight.data.iter().zip(&wanted).enumerate() {
        let (scale, found) = (scales[i / k], e4m3(*code) * scales[i / k]);
        assert!(
            (found - wanted).abs() <= (wanted.abs() / 16.0).max(scale * 2f32.powi(-10)) * 1.001,
            "{found} {wanted}"
        );
    }
}

#[test]
fn static_schemes_store_the_range_of_the_inputs_and_dynamic_ones_need_no_data() {
    let dir = tempfile::tempdir().unwrap();
    let (fixed, dynamic) = (dir.path().join("fixed"), dir.path().join("dynamic"));
    let found = summary("rtn", &model(), &fixed, &[&["--scheme", "FP8"], &DATA, &CHECK]);
    assert!(found["calibration"].is_string());
    let written = tensors(&fixed);
    for layer in 0..6 {
        let scale = |module: &str| {
            let name = format!("model.layers.{layer}.{module}.input_scale");
            tensor(&written, &name).floats()
        };
        let q = scale("self_attn.q_proj");
        assert!(q.len() == 1 && q[0].is_normal() && q[0] > 0.0, "{q:?}");
        // What is fused shares its input.
        assert_eq!((&q, &q), (&scale("self_attn.k_proj"), &scale("self_attn.v_proj")));
        assert_eq!(scale("mlp.gate_proj"), scale("mlp.up_proj"));
    }
    let found = summary("rtn", &model(), &dynamic, &[&["--scheme", "FP8_DYNAMIC"], &CHECK]);
    assert!(found["calibration"].is_null());
    assert!(!tensors(&dynamic).keys().any(|name| name.ends_with("input_scale")));
    let refused = run("rtn", &model(), &dir.path().join("none"), &[&["--scheme", "FP8", "--calib-samples", "0"]]);
    assert_eq!(refused.status.code(), Some(2), "{}", String::from_utf8_lossy(&refused.stderr));
}

#[test]
fn fused_linears_share_the_global_scale_of_nvfp4() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    summary("rtn", &model(), &out, &[&["--scheme", "NVFP4A16"], &CHECK]);
    let (source, written) = (tensors(&model()), tensors(&out));
    let global = |module: &str| tensor(&written, &format!("{module}.weight_global_scale")).floats()[0];
    let largest = |module: &str| source[&format!("{module}.weight")].floats().iter().fold(0f32, |m, v| m.max(v.abs()));
    for layer in 0..6 {
        for (parent, parts) in [("self_attn", &["q_proj", "k_proj", "v_proj"][..]), ("mlp", &["gate_proj", "up_proj"])]
        {
            let modules: Vec<String> =
                parts.iter().map(|part| format!("model.layers.{layer}.{parent}.{part}")).collect();
            // In the order of the reference, which multiplies by the reciprocal.
            let wanted = 2688.0 * modules.iter().map(|m| largest(m)).fold(0f32, f32::max).recip();
            for module in &modules {
                assert_eq!(global(module), wanted, "{module}");
            }
        }
    }
}

#[test]
fn an_architecture_nobody_described_is_quantized_tensor_by_tensor() {
    let copy = copy_of(&model());
    let path = copy.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap().replace("LlamaForCausalLM", "UnheardOfForCausalLM");
    std::fs::write(&path, text).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (known, unknown) = (dir.path().join("known"), dir.path().join("unknown"));
    let found = summary("rtn", copy.path(), &unknown, &[&["--scheme", "FP8_DYNAMIC"]]);
    assert!(found["comparison"].is_null());
    summary("rtn", &model(), &known, &[&["--scheme", "FP8_DYNAMIC", "--eval-samples", "0"]]);
    assert_eq!(tensors(&known), tensors(&unknown));
    let refused = run("rtn", copy.path(), &dir.path().join("none"), &[&["--scheme", "FP8"], &DATA]);
    assert_eq!(refused.status.code(), Some(4), "a calibrated scheme needs a known decoder");
}

#[test]
fn threads_and_shards_do_not_change_the_bytes() {
    let dir = tempfile::tempdir().unwrap();
    for (verb, flags) in [
        ("rtn", &["--scheme", "W4A16", "--range", "mse", "--eval-samples", "0"][..]),
        ("rtn", &["--scheme", "NVFP4", "--kv-cache", "fp8"]),
        ("smooth_quant", &["--alpha", "auto", "--activations", "static-tensor"]),
        ("smooth_quant", &["--rounding", "refine", "--kv-cache", "fp8-head"]),
    ] {
        let result = |name: &str, more: &[&str]| {
            let out = dir.path().join(format!("{verb}-{}-{name}", flags.join("")));
            let data: &[&str] = if flags.contains(&"W4A16") { &[] } else { &DATA };
            summary(
                verb,
                &model(),
                &out,
                &[flags, data, &["--eval-samples", "1"][..if flags.contains(&"0") { 0 } else { 2 }], more],
            );
            out
        };
        let first = result("two", &["--threads", "2"]);
        assert_eq!(files(&result("one", &["--threads", "1"])), files(&first), "{verb} {flags:?}");
        assert_eq!(files(&result("three", &["--threads", "3"])), files(&first), "{verb} {flags:?}");
        assert_eq!(tensors(&result("sharded", &["--max-shard-size", "1MB"])), tensors(&first), "{verb} {flags:?}");
    }
}

#[test]
fn blocks_of_fp8_keep_their_names() {
    let dir = tempfile::tempdir().unwrap();
    for (name, flags, dtype) in [
        ("plain", &[][..], Dtype::F8_E4M3),
        ("powers", &["--scale-fmt", "ue8m0"], Dtype::F8_E4M3),
        ("e5m2", &["--quant-dtype", "float8_e5m2"], Dtype::F8_E5M2),
    ] {
        let out = dir.path().join(name);
        let found = summary("blocked_fp8", &model(), &out, &[flags, &CHECK]);
        let kl = kl(&found);
        assert!(kl > 0.0 && kl < if dtype == Dtype::F8_E5M2 { 0.02 } else { 5e-3 }, "{name}: {kl}");
        let (source, written) = (tensors(&model()), tensors(&out));
        for (name, raw) in source.iter().filter(|(name, _)| name.contains("_proj")) {
            let codes = tensor(&written, name);
            assert_eq!((codes.dtype, &codes.shape), (dtype, &raw.shape));
            let scales = tensor(&written, &format!("{name}_scale_inv"));
            assert_eq!(scales.shape, [raw.shape[0].div_ceil(128), raw.shape[1].div_ceil(128)]);
            if flags.contains(&"ue8m0") {
                assert!(scales.floats().iter().all(|scale| scale.to_bits() & 0x007f_ffff == 0), "{name}");
            }
        }
        let quantization = &config(&out)["quantization_config"];
        assert_eq!(quantization["quant_method"], "fp8");
        assert_eq!(quantization["weight_block_size"], serde_json::json!([128, 128]));
        assert_eq!(quantization["scale_fmt"].as_str(), flags.contains(&"ue8m0").then_some("ue8m0"));
    }
}

#[test]
fn smoothing_leaves_the_float_function_alone_and_beats_plain_rounding() {
    let dir = tempfile::tempdir().unwrap();
    let plain = kl(&summary("rtn", &model(), &dir.path().join("plain"), &[&["--scheme", "W8A8"], &CHECK]));
    for (i, flags) in [
        &[][..],
        &["--alpha", "0.8"],
        &["--alpha", "auto"],
        &["--method", "awq"],
        &["--algorithm", "log_equalization"],
        &["--rounding", "gptq"],
        &["--rounding", "refine"],
        &["--activations", "static-tensor"],
        &["--activations", "static-tensor", "--act-asymmetric"],
        &["--layout", "compressed-tensors"],
    ]
    .into_iter()
    .enumerate()
    {
        let out = dir.path().join(i.to_string());
        let found = summary("smooth_quant", &model(), &out, &[flags, &DATA, &CHECK]);
        let (kl, fixed) = (kl(&found), flags.contains(&"static-tensor"));
        assert!(kl > 0.0 && kl < if fixed { 0.02 } else { plain * 1.5 }, "{flags:?}: {kl}, without smoothing {plain}");
        // Scales really moved.
        let norm = "model.layers.0.input_layernorm.weight";
        assert_ne!(tensors(&out)[norm], tensors(&model())[norm], "{flags:?}");
    }
    let lmdeploy = tensors(&dir.path().join("0"));
    let (weight, scale) = (tensor(&lmdeploy, &format!("{DOWN}.weight")), tensor(&lmdeploy, &format!("{DOWN}.scale")));
    assert_eq!((weight.dtype, scale.dtype, scale.shape.as_slice()), (Dtype::I8, Dtype::F32, &[weight.shape[0], 1][..]));
    assert_eq!(config(&dir.path().join("0"))["quantization_config"]["quant_method"], "smooth_quant");
    let asymmetric = tensors(&dir.path().join("8"));
    assert_eq!(tensor(&asymmetric, &format!("{DOWN}.input_zero_point")).shape, [1]);
}

#[test]
fn smoothing_runs_with_fp8() {
    let dir = tempfile::tempdir().unwrap();
    for (i, flags) in [
        &["--quant-dtype", "fp8"][..],
        &["--quant-dtype", "float8_e4m3fn", "--target", "vllm"],
        &["--quant-dtype", "fp8", "--activations", "static-tensor"],
        &["--quant-dtype", "float8_e5m2"],
    ]
    .into_iter()
    .enumerate()
    {
        let out = dir.path().join(i.to_string());
        let kl = kl(&summary("smooth_quant", &model(), &out, &[flags, &DATA, &CHECK]));
        assert!(kl > 0.0 && kl < 0.02, "{flags:?}: {kl}");
    }
}

#[test]
fn every_layer_gets_scales_for_its_cache() {
    let dir = tempfile::tempdir().unwrap();
    for (i, (verb, flags, shape)) in [
        ("smooth_quant", &["--kv-cache", "fp8"][..], &[1usize][..]),
        ("rtn", &["--scheme", "FP8_DYNAMIC", "--kv-cache", "fp8-head"], &[4, 1, 1]),
        ("auto_gptq", &["--kv-cache", "fp8", "--layout", "compressed-tensors"], &[1]),
        ("auto_awq", &["--kv-cache", "fp8", "--layout", "compressed-tensors"], &[1]),
    ]
    .into_iter()
    .enumerate()
    {
        let out = dir.path().join(i.to_string());
        let found = summary(verb, &model(), &out, &[flags, &DATA, &CHECK]);
        assert!(kl(&found) < 0.05, "{verb}: {found}");
        let written = tensors(&out);
        let heads = config(&model())["num_key_value_heads"].as_u64().unwrap() as usize;
        for layer in 0..6 {
            for part in ["k_scale", "v_scale"] {
                let scale = tensor(&written, &format!("model.layers.{layer}.self_attn.{part}"));
                let wanted: Vec<usize> = shape.iter().map(|d| if *d == 4 { heads } else { *d }).collect();
                assert_eq!((scale.dtype, &scale.shape), (Dtype::F32, &wanted), "{verb}");
                // Neither nothing nor everything: keys and values of this model are of the order of one.
                assert!(scale.floats().iter().all(|s| *s > 1e-5 && *s < 1.0), "{verb}: {:?}", scale.floats());
            }
        }
        let scheme = &config(&out)["quantization_config"]["kv_cache_scheme"];
        assert_eq!((&scheme["num_bits"], &scheme["type"]), (&8.into(), &"float".into()), "{verb}: {scheme}");
    }
    let refused = run(
        "rtn",
        &model(),
        &dir.path().join("none"),
        &[&["--scheme", "W8A16", "--kv-cache", "fp8", "--calib-samples", "0"]],
    );
    assert_eq!(refused.status.code(), Some(2));
}

#[test]
fn some_linears_can_have_another_scheme_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let flags = ["--scheme", "FP8_DYNAMIC", "--override", "down_proj:scheme=W8A16", "--ignore", r"layers\.0\."];
    let found = summary("rtn", &model(), &out, &[&flags, &CHECK]);
    assert!(kl(&found) < 5e-3, "{found}");
    let written = tensors(&out);
    assert!(written.contains_key("model.layers.3.mlp.down_proj.weight_packed"));
    assert_eq!(tensor(&written, "model.layers.3.mlp.up_proj.weight").dtype, Dtype::F8_E4M3);
    assert_eq!(written["model.layers.0.mlp.up_proj.weight"], tensors(&model())["model.layers.0.mlp.up_proj.weight"]);
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let broken = copy_of(&model());
    let mut all = tensors(broken.path());
    let raw = all.get_mut(&format!("{DOWN}.weight")).unwrap();
    raw.data[2 * (3 * raw.shape[1] + 5)..][..2].copy_from_slice(&half::bf16::INFINITY.to_le_bytes());
    write_tensors(broken.path(), &all, &[("format", "pt")]);
    let good = model();
    for (verb, model, flags, code, says) in [
        ("rtn", &good, &["--scheme", "FP8_DYNAMC"][..], 2, &["FP8_DYNAMC", "FP8_DYNAMIC"][..]),
        ("rtn", &good, &["--scheme", "zzz"], 2, &["zzz", "W8A8"]),
        ("rtn", &good, &["--scheme", "W8A8", "--override", "down:scheme=W8A61"], 2, &["W8A61", "W8A16"]),
        ("rtn", &good, &["--scheme", "FP8", "--override", "down_proj:bits=4"], 2, &["bits", "fp8"]),
        ("rtn", &good, &["--scheme", "FP8_DYNAMIC", "--layout", "gptq"], 4, &["gptq"]),
        ("rtn", &good, &["--scheme", "NVFP4", "--target", "lmdeploy-pytorch"], 4, &["lmdeploy-pytorch"]),
        ("rtn", &broken.path().to_owned(), &["--scheme", "FP8_DYNAMIC"], 3, &["down_proj", "row 3, column 5"]),
        ("blocked_fp8", &broken.path().to_owned(), &[], 3, &["down_proj", "row 3, column 5"]),
        ("blocked_fp8", &good, &["--block-size", "0"], 2, &["--block-size 0"]),
        ("blocked_fp8", &good, &["--quant-dtype", "int8"], 2, &["float8_e5m2"]),
        ("smooth_quant", &good, &["--alpha", "NaN"], 2, &["alpha", "NaN", "0.5"]),
        ("smooth_quant", &good, &["--alpha", "2"], 2, &["alpha 2", "auto"]),
        ("smooth_quant", &good, &["--alpha", "-1"], 2, &["alpha -1"]),
        ("smooth_quant", &good, &["--alpha", "half"], 2, &["half"]),
        ("smooth_quant", &good, &["--calib-samples", "0"], 2, &["lite rtn"]),
        ("smooth_quant", &good, &["--quant-dtype", "fp8", "--rounding", "gptq"], 2, &["integer codes"]),
        ("smooth_quant", &good, &["--target", "turbomind"], 4, &["turbomind"]),
        (
            "smooth_quant",
            &good,
            &["--activations", "static-tensor", "--layout", "lmdeploy-w8a8"],
            4,
            &["lmdeploy-w8a8"],
        ),
    ] {
        let out = dir.path().join("out");
        let output = run(verb, model, &out, &[flags]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{verb} {flags:?}: {stderr}");
        for word in says {
            assert!(stderr.contains(word), "{verb} {flags:?}: no `{word}` in {stderr}");
        }
        assert!(!out.exists(), "{verb} {flags:?} left {:?}", files(&out).keys());
    }
}

#[test]
fn a_plan_shows_the_scheme_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let output = run("smooth_quant", &model(), &out, &[&["--plan", "--kv-cache", "fp8"], &DATA]);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for wanted in
        ["8 bits, group size -1, symmetric; inputs 8 bits per token", "cache fp8", "12 tensors", "absorbs scales"]
    {
        assert!(stdout.contains(wanted), "no `{wanted}` in {stdout}");
    }
    assert!(!out.exists());
    let output = run("rtn", &model(), &out, &[&["--scheme", "FP8_BLOCK", "--plan", "--format", "json"]]);
    let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(plan["bits"], 8);
    assert!(plan["scheme"].as_str().unwrap().contains("fp8 e4m3, blocks of 128×128"), "{plan}");
    assert_eq!(plan["windows"], 0);
}

/// The other verbs read what the quantizing ones wrote: the same KL, and tokens.
#[test]
fn eval_and_generate_read_every_layout_of_small_types() {
    let dir = tempfile::tempdir().unwrap();
    for (scheme, layout) in [
        ("FP8", "modelopt"),
        ("NVFP4", "modelopt"),
        ("NVFP4A16", "modelopt"),
        ("NVFP4A16", "compressed-tensors"),
        ("FP8_BLOCK", "fp8"),
        ("W8A8", "lmdeploy-w8a8"),
        ("MXFP8", "compressed-tensors"),
    ] {
        let out = dir.path().join(format!("{scheme}-{layout}"));
        let made = summary("rtn", &model(), &out, &[&["--scheme", scheme, "--layout", layout], &DATA, &CHECK]);
        let flags = ["--dataset", "builtin", "--windows", "2", "--seqlen", "128", "--canary", "0", "--format", "json"];
        let output = lite().arg("eval").arg(&out).arg("--against").arg(model()).args(flags).output().unwrap();
        assert!(output.status.success(), "{scheme} {layout}: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        let judged: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        let found = judged["comparison"]["kl"]["mean"].as_f64().unwrap_or_else(|| panic!("no KL in {judged}"));
        // Other text and fewer tokens: the same size, not the same figure.
        assert!(found > 0.2 * kl(&made) && found < 5.0 * kl(&made), "{scheme} {layout}: {found}, was {}", kl(&made));
        let flags = ["--prompt", "The house", "--max-new-tokens", "4"];
        let output = lite().arg("generate").arg(&out).args(flags).output().unwrap();
        assert!(output.status.success(), "{scheme} {layout}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
