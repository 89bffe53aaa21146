//! Specs of published configurations against the tensor names and shapes of the published checkpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lite_decoder::{DecoderError, DecoderSpec, FAMILIES, WRAPPERS};
use serde_json::{Map, Value};

use crate::fixture::{object, root};

/// Every config.json of the reference data, or nothing (with a notice) where the data is absent.
fn configs() -> Vec<PathBuf> {
    let dir = root().join("../shared/data/configs");
    let Ok(entries) = std::fs::read_dir(&dir) else {
        eprintln!("skipped: {} is absent", dir.display());
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path().join("config.json")).collect();
    if let Ok(entries) = std::fs::read_dir(dir.join("aiconfigurator-hf-configs")) {
        found.extend(
            entries.map(|entry| entry.unwrap().path()).filter(|p| p.to_string_lossy().ends_with("_config.json")),
        );
    }
    // Some were written by Python, whose `Infinity` is not JSON.
    found.retain(|path| path.is_file() && !std::fs::read_to_string(path).unwrap().contains("Infinity"));
    found.sort();
    found
}

fn number(config: &Map<String, Value>, key: &str) -> usize {
    config[key].as_u64().unwrap() as usize
}

/// Names and shapes as the families publish them, written down here without the crate's tables.
fn published(config: &Map<String, Value>) -> BTreeMap<String, Vec<usize>> {
    let n = |key| number(config, key);
    let (h, m, v) = (n("hidden_size"), n("intermediate_size"), n("vocab_size"));
    let heads = n("num_attention_heads");
    let kv = config.get("num_key_value_heads").map_or(heads, |v| v.as_u64().unwrap() as usize);
    let d = config.get("head_dim").map_or(h / heads, |v| v.as_u64().unwrap() as usize);
    let family = config["model_type"].as_str().unwrap();
    let gemma = family.starts_with("gemma");
    let tied = config.get("tie_word_embeddings").map_or(gemma, |tied| tied == &Value::Bool(true));
    let mut out = BTreeMap::new();
    let mut add = |name: String, shape: &[usize]| assert!(out.insert(name, shape.to_vec()).is_none());
    for i in 0..n("num_hidden_layers") {
        let p = format!("model.layers.{i}");
        if ["deepseek_v3", "kimi_k2"].contains(&family) {
            deepseek_v3_layer(config, i).into_iter().for_each(|(name, shape)| add(name, &shape));
            continue;
        }
        if family == "internlm2" {
            add(format!("{p}.attention.wqkv.weight"), &[(heads + 2 * kv) * d, h]);
            add(format!("{p}.attention.wo.weight"), &[h, heads * d]);
            add(format!("{p}.feed_forward.w1.weight"), &[m, h]);
            add(format!("{p}.feed_forward.w3.weight"), &[m, h]);
            add(format!("{p}.feed_forward.w2.weight"), &[h, m]);
            add(format!("{p}.attention_norm.weight"), &[h]);
            add(format!("{p}.ffn_norm.weight"), &[h]);
            continue;
        }
        add(format!("{p}.input_layernorm.weight"), &[h]);
        add(format!("{p}.post_attention_layernorm.weight"), &[h]);
        add(format!("{p}.self_attn.o_proj.weight"), &[h, heads * d]);
        if gemma {
            add(format!("{p}.pre_feedforward_layernorm.weight"), &[h]);
            add(format!("{p}.post_feedforward_layernorm.weight"), &[h]);
        }
        if family == "mixtral" {
            add(format!("{p}.block_sparse_moe.gate.weight"), &[n("num_local_experts"), h]);
            for e in 0..n("num_local_experts") {
                for (name, shape) in [("w1", [m, h]), ("w2", [h, m]), ("w3", [m, h])] {
                    add(format!("{p}.block_sparse_moe.experts.{e}.{name}.weight"), &shape);
                }
            }
        } else if family == "gpt_oss" {
            // As the checkpoint reader presents the experts, which are published fused.
            add(format!("{p}.self_attn.sinks"), &[heads]);
            add(format!("{p}.self_attn.o_proj.bias"), &[h]);
            add(format!("{p}.mlp.router.weight"), &[n("num_local_experts"), h]);
            add(format!("{p}.mlp.router.bias"), &[n("num_local_experts")]);
            for e in 0..n("num_local_experts") {
                for (name, shape) in [("gate", [m, h]), ("up", [m, h]), ("down", [h, m])] {
                    add(format!("{p}.mlp.experts.{e}.{name}_proj.weight"), &shape);
                    add(format!("{p}.mlp.experts.{e}.{name}_proj.bias"), &shape[..1]);
                }
            }
        } else if family == "qwen3_moe" {
            let width = n("moe_intermediate_size");
            add(format!("{p}.mlp.gate.weight"), &[n("num_experts"), h]);
            for e in 0..n("num_experts") {
                for (name, shape) in [("gate", [width, h]), ("up", [width, h]), ("down", [h, width])] {
                    add(format!("{p}.mlp.experts.{e}.{name}_proj.weight"), &shape);
                }
            }
        } else {
            add(format!("{p}.mlp.down_proj.weight"), &[h, m]);
        }
        if family == "phi3" {
            add(format!("{p}.self_attn.qkv_proj.weight"), &[(heads + 2 * kv) * d, h]);
            add(format!("{p}.mlp.gate_up_proj.weight"), &[2 * m, h]);
            continue;
        }
        if !["mixtral", "qwen3_moe", "gpt_oss"].contains(&family) {
            add(format!("{p}.mlp.gate_proj.weight"), &[m, h]);
            add(format!("{p}.mlp.up_proj.weight"), &[m, h]);
        }
        for (name, count) in [("q", heads), ("k", kv), ("v", kv)] {
            add(format!("{p}.self_attn.{name}_proj.weight"), &[count * d, h]);
            if ["qwen2", "gpt_oss"].contains(&family) {
                add(format!("{p}.self_attn.{name}_proj.bias"), &[count * d]);
            }
        }
        if ["qwen3", "qwen3_moe", "gemma3_text"].contains(&family) {
            add(format!("{p}.self_attn.q_norm.weight"), &[d]);
            add(format!("{p}.self_attn.k_norm.weight"), &[d]);
        }
    }
    add("model.norm.weight".into(), &[h]);
    let (embed, head) = if family == "internlm2" { ("tok_embeddings", "output") } else { ("embed_tokens", "lm_head") };
    add(format!("model.{embed}.weight"), &[v, h]);
    if !tied {
        add(format!("{head}.weight"), &[v, h]);
    }
    out
}

