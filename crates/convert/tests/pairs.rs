//! Every layout to every other: what can be held comes back with the same values, what cannot is refused by name.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use lite_convert::{ConvertError, ConvertReport, Recipe, convert};
use lite_job::{ErrorKind, Silent};
use lite_model::{Checkpoint, CheckpointWriter, Dtype, OutputTensor};
use lite_pack::{ConfigFacts, KvCacheScheme, Layout};
use lite_quant::floats::{FloatFormat, FloatLinear, FloatScheme, Grain, ScaleKind};
use lite_quant::{
    ActivationFormat, ActivationScale, ActivationScheme, GroupSize, InputQuantization, LinearScheme, QuantizedLinear,
    ScaleDtype, Scheme, Weights,
};
use lite_runtime::{QuantizedCheckpoint, stored_linears};

const N: usize = 256;
const K: usize = 384;
const MODULES: [&str; 2] = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"];

/// Numbers without a pattern.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }
}

fn weights(scheme: &LinearScheme, seed: u64) -> Weights {
    let mut noise = Noise(seed);
    match scheme.weights {
        lite_quant::WeightScheme::Int(scheme) => {
            let groups = scheme.groups(K).unwrap();
            let zero = |noise: &mut Noise| match scheme.symmetric {
                true => scheme.middle_code(),
                false => (noise.next() % (u32::from(scheme.max_code()) + 1)) as u8,
            };
            Weights::Int(QuantizedLinear {
                scheme,
                out_features: N,
                in_features: K,
                codes: (0..N * K).map(|_| (noise.next() % (u32::from(scheme.max_code()) + 1)) as u8).collect(),
                scales: (0..N * groups).map(|_| scheme.scale_dtype.round(0.01 + noise.next() as f32 * 1e-11)).collect(),
                zeros: (0..N * groups).map(|_| zero(&mut noise)).collect(),
            })
        }
        lite_quant::WeightScheme::Float(scheme) => {
            let (rows, columns) = scheme.grain.grid(N, K).unwrap();
            let code = |noise: &mut Noise| loop {
                let code = (noise.next() % (1 << scheme.format.bits())) as u8;
                if scheme.format.decode(code).is_finite() {
                    return code;
                }
            };
            let scale = |noise: &mut Noise| match scheme.scale {
                ScaleKind::Float(dtype) => dtype.round(0.01 + noise.next() as f32 * 1e-11),
                ScaleKind::E8M0 => 2f32.powi(-(noise.next() as i32 % 7)),
                ScaleKind::E4M3WithGlobal => FloatFormat::E4M3.decode(0x30 + (noise.next() % 16) as u8),
            };
            let global_scale = match scheme.scale {
                // What compressed-tensors stores is the reciprocal.
                ScaleKind::E4M3WithGlobal => 0.0078125,
                _ => 1.0,
            };
            Weights::Float(FloatLinear {
                scheme,
                out_features: N,
                in_features: K,
                codes: (0..N * K).map(|_| code(&mut noise)).collect(),
                scales: (0..rows * columns).map(|_| scale(&mut noise)).collect(),
                global_scale,
            })
        }
    }
}

fn input(scheme: &LinearScheme) -> Option<InputQuantization> {
    let fixed = |scale| matches!(scale, ActivationScale::StaticTensor | ActivationScale::StaticTensorLocal(_));
    scheme.activations.filter(|a| fixed(a.scale)).map(|_| InputQuantization { scale: 0.03125, zero_point: 0 })
}

