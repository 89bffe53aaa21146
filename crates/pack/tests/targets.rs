//! Each rule of each engine fires where it must and nowhere else.

mod engines;

use lite_pack::layout;
use lite_pack::targets::{SiteFacts, Target, Verdict, check, engines_for};
use lite_quant::{ScaleDtype, Scheme};

use engines::{expert_linears, rules, scheme, site};

/// One dense layer, and a head that stays dense.
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

fn change(change: impl Fn(&mut SiteFacts)) -> Vec<SiteFacts> {
    let mut sites = dense();
    sites.iter_mut().for_each(change);
    sites
}

fn experts() -> Vec<SiteFacts> {
    let mut router = site("model.layers.0.mlp.gate", None, 2, 512);
    router.quantized = false;
    expert_linears().into_iter().chain([router]).collect()
}

const CT: &str = "compressed-tensors";
const LLAMA: &str = "LlamaForCausalLM";
const NONE: (Vec<&str>, Vec<&str>) = (vec![], vec![]);

#[test]
fn names_go_both_ways() {
    for target in Target::ALL {
        assert_eq!(Target::from_name(target.name()), Some(target));
    }
    assert_eq!(Target::from_name("vLLM"), None);
}

#[test]
fn the_common_schemes_load_without_a_word() {
    for target in [Target::Vllm, Target::TurboMind, Target::LmdeployPytorch] {
        assert_eq!(rules(target, "awq", &scheme(4, 128, false), &dense(), LLAMA, 2), NONE, "{target:?}");
    }
    for symmetric in [true, false] {
        for target in [Target::Vllm, Target::TurboMind, Target::Transformers] {
            assert_eq!(rules(target, CT, &scheme(4, 128, symmetric), &dense(), LLAMA, 2), NONE, "{target:?}");
        }
    }
    assert_eq!(rules(Target::Vllm, CT, &scheme(8, -1, true), &dense(), LLAMA, 4), NONE);
    assert_eq!(rules(Target::Vllm, CT, &scheme(4, 128, true), &experts(), "Qwen3MoeForCausalLM", 2), NONE);
}

#[test]
fn every_default_layout_loads_in_its_engine() {
    for (bits, group, symmetric) in [(4, 128, false), (4, 128, true), (4, 32, true), (8, 128, true), (3, 64, false)] {
        let scheme = scheme(bits, group, symmetric);
        for target in Target::ALL {
            let name = target.default_layout(&scheme.into());
            // TensorRT-LLM takes groups of 64 and 128.
            let narrow = target == Target::TrtLlm && (bits != 4 || group == 32);
            if narrow || bits != 4 && (target == Target::TurboMind || name == "awq") {
                continue;
            }
            assert_eq!(rules(target, name, &scheme, &dense(), LLAMA, 1).0, Vec::<&str>::new(), "{target:?} {scheme:?}");
        }
    }
}

#[test]
fn limits_of_the_layout_come_first() {
    for target in Target::ALL {
        let found = rules(target, "awq", &scheme(8, 128, false), &dense(), LLAMA, 1);
        assert_eq!(found, (vec!["layout-limits"], vec![]), "{target:?}");
        let sites = change(|site| site.k -= 64);
        let found = check(target, layout(CT).unwrap(), &scheme(4, 128, true).into(), &sites, &[], 1);
        assert!(found.iter().all(|found| found.rule == "layout-limits"));
        // The head is not quantized, so its shape does not matter.
        assert_eq!(found.iter().map(|found| found.sites.len()).sum::<usize>(), 7, "{found:?}");
    }
}