/// One layer of DeepSeek-V3, R1 or Kimi K2.
fn deepseek_v3_layer(config: &Map<String, Value>, layer: usize) -> Vec<(String, Vec<usize>)> {
    let n = |key| number(config, key);
    let (h, heads, rope) = (n("hidden_size"), n("num_attention_heads"), n("qk_rope_head_dim"));
    let (q, kv, nope, value) = (n("q_lora_rank"), n("kv_lora_rank"), n("qk_nope_head_dim"), n("v_head_dim"));
    let mut out = vec![
        ("input_layernorm".to_owned(), vec![h]),
        ("post_attention_layernorm".to_owned(), vec![h]),
        ("self_attn.q_a_proj".to_owned(), vec![q, h]),
        ("self_attn.q_a_layernorm".to_owned(), vec![q]),
        ("self_attn.q_b_proj".to_owned(), vec![heads * (nope + rope), q]),
        ("self_attn.kv_a_proj_with_mqa".to_owned(), vec![kv + rope, h]),
        ("self_attn.kv_a_layernorm".to_owned(), vec![kv]),
        ("self_attn.kv_b_proj".to_owned(), vec![heads * (nope + value), kv]),
        ("self_attn.o_proj".to_owned(), vec![h, heads * value]),
    ];
    let mut mlp = |module: String, width: usize| {
        for (name, shape) in [("gate", [width, h]), ("up", [width, h]), ("down", [h, width])] {
            out.push((format!("{module}.{name}_proj"), shape.to_vec()));
        }
    };
    let (experts, width) = (n("n_routed_experts"), n("moe_intermediate_size"));
    let sparse = layer >= n("first_k_dense_replace");
    if sparse {
        (0..experts).for_each(|e| mlp(format!("mlp.experts.{e}"), width));
        mlp("mlp.shared_experts".to_owned(), n("n_shared_experts") * width);
        out.push(("mlp.gate".to_owned(), vec![experts, h]));
    } else {
        mlp("mlp".to_owned(), n("intermediate_size"));
    }
    let p = format!("model.layers.{layer}");
    let mut out: Vec<_> = out.into_iter().map(|(name, shape)| (format!("{p}.{name}.weight"), shape)).collect();
    if sparse {
        out.push((format!("{p}.mlp.gate.e_score_correction_bias"), vec![experts]));
    }
    out
}