/// A checkpoint of an architecture nobody knows; `false` if the layout cannot hold the scheme.
fn write(dir: &Path, layout: &dyn Layout, scheme: &LinearScheme, cache: Option<KvCacheScheme>) -> bool {
    if layout.check(scheme, N, K).is_err() {
        return false;
    }
    let facts = ConfigFacts {
        ignored: vec!["lm_head".to_owned(), "model.layers.0.mlp.gate".to_owned()],
        kv_cache: cache,
        ..ConfigFacts::new(*scheme)
    };
    let Ok(config) = layout.quantization_config(&facts) else { return false };
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = vec![
        ("model.embed_tokens.weight".into(), Dtype::BF16, vec![8, K], vec![7; 16 * K]),
        ("model.layers.0.mlp.gate.weight".into(), Dtype::BF16, vec![4, K], vec![9; 8 * K]),
        ("model.layers.0.mlp.up_proj.bias".into(), Dtype::F32, vec![N], vec![1; 4 * N]),
        ("lm_head.weight".into(), Dtype::BF16, vec![8, K], vec![5; 16 * K]),
    ];
    if cache.is_some() {
        for leaf in ["k_scale", "v_scale"] {
            tensors.push((
                format!("model.layers.0.self_attn.{leaf}"),
                Dtype::F32,
                vec![1],
                0.5f32.to_le_bytes().into(),
            ));
        }
    }
    for (i, module) in MODULES.iter().enumerate() {
        let weights = weights(scheme, i as u64 + 1);
        for tensor in layout.pack(&weights, scheme.activations.as_ref(), input(scheme).as_ref()).unwrap() {
            tensors.push((format!("{module}.{}", tensor.suffix), tensor.dtype, tensor.shape, tensor.data));
        }
    }
    let specs = tensors.iter().map(|(name, dtype, shape, _)| OutputTensor {
        name: name.clone(),
        dtype: *dtype,
        shape: shape.clone(),
    });
    let writer = CheckpointWriter::create(dir, specs.collect(), u64::MAX).unwrap();
    for (name, _, _, data) in &tensors {
        writer.write(name, data).unwrap();
    }
    writer.finish().unwrap();
    let config = serde_json::json!({"architectures": ["NobodyKnows"], "model_type": "x", "torch_dtype": "bfloat16",
        "rms_norm_eps": 1e-6, "quantization_config": config});
    std::fs::write(dir.join("config.json"), format!("{config:#}")).unwrap();
    std::fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    for (name, value) in layout.side_files(&facts).unwrap() {
        std::fs::write(dir.join(name), value.to_string()).unwrap();
    }
    true
}

fn run(from: &Path, to: &Path, layout: &str, requantize: bool) -> Result<ConvertReport, ConvertError> {
    let recipe = Recipe {
        model: from.to_str().unwrap().to_owned(),
        revision: None,
        download_dir: None,
        work_dir: to.to_owned(),
        overwrite: false,
        layout: Some(layout.to_owned()),
        target: None,
        tensor_parallel: 1,
        requantize,
        dtype: None,
        max_shard_bytes: 100_000,
    };
    convert(&recipe, &Silent, &AtomicBool::new(false))
}

/// Dequantized values and input scales of all linears, by the layout of the folder's config.
fn values(dir: &Path) -> Vec<(String, Vec<u32>, Option<InputQuantization>)> {
    let checkpoint = QuantizedCheckpoint::open(dir).unwrap();
    let (linears, unknown) = stored_linears(checkpoint.checkpoint());
    assert!(unknown.is_empty() && linears.len() == MODULES.len(), "{unknown:?} {linears:?}");
    linears
        .iter()
        .map(|linear| {
            assert_eq!((linear.out_features, linear.in_features), (N, K));
            let found = checkpoint.linear(&linear.module, N, K).unwrap();
            let bits = found.weights.dequantize().iter().map(|value| value.to_bits()).collect();
            (linear.module.clone(), bits, found.input)
        })
        .collect()
}

fn int(bits: u8, group_size: GroupSize, symmetric: bool, scale_dtype: ScaleDtype) -> LinearScheme {
    Scheme { bits, group_size, symmetric, scale_dtype }.into()
}

fn float(format: FloatFormat, grain: Grain, scale: ScaleKind) -> LinearScheme {
    FloatScheme { format, grain, scale }.into()
}

fn with(scheme: LinearScheme, format: ActivationFormat, scale: ActivationScale) -> LinearScheme {
    LinearScheme { activations: Some(ActivationScheme { format, scale }), ..scheme }
}

const INT8: ActivationFormat = ActivationFormat::Int { bits: 8, symmetric: true };
const E4M3: ActivationFormat = ActivationFormat::Float(FloatFormat::E4M3);
const F32: ScaleKind = ScaleKind::Float(ScaleDtype::F32);
const BLOCK: Grain = Grain::Block { rows: 128, columns: 128 };

