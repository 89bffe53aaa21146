//! Models whose weights are fp8 codes with block scales, as DeepSeek publishes them: quantizing one equals quantizing
//! what the codes stand for.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;
use tempfile::TempDir;

use super::support::*;

/// Rows and columns of a block; no size of the bundled model is a multiple of either.
const BLOCK: (usize, usize) = (96, 100);

/// The value of an e4m3 code, by the OCP table.
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match exponent {
        0 => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if code & 0x80 != 0 { -magnitude } else { magnitude }
}

/// Codes and block scales `[⌈N/rows⌉, ⌈K/columns⌉]` of a weight, and the values they stand for.
fn encode(weight: &[f32], n: usize, k: usize) -> (Vec<u8>, Vec<f32>, Vec<f32>) {
    let table: Vec<f32> = (0..127).map(e4m3).collect();
    let (rows, columns) = (n.div_ceil(BLOCK.0), k.div_ceil(BLOCK.1));
    let block = |at: usize| (at / k / BLOCK.0) * columns + (at % k) / BLOCK.1;
    let mut scales = vec![0f32; rows * columns];
    for (at, value) in weight.iter().enumerate() {
        let scale = &mut scales[block(at)];
        *scale = scale.max(value.abs() / 448.0);
    }
    let code = |at: usize| {
        let wanted = (weight[at] / scales[block(at)]).abs();
        let above = table.partition_point(|value| *value < wanted).min(126);
        let below = above.saturating_sub(1);
        let code = if wanted - table[below] < table[above] - wanted { below } else { above };
        code as u8 | if weight[at] < 0.0 { 0x80 } else { 0 }
    };
    let codes: Vec<u8> = (0..weight.len()).map(code).collect();
    let values = codes.iter().enumerate().map(|(at, code)| e4m3(*code) * scales[block(at)]).collect();
    (codes, scales, values)
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// The bundled model with fp8 linears, and with the values of these in f32.
fn fp8_and_f32() -> (TempDir, TempDir) {
    let (coded, plain) = (copy_of(&model()), copy_of(&model()));
    let (mut codes, mut floats) = (BTreeMap::new(), BTreeMap::new());
    for (name, raw) in tensors(&model()) {
        if !name.ends_with("_proj.weight") {
            codes.insert(name.clone(), raw.clone());
            floats.insert(name, raw);
            continue;
        }
        let (n, k) = (raw.shape[0], raw.shape[1]);
        let (own, scales, values) = encode(&raw.floats(), n, k);
        let grid = vec![n.div_ceil(BLOCK.0), k.div_ceil(BLOCK.1)];
        codes.insert(name.clone(), Raw { dtype: Dtype::F8_E4M3, shape: raw.shape.clone(), data: own });
        codes.insert(format!("{name}_scale_inv"), Raw { dtype: Dtype::F32, shape: grid, data: bytes(&scales) });
        floats.insert(name, Raw { dtype: Dtype::F32, shape: raw.shape, data: bytes(&values) });
    }
    write_tensors(coded.path(), &codes, &[("format", "pt")]);
    write_tensors(plain.path(), &floats, &[("format", "pt")]);
    let mut config = config(coded.path());
    config["quantization_config"] = serde_json::json!({"quant_method": "fp8", "fmt": "e4m3",
        "activation_scheme": "dynamic", "weight_block_size": [BLOCK.0, BLOCK.1]});
    write_config(coded.path(), &config);
    (coded, plain)
}

fn write_config(dir: &Path, config: &serde_json::Value) {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn quantizing_codes_equals_quantizing_their_values() {
    let (coded, plain) = fp8_and_f32();
    let out = tempfile::tempdir().unwrap();
    for (verb, flags) in [
        ("auto_awq", &["--dtype", "bfloat16"][..]),
        ("auto_gptq", &["--dtype", "bfloat16", "--layout", "compressed-tensors"]),
        ("auto_awq", &["--dtype", "bfloat16", "--ignore", "down_proj", "--layout", "compressed-tensors"]),
    ] {
        let run = |model: &Path, name: &str| {
            let target = out.path().join(name);
            let _ = std::fs::remove_dir_all(&target);
            let done =
                lite().arg(verb).arg(model).arg("--work-dir").arg(&target).args(QUICK).args(flags).output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            (target, String::from_utf8(done.stderr).unwrap())
        };
        let (from_codes, story) = run(coded.path(), "codes");
        let (from_values, _) = run(plain.path(), "values");
        assert!(story.contains("fp8 codes"), "{story}");
        // The order of tensors follows the source's, which sorts by dtype; their bytes are the same.
        let (found, wanted) = (tensors(&from_codes), tensors(&from_values));
        assert_eq!(found.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>());
        for (name, raw) in &found {
            assert!(*raw == wanted[name], "{verb} {flags:?}: `{name}` differs");
        }
        let (a, b) = (config(&from_codes), config(&from_values));
        assert_eq!(a["quantization_config"], b["quantization_config"]);
        assert_eq!(a["quantization_config"].get("weight_block_size"), None);
    }
}

#[test]
fn every_source_tensor_has_one_row_and_scales_are_dropped_by_a_rule() {
    let (coded, _) = fp8_and_f32();
    let output = lite().arg("plan").arg(coded.path()).args(["--format", "json"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = plan["tensors"].as_array().unwrap();
    let mut named: Vec<&str> = rows.iter().map(|row| row["source"].as_str().unwrap()).collect();
    named.sort_unstable();
    assert_eq!(named, tensors(coded.path()).keys().map(String::as_str).collect::<Vec<_>>());
    for row in rows.iter().filter(|row| row["source"].as_str().unwrap().ends_with("_scale_inv")) {
        assert!(row["action"].as_str().unwrap().starts_with("dropped: scales of fp8 codes"), "{row}");
        assert_eq!(row["outputs"], serde_json::json!([]));
    }
}

#[test]
fn a_missing_scale_and_integer_codes_are_refused() {
    let (coded, _) = fp8_and_f32();
    let mut raw = tensors(coded.path());
    let missing = "model.layers.3.mlp.up_proj.weight_scale_inv";
    let scale = raw.remove(missing).unwrap();
    write_tensors(coded.path(), &raw, &[]);
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("out");
    let refused = |code: i32, words: &[&str]| {
        let output = auto_awq(coded.path(), &target, &QUICK);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert!(words.iter().all(|word| stderr.contains(word)), "{stderr}");
        assert!(!target.exists());
    };
    refused(3, &["`model.layers.3.mlp.up_proj.weight`", missing]);
    raw.insert(missing.to_owned(), Raw { shape: vec![1, 1, 2], ..scale.clone() });
    raw.get_mut(missing).unwrap().data.truncate(8);
    write_tensors(coded.path(), &raw, &[]);
    refused(3, &[missing, "[1, 1, 2]"]);
    raw.insert(missing.to_owned(), scale);
    let packed = Raw { dtype: Dtype::I32, shape: vec![1], data: vec![0; 4] };
    raw.insert("model.layers.0.x.qweight".to_owned(), packed);
    write_tensors(coded.path(), &raw, &[]);
    refused(4, &["already quantized", "quant_method `fp8`"]);
}
