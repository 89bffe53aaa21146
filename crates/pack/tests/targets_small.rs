//! The engines' rules for small floats and for integers under quantized inputs.

use lite_pack::targets::{Severity, SiteFacts, Target, check};
use lite_pack::{layout, preset};
use lite_quant::floats::{FloatFormat, FloatScheme, Grain, ScaleKind};
use lite_quant::{ActivationFormat, ActivationScale, ActivationScheme, GroupSize, LinearScheme, ScaleDtype, Scheme};

const CT: &str = "compressed-tensors";

fn site(name: &str, group: Option<&str>, n: usize, k: usize) -> SiteFacts {
    SiteFacts { name: name.to_owned(), fused_group: group.map(str::to_owned), n, k, quantized: true, scheme: None }
}

fn dense() -> Vec<SiteFacts> {
    let (qkv, gate_up) = (Some("model.layers.0.self_attn.qkv"), Some("model.layers.0.mlp.gate_up"));
    let mut sites = vec![
        site("model.layers.0.self_attn.q_proj", qkv, 512, 512),
        site("model.layers.0.self_attn.k_proj", qkv, 128, 512),
        site("model.layers.0.self_attn.v_proj", qkv, 128, 512),
        site("model.layers.0.self_attn.o_proj", None, 512, 512),
        site("model.layers.0.mlp.gate_proj", gate_up, 1024, 512),
        site("model.layers.0.mlp.up_proj", gate_up, 1024, 512),
        site("model.layers.0.mlp.down_proj", None, 512, 1024),
        site("lm_head", None, 1000, 512),
    ];
    sites[7].quantized = false;
    sites
}

fn named(name: &str) -> LinearScheme {
    preset(name, ScaleDtype::F32).unwrap()
}

/// Names of the rules that refuse.
fn refused(target: Target, name: &str, scheme: &LinearScheme, sites: &[SiteFacts], tp: usize) -> Vec<&'static str> {
    let found = check(target, layout(name).unwrap(), scheme, sites, &["LlamaForCausalLM".to_owned()], tp);
    assert!(found.iter().all(|found| !found.message.is_empty() && !found.source.is_empty()));
    found.iter().filter(|found| found.severity == Severity::Refused).map(|found| found.rule).collect()
}

/// What each engine loads in the layout that is chosen for it.
#[test]
fn default_layouts_load_where_the_engine_has_the_scheme() {
    // vLLM, TurboMind, LMDeploy's PyTorch engine, transformers, TensorRT-LLM.
    let table = [
        ("W8A8", [true, false, true, true, false]),
        ("W4A8", [true, false, false, true, false]),
        ("W4AFP8", [true, false, false, true, false]),
        ("W4A4", [false, false, false, true, false]),
        ("FP8", [true, false, true, true, true]),
        ("FP8_DYNAMIC", [true, false, true, true, true]),
        ("FP8_BLOCK", [true, true, true, true, false]),
        ("NVFP4", [true, false, false, true, true]),
        ("NVFP4A16", [true, false, false, true, false]),
        ("MXFP4", [true, false, false, true, false]),
        ("MXFP8A16", [true, false, false, true, false]),
    ];
    for (name, wanted) in table {
        let scheme = named(name);
        let loads = Target::ALL.map(|target| {
            let layout = target.default_layout(&scheme);
            refused(target, layout, &scheme, &dense(), 1).is_empty()
        });
        assert_eq!(loads, wanted, "{name}");
    }
}

#[test]
fn private_layouts_are_read_by_their_engine_alone() {
    let reads = |name: &str, scheme: &LinearScheme| {
        Target::ALL.map(|target| refused(target, name, scheme, &dense(), 1).is_empty())
    };
    assert_eq!(reads("lmdeploy-w8a8", &named("W8A8")), [false, false, true, false, false]);
    assert_eq!(reads("fp8", &named("FP8_BLOCK")), [true, true, true, true, false]);
    assert_eq!(reads("fp8", &named("FP8")), [true, false, true, false, false]);
    assert_eq!(reads("modelopt", &named("NVFP4")), [true, false, false, false, true]);
    // A layout that cannot hold the scheme.
    for target in Target::ALL {
        assert_eq!(refused(target, "awq", &named("W8A8"), &dense(), 1), ["layout-limits"]);
    }
    let e5m2 = FloatScheme {
        format: FloatFormat::E5M2,
        grain: Grain::Block { rows: 128, columns: 128 },
        scale: ScaleKind::Float(ScaleDtype::F32),
    };
    let inputs = ActivationFormat::Float(FloatFormat::E5M2);
    let e5m2 = LinearScheme {
        weights: e5m2.into(),
        activations: Some(ActivationScheme { format: inputs, scale: ActivationScale::DynamicGroup(128) }),
    };
    assert_eq!(lite_pack::default_layout(&e5m2), "fp8");
    assert_eq!(reads("fp8", &e5m2), [false, false, true, false, false]);
}

#[test]
fn vllm_reads_what_its_table_has() {
    let run = |scheme: &LinearScheme| refused(Target::Vllm, CT, scheme, &dense(), 1);
    let int8 = |symmetric, group_size| Scheme { bits: 8, group_size, symmetric, scale_dtype: ScaleDtype::F32 };
    let under = |weights: Scheme, scale| LinearScheme {
        weights: weights.into(),
        activations: Some(ActivationScheme { format: ActivationFormat::Int { bits: 8, symmetric: false }, scale }),
    };
    let token = ActivationScale::DynamicToken;
    assert!(run(&under(int8(true, GroupSize::Channel), ActivationScale::StaticTensor)).is_empty());
    for bad in [
        under(int8(true, GroupSize::Channels(128)), token),
        under(int8(false, GroupSize::Channel), token),
        under(int8(true, GroupSize::Channel), ActivationScale::DynamicGroup(128)),
        LinearScheme { activations: named("FP8_DYNAMIC").activations, ..named("W8A16") },
        LinearScheme { activations: named("FP8_DYNAMIC").activations, ..named("NVFP4A16") },
    ] {
        assert_eq!(run(&bad), ["vllm-scheme"], "{bad:?}");
    }
    let mut odd = dense();
    odd[3].n = 448;
    assert_eq!(refused(Target::Vllm, CT, &named("W4AFP8"), &odd, 1), ["vllm-w4afp8-shape"]);
    let mut mixed = dense();
    mixed[2].quantized = false;
    assert_eq!(refused(Target::Vllm, CT, &named("FP8_DYNAMIC"), &mixed, 1), ["vllm-fused-mixed"]);
}

#[test]
fn blocks_must_not_be_cut() {
    let blocks = named("FP8_BLOCK");
    assert!(refused(Target::Vllm, CT, &blocks, &dense(), 1).is_empty());
    // 128 rows of k_proj over two ranks are half a block.
    assert_eq!(refused(Target::Vllm, CT, &blocks, &dense(), 2), ["vllm-block-shape"]);
    let mut ragged = dense();
    ragged[1].n = 64;
    assert_eq!(refused(Target::Vllm, "fp8", &blocks, &ragged, 1), ["vllm-block-shape"]);
    // The last of what is fused may end within a block.
    let mut last = dense();
    last[2].n = 64;
    assert!(refused(Target::Vllm, CT, &blocks, &last, 1).is_empty());
}
