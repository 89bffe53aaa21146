//! Both directions against tensors made by compressed-tensors' own compressor and by AutoAWQ's
//! published packing loop (`tests/generators/pack_golden.py`), and configs that their readers accept.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lite_pack::{ConfigFacts, TensorRef, detect, layout};
use lite_quant::{GroupSize, QuantizedLinear, ScaleDtype, Scheme};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

fn fixture(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/pack").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn config_fixture(name: &str) -> BTreeMap<String, Value> {
    serde_json::from_slice(&fixture(name)).unwrap()
}

#[test]
fn foreign_tensors_are_written_and_read() {
    let bytes = fixture("golden.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut cases: Vec<String> =
        file.names().iter().filter_map(|name| name.strip_suffix("/codes").map(str::to_owned)).collect();
    cases.sort();
    assert_eq!(cases.len(), 24, "the fixture is complete");
    for case in cases {
        let parts: Vec<&str> = case.split('/').collect();
        let [name, bits, group, kind] = parts[..] else { panic!("{case}") };
        let layout = layout(name).unwrap();
        let get = |suffix: &str| {
            // The given `scales` are f32; AWQ's packed tensor has the same name.
            let stored = if suffix == "scales" { "scales_packed" } else { suffix };
            file.tensor(&format!("{case}/{stored}")).ok()
        };
        let given = |suffix: &str| file.tensor(&format!("{case}/{suffix}")).unwrap();
        let (codes, zeros) = (given("codes"), given("zeros"));
        let packed_scales = get("weight_scale").or_else(|| get("scales")).unwrap().dtype();
        let scheme = Scheme {
            bits: bits.parse().unwrap(),
            group_size: if group == "-1" { GroupSize::Channel } else { GroupSize::Channels(group.parse().unwrap()) },
            symmetric: kind == "sym",
            scale_dtype: if packed_scales == Dtype::BF16 { ScaleDtype::BF16 } else { ScaleDtype::F16 },
        };
        let weight = QuantizedLinear {
            scheme,
            out_features: codes.shape()[0],
            in_features: codes.shape()[1],
            codes: codes.data().to_vec(),
            scales: given("scales").data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            zeros: zeros.data().to_vec(),
        };

        let packed = layout.pack(&weight).unwrap();
        for tensor in &packed {
            let wanted = get(tensor.suffix).unwrap_or_else(|| panic!("{case}: no {}", tensor.suffix));
            assert_eq!((tensor.dtype, &*tensor.shape), (wanted.dtype(), wanted.shape()), "{case} {}", tensor.suffix);
            assert_eq!(tensor.data, wanted.data(), "{case} {}", tensor.suffix);
        }
        let foreign = layout.suffixes().iter().filter(|suffix| get(suffix).is_some()).count();
        assert_eq!(packed.len(), foreign, "{case}: as many tensors as the library writes");

        let views: BTreeMap<&str, _> =
            layout.suffixes().iter().filter_map(|suffix| Some((*suffix, get(suffix)?))).collect();
        let lookup = |suffix: &str| {
            views.get(suffix).map(|view| TensorRef { dtype: view.dtype(), shape: view.shape(), data: view.data() })
        };
        let back = layout.unpack(&scheme, weight.out_features, weight.in_features, &lookup).unwrap();
        assert_eq!(back, weight, "{case}");
    }
}

fn facts(bits: i64, group: i64, symmetric: bool, ignored: &[&str], lm_head: Option<&str>) -> ConfigFacts {
    ConfigFacts {
        scheme: Scheme::new(bits, group, symmetric, ScaleDtype::F16).unwrap(),
        ignored: ignored.iter().map(|&name| name.to_owned()).collect(),
        lm_head: lm_head.map(str::to_owned),
    }
}

/// `pack_golden.py` has compressed-tensors and transformers parse the same files.
#[test]
fn configs_are_the_ones_their_readers_accept() {
    let cases = [
        ("compressed-tensors", "w4_g128_asym", facts(4, 128, false, &["lm_head", "model.layers.0.mlp.gate"], None)),
        ("compressed-tensors", "w8_channel_sym", facts(8, -1, true, &["lm_head"], None)),
        ("compressed-tensors", "w3_g64_sym_head", facts(3, 64, true, &[], Some("lm_head"))),
        ("awq", "g128", facts(4, 128, false, &["lm_head"], None)),
        ("awq", "g64_head", facts(4, 64, false, &[], Some("lm_head"))),
    ];
    let (ct, awq) = (config_fixture("ct_config.json"), config_fixture("awq_config.json"));
    assert_eq!(ct.len() + awq.len(), cases.len());
    for (name, key, facts) in cases {
        let wanted = &if name == "awq" { &awq } else { &ct }[key];
        let written = layout(name).unwrap().quantization_config(&facts);
        // As text, so that the order of keys is held too.
        assert_eq!(serde_json::to_string_pretty(&written).unwrap(), serde_json::to_string_pretty(wanted).unwrap());

        for config in
            [json!({ "quantization_config": written }), json!({ "text_config": { "quantization_config": written } })]
        {
            let Value::Object(config) = config else { unreachable!() };
            let (found, parsed) = detect(&config).unwrap().unwrap();
            assert_eq!(found.name(), name);
            assert_eq!((parsed.scheme, &parsed.ignored), (facts.scheme, &facts.ignored), "{key}");
        }
    }
}

#[test]
fn plain_and_foreign_configs_are_told_apart() {
    let map = |value: Value| match value {
        Value::Object(map) => map,
        _ => unreachable!(),
    };
    assert!(detect(&Map::new()).unwrap().is_none());
    assert!(detect(&map(json!({ "quantization_config": null }))).unwrap().is_none());
    let refused = |value: Value| match detect(&map(json!({ "quantization_config": value }))) {
        Err(error) => (error.kind().exit_code(), error.to_string()),
        Ok(_) => panic!("{value} was accepted"),
    };
    let ct = |changes: &[(&str, Value)]| {
        let mut config = layout("compressed-tensors").unwrap().quantization_config(&facts(4, 128, false, &[], None));
        for (pointer, value) in changes {
            *config.pointer_mut(pointer).unwrap() = value.clone();
        }
        config
    };
    let group = "/config_groups/group_0";
    let weights = |key: &str| format!("{group}/weights/{key}");
    let cases: Vec<(Value, i32, &str)> = vec![
        (json!({ "quant_method": "gptq", "bits": 4 }), 4, "gptq"),
        (json!({ "quant_method": 7 }), 3, "quant_method"),
        (json!({}), 3, "quant_method"),
        (json!("awq"), 3, "an object"),
        (json!({ "quant_method": "awq", "version": "gemv", "bits": 4 }), 4, "gemv"),
        (json!({ "quant_method": "awq", "bits": 8, "group_size": 128, "zero_point": true }), 4, "bits"),
        (json!({ "quant_method": "awq", "bits": 4, "zero_point": true }), 3, "group_size"),
        (json!({ "quant_method": "awq", "bits": 4, "group_size": 128 }), 3, "zero_point"),
        (json!({ "quant_method": "awq", "bits": 4, "group_size": 7, "zero_point": true }), 4, "group size 7"),
        (ct(&[("/quantization_status", json!("frozen"))]), 4, "quantization_status"),
        (ct(&[("/kv_cache_scheme", json!({ "num_bits": 8 }))]), 4, "kv_cache_scheme"),
        (ct(&[("/config_groups", json!({}))]), 4, "config_groups"),
        (ct(&[("/config_groups", json!([1]))]), 3, "config_groups"),
        (ct(&[(&format!("{group}/format"), json!("int-quantized"))]), 4, "config_groups.group_0.format"),
        (ct(&[(&format!("{group}/format"), json!(null)), ("/format", json!("dense"))]), 4, "`format`"),
        (ct(&[(&format!("{group}/input_activations"), json!({ "num_bits": 8 }))]), 4, "input_activations"),
        (ct(&[(&weights("type"), json!("float"))]), 4, "type"),
        (ct(&[(&weights("actorder"), json!("group"))]), 4, "actorder"),
        (ct(&[(&weights("strategy"), json!("block"))]), 4, "strategy"),
        (ct(&[(&weights("group_size"), json!(-5))]), 3, "group_size"),
        (ct(&[(&weights("num_bits"), json!(16))]), 4, "16 bits"),
        (ct(&[(&weights("dynamic"), json!("yes"))]), 3, "dynamic"),
        (ct(&[("/ignore", json!([1]))]), 3, "ignore"),
    ];
    for (config, code, part) in cases {
        let (found, message) = refused(config.clone());
        assert!(message.contains(part), "{config}: {message}");
        assert_eq!(found, code, "{message}");
    }
    // What other writers leave out or spell otherwise.
    let lenient = [
        ct(&[(&weights("actorder"), json!("static"))]),
        ct(&[(&format!("{group}/format"), json!(null))]),
        json!({ "quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": true, "version": "GEMM" }),
    ];
    for config in lenient {
        assert!(detect(&map(json!({ "quantization_config": config }))).unwrap().is_some());
    }
}