fn schemes() -> Vec<LinearScheme> {
    let group = GroupSize::Channels(128);
    let channel = GroupSize::Channel;
    let fp8 = |grain| float(FloatFormat::E4M3, grain, F32);
    vec![
        int(4, group, false, ScaleDtype::F16),
        int(4, group, true, ScaleDtype::BF16),
        int(4, channel, false, ScaleDtype::F16),
        int(3, GroupSize::Channels(32), true, ScaleDtype::F16),
        int(5, group, false, ScaleDtype::BF16),
        int(8, channel, true, ScaleDtype::F32),
        with(int(8, channel, true, ScaleDtype::F32), INT8, ActivationScale::DynamicToken),
        with(int(8, channel, true, ScaleDtype::BF16), INT8, ActivationScale::DynamicToken),
        with(int(8, channel, true, ScaleDtype::F32), INT8, ActivationScale::StaticTensor),
        with(fp8(Grain::Channel), E4M3, ActivationScale::DynamicToken),
        with(fp8(Grain::Tensor), E4M3, ActivationScale::DynamicToken),
        with(fp8(Grain::Tensor), E4M3, ActivationScale::StaticTensor),
        with(fp8(BLOCK), E4M3, ActivationScale::DynamicGroup(128)),
        fp8(Grain::Channel),
        fp8(BLOCK),
        float(FloatFormat::E2M1, Grain::Group(16), ScaleKind::E4M3WithGlobal),
        with(
            float(FloatFormat::E2M1, Grain::Group(16), ScaleKind::E4M3WithGlobal),
            ActivationFormat::Float(FloatFormat::E2M1),
            ActivationScale::StaticTensorLocal(16),
        ),
        float(FloatFormat::E2M1, Grain::Group(32), ScaleKind::E8M0),
        float(FloatFormat::E4M3, Grain::Group(32), ScaleKind::E8M0),
    ]
}

#[test]
fn every_pair_keeps_every_value_or_refuses() {
    let mut held = 0;
    for scheme in schemes() {
        for from in lite_pack::all() {
            let source = tempfile::tempdir().unwrap();
            if !write(source.path(), *from, &scheme, None) {
                continue;
            }
            let wanted = values(source.path());
            for to in lite_pack::all() {
                let pair = format!("{scheme:?}: {} to {}", from.name(), to.name());
                let out = tempfile::tempdir().unwrap();
                let target = out.path().join("out");
                match run(source.path(), &target, to.name(), false) {
                    Ok(report) => {
                        assert_eq!(values(&target), wanted, "{pair}");
                        assert_eq!((report.exact, report.rounded.len(), report.copied), (2, 0, 4), "{pair}");
                        let (old, new) = (Checkpoint::open(source.path()).unwrap(), Checkpoint::open(&target).unwrap());
                        for name in ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.bias", "lm_head.weight"] {
                            assert_eq!(new.tensor(name).unwrap().data, old.tensor(name).unwrap().data, "{pair}");
                        }
                        assert!(target.join("tokenizer.json").is_file() && !target.join(".lite").exists());
                        assert!(new.config_text().contains("\"rms_norm_eps\": 1e-"), "{pair}");
                        let read = QuantizedCheckpoint::open(&target).unwrap();
                        let activations = read.config().scheme.activations;
                        assert_eq!(activations, scheme.activations, "{pair}");
                        held += 1;
                    }
                    Err(error) => {
                        assert_ne!(from.name(), to.name(), "{pair}: {error}");
                        assert_eq!(error.kind(), ErrorKind::Unsupported, "{pair}: {error}");
                        assert!(error.to_string().contains(MODULES[0]), "{pair}: {error}");
                        assert!(!target.exists(), "{pair}");
                    }
                }
            }
        }
    }
    assert!(held > 0);
}

#[test]
fn pairs_that_must_be_possible_are() {
    let group = GroupSize::Channels(128);
    let channel = GroupSize::Channel;
    let w8a8 = with(int(8, channel, true, ScaleDtype::F32), INT8, ActivationScale::DynamicToken);
    let block = with(float(FloatFormat::E4M3, BLOCK, F32), E4M3, ActivationScale::DynamicGroup(128));
    let fp8 = with(float(FloatFormat::E4M3, Grain::Channel, F32), E4M3, ActivationScale::DynamicToken);
    let tensor = with(float(FloatFormat::E4M3, Grain::Tensor, F32), E4M3, ActivationScale::StaticTensor);
    let cases: [(LinearScheme, &[&str]); 6] = [
        (int(4, group, false, ScaleDtype::F16), &["awq", "gptq", "compressed-tensors"]),
        (int(4, group, true, ScaleDtype::F16), &["awq", "gptq", "compressed-tensors"]),
        (w8a8, &["compressed-tensors", "lmdeploy-w8a8"]),
        (block, &["compressed-tensors", "fp8"]),
        (fp8, &["compressed-tensors", "lmdeploy-w8a8"]),
        (tensor, &["compressed-tensors", "fp8", "modelopt"]),
    ];
    for (scheme, layouts) in cases {
        for from in layouts {
            let source = tempfile::tempdir().unwrap();
            let layout = lite_pack::layout(from).unwrap_or_else(|| panic!("no layout {from}"));
            assert!(write(source.path(), layout, &scheme, None), "{from} cannot hold {scheme:?}");
            for to in layouts {
                let out = tempfile::tempdir().unwrap();
                let target = out.path().join("out");
                run(source.path(), &target, to, false).unwrap_or_else(|e| panic!("{scheme:?}: {from} to {to}: {e}"));
                assert_eq!(values(&target), values(source.path()), "{scheme:?}: {from} to {to}");
            }
        }
    }
}

