//! Headers written by hand.

use lite_model::{CheckpointWriter, OutputTensor};
use proptest::prelude::*;

use super::*;

fn write(dir: &Path, config: &str, tensors: &[(&str, Dtype, &[usize])]) {
    let specs: Vec<OutputTensor> = tensors
        .iter()
        .map(|(name, dtype, shape)| OutputTensor { name: (*name).to_owned(), dtype: *dtype, shape: shape.to_vec() })
        .collect();
    let writer = CheckpointWriter::create(dir, specs.clone(), u64::MAX).unwrap();
    for spec in &specs {
        let data = match spec.name.ends_with("weight_shape") {
            true => [24u64, 40].iter().flat_map(|dim| dim.to_le_bytes()).collect(),
            false => vec![0; spec.bytes() as usize],
        };
        writer.write(&spec.name, &data).unwrap();
    }
    writer.finish().unwrap();
    std::fs::write(dir.join("config.json"), config).unwrap();
}

fn of(config: &str, tensors: &[(&str, Dtype, &[usize])]) -> Inspection {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), config, tensors);
    inspect(dir.path()).unwrap()
}

#[test]
fn plain_checkpoints_are_counted() {
    let found = of(
        r#"{"architectures": ["NobodyKnows"], "model_type": "x", "tie_word_embeddings": true}"#,
        &[("model.layers.0.mlp.up_proj.weight", Dtype::BF16, &[4, 8]), ("model.norm.weight", Dtype::F32, &[8])],
    );
    assert_eq!((found.architecture.as_deref(), found.layout, found.tied_head), (Some("NobodyKnows"), None, Some(true)));
    assert_eq!((found.parameters, found.bytes, found.shards), (40, 96, 1));
    assert!((found.bits_per_weight - 96.0 * 8.0 / 40.0).abs() < 1e-12);
    assert!(found.quantized_bits_per_weight.is_none() && found.linears.is_empty() && found.warnings.is_empty());
}

/// Shapes as the tools write them, for a weight [24, 40] (and [32, 64] where words must be full).
#[test]
fn every_way_of_storing_is_recognised() {
    type Headers = Vec<(&'static str, Dtype, &'static [usize])>;
    type Case = (Headers, Storage, [usize; 2], u8, Option<i64>, &'static str);
    let cases: Vec<Case> = vec![
        (
            vec![
                ("m.qweight", Dtype::I32, &[40, 3]),
                ("m.scales", Dtype::F16, &[5, 24]),
                ("m.qzeros", Dtype::I32, &[5, 3]),
            ],
            Storage::Awq,
            [24, 40],
            4,
            Some(8),
            "int4 group 8",
        ),
        (
            vec![
                ("m.qweight", Dtype::I32, &[6, 32]),
                ("m.scales", Dtype::F16, &[1, 32]),
                ("m.qzeros", Dtype::I32, &[1, 3]),
                ("m.g_idx", Dtype::I32, &[64]),
            ],
            Storage::Gptq,
            [32, 64],
            3,
            Some(-1),
            "int3 per channel",
        ),
        (
            vec![
                ("m.weight_packed", Dtype::I32, &[24, 5]),
                ("m.weight_scale", Dtype::BF16, &[24, 5]),
                ("m.weight_shape", Dtype::I64, &[2]),
            ],
            Storage::PackedInt,
            [24, 40],
            4,
            Some(8),
            "int4 group 8 symmetric",
        ),
        (
            vec![
                ("m.weight_packed", Dtype::U8, &[32, 32]),
                ("m.weight_scale", Dtype::F8_E4M3, &[32, 4]),
                ("m.weight_global_scale", Dtype::F32, &[1]),
            ],
            Storage::PackedFp4,
            [32, 64],
            4,
            Some(16),
            "fp4 e2m1 group 16",
        ),
        (
            vec![("m.weight", Dtype::I8, &[24, 40]), ("m.scale", Dtype::F32, &[24, 1])],
            Storage::Int8,
            [24, 40],
            8,
            Some(-1),
            "int8 per channel symmetric",
        ),
        (
            vec![("m.weight", Dtype::F8_E4M3, &[300, 129]), ("m.weight_scale_inv", Dtype::F32, &[3, 2])],
            Storage::Fp8,
            [300, 129],
            8,
            None,
            "fp8 e4m3 block 128×128",
        ),
        (
            vec![("m.weight", Dtype::F8_E5M2, &[24, 40]), ("m.weight_scale", Dtype::F32, &[])],
            Storage::Fp8,
            [24, 40],
            8,
            None,
            "fp8 e5m2, one scale",
        ),
    ];
    for (tensors, storage, shape, bits, group_size, scheme) in cases {
        let found = of("{}", &tensors);
        let [linear] = found.linears.as_slice() else { panic!("{tensors:?}: {:?}", found.linears) };
        assert_eq!((linear.storage, linear.shape, linear.bits, linear.group_size), (storage, shape, bits, group_size));
        assert_eq!(linear.scheme, scheme);
        assert_eq!(linear.bytes, found.bytes, "{scheme}: every tensor belongs to it");
        assert_eq!(found.parameters, (shape[0] * shape[1]) as u64);
        assert!(found.warnings.iter().any(|warning| warning.contains("declares no quantization")));
    }
}

#[test]
fn what_does_not_fit_together_is_said() {
    let config = r#"{"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": -1, "zero_point": true,
        "modules_to_not_convert": ["lm_head", "mlp.gate"]}}"#;
    let none = of(config, &[("model.layers.0.q.weight", Dtype::F16, &[8, 8])]);
    assert!(none.warnings[0].contains("no linear is stored quantized"), "{:?}", none.warnings);
    let tensors: [(&str, Dtype, &[usize]); 7] = [
        ("model.layers.0.q.qweight", Dtype::I32, &[8, 1]),
        ("model.layers.0.q.scales", Dtype::F16, &[1, 8]),
        ("model.layers.0.q.qzeros", Dtype::I32, &[1, 1]),
        ("model.layers.0.q.weight", Dtype::F16, &[8, 8]),
        ("model.layers.0.k.weight", Dtype::F16, &[8, 8]),
        ("model.layers.0.mlp.gate.weight", Dtype::F16, &[8, 8]),
        ("model.layers.0.v.qweight", Dtype::I32, &[8, 1]),
    ];
    let found = of(config, &tensors);
    assert_eq!((found.layout.as_deref(), found.ignored.len()), (Some("awq"), 2));
    let said = |words: &[&str]| found.warnings.iter().any(|w| words.iter().all(|word| w.contains(word)));
    assert!(said(&["float weight", "layers.0.q`"]), "{:?}", found.warnings);
    assert!(said(&["not understood", "layers.0.v.qweight"]), "{:?}", found.warnings);
    assert!(said(&["stored plain", "layers.0.k`"]) && !said(&["mlp.gate"]), "{:?}", found.warnings);
}