/// Whether the file describes a model around a decoder that is known.
fn is_wrapper(config: &Map<String, Value>) -> bool {
    let name = config.get("architectures").and_then(|a| a[0].as_str());
    name.is_some_and(|name| WRAPPERS.iter().any(|wrapper| wrapper.architecture == name))
}

#[test]
fn decoders_inside_published_models_are_found() {
    let mut tested = 0;
    for path in configs() {
        let config = object(&path);
        if !is_wrapper(&config) {
            continue;
        }
        let spec = DecoderSpec::from_config(&config).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let text =
            ["text_config", "llm_config"].iter().find_map(|key| config.get(*key)?.as_object()).unwrap_or(&config);
        assert_eq!(spec.blocks.len(), number(text, "num_hidden_layers"), "{}", path.display());
        assert_eq!((spec.hidden, spec.vocab), (number(text, "hidden_size"), number(text, "vocab_size")));
        assert!(
            spec.tensors().iter().all(|need| need.name.contains("language_model") || need.name == "lm_head.weight")
        );
        tested += 1;
    }
    assert!(tested > 2 || configs().is_empty(), "{tested}");
}

fn is_known(config: &Map<String, Value>) -> bool {
    match config.get("architectures").and_then(|a| a[0].as_str()) {
        Some(name) => FAMILIES.iter().any(|f| f.architecture == name),
        None => FAMILIES.iter().any(|f| config.get("model_type").and_then(Value::as_str) == Some(f.model_type)),
    }
}

#[test]
fn specs_name_the_published_tensors() {
    let mut tested = 0;
    for path in configs() {
        let mut config = object(&path);
        if !is_known(&config) {
            continue;
        }
        // One of the files is an excerpt.
        config.entry("vocab_size").or_insert(151_936.into());
        let spec = DecoderSpec::from_config(&config).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let needed: BTreeMap<String, Vec<usize>> = spec.tensors().into_iter().map(|n| (n.name, n.shape)).collect();
        let published = published(&config);
        let apart: Vec<_> = needed.iter().filter(|(name, shape)| published.get(*name) != Some(shape)).take(3).collect();
        let lost: Vec<_> = published.keys().filter(|name| !needed.contains_key(*name)).take(3).collect();
        assert!(apart.is_empty() && lost.is_empty(), "{}: {apart:?}, {lost:?}", path.display());
        assert_eq!(spec.max_positions, number(&config, "max_position_embeddings"));
        let linears: Vec<String> = spec.sites().map(|site| format!("{}.weight", site.module)).collect();
        assert!(linears.iter().all(|name| needed.contains_key(name)), "{}", path.display());
        assert!(spec.sites().all(|site| spec.site(site.id) == Some(site)));
        spec.check_tensors(&|name| needed.get(name).cloned()).unwrap();
        tested += 1;
    }
    eprintln!("{tested} configurations");
    assert!(tested > 0 || configs().is_empty());
}

