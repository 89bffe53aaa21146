//! Schemes beyond integers alone, in every layout that takes them: what is packed comes back, configs are read as they
//! were written, and nothing damaged gets through or brings the reader down.

use lite_pack::{
    ConfigFacts, ErrorKind, KvCacheScheme, Layout, PRESETS, PackError, PackedTensor, TensorRef, all, detect, layout,
    preset,
};
use lite_quant::floats::{FloatFormat, FloatLinear, FloatScheme, Grain, ScaleKind, e8m0};
use lite_quant::{
    ActivationFormat, ActivationScale, ActivationScheme, GroupSize, InputQuantization, LinearScheme, QuantizedLinear,
    ScaleDtype, Scheme, WeightScheme, Weights,
};
use proptest::prelude::*;
use safetensors::Dtype;
use serde_json::{Value, json};

/// Every preset that is not integer weights alone, and what only other layouts write.
fn schemes() -> Vec<LinearScheme> {
    let presets = PRESETS.iter().filter_map(|name| preset(name, ScaleDtype::F32));
    let mut schemes: Vec<LinearScheme> =
        presets.filter(|scheme| scheme.weights.int().is_none() || scheme.activations.is_some()).collect();
    let float =
        |format, grain| WeightScheme::Float(FloatScheme { format, grain, scale: ScaleKind::Float(ScaleDtype::F32) });
    let inputs = |format, scale| Some(ActivationScheme { format: ActivationFormat::Float(format), scale });
    let (e4m3, e5m2) = (FloatFormat::E4M3, FloatFormat::E5M2);
    let block = Grain::Block { rows: 128, columns: 128 };
    schemes.extend([
        LinearScheme { weights: float(e5m2, Grain::Channel), activations: inputs(e5m2, ActivationScale::DynamicToken) },
        LinearScheme { weights: float(e5m2, block), activations: inputs(e5m2, ActivationScale::DynamicGroup(128)) },
        LinearScheme { weights: float(e4m3, Grain::Tensor), activations: inputs(e4m3, ActivationScale::DynamicToken) },
        LinearScheme { weights: float(e4m3, block), activations: None },
        LinearScheme { weights: float(e4m3, Grain::Group(64)), activations: None },
    ]);
    let eight = |symmetric| Scheme { bits: 8, group_size: GroupSize::Channel, symmetric, scale_dtype: ScaleDtype::F32 };
    for symmetric in [true, false] {
        let format = ActivationFormat::Int { bits: 8, symmetric };
        schemes.push(LinearScheme {
            weights: eight(symmetric).into(),
            activations: Some(ActivationScheme { format, scale: ActivationScale::StaticTensor }),
        });
    }
    schemes
}

/// Random codes and scales of a scheme. `K` is 256, a whole number of groups and blocks of every one of them.
fn weights(scheme: &LinearScheme, n: usize, seed: u64) -> Weights {
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as u32
    };
    match scheme.weights {
        WeightScheme::Int(int) => {
            let params = n * int.groups(K).unwrap();
            QuantizedLinear {
                scheme: int,
                out_features: n,
                in_features: K,
                codes: (0..n * K).map(|_| next() as u8 & int.max_code()).collect(),
                scales: (0..params).map(|_| 1e-3 + next() as f32 * 1e-8).collect(),
                zeros: (0..params)
                    .map(|_| if int.symmetric { int.middle_code() } else { next() as u8 & int.max_code() })
                    .collect(),
            }
            .into()
        }
        WeightScheme::Float(float) => {
            let (rows, columns) = float.grain.grid(n, K).unwrap();
            let scale = |next: u32| match float.scale {
                ScaleKind::Float(dtype) => dtype.round(1e-3 + next as f32 * 1e-8),
                ScaleKind::E8M0 => e8m0::decode(next as u8 % 255),
                ScaleKind::E4M3WithGlobal => FloatFormat::E4M3.decode(next as u8 % 126 + 1),
            };
            let global = float.scale == ScaleKind::E4M3WithGlobal;
            FloatLinear {
                scheme: float,
                out_features: n,
                in_features: K,
                codes: (0..n * K).map(|_| float.format.encode(next() as f32 / 1e4 - 800.0)).collect(),
                scales: (0..rows * columns).map(|_| scale(next())).collect(),
                // A power of two and its reciprocal are both exact.
                global_scale: if global { 2f64.powi(next() as i32 % 20 - 10) } else { 1.0 },
            }
            .into()
        }
    }
}

