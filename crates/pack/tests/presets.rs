//! Every preset of llm-compressor: the same bytes and the same config as compressed-tensors makes of one awkward
//! weight (`tests/generators/small_floats.py`), and back.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lite_pack::{ConfigFacts, KvCacheScheme, PackedTensor, TensorRef, detect, layout, preset};
use lite_quant::floats::{FloatRange, FloatScheme, Grain, ScaleKind, nvfp4_global, quantize_float};
use lite_quant::{
    ActivationScale, InputQuantization, LinearScheme, Range, RangeContext, ScaleDtype, WeightScheme, Weights,
    quantize_nearest,
};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

fn fixture(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/pack").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn scheme(name: &str) -> LinearScheme {
    let scheme = preset(name.trim_end_matches("_8x48"), ScaleDtype::F32).unwrap();
    match scheme.weights {
        WeightScheme::Float(weights) if name.ends_with("_8x48") => {
            let weights = FloatScheme { grain: Grain::Block { rows: 8, columns: 48 }, ..weights };
            LinearScheme { weights: weights.into(), ..scheme }
        }
        _ => scheme,
    }
}

/// The weight, quantized here.
fn quantized(scheme: &LinearScheme, weight: &[f32], n: usize, k: usize) -> Weights {
    match &scheme.weights {
        WeightScheme::Int(int) => {
            let context = RangeContext { weight, out_features: n, in_features: k, gram: None };
            quantize_nearest(&context, int, Range::MinMax).unwrap().into()
        }
        WeightScheme::Float(float) => quantize_float(weight, n, k, float, FloatRange::MinMax, None).unwrap().into(),
    }
}

/// The scale of inputs up to 4, as the library finds it.
fn input(scheme: &LinearScheme) -> Option<InputQuantization> {
    let scale = match scheme.activations?.scale {
        ActivationScale::StaticTensor => 4.0 / 448.0,
        ActivationScale::StaticTensorLocal(_) => nvfp4_global(4.0) as f32,
        _ => return None,
    };
    Some(InputQuantization { scale, zero_point: 0 })
}

/// A zero row of integers has the scale 1 here and f32's epsilon in the library; both give zeros.
fn without_empty_scales(tensor: &PackedTensor) -> Vec<u8> {
    let words = tensor.data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    words.flat_map(|scale| if scale == f32::EPSILON { 1f32 } else { scale }.to_le_bytes()).collect()
}

