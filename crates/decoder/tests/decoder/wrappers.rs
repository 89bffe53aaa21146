//! Decoders inside vision-language models: found by their section and their names, and equal to transformers' on text.

use std::collections::BTreeSet;

use lite_decoder::{AttnSpec, DecoderSpec, ErrorKind, WRAPPERS};
use serde_json::{Value, json};

use crate::fixture::{Fixture, object, root};

/// Fixture, and the names of embedding and head in it.
const CASES: &[(&str, &str, &str)] = &[
    ("gemma3-vision", "language_model.model.embed_tokens.weight", "language_model.lm_head"),
    ("internvl", "language_model.model.embed_tokens.weight", "language_model.lm_head"),
    ("internvl-hf", "language_model.model.embed_tokens.weight", "language_model.lm_head"),
    ("llava", "language_model.model.embed_tokens.weight", "language_model.lm_head"),
    ("qwen2-vl", "model.embed_tokens.weight", "lm_head"),
    ("qwen2_5-vl", "model.embed_tokens.weight", "lm_head"),
    ("qwen2_5-vl-sections", "model.embed_tokens.weight", "lm_head"),
    ("qwen3-vl", "model.language_model.embed_tokens.weight", "lm_head"),
    ("qwen3-vl-moe", "model.language_model.embed_tokens.weight", "lm_head"),
];