const K: usize = 256;

fn input(scheme: &LinearScheme, zero_point: i32) -> Option<InputQuantization> {
    let inputs = scheme.activations?;
    let zero_point =
        if matches!(inputs.format, ActivationFormat::Int { symmetric: false, .. }) { zero_point } else { 0 };
    let found = matches!(inputs.scale, ActivationScale::StaticTensor | ActivationScale::StaticTensorLocal(_));
    found.then_some(InputQuantization { scale: 0.0625, zero_point })
}

fn lookup<'a>(tensors: &'a [PackedTensor]) -> impl Fn(&str) -> Option<TensorRef<'a>> {
    move |suffix| {
        let tensor = tensors.iter().find(|tensor| tensor.suffix == suffix)?;
        Some(TensorRef { dtype: tensor.dtype, shape: &tensor.shape, data: &tensor.data })
    }
}

/// Layouts and the schemes that each holds.
fn holding() -> impl Iterator<Item = (&'static dyn Layout, LinearScheme)> {
    all().iter().flat_map(|layout| schemes().into_iter().map(move |scheme| (*layout, scheme))).filter(
        |(layout, scheme)| match layout.check(scheme, 32, K) {
            Ok(()) => true,
            Err(error) => {
                assert!(matches!(error, PackError::Scheme { .. }), "{}: {error}", layout.name());
                assert_eq!(error.kind(), ErrorKind::Unsupported);
                let found =
                    layout.pack(&weights(scheme, 32, 1), scheme.activations.as_ref(), input(scheme, 0).as_ref());
                assert_eq!(found, Err(error));
                false
            }
        },
    )
}

#[test]
fn every_scheme_has_a_layout_and_every_new_layout_its_schemes() {
    for scheme in schemes() {
        assert!(holding().any(|(_, held)| held == scheme), "{scheme:?}");
    }
    let count = |name| holding().filter(|(layout, _)| layout.name() == name).count();
    assert_eq!(["awq", "gptq", "lmdeploy-w8a8", "fp8", "modelopt"].map(count), [0, 0, 4, 4, 5]);
    assert!(count("compressed-tensors") > 20);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn unpacking_a_packed_weight_gives_it_back(n in 1usize..150, seed in any::<u64>(), zero in -128i32..128) {
        for (layout, scheme) in holding() {
            let (weights, input) = (weights(&scheme, n, seed), input(&scheme, zero));
            let packed = layout.pack(&weights, scheme.activations.as_ref(), input.as_ref()).unwrap();
            let specs = layout.describe(&scheme, n, K).unwrap();
            prop_assert_eq!(specs.len(), packed.len());
            for (spec, tensor) in specs.iter().zip(&packed) {
                prop_assert_eq!((spec.suffix, spec.dtype, &spec.shape), (tensor.suffix, tensor.dtype, &tensor.shape));
                prop_assert!(layout.suffixes().contains(&spec.suffix));
                prop_assert_eq!(tensor.data.len(), spec.shape.iter().product::<usize>() * spec.dtype.bitsize() / 8);
            }
            let back = layout.unpack(&scheme, n, K, &lookup(&packed)).unwrap();
            prop_assert_eq!((back.weights, back.input), (weights, input), "{} {:?}", layout.name(), scheme);
        }
    }

    #[test]
    fn damaged_tensors_are_named(which in any::<prop::sample::Index>(), damage in 0..4, seed in any::<u64>()) {
        for (layout, scheme) in holding() {
            let mut packed = layout.pack(&weights(&scheme, 16, seed), scheme.activations.as_ref(), input(&scheme, 3).as_ref()).unwrap();
            let at = which.index(packed.len());
            let suffix = packed[at].suffix;
            match damage {
                0 => { packed[at].data.pop(); }
                1 => packed[at].shape.push(2),
                2 => packed[at].dtype = Dtype::BOOL,
                _ => { packed.remove(at); }
            }
            let error = layout.unpack(&scheme, 16, K, &lookup(&packed)).unwrap_err();
            // Without its words a packed weight is looked for a byte each.
            let bytes = suffix == "weight_packed" && damage == 3;
            prop_assert!(error.to_string().contains(&format!("`{suffix}`")) || bytes, "{} {}", layout.name(), error);
            prop_assert_eq!(error.kind(), ErrorKind::Input);
        }
    }

    #[test]
    fn nothing_brings_the_reader_down(
        n in any::<usize>(), k in any::<usize>(), small in any::<bool>(),
        shape in prop::collection::vec(any::<usize>(), 0..4),
        data in prop::collection::vec(any::<u8>(), 0..200), dtype in 0usize..6,
        rows in any::<usize>(), columns in any::<usize>(),
    ) {
        let (n, k) = if small { (n % 40, k % 40) } else { (n, k) };
        let dtype = [Dtype::I8, Dtype::F8_E4M3, Dtype::U8, Dtype::F32, Dtype::F4, Dtype::F8_E5M2][dtype];
        let mut schemes = schemes();
        for grain in [Grain::Group(columns % 5), Grain::Block { rows, columns }] {
            let weights = FloatScheme { format: FloatFormat::E4M3, grain, scale: ScaleKind::Float(ScaleDtype::F16) };
            schemes.push(weights.into());
        }
        for (layout, scheme) in all().iter().flat_map(|layout| schemes.iter().map(move |scheme| (layout, scheme))) {
            let get = |_: &str| Some(TensorRef { dtype, shape: &shape, data: &data });
            prop_assert!(layout.unpack(scheme, n, k, &get).is_err());
            prop_assert_eq!(layout.check(scheme, n, k).is_ok(), layout.describe(scheme, n, k).is_ok());
        }
    }
}

