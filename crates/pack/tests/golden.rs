//! Both directions against tensors made by compressed-tensors' own compressor and by AutoAWQ's
//! published packing loop (`tests/generators/pack_golden.py`), and by an independent GPTQ packer
//! (`tests/generators/gptq_golden.py`), and configs that their readers accept.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lite_pack::{ConfigFacts, TensorRef, detect, layout};
use lite_quant::{GroupSize, LinearScheme, QuantizedLinear, ScaleDtype, Scheme, Weights};
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
    written_and_read("golden.safetensors", 24);
    written_and_read("gptq.safetensors", 12);
}

fn written_and_read(name: &str, count: usize) {
    let bytes = fixture(name);
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut cases: Vec<String> =
        file.names().iter().filter_map(|name| name.strip_suffix("/codes").map(str::to_owned)).collect();
    cases.sort();
    assert_eq!(cases.len(), count, "the fixture is complete");
    for case in cases {
        let parts: Vec<&str> = case.split('/').collect();
        let [name, bits, group, kind] = parts[..] else { panic!("{case}") };
        let layout = layout(name).unwrap();
        let get = |suffix: &str| {
            // The given `scales` are f32; the packed tensor of AWQ and GPTQ has the same name.
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

        let packed = layout.pack(&weight.clone().into(), None, None).unwrap();
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
        let back = layout.unpack(&scheme.into(), weight.out_features, weight.in_features, &lookup).unwrap();
        assert_eq!(back, Weights::Int(weight).into(), "{case}");
    }
}

fn facts(bits: i64, group: i64, symmetric: bool, ignored: &[&str], lm_head: Option<&str>) -> ConfigFacts {
    ConfigFacts {
        ignored: ignored.iter().map(|&name| name.to_owned()).collect(),
        lm_head: lm_head.map(str::to_owned),
        ..ConfigFacts::new(scheme(bits, group, symmetric).into())
    }
}

fn scheme(bits: i64, group: i64, symmetric: bool) -> Scheme {
    Scheme::new(bits, group, symmetric, ScaleDtype::F16).unwrap()
}

fn with_overrides(facts: ConfigFacts, overrides: &[(&str, Scheme)]) -> ConfigFacts {
    ConfigFacts {
        overrides: overrides.iter().map(|(name, scheme)| ((*name).to_owned(), (*scheme).into())).collect(),
        ..facts
    }
}

/// `pack_golden.py` and `gptq_golden.py` have the readers parse the same files.
#[test]
fn configs_are_the_ones_their_readers_accept() {
    let plain = ["lm_head", "model.layers.1.mlp.gate"];
    let wide = scheme(8, 128, true);
    let gptq_mixed = with_overrides(
        facts(4, 128, true, &plain, None),
        &[
            ("model.layers.0.mlp.down_proj", wide),
            ("model.layers.1.self_attn.q_proj", wide),
            ("model.layers.1.self_attn.k_proj", wide),
            ("model.layers.1.self_attn.v_proj", wide),
            ("model.layers.2.mlp.experts.0.gate_proj", scheme(4, 32, true)),
            ("model.layers.2.mlp.experts.0.up_proj", scheme(4, 32, true)),
            ("model.layers.2.mlp.experts.0.down_proj", scheme(4, 32, true)),
        ],
    );
    let ct_mixed = with_overrides(
        ConfigFacts { act_order: true, ..facts(4, 128, true, &plain, None) },
        &[
            ("model.layers.0.mlp.down_proj", wide),
            ("model.layers.1.self_attn.o_proj", scheme(4, -1, false)),
            ("model.layers.1.mlp.down_proj", wide),
        ],
    );
    let cases = [
        ("compressed-tensors", "w4_g128_asym", facts(4, 128, false, &["lm_head", "model.layers.0.mlp.gate"], None)),
        ("compressed-tensors", "w8_channel_sym", facts(8, -1, true, &["lm_head"], None)),
        ("compressed-tensors", "w3_g64_sym_head", facts(3, 64, true, &[], Some("lm_head"))),
        ("compressed-tensors", "w4_g128_sym_mixed", ct_mixed),
        ("awq", "g128", facts(4, 128, false, &["lm_head"], None)),
        ("awq", "g64_head", facts(4, 64, false, &[], Some("lm_head"))),
        ("gptq", "w4_g128_sym", facts(4, 128, true, &["lm_head"], None)),
        ("gptq", "w3_channel_asym_head", facts(3, -1, false, &[], Some("lm_head"))),
        ("gptq", "w4_g128_sym_mixed", gptq_mixed),
    ];
    let fixtures = ["ct_config.json", "awq_config.json", "gptq_config.json"].map(config_fixture);
    assert_eq!(fixtures.iter().map(BTreeMap::len).sum::<usize>(), cases.len());
    for (name, key, facts) in cases {
        let wanted = &fixtures[["compressed-tensors", "awq", "gptq"].iter().position(|known| *known == name).unwrap()];
        let layout = layout(name).unwrap();
        let written = layout.quantization_config(&facts).unwrap();
        // As text, so that the order of keys is held too.
        assert_eq!(
            serde_json::to_string_pretty(&written).unwrap(),
            serde_json::to_string_pretty(&wanted[key]).unwrap(),
            "{name} {key}"
        );
        let side = layout.side_files(&facts).unwrap();
        match name {
            "gptq" => assert_eq!(side, [("quantize_config.json", written.clone())]),
            _ => assert_eq!(side, []),
        }
        // What is outside the blocks is not mentioned in `dynamic`.
        let told = |module: &&String| name != "gptq" || module.contains(".layers.");
        let ignored: Vec<String> = facts.ignored.iter().filter(told).cloned().collect();

        for config in
            [json!({ "quantization_config": written }), json!({ "text_config": { "quantization_config": written } })]
        {
            let Value::Object(config) = config else { unreachable!() };
            let (found, parsed) = detect(&config).unwrap().unwrap();
            assert_eq!(found.name(), name);
            assert_eq!((parsed.scheme, &parsed.ignored), (facts.scheme, &ignored), "{key}");
            let sorted = |overrides: &[(String, LinearScheme)]| overrides.iter().cloned().collect::<BTreeMap<_, _>>();
            assert_eq!(sorted(&parsed.overrides), sorted(&facts.overrides), "{key}");
            for (module, scheme) in &facts.overrides {
                assert_eq!(parsed.scheme_of(module), scheme);
            }
            assert_eq!(*parsed.scheme_of("model.layers.3.mlp.up_proj"), facts.scheme);
        }
    }
}

#[test]
fn overrides_that_a_layout_cannot_hold_are_named() {
    let name = "model.layers.0.mlp.down_proj";
    let mixed = |common: Scheme, other| with_overrides(ConfigFacts::new(common.into()), &[(name, other)]);
    let refused = |layout_name: &str, facts: &ConfigFacts| {
        let error = layout(layout_name).unwrap().quantization_config(facts).unwrap_err();
        assert_eq!(error.kind().exit_code(), 4);
        assert!(error.to_string().contains(name), "{error}");
    };
    refused("awq", &mixed(scheme(4, 128, false), scheme(4, 64, false)));
    let both = mixed(scheme(4, 128, true), scheme(4, 128, false));
    refused("gptq", &both);
    assert!(layout("gptq").unwrap().side_files(&both).is_err());
    // The same scheme, or one that differs in what no config tells, is no override.
    let same = Scheme { scale_dtype: ScaleDtype::BF16, ..scheme(4, 128, false) };
    for layout in ["awq", "compressed-tensors", "gptq"].map(|name| layout(name).unwrap()) {
        let facts = mixed(scheme(4, 128, false), same);
        let alone = ConfigFacts::new(facts.scheme);
        assert_eq!(layout.quantization_config(&facts).unwrap(), layout.quantization_config(&alone).unwrap());
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
        let mut config =
            layout("compressed-tensors").unwrap().quantization_config(&facts(4, 128, false, &[], None)).unwrap();
        for (pointer, value) in changes {
            *config.pointer_mut(pointer).unwrap() = value.clone();
        }
        config
    };
    let gptq = |changes: &[(&str, Value)]| {
        let mut config = layout("gptq").unwrap().quantization_config(&facts(4, 128, true, &[], None)).unwrap();
        changes.iter().for_each(|(key, value)| config[*key] = value.clone());
        config
    };
    let two_groups = |targets: Value| {
        let mut config = ct(&[]);
        config["config_groups"]["group_1"] = config["config_groups"]["group_0"].clone();
        config["config_groups"]["group_1"]["targets"] = targets;
        config
    };
    let group = "/config_groups/group_0";
    let weights = |key: &str| format!("{group}/weights/{key}");
    let cases: Vec<(Value, i32, &str)> = vec![
        (json!({ "quant_method": "hqq", "bits": 4 }), 4, "hqq"),
        (gptq(&[("bits", json!(5))]), 4, "bits"),
        (gptq(&[("bits", json!("4"))]), 3, "bits"),
        (gptq(&[("group_size", json!(null))]), 3, "group_size"),
        (gptq(&[("group_size", json!(100))]), 4, "group size 100"),
        (gptq(&[("sym", json!(1))]), 3, "sym"),
        (gptq(&[("checkpoint_format", json!("marlin"))]), 4, "checkpoint_format"),
        (gptq(&[("pack_dtype", json!("int64"))]), 4, "pack_dtype"),
        (gptq(&[("dynamic", json!([]))]), 3, "dynamic"),
        (gptq(&[("dynamic", json!({ "+:.*down.*": { "bits": 8 } }))]), 4, "dynamic.+:.*down.*"),
        (gptq(&[("dynamic", json!({ "^a$": 8 }))]), 3, "dynamic.^a$"),
        (gptq(&[("dynamic", json!({ "+:^a$": { "bits": 5 } }))]), 4, "dynamic.+:^a$.bits"),
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
        (ct(&[(&format!("{group}/format"), json!("nvfp4-pack-quantized"))]), 4, "config_groups.group_0.format"),
        (ct(&[(&format!("{group}/format"), json!(null)), ("/format", json!("dense"))]), 4, "`format`"),
        (ct(&[(&format!("{group}/input_activations"), json!({ "num_bits": 3 }))]), 4, "input_activations"),
        (ct(&[(&weights("type"), json!("float"))]), 4, "symmetric"),
        (ct(&[(&weights("actorder"), json!("group"))]), 4, "actorder"),
        (ct(&[(&weights("strategy"), json!("block"))]), 4, "strategy"),
        (ct(&[(&weights("group_size"), json!(-5))]), 3, "group_size"),
        (ct(&[(&weights("num_bits"), json!(16))]), 4, "16 bits"),
        (ct(&[(&weights("dynamic"), json!("yes"))]), 3, "dynamic"),
        (ct(&[("/ignore", json!([1]))]), 3, "ignore"),
        (two_groups(json!(["re:.*down_proj"])), 4, "config_groups.group_1.targets"),
        (two_groups(json!(["Linear"])), 4, "config_groups.group_1.targets"),
        (two_groups(json!([1])), 3, "config_groups.group_1.targets"),
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
        gptq(&[("desc_act", json!(true)), ("dynamic", json!({ "-:.*gate.*": {}, "^a$": { "sym": true } }))]),
        gptq(&[("checkpoint_format", json!(null)), ("format", json!("gptq_v2")), ("dynamic", json!(null))]),
        two_groups(json!(["model.layers.0.mlp.down_proj"])),
        json!({ "quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": true, "version": "GEMM" }),
    ];
    for config in lenient {
        assert!(detect(&map(json!({ "quantization_config": config }))).unwrap().is_some());
    }
}