#[test]
fn turbomind() {
    let run =
        |layout, scheme: Scheme, sites: &[SiteFacts], arch| rules(Target::TurboMind, layout, &scheme, sites, arch, 1);
    assert_eq!(run("awq", scheme(4, 64, false), &dense(), LLAMA).0, ["turbomind-group-size"]);
    assert_eq!(run(CT, scheme(4, 64, true), &dense(), LLAMA).0, ["turbomind-group-size"]);
    assert_eq!(run(CT, scheme(4, -1, true), &dense(), LLAMA).0, ["turbomind-group-size"]);
    assert_eq!(run(CT, scheme(4, 32, true), &dense(), LLAMA), NONE);
    assert_eq!(run(CT, scheme(8, 128, true), &dense(), LLAMA).0, ["turbomind-bits"]);
    for arch in ["MistralForCausalLM", "Phi3ForCausalLM"] {
        let found = check(
            Target::TurboMind,
            layout(CT).unwrap(),
            &scheme(4, 128, true).into(),
            &dense(),
            &[arch.to_owned()],
            1,
        );
        assert_eq!(found[0].rule, "turbomind-architecture");
        assert!(found[0].message.contains("lmdeploy-pytorch") && found[0].message.contains("vllm"));
    }
    assert_eq!(run(CT, scheme(4, 128, true), &dense(), "GptOssForCausalLM").0, ["turbomind-gpt-oss"]);
    assert_eq!(run(CT, scheme(4, 128, true), &dense(), "Glm4MoeLiteForCausalLM").0, ["turbomind-mla"]);
    let odd = change(|site| site.n += 4);
    assert_eq!(run(CT, scheme(4, 128, true), &odd, LLAMA).0, ["turbomind-n"]);
    let up_only = change(|site| site.quantized &= !site.name.ends_with("gate_proj"));
    assert_eq!(run(CT, scheme(4, 128, true), &up_only, LLAMA).0, ["turbomind-gate-up"]);
    let no_v = change(|site| site.quantized &= !site.name.ends_with("v_proj"));
    assert_eq!(run(CT, scheme(4, 128, true), &no_v, LLAMA), (vec![], vec!["turbomind-fused-mixed"]));
    let head = change(|site| site.quantized = true);
    assert_eq!(run(CT, scheme(4, 128, true), &head, LLAMA), (vec![], vec!["turbomind-dense"]));
    let tower = [dense(), vec![site("visual.blocks.0.mlp.fc1", None, 512, 512)]].concat();
    assert_eq!(run(CT, scheme(4, 128, true), &tower, LLAMA).0, ["turbomind-tower"]);
    let bf16 = Scheme { scale_dtype: ScaleDtype::BF16, ..scheme(4, 128, true) };
    assert_eq!(run(CT, bf16, &dense(), LLAMA), (vec![], vec!["turbomind-scale-dtype"]));
    // 512 / 128 = 4 groups do not divide over 8 ranks.
    assert_eq!(rules(Target::TurboMind, CT, &scheme(4, 128, true), &dense(), LLAMA, 8).0, ["turbomind-tp"]);
    let short = change(|site| site.k = 48);
    let narrow = Scheme::new(4, 16, true, ScaleDtype::F16).unwrap();
    assert_eq!(run(CT, narrow, &short, LLAMA).0, ["turbomind-group-size", "turbomind-k"]);
}

#[test]
fn vllm_linears() {
    let run = |layout, scheme: Scheme, sites: &[SiteFacts], tp| rules(Target::Vllm, layout, &scheme, sites, LLAMA, tp);
    assert_eq!(run("awq", scheme(4, 16, false), &dense(), 1).0, ["vllm-awq-group-size"]);
    assert_eq!(
        run("awq", scheme(4, 256, false), &dense(), 1),
        (vec!["vllm-awq-plain-shape"], vec!["vllm-awq-group-size"])
    );
    assert_eq!(run("awq", scheme(4, -1, false), &dense(), 1), NONE);
    assert_eq!(run("awq", scheme(4, -1, false), &dense(), 2).0, ["vllm-tp-awq-channel"]);
    for (bits, group, symmetric) in
        [(4, 256, true), (4, 16, true), (4, 16, false), (8, 32, false), (8, 128, false), (3, 128, true)]
    {
        let found = run(CT, scheme(bits, group, symmetric), &dense(), 1);
        assert_eq!(found, (vec![], vec!["vllm-kernel"]), "{bits} {group} {symmetric}");
    }
    let no_v = change(|site| site.quantized &= !site.name.ends_with("v_proj"));
    assert_eq!(run(CT, scheme(4, 128, true), &no_v, 1).0, ["vllm-fused-mixed"]);
    // Three-bit zero points of 1000 fused rows do not end at a word.
    let ragged = change(|site| site.n = 1000);
    assert_eq!(run(CT, scheme(3, 128, false), &ragged, 1).0, ["vllm-zero-point-words"]);
    assert_eq!(run(CT, scheme(3, 128, true), &ragged, 1).0, Vec::<&str>::new());
    let eight = change(|site| site.n = 8);
    assert_eq!(run("awq", scheme(4, 128, false), &eight, 2).0, ["vllm-zero-point-words"]);
    assert_eq!(run(CT, scheme(4, 128, true), &dense(), 8).0, ["vllm-tp-rows"]);
    assert_eq!(run(CT, scheme(4, 128, true), &dense(), 3).0, ["vllm-tp-columns", "vllm-tp-rows"]);
    let f32 = Scheme { scale_dtype: ScaleDtype::F32, ..scheme(4, 128, true) };
    assert_eq!(run(CT, f32, &dense(), 1), (vec![], vec!["vllm-scale-dtype"]));
}