#[test]
fn codes_and_scales_that_are_no_numbers_are_refused_both_ways() {
    for (layout, scheme) in holding() {
        let Weights::Float(weight) = weights(&scheme, 16, 9) else { continue };
        let pack =
            |weight: FloatLinear| layout.pack(&weight.into(), scheme.activations.as_ref(), input(&scheme, 0).as_ref());
        let mut bad = weight.clone();
        bad.codes[300] = if bad.scheme.format == FloatFormat::E2M1 { 16 } else { 0x7f };
        assert!(matches!(pack(bad), Err(PackError::Value { what: "codes", row: 1, column: 44, .. })));
        for scale in [f32::NAN, f32::INFINITY] {
            let mut bad = weight.clone();
            bad.scales[0] = scale;
            assert!(matches!(pack(bad), Err(PackError::Value { what: "scales", .. })));
        }
        if scheme.weights != weight.scheme.into() || weight.scheme.format == FloatFormat::E2M1 {
            continue;
        }
        let mut packed = pack(weight).unwrap();
        packed[0].data[300] = 0xff;
        let error = layout.unpack(&scheme, 16, K, &lookup(&packed)).unwrap_err();
        assert!(matches!(error, PackError::Value { what: "weight", row: 1, column: 44, .. }), "{error}");
    }
    // Scales and their reciprocals that are not positive numbers.
    let nvfp4 = preset("NVFP4", ScaleDtype::F32).unwrap();
    for name in ["compressed-tensors", "modelopt"] {
        let layout = layout(name).unwrap();
        let sound =
            layout.pack(&weights(&nvfp4, 16, 2), nvfp4.activations.as_ref(), input(&nvfp4, 0).as_ref()).unwrap();
        for at in 2..4 {
            for bad in [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-40] {
                let mut packed = sound.clone();
                packed[at].data = f32::to_le_bytes(bad).to_vec();
                let error = layout.unpack(&nvfp4, 16, K, &lookup(&packed)).unwrap_err();
                assert!(error.to_string().contains(packed[at].suffix), "{error}");
            }
        }
    }
}

#[test]
fn static_activations_need_their_scale_and_others_have_none() {
    for (layout, scheme) in holding() {
        let weights = weights(&scheme, 16, 5);
        let other = match input(&scheme, 0) {
            Some(_) => None,
            None => Some(InputQuantization { scale: 1.0, zero_point: 0 }),
        };
        let error = layout.pack(&weights, scheme.activations.as_ref(), other.as_ref()).unwrap_err();
        assert!(matches!(error, PackError::Input { .. }), "{} {error}", layout.name());
        if let Some(sound) = input(&scheme, 0) {
            let wild = InputQuantization { zero_point: 200, ..sound };
            assert!(layout.pack(&weights, scheme.activations.as_ref(), Some(&wild)).is_err());
        }
    }
}

