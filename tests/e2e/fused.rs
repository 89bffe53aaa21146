//! Experts that a checkpoint stores in one tensor per layer: the result is that of the same experts stored one by one.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;
use tempfile::TempDir;

use super::families::{EIGHT_BITS, ok, write_tokenizer};
use super::mixtures::CALIBRATION;
use super::support::*;

const DATA_FREE: [&str; 6] = ["--calib-samples", "0", "--w-group-size", "16", "--layout", "compressed-tensors"];

/// How gate and up, and the two axes of a matrix, lie in a tensor of all experts.
#[derive(Debug, Clone, Copy)]
enum Layout {
    /// `[E, 2I, H]` and `[E, H, I]`.
    Rows,
    /// `[E, H, 2I]` and `[E, I, H]`.
    Columns,
}

/// A family with experts, stored one by one.
fn mixture() -> TempDir {
    let copy = copy_of(&root().join("tests/fixtures/families/qwen3-moe"));
    std::fs::remove_file(copy.path().join("expected.safetensors")).unwrap();
    let vocab = config(copy.path())["vocab_size"].as_u64().unwrap() as usize;
    write_tokenizer(copy.path(), vocab);
    let all = tensors(copy.path());
    write_tensors(copy.path(), &all, &[("format", "pt")]);
    copy
}

/// A matrix of two-byte elements with its axes exchanged.
fn transposed(raw: &Raw) -> Vec<u8> {
    let (n, k) = (raw.shape[0], raw.shape[1]);
    (0..n * k).flat_map(|at| raw.data[2 * (at % n * k + at / n)..][..2].to_vec()).collect()
}

/// The same tensors with all experts of a layer in one, the first `experts` of them.
fn fused(all: &BTreeMap<String, Raw>, layout: Layout, experts: usize) -> BTreeMap<String, Raw> {
    let mut out: BTreeMap<String, Raw> =
        all.iter().filter(|(name, _)| !name.contains(".experts.")).map(|(n, raw)| (n.clone(), raw.clone())).collect();
    let modules: Vec<&str> = all.keys().filter_map(|name| name.strip_suffix(".experts.0.down_proj.weight")).collect();
    assert!(!modules.is_empty());
    for module in modules {
        let part = |e: usize, name: &str| &all[&format!("{module}.experts.{e}.{name}.weight")];
        let [h, i] = part(0, "down_proj").shape[..] else { panic!() };
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        for e in 0..experts {
            let (gate, up, own) = (part(e, "gate_proj"), part(e, "up_proj"), part(e, "down_proj"));
            let both = Raw { shape: vec![2 * i, h], data: [&gate.data[..], &up.data].concat(), ..gate.clone() };
            match layout {
                Layout::Rows => {
                    gate_up.extend_from_slice(&both.data);
                    down.extend_from_slice(&own.data);
                }
                Layout::Columns => {
                    gate_up.extend(transposed(&both));
                    down.extend(transposed(own));
                }
            }
        }
        let (up, of_down) = match layout {
            Layout::Rows => ([experts, 2 * i, h], [experts, h, i]),
            Layout::Columns => ([experts, h, 2 * i], [experts, i, h]),
        };
        for (name, shape, data) in [("gate_up_proj", up, gate_up), ("down_proj", of_down, down)] {
            let raw = Raw { dtype: Dtype::BF16, shape: shape.to_vec(), data };
            out.insert(format!("{module}.experts.{name}"), raw);
        }
    }
    out
}

/// Weights and config of a result, byte for byte.
fn result(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = files(dir);
    all.retain(|name, _| name.ends_with(".safetensors") || name == "config.json");
    assert!(all.len() >= 2);
    all
}