#[test]
fn ignore_lists_by_substring() {
    // An unquantized router `mlp.gate` beside a quantized `mlp.gate_proj`.
    let mut router = site("model.layers.0.mlp.gate", None, 8, 512);
    router.quantized = false;
    let sites = [dense(), vec![router]].concat();
    let awq = scheme(4, 128, false);
    assert_eq!(rules(Target::Vllm, "awq", &awq, &sites, LLAMA, 1).0, ["vllm-awq-ignore-substring"]);
    assert_eq!(rules(Target::Transformers, "awq", &awq, &sites, LLAMA, 1).0, ["transformers-awq-ignore-prefix"]);
    assert_eq!(rules(Target::LmdeployPytorch, "awq", &awq, &sites, LLAMA, 1), NONE);
    for target in [Target::Vllm, Target::Transformers] {
        assert_eq!(rules(target, CT, &awq, &sites, LLAMA, 1), NONE);
    }
    // The other way round.
    let mut long = site("model.layers.0.mlp.up_proj_extra", None, 8, 512);
    long.quantized = false;
    let sites = [dense(), vec![long]].concat();
    assert_eq!(rules(Target::LmdeployPytorch, "awq", &awq, &sites, LLAMA, 1).0, ["lmdeploy-pytorch-ignore-substring"]);
    assert_eq!(rules(Target::Vllm, "awq", &awq, &sites, LLAMA, 1), NONE);
}

#[test]
fn expert_layers() {
    let awq = scheme(4, 128, false);
    assert_eq!(rules(Target::LmdeployPytorch, "awq", &awq, &experts(), LLAMA, 1).0, ["lmdeploy-pytorch-experts"]);
    let mut sites = experts();
    sites[5].quantized = false;
    assert_eq!(rules(Target::Vllm, CT, &awq, &sites, LLAMA, 1).0, ["vllm-experts-mixed"]);
    let mut narrow = experts();
    narrow.iter_mut().filter(|site| site.k == 512).for_each(|site| site.k = 576);
    assert_eq!(rules(Target::Vllm, CT, &scheme(4, 64, true), &narrow, LLAMA, 1), (vec![], vec!["vllm-experts-marlin"]));
    assert_eq!(rules(Target::Vllm, CT, &scheme(4, -1, true), &narrow, LLAMA, 1).0, ["vllm-experts-marlin"]);
    // vLLM halves the groups of AWQ experts until they fit a rank, those of compressed-tensors it does not.
    assert_eq!(rules(Target::Vllm, "awq", &awq, &experts(), LLAMA, 4).0, Vec::<&str>::new());
    assert_eq!(rules(Target::Vllm, CT, &awq, &experts(), LLAMA, 4).0, ["vllm-tp-rows"]);
    assert_eq!(rules(Target::Transformers, CT, &awq, &experts(), LLAMA, 1), (vec![], vec!["transformers-experts"]));
}

