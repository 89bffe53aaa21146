//! Families whose experts some engines read in one tensor per layer only.

mod engines;

use lite_pack::targets::{SiteFacts, Target, Verdict, check, engines_for};
use lite_pack::{layout, preset};
use lite_quant::ScaleDtype;

use engines::{expert_linears, rules, scheme, site};

const CT: &str = "compressed-tensors";
const NONE: (Vec<&str>, Vec<&str>) = (vec![], vec![]);

/// The attention of one layer.
fn dense() -> Vec<SiteFacts> {
    let qkv = Some("model.layers.0.self_attn.qkv");
    vec![
        site("model.layers.0.self_attn.q_proj", qkv, 512, 512),
        site("model.layers.0.self_attn.k_proj", qkv, 128, 512),
        site("model.layers.0.self_attn.v_proj", qkv, 128, 512),
        site("model.layers.0.self_attn.o_proj", None, 512, 512),
    ]
}

/// The same linears, none of them quantized.
fn plain(mut sites: Vec<SiteFacts>) -> Vec<SiteFacts> {
    sites.iter_mut().for_each(|site| site.quantized = false);
    sites
}

/// Experts one by one, which no engine is known to load: one finding for each, whatever other rules are broken.
#[test]
fn experts_of_gpt_oss() {
    const ARCH: &str = "GptOssForCausalLM";
    let refusals = [
        (Target::Vllm, "vllm-gpt-oss"),
        (Target::TurboMind, "turbomind-gpt-oss"),
        (Target::LmdeployPytorch, "lmdeploy-pytorch-gpt-oss"),
        (Target::Transformers, "transformers-gpt-oss"),
    ];
    let mut half = expert_linears();
    half[5].quantized = false;
    let mut own = expert_linears();
    own[2].scheme = Some(scheme(8, 128, true).into());
    let mut odd = expert_linears();
    odd.iter_mut().for_each(|site| (site.n, site.k) = (site.n + 4, site.k + 8));
    // Left plain they are one by one all the same.
    let plain = [dense(), plain(expert_linears())].concat();
    for sites in [expert_linears(), [dense(), expert_linears()].concat(), half, own, odd, plain] {
        for (target, rule) in refusals {
            for layout in ["awq", "gptq", CT] {
                for scheme in [scheme(4, 128, false), scheme(8, -1, true)] {
                    let found = rules(target, layout, &scheme, &sites, ARCH, 3);
                    assert_eq!(found, (vec![rule], vec![]), "{target:?} {layout} {scheme:?}");
                }
            }
        }
    }
    let trtllm = rules(Target::TrtLlm, "gptq", &scheme(4, 128, true), &expert_linears(), ARCH, 1);
    assert_eq!(trtllm, (vec![], vec!["trtllm-gpt-oss"]));
    let trtllm = rules(Target::TrtLlm, CT, &scheme(4, 128, true), &expert_linears(), ARCH, 1);
    assert_eq!(trtllm, (vec!["trtllm-layout"], vec!["trtllm-gpt-oss"]));
    for w8a8 in ["W8A8", "FP8_DYNAMIC"] {
        let scheme = preset(w8a8, ScaleDtype::F32).unwrap();
        let layout = layout("lmdeploy-w8a8").unwrap();
        let found = check(Target::LmdeployPytorch, layout, &scheme, &expert_linears(), &[ARCH.to_owned()], 1);
        assert_eq!(found.iter().map(|found| found.rule).collect::<Vec<_>>(), ["lmdeploy-pytorch-gpt-oss"], "{w8a8}");
        // Another family's load there.
        let found =
            check(Target::LmdeployPytorch, layout, &scheme, &expert_linears(), &["Qwen3MoeForCausalLM".to_owned()], 1);
        assert_eq!(found, [], "{w8a8}");
    }
    // Without experts nothing is fused.
    assert_eq!(rules(Target::Vllm, CT, &scheme(4, 128, true), &dense(), ARCH, 1), NONE);
    assert_eq!(rules(Target::LmdeployPytorch, "awq", &scheme(4, 128, true), &dense(), ARCH, 1), NONE);
    // A plan that names no engine says the same.
    let found = engines_for(layout(CT).unwrap(), &scheme(4, 128, true).into(), &expert_linears(), &[ARCH.to_owned()]);
    for (target, rule) in refusals {
        let Some((_, Verdict::Refuses(why))) = found.iter().find(|(engine, _)| *engine == target) else {
            panic!("{target:?} loads");
        };
        assert_eq!(why.iter().map(|why| why.rule).collect::<Vec<_>>(), [rule]);
        // No advice that leads nowhere.
        for dead in ["unquantized", "plain", "use vLLM", "use TurboMind"] {
            assert!(!why[0].message.contains(dead), "{}", why[0].message);
        }
    }
}

/// transformers leaves experts one by one unread and makes up new ones (its loading report names them `UNEXPECTED` and
/// `MISSING`); vLLM has a mapping of each.
#[test]
fn experts_of_qwen3_vl_moe() {
    for arch in ["Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeTextModel"] {
        let run = |target, layout, sites: &[SiteFacts]| rules(target, layout, &scheme(4, 128, true), sites, arch, 1);
        let refused = (vec!["transformers-qwen3-vl-moe"], vec![]);
        for layout in ["awq", "gptq", CT] {
            assert_eq!(run(Target::Transformers, layout, &expert_linears()), refused, "{layout}");
            assert_eq!(
                run(Target::Transformers, layout, &[dense(), plain(expert_linears())].concat()),
                refused,
                "{layout}"
            );
        }
        let found = check(
            Target::Transformers,
            layout(CT).unwrap(),
            &scheme(4, 128, true).into(),
            &expert_linears(),
            &[arch.to_owned()],
            1,
        );
        assert_eq!(found[0].sites.len(), 6, "{found:?}");
        assert_eq!(run(Target::Transformers, CT, &dense()), NONE);
        assert_eq!(run(Target::Vllm, CT, &expert_linears()), NONE);
        assert_eq!(run(Target::LmdeployPytorch, "awq", &expert_linears()).0, ["lmdeploy-pytorch-experts"]);
        assert_eq!(run(Target::TurboMind, CT, &expert_linears()).0, ["turbomind-architecture"]);
    }
}