#[test]
fn logits_of_text_agree_with_transformers() {
    for (case, embed, head) in CASES {
        let fixture = Fixture::open_in("wrappers", case);
        assert_eq!((fixture.spec.embed.weight.as_str(), fixture.spec.head.module.as_str()), (*embed, *head));
        for batch in &fixture.batches {
            let logits = fixture.logits(&batch.windows);
            let worst = logits.iter().zip(&batch.logits).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            eprintln!("{case:20} largest difference {worst:.1e}");
            assert!(logits.len() == batch.logits.len() && worst <= 1e-4, "{case}: {worst}");
        }
        // What is named is there, once; what is left is the vision part.
        let needed: BTreeSet<String> = fixture.spec.tensors().into_iter().map(|need| need.name).collect();
        let left: Vec<&String> = fixture.weights.tensors.keys().filter(|name| !needed.contains(*name)).collect();
        assert!(needed.iter().all(|name| fixture.weights.tensors.contains_key(name)), "{case}");
        let vision = ["visual.", "vision_tower.", "vision_model.", "multi_modal_projector.", "mlp1."];
        assert!(
            !left.is_empty() && left.iter().all(|name| vision.iter().any(|v| name.contains(v))),
            "{case}: {left:?}"
        );
        fixture.spec.check_tensors(&|name| Some(fixture.weights.tensors.get(name)?.0.clone())).unwrap();
    }
    let found: BTreeSet<String> = std::fs::read_dir(root().join("tests/fixtures/wrappers"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.ends_with(".md"))
        .collect();
    assert_eq!(found, CASES.iter().map(|(case, ..)| (*case).to_owned()).collect());
}

#[test]
fn names_are_those_of_the_checkpoint() {
    let config = object(&root().join("tests/fixtures/wrappers/llava/config.json"));
    let inside = "model.language_model.embed_tokens.weight";
    let spec = DecoderSpec::from_config_for(&config, &|name| name == inside).unwrap();
    assert_eq!((spec.embed.weight.as_str(), spec.head.weight.as_str()), (inside, "lm_head.weight"));
    assert_eq!(spec.sites().next().unwrap().module, "model.language_model.layers.0.self_attn.q_proj");
    // As published, where nothing is known of the tensors.
    assert_eq!(DecoderSpec::from_config(&config).unwrap().head.weight, "language_model.lm_head.weight");
}

#[test]
fn sections_may_leave_sizes_to_their_class() {
    // LLaVA 1.5 and Gemma 3 4B as they are published, shortened.
    let llava = json!({"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": {
        "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096, "model_type": "llama",
        "rms_norm_eps": 1e-5, "torch_dtype": "float16", "vocab_size": 32064}, "vision_config": {}});
    let spec = DecoderSpec::from_config(llava.as_object().unwrap()).unwrap();
    assert_eq!(
        (spec.hidden, spec.vocab, spec.blocks.len(), spec.arch.as_str()),
        (4096, 32_064, 32, "LlamaForCausalLM")
    );
    let gemma = json!({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
        "torch_dtype": "bfloat16", "text_config": {"hidden_size": 2560, "intermediate_size": 10240,
        "model_type": "gemma3_text", "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024}, "vision_config": {}});
    let spec = DecoderSpec::from_config(gemma.as_object().unwrap()).unwrap();
    assert_eq!((spec.hidden, spec.vocab, spec.blocks.len(), spec.head.tied), (2560, 262_208, 34, true));
    // √2560 as bfloat16 has it.
    assert_eq!(spec.embed.scale, 50.5);
}

/// Qwen3-VL-30B-A3B's keys as they are published: other names than transformers 5 writes, for the same.
#[test]
fn qwen3_vl_moe_as_published() {
    let saved = object(&root().join("tests/fixtures/wrappers/qwen3-vl-moe/config.json"));
    let mut published = saved.clone();
    let text = published["text_config"].as_object_mut().unwrap();
    let rope = text.shift_remove("rope_parameters").unwrap();
    let experts = text.shift_remove("num_local_experts").unwrap();
    assert_eq!(text.shift_remove("tie_word_embeddings"), Some(true.into()));
    let scaling = json!({"mrope_interleaved": true, "mrope_section": [4, 2, 2], "rope_type": "default"});
    text.insert("rope_theta".into(), rope["rope_theta"].clone());
    text.insert("rope_scaling".into(), scaling);
    text.insert("num_experts".into(), experts);
    text.insert("norm_topk_prob".into(), true.into());
    let read = |config| DecoderSpec::from_config(config).unwrap();
    assert_eq!(read(&published), read(&saved));
    let spec = read(&saved);
    // What the whole model says, not the section's default.
    assert!(!spec.head.tied);
    let moe = spec.blocks[1].moe().unwrap();
    assert!(moe.router.normalize && moe.experts == 5 && moe.top_k == 2);
    assert_eq!(moe.router.weight, "model.language_model.layers.1.mlp.gate.weight");
}

/// What Qwen's classes of the text part have where a section says nothing (transformers 5.17); they are not those of the
/// same decoder alone.
#[test]
fn sections_have_the_defaults_of_their_own_class() {
    for (architecture, model_type, layers, kv_heads, theta, eps, positions) in [
        ("Qwen2VLForConditionalGeneration", "qwen2_vl", 80, 8, 1e6, 1e-5f32, 32_768),
        ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", 80, 8, 1e6, 1e-5, 32_768),
        ("Qwen3VLForConditionalGeneration", "qwen3_vl", 32, 32, 5e5, 1e-6, 128_000),
        ("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", 24, 16, 5e5, 1e-6, 128_000),
    ] {
        let mut text = json!({"model_type": format!("{model_type}_text")});
        if model_type == "qwen3_vl_moe" {
            text["num_experts"] = 4.into();
            text["num_experts_per_tok"] = 2.into();
            text["moe_intermediate_size"] = 64.into();
        }
        let config = json!({"architectures": [architecture], "model_type": model_type, "text_config": text});
        let spec = DecoderSpec::from_config(config.as_object().unwrap()).unwrap();
        let AttnSpec::Gqa(attn) = &spec.blocks[0].attn else { panic!("not grouped-query attention") };
        let found = (spec.blocks.len(), attn.kv_heads, spec.rope.theta, spec.final_norm.eps, spec.max_positions);
        assert_eq!(found, (layers, kv_heads, theta, eps, positions), "{architecture}");
        let sizes = (spec.hidden, spec.vocab, attn.heads, attn.head_dim);
        let wanted = match model_type {
            "qwen2_vl" | "qwen2_5_vl" => (8192, 152_064, 64, 128),
            "qwen3_vl" => (4096, 151_936, 32, 128),
            _ => (2048, 151_936, 16, 128),
        };
        assert_eq!(sizes, wanted, "{architecture}");
    }
    // The older files, without a section, have the same class.
    let windows = |first: Value| {
        let config = json!({"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl",
            "hidden_size": 64, "intermediate_size": 96, "vocab_size": 32, "num_hidden_layers": 40,
            "num_attention_heads": 8, "use_sliding_window": true, "max_window_layers": first});
        let spec = DecoderSpec::from_config(config.as_object().unwrap()).unwrap();
        assert_eq!((spec.rope.theta, spec.final_norm.eps), (1e6, 1e-5));
        spec.blocks.iter().filter(|block| matches!(&block.attn, AttnSpec::Gqa(attn) if attn.window.is_some())).count()
    };
    assert_eq!((windows(Value::Null), windows(28.into())), (0, 12), "80 by default");
}

/// Which `tie_word_embeddings` counts: that of the whole and that of the section, absent or not, as transformers 5.17 resolves
/// them in each model's configuration class (InternVLChatModel: as its published code does).
#[test]
fn ties_are_those_of_the_models_class() {
    let text = json!({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "vocab_size": 32,
        "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8});
    let experts = json!({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64});
    let (no, yes) = (Some(false), Some(true));
    let cases = [(None, None), (None, no), (None, yes), (no, None), (no, yes), (yes, None), (yes, no)];
    // The results of these cases, in order.
    let either = [false, false, true, false, true, true, true];
    let whole_false = [false, false, false, false, false, true, true];
    let whole_true = [true, true, true, false, false, true, true];
    let section = [false, false, true, false, true, false, false];
    for (architecture, section_type, key, wanted) in [
        ("Qwen2VLForConditionalGeneration", "qwen2_vl_text", "text_config", either),
        ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl_text", "text_config", either),
        ("LlavaForConditionalGeneration", "qwen2", "text_config", either),
        ("Qwen3VLForConditionalGeneration", "qwen3_vl_text", "text_config", whole_false),
        ("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe_text", "text_config", whole_false),
        ("Gemma3ForConditionalGeneration", "gemma3_text", "text_config", whole_true),
        ("InternVLForConditionalGeneration", "qwen2", "text_config", whole_true),
        ("InternVLChatModel", "qwen2", "llm_config", section),
    ] {
        let config = |(whole, own): (Option<bool>, Option<bool>)| {
            let mut text = text.clone();
            text["model_type"] = section_type.into();
            if section_type == "qwen3_vl_moe_text" {
                text.as_object_mut().unwrap().extend(experts.as_object().unwrap().clone());
            }
            let tie = "tie_word_embeddings";
            let mut config = json!({"architectures": [architecture]});
            own.into_iter().for_each(|own| text[tie] = own.into());
            whole.into_iter().for_each(|whole| config[tie] = whole.into());
            config[key] = text;
            config.as_object().unwrap().clone()
        };
        let found = cases.map(|case| DecoderSpec::from_config(&config(case)).unwrap().head.tied);
        assert_eq!(found, wanted, "{architecture}");
        // A checkpoint with a head of its own is not tied by a default, only by a key.
        let with_head = |case| {
            let spec = DecoderSpec::from_config_for(&config(case), &|name| name.ends_with("lm_head.weight")).unwrap();
            assert!(!spec.head.tied || !spec.head.weight.contains("lm_head"));
            spec.head.tied
        };
        assert!(!with_head((None, no)), "{architecture}");
        assert_eq!(with_head((yes, yes)), wanted[6] || wanted[4], "{architecture}");
    }
    // Older files have the keys of the decoder at the top.
    for (whole, tied) in [(Value::Null, false), (false.into(), false), (true.into(), true)] {
        let mut flat = text.clone();
        flat["architectures"] = json!(["Qwen2VLForConditionalGeneration"]);
        flat["model_type"] = "qwen2_vl".into();
        flat["tie_word_embeddings"] = whole;
        assert_eq!(DecoderSpec::from_config(flat.as_object().unwrap()).unwrap().head.tied, tied);
    }
}

#[test]
fn a_section_that_is_not_there_is_named() {
    for wrapper in WRAPPERS {
        let config = json!({"architectures": [wrapper.architecture], "model_type": wrapper.model_type});
        let error = DecoderSpec::from_config(config.as_object().unwrap()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Input, "{error}");
        let message = error.to_string();
        assert!(["text_config", "llm_config", "hidden_size"].iter().any(|key| message.contains(key)), "{message}");
        let mut config = config;
        for key in ["text_config", "llm_config"] {
            config[key] = json!({"architectures": ["MambaForCausalLM"], "model_type": "mamba"});
        }
        assert!(DecoderSpec::from_config(config.as_object().unwrap()).is_err());
        config["text_config"] = Value::from(7);
        config["llm_config"] = Value::from(7);
        assert!(
            DecoderSpec::from_config(config.as_object().unwrap()).unwrap_err().to_string().contains("_config` is 7")
        );
    }
}