#[test]
fn lmdeploy_pytorch_and_transformers() {
    let pytorch = |layout, scheme: Scheme| rules(Target::LmdeployPytorch, layout, &scheme, &dense(), LLAMA, 1);
    assert_eq!(pytorch(CT, scheme(4, 128, false)).0, ["lmdeploy-pytorch-layout"]);
    assert_eq!(pytorch("awq", scheme(4, -1, false)).0, ["lmdeploy-pytorch-group-size"]);
    for group in [16, 32, 64, 256] {
        assert_eq!(pytorch("awq", scheme(4, group, true)), NONE, "{group}");
    }
    let no_v = change(|site| site.quantized &= !site.name.ends_with("v_proj"));
    let found = rules(Target::LmdeployPytorch, "awq", &scheme(4, 128, false), &no_v, LLAMA, 1);
    assert_eq!(found.0, ["lmdeploy-pytorch-fused-mixed"]);
    let found = rules(Target::Transformers, "awq", &scheme(4, 128, false), &dense(), LLAMA, 1);
    assert_eq!(found, (vec![], vec!["transformers-awq-kernel"]));
    let head = change(|site| site.quantized = true);
    let found = rules(Target::Transformers, "awq", &scheme(4, 128, false), &head, LLAMA, 1);
    assert_eq!(found.0, ["transformers-awq-head"]);
    let found = rules(Target::Transformers, CT, &scheme(3, 128, false), &dense(), LLAMA, 1);
    assert_eq!(found, (vec![], vec!["transformers-dense-packing"]));
}

#[test]
fn a_plan_lists_every_engine() {
    let found =
        engines_for(layout(CT).unwrap(), &scheme(4, 128, true).into(), &dense(), &["MistralForCausalLM".to_owned()]);
    let loads: Vec<bool> = found.iter().map(|(_, verdict)| matches!(verdict, Verdict::Loads(_))).collect();
    assert_eq!(found.iter().map(|(target, _)| *target).collect::<Vec<_>>(), Target::ALL);
    assert_eq!(loads, [true, false, false, true, false]);
}

#[test]
fn gptq_checkpoints() {
    let run = |target, scheme: Scheme, sites: &[SiteFacts], tp| rules(target, "gptq", &scheme, sites, LLAMA, tp);
    // A head of 1000 rows is no multiple of 32, but it stays plain.
    for target in [Target::Vllm, Target::TurboMind] {
        assert_eq!(run(target, scheme(4, 128, true), &dense(), 2), NONE, "{target:?}");
    }
    for (bits, group, symmetric, wanted) in [
        (8, -1, true, vec![]),
        (4, 32, true, vec![]),
        (3, 128, true, vec!["vllm-gptq-bits"]),
        (4, 128, false, vec!["vllm-gptq-asymmetric"]),
        (2, 256, false, vec!["vllm-gptq-asymmetric", "vllm-gptq-bits", "vllm-gptq-group-size"]),
    ] {
        assert_eq!(run(Target::Vllm, scheme(bits, group, symmetric), &dense(), 1), (wanted, vec![]), "{bits} {group}");
    }
    // 32 rows of 4 bits over two ranks are half a word short of whole ones; zero points are always there.
    let eight = change(|site| site.n = 32);
    assert_eq!(run(Target::Vllm, scheme(4, 128, true), &eight, 8).0, ["vllm-zero-point-words", "vllm-tp-rows"]);
    for (group, symmetric, wanted) in [
        (64, true, "turbomind-group-size"),
        (-1, true, "turbomind-group-size"),
        (128, false, "turbomind-gptq-asymmetric"),
    ] {
        assert_eq!(run(Target::TurboMind, scheme(4, group, symmetric), &dense(), 1), (vec![wanted], vec![]));
    }
    assert_eq!(run(Target::TurboMind, scheme(8, 128, true), &dense(), 1).0, ["turbomind-bits"]);
    let no_v = change(|site| site.quantized &= !site.name.ends_with("v_proj"));
    assert_eq!(run(Target::TurboMind, scheme(4, 128, true), &no_v, 1), (vec!["turbomind-fused-mixed"], vec![]));
    assert_eq!(run(Target::LmdeployPytorch, scheme(4, 128, true), &dense(), 1).0, ["lmdeploy-pytorch-layout"]);

    let package = "transformers-gptq-package";
    assert_eq!(run(Target::Transformers, scheme(3, -1, false), &dense(), 1), (vec![], vec![package]));
    let head = change(|site| (site.quantized, site.n) = (true, 1024));
    assert_eq!(
        run(Target::Transformers, scheme(4, 128, true), &head, 1),
        (vec!["transformers-gptq-head"], vec![package])
    );
    let no_v = run(Target::Transformers, scheme(4, 128, true), &no_v, 1);
    assert_eq!(no_v, (vec!["transformers-gptq-plain"], vec![package]));
    let experts = run(Target::Transformers, scheme(4, 128, true), &experts(), 1);
    assert_eq!(experts, (vec![], vec![package, "transformers-gptq-router", "transformers-experts"]));
}