#[test]
fn requantizing_reaches_every_layout_and_says_what_it_costs() {
    let source = tempfile::tempdir().unwrap();
    let layout = lite_pack::layout("compressed-tensors").unwrap();
    let five = int(5, GroupSize::Channels(128), false, ScaleDtype::BF16);
    assert!(write(source.path(), layout, &five, None));
    for to in lite_pack::all().iter().filter(|to| to.name() != "compressed-tensors") {
        let out = tempfile::tempdir().unwrap();
        let refused = run(source.path(), &out.path().join("a"), to.name(), false).unwrap_err();
        assert!(refused.to_string().contains("--requantize"), "{refused}");
        let report = run(source.path(), &out.path().join("b"), to.name(), true).unwrap();
        assert_eq!((report.exact, report.rounded.len()), (0, 2), "{}", to.name());
        for linear in &report.rounded {
            // Five-bit noise in four bits at worst.
            assert!(linear.error > 0.0 && linear.error < 0.2, "{}: {linear:?}", to.name());
        }
        values(&out.path().join("b"));
    }
}

#[test]
fn plain_results_hold_the_values_rounded_to_the_models_type() {
    for scheme in schemes() {
        for from in lite_pack::all() {
            let source = tempfile::tempdir().unwrap();
            if !write(source.path(), *from, &scheme, None) {
                continue;
            }
            let out = tempfile::tempdir().unwrap();
            let target = out.path().join("out");
            run(source.path(), &target, "plain", false).unwrap();
            let plain = Checkpoint::open(&target).unwrap();
            assert!(!plain.config().contains_key("quantization_config"));
            for (module, bits, _) in values(source.path()) {
                let found = plain.tensor_f32(&format!("{module}.weight")).unwrap();
                let wanted: Vec<f32> =
                    bits.iter().map(|bits| half::bf16::from_f32(f32::from_bits(*bits)).to_f32()).collect();
                assert_eq!(found, wanted, "{scheme:?} {}", from.name());
            }
            assert_eq!(plain.names().count(), 6);
        }
    }
}

#[test]
fn a_cache_scheme_travels_or_is_refused() {
    let scheme = int(4, GroupSize::Channels(128), true, ScaleDtype::F16);
    let source = tempfile::tempdir().unwrap();
    let layout = lite_pack::layout("compressed-tensors").unwrap();
    assert!(write(source.path(), layout, &scheme, Some(KvCacheScheme::Fp8Tensor)));
    let out = tempfile::tempdir().unwrap();
    run(source.path(), &out.path().join("a"), "compressed-tensors", false).unwrap();
    let same = QuantizedCheckpoint::open(&out.path().join("a")).unwrap();
    assert_eq!(same.config().kv_cache, Some(KvCacheScheme::Fp8Tensor));
    assert!(same.checkpoint().info("model.layers.0.self_attn.k_scale").is_some());
    let error = run(source.path(), &out.path().join("b"), "awq", false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let report = run(source.path(), &out.path().join("c"), "awq", true).unwrap();
    assert!(report.notes[0].contains("cache") && report.rounded.is_empty());
    let dropped = Checkpoint::open(&out.path().join("c")).unwrap();
    assert!(dropped.info("model.layers.0.self_attn.k_scale").is_none());
}

#[test]
fn sources_that_contradict_themselves_are_refused() {
    let scheme = int(4, GroupSize::Channels(128), false, ScaleDtype::F16);
    let source = tempfile::tempdir().unwrap();
    assert!(write(source.path(), lite_pack::layout("awq").unwrap(), &scheme, None));
    let out = tempfile::tempdir().unwrap();
    let fails = |layout: &str| run(source.path(), &out.path().join("out"), layout, false).unwrap_err();
    assert_eq!(fails("marlin").kind(), ErrorKind::Usage);
    let config = std::fs::read_to_string(source.path().join("config.json")).unwrap();
    let edit = |from: &str, to: &str| {
        assert!(config.contains(from), "{config}");
        std::fs::write(source.path().join("config.json"), config.replace(from, to)).unwrap();
    };
    edit("\"group_size\": 128", "\"group_size\": 64");
    assert_eq!(fails("gptq").kind(), ErrorKind::Input);
    edit("\"quantization_config\"", "\"other_config\"");
    assert!(fails("gptq").to_string().contains("quantization_config"));
    assert!(!out.path().join("out").exists());
}