#[test]
fn the_bytes_are_those_of_experts_stored_one_by_one() {
    let single = mixture();
    let all = tensors(single.path());
    let experts = config(single.path())["num_experts"].as_u64().unwrap() as usize;
    let dir = tempfile::tempdir().unwrap();
    let calibrated = [&CALIBRATION[..], &EIGHT_BITS, &["--eval-samples", "2"]].concat();
    let ways: [(&str, &[&str]); 4] = [
        ("auto_gptq", &calibrated),
        ("auto_awq", &calibrated),
        ("auto_awq", &[&DATA_FREE[..], &["--eval-samples", "0"]].concat()),
        // Experts stay plain, and are copied one by one.
        ("auto_awq", &[&DATA_FREE[..], &["--ignore", "experts", "--eval-samples", "2"]].concat()),
    ];
    let run = |verb: &str, model: &Path, name: &str, flags: &[&str]| {
        let out = dir.path().join(name);
        let _ = std::fs::remove_dir_all(&out);
        ok(lite().arg(verb).arg(model).arg("--work-dir").arg(&out).args(flags));
        ok(lite().arg("verify").arg(&out).arg("--against").arg(model));
        // The original of the one is an original of the other.
        ok(lite().arg("verify").arg(&out).arg("--against").arg(single.path()));
        result(&out)
    };
    for (i, (verb, flags)) in ways.into_iter().enumerate() {
        let wanted = run(verb, single.path(), "single", flags);
        for layout in [Layout::Rows, Layout::Columns] {
            if i == 1 && matches!(layout, Layout::Columns) {
                // The wrapper that is published so runs this way in wrappers.rs.
                continue;
            }
            let model = copy_of(single.path());
            write_tensors(model.path(), &fused(&all, layout, experts), &[("format", "pt")]);
            assert!(tensors(model.path()).len() < all.len());
            let found = run(verb, model.path(), "fused", flags);
            assert_eq!(found.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>());
            for (name, bytes) in &found {
                assert!(*bytes == wanted[name], "{verb} {layout:?}: {name} differs");
            }
        }
    }
}

#[test]
fn a_plan_and_an_inspection_name_every_expert() {
    let single = mixture();
    let all = tensors(single.path());
    let model = copy_of(single.path());
    write_tensors(model.path(), &fused(&all, Layout::Columns, 8), &[("format", "pt")]);
    let plan = ok(lite().arg("plan").arg(model.path()).args(["--w-group-size", "16", "--format", "json"]));
    let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
    let mut named: Vec<&str> =
        plan["tensors"].as_array().unwrap().iter().map(|row| row["source"].as_str().unwrap()).collect();
    named.sort_unstable();
    assert_eq!(named, all.keys().map(String::as_str).collect::<Vec<_>>());
    assert!(plan["notes"].to_string().contains("written one by one"), "{}", plan["notes"]);
    let parameters = |dir: &Path| {
        let found = ok(lite().arg("inspect").arg(dir).args(["--format", "json"]));
        serde_json::from_str::<serde_json::Value>(&found).unwrap()["parameters"].clone()
    };
    assert_eq!(parameters(model.path()), parameters(single.path()));
}

/// Fewer and more experts than config.json says.
#[test]
fn another_number_of_experts_is_named() {
    let single = mixture();
    let all = tensors(single.path());
    let model = copy_of(single.path());
    let dir = tempfile::tempdir().unwrap();
    let refused = |words: &[&str]| {
        let out = dir.path().join("out");
        let output = lite().arg("auto_awq").arg(model.path()).arg("--work-dir").arg(&out).args(CALIBRATION).output();
        let output = output.unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{stderr}");
        assert!(words.iter().all(|word| stderr.contains(word)), "{stderr}");
    };
    write_tensors(model.path(), &fused(&all, Layout::Columns, 7), &[]);
    refused(&["`model.layers.0.mlp.experts.7.gate_proj.weight`"]);
    // The router says the same as config.json; one expert more in every layer.
    let mut more = all.clone();
    for (name, raw) in all.iter().filter(|(name, _)| name.contains(".experts.7.")) {
        more.insert(name.replace(".experts.7.", ".experts.8."), raw.clone());
    }
    write_tensors(model.path(), &fused(&more, Layout::Rows, 9), &[]);
    refused(&["`model.layers.0.mlp.experts.8.gate_proj.weight`", "8 experts", "num_experts"]);
}