#[test]
fn ignore_lists_of_every_tool_are_understood() {
    let cover = |rule: &str, module: &str| Ignored::new(&[rule.to_owned()]).holds(module);
    for (rule, module) in [
        ("lm_head", "lm_head"),
        ("re:.*lm_head", "lm_head"),
        ("visual", "model.visual.blocks.0.attn"),
        ("mlp.gate", "model.layers.3.mlp.gate"),
        ("*router*", "model.layers.1.router.proj"),
        (r"^model\.layers\.0\.x$", "model.layers.0.x"),
    ] {
        assert!(cover(rule, module), "{rule} {module}");
    }
    for (rule, module) in [("mlp.gate", "model.layers.3.mlp.gate_proj"), ("re:[", "x"), ("", "x"), ("re:b", "ab")] {
        assert!(!cover(rule, module), "{rule} {module}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Any shapes under any of the known names: a result, never a panic.
    #[test]
    fn no_header_is_a_panic(
        parts in prop::collection::btree_map(
            prop::sample::select(PARTS.to_vec()),
            (prop::collection::vec(0usize..9, 0..4), 0usize..6),
            1..5,
        ),
    ) {
        const DTYPES: [Dtype; 6] = [Dtype::I32, Dtype::F16, Dtype::U8, Dtype::I8, Dtype::F8_E4M3, Dtype::I64];
        let names: Vec<String> = parts.keys().map(|part| format!("model.layers.0.m.{part}")).collect();
        let tensors: Vec<(&str, Dtype, &[usize])> = names
            .iter()
            .zip(parts.values())
            .filter(|(name, _)| !name.ends_with("weight_shape"))
            .map(|(name, (shape, dtype))| (name.as_str(), DTYPES[*dtype], shape.as_slice()))
            .collect();
        let found = of(r#"{"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": true}}"#, &tensors);
        prop_assert!(found.linears.len() <= tensors.len());
    }
}

const PARTS: [&str; 9] =
    ["qweight", "qzeros", "scales", "g_idx", "weight", "weight_packed", "weight_scale", "weight_scale_inv", "scale"];