#[test]
fn configs_are_read_as_they_were_written() {
    for (layout, scheme) in holding() {
        let mut facts = ConfigFacts::new(scheme);
        facts.ignored = vec!["lm_head".to_owned(), "model.layers.0.mlp.gate".to_owned()];
        if matches!(layout.name(), "compressed-tensors" | "modelopt") {
            facts.kv_cache = Some(KvCacheScheme::Fp8Tensor);
        }
        let mut configs = vec![layout.quantization_config(&facts).unwrap()];
        for (name, mut side) in layout.side_files(&facts).unwrap() {
            assert_eq!(name, "hf_quant_config.json");
            side["quant_method"] = json!("modelopt");
            configs.push(side);
        }
        for config in configs {
            let config = json!({ "quantization_config": config });
            let (found, parsed) = detect(config.as_object().unwrap()).unwrap().unwrap();
            assert_eq!(found.name(), layout.name());
            assert_eq!(parsed.ignored, facts.ignored);
            assert_eq!(parsed.kv_cache, facts.kv_cache);
            let again = layout.quantization_config(&ConfigFacts { scheme: parsed.scheme, ..facts.clone() }).unwrap();
            assert_eq!(again, layout.quantization_config(&facts).unwrap(), "{}", layout.name());
        }
    }
    for name in ["awq", "gptq", "lmdeploy-w8a8", "fp8"] {
        let (_, scheme) = holding()
            .find(|(layout, _)| layout.name() == name)
            .unwrap_or_else(|| (layout(name).unwrap(), Scheme::new(4, 128, true, ScaleDtype::F16).unwrap().into()));
        let facts = ConfigFacts { kv_cache: Some(KvCacheScheme::Fp8Tensor), ..ConfigFacts::new(scheme) };
        let error = layout(name).unwrap().quantization_config(&facts).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    }
}

#[test]
fn foreign_configs_are_read_or_refused_by_name() {
    let parse = |value: Value| {
        let config = json!({ "quantization_config": value });
        detect(config.as_object().unwrap()).map(|found| found.unwrap().1)
    };
    // DeepSeek-V3's, LMDeploy's and ModelOpt's own.
    let block = Grain::Block { rows: 128, columns: 128 };
    let found = parse(
        json!({ "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128] }),
    );
    assert!(matches!(found.unwrap().scheme.weights, WeightScheme::Float(FloatScheme { grain, .. }) if grain == block));
    assert!(parse(json!({ "quant_method": "smooth_quant" })).unwrap().scheme.weights.int().is_some());
    let found = parse(
        json!({ "quant_method": "modelopt", "quantization": { "quant_algo": "nvfp4", "kv_cache_quant_algo": null, "exclude_modules": ["lm_head"] } }),
    );
    assert_eq!(found.unwrap().ignored, ["lm_head"]);
    let refused = [
        (json!({ "quant_method": "fp8", "weight_block_size": [128] }), 3, "weight_block_size"),
        (json!({ "quant_method": "fp8", "weight_block_size": [0, 128] }), 3, "weight_block_size"),
        (json!({ "quant_method": "fp8", "fmt": "e3m4" }), 4, "fmt"),
        (json!({ "quant_method": "fp8", "activation_scheme": 7 }), 4, "activation_scheme"),
        (json!({ "quant_method": "fp8", "ignored_layers": 7 }), 3, "ignored_layers"),
        (json!({ "quant_method": "smooth_quant", "quant_dtype": "int4" }), 4, "quant_dtype"),
        (json!({ "quant_method": "modelopt" }), 3, "quant_algo"),
        (json!({ "quant_method": "modelopt", "quant_algo": "W4A16_AWQ" }), 4, "quant_algo"),
        (
            json!({ "quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "INT8" }),
            4,
            "kv_cache_quant_algo",
        ),
    ];
    for (config, code, part) in refused {
        let error = parse(config.clone()).unwrap_err();
        assert_eq!(error.kind().exit_code(), code, "{config}: {error}");
        assert!(error.to_string().contains(part), "{config}: {error}");
    }
}