/// gpt-oss as published: quantizing its MXFP4 codes is quantizing the values that transformers reads from them.
#[test]
fn codes_of_gpt_oss_are_read_as_values() {
    let coded = copy_of(&root().join("tests/fixtures/fused/gpt-oss-mxfp4"));
    let bytes = std::fs::read(coded.path().join("values.safetensors")).unwrap();
    std::fs::remove_file(coded.path().join("values.safetensors")).unwrap();
    let plain = copy_of(coded.path());
    let mut all = tensors(coded.path());
    all.retain(|name, _| !name.contains(".experts."));
    for (name, view) in safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors() {
        all.insert(name, Raw { dtype: view.dtype(), shape: view.shape().to_vec(), data: view.data().to_vec() });
    }
    write_tensors(plain.path(), &all, &[("format", "pt")]);
    let mut keys = config(plain.path());
    keys.as_object_mut().unwrap().remove("quantization_config").unwrap();
    std::fs::write(plain.path().join("config.json"), keys.to_string()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let run = |model: &Path, name: &str, flags: &[&str]| {
        let out = dir.path().join(name);
        let _ = std::fs::remove_dir_all(&out);
        let mut command = lite();
        command.arg("auto_awq").arg(model).arg("--work-dir").arg(&out).args(DATA_FREE).args(["--eval-samples", "0"]);
        let output = command.args(flags).output().unwrap();
        let story = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{story}");
        (tensors(&out), config(&out), story)
    };
    for flags in [&[][..], &["--ignore", "down_proj"]] {
        let (found, keys, story) = run(coded.path(), "codes", flags);
        let (wanted, other, _) = run(plain.path(), "values", flags);
        assert!(story.contains("MXFP4 codes") && story.contains("written one by one"), "{story}");
        assert_eq!(found.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>());
        for (name, raw) in &found {
            assert!(*raw == wanted[name], "{flags:?}: `{name}` differs");
        }
        assert!(found.contains_key("model.layers.1.mlp.experts.2.down_proj.bias"));
        assert_eq!(keys["quantization_config"], other["quantization_config"]);
        assert_eq!(keys["quantization_config"]["quant_method"], "compressed-tensors");
    }
    // Under another name of the method they are codes of nobody.
    let mut keys = config(coded.path());
    keys["quantization_config"]["quant_method"] = "nvfp4".into();
    std::fs::write(coded.path().join("config.json"), keys.to_string()).unwrap();
    let mut command = lite();
    command.arg("auto_awq").arg(coded.path()).arg("--work-dir").arg(dir.path().join("no")).args(DATA_FREE);
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{stderr}");
    assert!(stderr.contains("already quantized"), "{stderr}");
}

/// The codes as plain floats, bit by bit what transformers makes of them.
#[test]
fn codes_of_gpt_oss_convert_to_floats() {
    let coded = copy_of(&root().join("tests/fixtures/fused/gpt-oss-mxfp4"));
    let bytes = std::fs::read(coded.path().join("values.safetensors")).unwrap();
    std::fs::remove_file(coded.path().join("values.safetensors")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("plain");
    let story = ok(lite().arg("convert").arg(coded.path()).args(["--layout", "plain", "--work-dir"]).arg(&out));
    let found = tensors(&out);
    for (name, view) in safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors() {
        assert!(found[&name].data == view.data() && found[&name].shape == view.shape(), "{name}: {story}");
        assert_eq!(found[&name].dtype, Dtype::BF16);
    }
    assert!(found.keys().all(|name| !name.ends_with("_scale") && !name.ends_with("_blocks")));
    assert_eq!(config(&out).get("quantization_config"), None);
}