#[test]
fn other_architectures_are_named_in_the_error() {
    for path in configs() {
        let config = object(&path);
        if !config.contains_key("architectures") || is_known(&config) || is_wrapper(&config) {
            continue;
        }
        let name = config["architectures"][0].as_str().unwrap();
        let error = DecoderSpec::from_config(&config).unwrap_err();
        assert_eq!(error.kind(), lite_decoder::ErrorKind::Unsupported, "{}", path.display());
        let message = error.to_string();
        assert!(message.contains(name) && message.contains("InternLM3ForCausalLM"), "{message}");
        assert!(message.contains("--calib-samples 0"), "{message}");
    }
}

#[test]
fn the_index_of_internlm3_holds_what_the_spec_names() {
    let dir = root().join("../shared/data/configs/internlm3-8b-instruct");
    if !Path::new(&dir).is_dir() {
        eprintln!("skipped: {} is absent", dir.display());
        return;
    }
    let spec = DecoderSpec::from_config(&object(&dir.join("config.json"))).unwrap();
    let index = object(&dir.join("model.safetensors.index.json"));
    let listed: BTreeSet<String> = index["weight_map"].as_object().unwrap().keys().cloned().collect();
    assert_eq!(spec.tensors().into_iter().map(|n| n.name).collect::<BTreeSet<_>>(), listed);
}

#[test]
fn fused_groups_are_those_of_the_engines() {
    let fixture = crate::fixture::Fixture::open("qwen3");
    let groups: Vec<&str> = fixture.spec.blocks[1].sites.iter().map(|site| site.fused_group.as_str()).collect();
    let (qkv, gate_up) = ("model.layers.1.self_attn.qkv", "model.layers.1.mlp.gate_up");
    let (o, down) = ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj");
    assert_eq!(groups, [qkv, qkv, qkv, o, gate_up, gate_up, down]);
    let fixture = crate::fixture::Fixture::open("phi3");
    assert!(fixture.spec.sites().all(|site| site.fused_group == site.module));
}

#[test]
fn checkpoints_that_disagree_with_the_config_are_explained() {
    let fixture = crate::fixture::Fixture::open("qwen2");
    let shapes: BTreeMap<String, Vec<usize>> = fixture.spec.tensors().into_iter().map(|n| (n.name, n.shape)).collect();
    let check = |shapes: &BTreeMap<String, Vec<usize>>| fixture.spec.check_tensors(&|name| shapes.get(name).cloned());
    check(&shapes).unwrap();

    let mut fewer = shapes.clone();
    fewer.retain(|name, _| !name.contains("layers.1."));
    let message = check(&fewer).unwrap_err().to_string();
    assert!(message.contains("lacks 12 of the 26 tensors"), "{message}");
    assert!(message.contains("`model.layers.1.input_layernorm.weight`") && message.contains('…'), "{message}");

    let mut wrong = shapes.clone();
    wrong.insert("model.layers.1.mlp.up_proj.weight".into(), vec![65, 64]);
    wrong.insert("model.layers.1.mlp.down_proj.weight".into(), vec![64, 65]);
    let error = check(&wrong).unwrap_err();
    assert!(matches!(&error, DecoderError::Shape { tensor, .. } if tensor == "model.layers.1.mlp.up_proj.weight"));
    let message = error.to_string();
    assert!(message.contains("[65, 64], wanted [64, 64]"), "{message}");
    assert!(message.contains("`intermediate_size`") && message.contains("1 more"), "{message}");

    let mut more = shapes;
    more.insert("model.layers.2.self_attn.q_proj.weight".into(), vec![64, 64]);
    let message = check(&more).unwrap_err().to_string();
    assert!(message.contains("`model.layers.2.self_attn.q_proj.weight`, but `num_hidden_layers` is 2"), "{message}");
}