#[test]
fn linears_with_their_own_scheme() {
    let wide = scheme(8, 128, true);
    let own = |suffixes: &'static [&'static str]| {
        change(move |site| site.scheme = suffixes.iter().any(|end| site.name.ends_with(end)).then_some(wide.into()))
    };
    let run = |target, layout: &str, sites: &[SiteFacts]| rules(target, layout, &scheme(4, 128, true), sites, LLAMA, 1);
    let down = own(&["down_proj"]);
    assert_eq!(run(Target::Vllm, CT, &down), NONE);
    assert_eq!(run(Target::Vllm, "gptq", &down), NONE);
    assert_eq!(run(Target::Transformers, CT, &down), NONE);
    assert_eq!(run(Target::Transformers, "gptq", &down).0, ["transformers-gptq-schemes"]);
    // Its bits are refused too.
    for layout in [CT, "gptq"] {
        assert_eq!(run(Target::TurboMind, layout, &down).0, ["turbomind-bits", "turbomind-schemes"]);
    }
    for target in Target::ALL {
        assert_eq!(run(target, "awq", &down).0, ["layout-limits"], "{target:?}");
    }
    let refused = check(Target::TurboMind, layout(CT).unwrap(), &scheme(4, 128, true).into(), &down, &[], 1);
    assert!(refused.iter().all(|found| found.sites == ["model.layers.0.mlp.down_proj"]), "{refused:?}");
    // Of linears that are fused, all or none.
    assert_eq!(run(Target::Vllm, CT, &own(&["v_proj"])).0, ["vllm-fused-schemes"]);
    assert_eq!(run(Target::Vllm, "gptq", &own(&["gate_proj"])).0, ["vllm-fused-schemes"]);
    assert_eq!(run(Target::Vllm, "gptq", &own(&["q_proj", "k_proj", "v_proj"])), NONE);
    let mut expert = experts();
    expert[2].scheme = Some(wide.into());
    assert_eq!(run(Target::Vllm, CT, &expert).0, ["vllm-experts-schemes"]);
    // The rules of a scheme are checked on its own linears: 3 bits only for them, and their own groups.
    let mut three = dense();
    three[6].scheme = Some(scheme(3, 128, true).into());
    assert_eq!(run(Target::Vllm, CT, &three), (vec![], vec!["vllm-kernel"]));
    assert_eq!(run(Target::Vllm, "gptq", &three).0, ["vllm-gptq-bits"]);
    // Another type of scales is not another scheme.
    let bf16 =
        change(|site| site.scheme = Some(Scheme { scale_dtype: ScaleDtype::BF16, ..scheme(4, 128, true) }.into()));
    assert_eq!(run(Target::TurboMind, CT, &bf16), (vec![], vec!["turbomind-scale-dtype"]));
    let mut wrapped = dense();
    wrapped.iter_mut().for_each(|site| site.name = site.name.replace("model.", "model.language_model."));
    wrapped[6].scheme = Some(wide.into());
    assert_eq!(run(Target::Vllm, "gptq", &wrapped), (vec![], vec!["vllm-gptq-names"]));
    let mut symmetric = dense();
    symmetric[6].scheme = Some(scheme(4, 128, false).into());
    assert_eq!(run(Target::Vllm, "gptq", &symmetric).0, ["layout-limits"]);
}