#[test]
fn bytes_are_those_of_the_library_both_ways() {
    let bytes = fixture("presets.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor("weight").unwrap();
    let [n, k] = view.shape()[..] else { panic!() };
    let weight: Vec<f32> = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let layout = layout("compressed-tensors").unwrap();
    let mut by_preset = BTreeMap::<&str, Vec<PackedTensor>>::new();
    for name in file.names() {
        let Some((preset, suffix)) = name.split_once('/') else { continue };
        let suffix = layout.suffixes().iter().find(|known| **known == suffix).unwrap();
        let view = file.tensor(name).unwrap();
        by_preset.entry(preset).or_default().push(PackedTensor {
            suffix,
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            data: view.data().to_vec(),
        });
    }
    assert_eq!(by_preset.len(), 16, "the fixture is complete");
    for (name, theirs) in &mut by_preset {
        let scheme = scheme(name);
        theirs.sort_by_key(|tensor| tensor.suffix);
        let sorted = |mut tensors: Vec<PackedTensor>| {
            tensors.sort_by_key(|tensor| tensor.suffix);
            tensors
        };
        // What they wrote is read, and written again.
        let get = |suffix: &str| {
            let tensor = theirs.iter().find(|tensor| tensor.suffix == suffix)?;
            Some(TensorRef { dtype: tensor.dtype, shape: &tensor.shape, data: &tensor.data })
        };
        let read = layout.unpack(&scheme, n, k, &get).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(read.input, input(&scheme), "{name}");
        let again = layout.pack(&read.weights, scheme.activations.as_ref(), read.input.as_ref()).unwrap();
        assert!(sorted(again) == *theirs, "{name}");
        // What is quantized here is what they wrote. Asymmetric scales are divided in another order.
        if name.ends_with("ASYM") {
            continue;
        }
        if scheme.weights.int().is_some() {
            let scales = theirs.iter_mut().find(|tensor| tensor.suffix == "weight_scale").unwrap();
            scales.data = without_empty_scales(scales);
        }
        let ours = quantized(&scheme, &weight, n, k);
        let ours = sorted(layout.pack(&ours, scheme.activations.as_ref(), input(&scheme).as_ref()).unwrap());
        assert_eq!(ours.len(), theirs.len(), "{name}");
        for (ours, theirs) in ours.iter().zip(&*theirs) {
            let what = format!("{name} {}", theirs.suffix);
            assert_eq!((ours.suffix, ours.dtype, &ours.shape), (theirs.suffix, theirs.dtype, &theirs.shape), "{what}");
            let first = ours.data.iter().zip(&theirs.data).position(|(ours, theirs)| ours != theirs);
            assert_eq!(first, None, "{what}: first byte that differs");
        }
    }
}

#[test]
fn configs_are_those_of_the_library_both_ways() {
    let theirs: BTreeMap<String, Value> = serde_json::from_slice(&fixture("presets_config.json")).unwrap();
    assert_eq!(theirs.len(), 16);
    let layout = layout("compressed-tensors").unwrap();
    for (name, theirs) in theirs {
        let scheme = scheme(&name);
        let mut facts = ConfigFacts::new(scheme);
        facts.kv_cache = Some(if name.contains("NVFP4") { KvCacheScheme::Fp8Head } else { KvCacheScheme::Fp8Tensor });
        let ours = layout.quantization_config(&facts).unwrap();
        assert_eq!(
            serde_json::to_string_pretty(&ours["config_groups"]["group_0"]).unwrap(),
            serde_json::to_string_pretty(&theirs).unwrap(),
            "{name}"
        );
        assert_eq!(ours["format"], theirs["format"], "{name}");
        // What a newer release leaves out, and what an older one writes.
        let mut sparse = ours.clone();
        let group = &mut sparse["config_groups"]["group_0"];
        for args in ["weights", "input_activations"] {
            if let Some(args) = group[args].as_object_mut() {
                args.retain(|key, value| !value.is_null() && !["observer", "observer_kwargs"].contains(&&**key));
                if let Some(Value::Array(block)) = args.get("block_structure") {
                    args["block_structure"] = json!(format!("{}x{}", block[0], block[1]));
                }
            }
        }
        for config in [ours, sparse] {
            let config = json!({ "quantization_config": config });
            let (_, parsed) = detect(config.as_object().unwrap()).unwrap().unwrap();
            let found = match parsed.scheme.weights {
                WeightScheme::Int(int) => lite_quant::Scheme { scale_dtype: ScaleDtype::F32, ..int }.into(),
                WeightScheme::Float(FloatScheme { scale: ScaleKind::Float(_), format, grain }) => {
                    FloatScheme { format, grain, scale: ScaleKind::Float(ScaleDtype::F32) }.into()
                }
                other => other,
            };
            assert_eq!(LinearScheme { weights: found, ..parsed.scheme }, scheme, "{name}");
            assert_eq!(parsed.kv_cache, facts.kv_cache, "{name}");
        }
    }
}

#[test]
fn groups_of_several_formats_are_mixed_precision() {
    let mut facts = ConfigFacts::new(preset("NVFP4", ScaleDtype::BF16).unwrap());
    facts.overrides.push(("model.layers.0.mlp.down_proj".to_owned(), preset("FP8_DYNAMIC", ScaleDtype::BF16).unwrap()));
    let config = layout("compressed-tensors").unwrap().quantization_config(&facts).unwrap();
    assert_eq!(config["format"], "mixed-precision");
    assert_eq!(config["config_groups"]["group_1"]["format"], "float-quantized");
    let config = json!({ "quantization_config": config });
    let (_, parsed) = detect(config.as_object().unwrap()).unwrap().unwrap();
    assert_eq!(parsed.scheme, facts.scheme);
    assert_eq!(parsed.overrides.len(), 1);
    assert_eq!(parsed.scheme_of("model.layers.0.mlp.down_proj").activations, facts.overrides[0].1.activations);
}

/// An integer of a byte each under a packed scheme, as other tools write W8A16.
#[test]
fn packed_schemes_are_read_from_bytes_too() {
    let layout = layout("compressed-tensors").unwrap();
    let eight = preset("W8A8", ScaleDtype::F32).unwrap();
    let weights = quantized(&eight, &[0.5, -0.25, 1.0, -1.0], 2, 2);
    let packed = layout.pack(&weights, eight.activations.as_ref(), None).unwrap();
    let get = |suffix: &str| {
        let tensor = packed.iter().find(|tensor| tensor.suffix == suffix)?;
        Some(TensorRef { dtype: tensor.dtype, shape: &tensor.shape, data: &tensor.data })
    };
    assert_eq!(packed[0].dtype, Dtype::I8);
    let plain = LinearScheme { activations: None, ..eight };
    assert_eq!(layout.unpack(&plain, 2, 2, &get).unwrap().weights, weights);
}
