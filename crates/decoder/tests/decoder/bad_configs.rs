//! Configurations that make no sense end in an error that names the key, never in a panic.

use lite_decoder::{DecoderSpec, ErrorKind, RopeScaling};
use serde_json::{Map, Value, json};

fn llama() -> Map<String, Value> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    });
    config.as_object().unwrap().clone()
}

fn with(changes: Value) -> Map<String, Value> {
    let mut config = llama();
    for (key, value) in changes.as_object().unwrap() {
        config.insert(key.clone(), value.clone());
    }
    config
}

/// The message for `config`, which must hold every one of `parts`.
fn refused(config: &Map<String, Value>, kind: ErrorKind, parts: &[&str]) {
    let error = match DecoderSpec::from_config(config) {
        Ok(_) => panic!("accepted: {config:?}"),
        Err(error) => error,
    };
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in `{message}`");
    }
    assert_eq!(error.kind(), kind, "{message}");
}

#[test]
fn sizes_are_checked() {
    DecoderSpec::from_config(&llama()).unwrap();
    let keys = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"];
    let optional = ["num_key_value_heads", "max_position_embeddings", "head_dim"];
    for key in keys.iter().chain(&optional) {
        for bad in [
            json!(0),
            json!(-4),
            json!(1_000_000_000_000_000_000u64),
            json!(1e18),
            json!(64.5),
            json!("64"),
            json!([64]),
            json!(true),
        ] {
            refused(
                &with(json!({ *key: bad.clone() })),
                ErrorKind::Input,
                &[&format!("`{key}` is {bad}"), "whole number"],
            );
        }
    }
    for key in keys {
        let mut config = llama();
        config.remove(key);
        refused(&config, ErrorKind::Input, &[&format!("`{key}` is missing")]);
    }
}

#[test]
fn contradictions_are_named() {
    let table = [
        (json!({"num_key_value_heads": 3}), vec!["`num_attention_heads` is 4", "`num_key_value_heads`, 3"]),
        (json!({"num_key_value_heads": 8}), vec!["`num_attention_heads` is 4", "`num_key_value_heads`, 8"]),
        (json!({"hidden_size": 66}), vec!["`hidden_size` is 66", "`num_attention_heads`, 4"]),
        (json!({"head_dim": 15}), vec!["`head_dim` 15", "even"]),
        (json!({"num_hidden_layers": 10_001}), vec!["`num_hidden_layers` is 10001", "10000"]),
        (json!({"num_hidden_layers": 10_000, "intermediate_size": 1_000_000}), vec!["`num_hidden_layers` ×"]),
        (json!({"head_dim": 1_048_576}), vec!["`num_attention_heads` times `head_dim`"]),
        (json!({"rms_norm_eps": -1e-5}), vec!["`rms_norm_eps` is -"]),
        (json!({"rms_norm_eps": "1e-5"}), vec!["`rms_norm_eps` is \"1e-5\"", "a number"]),
        (json!({"tie_word_embeddings": "yes"}), vec!["`tie_word_embeddings` is \"yes\"", "true or false"]),
        (json!({"attention_bias": 1}), vec!["`attention_bias` is 1"]),
        (json!({"hidden_act": 3}), vec!["`hidden_act` is 3", "a string"]),
        (json!({"rope_theta": 0}), vec!["`rope_theta` is 0"]),
        (json!({"rope_theta": 1}), vec!["`rope_theta` is 1"]),
        (json!({"rope_theta": "big\u{1b}[2J"}), vec!["`rope_theta` is \"big\\u001b[2J\""]),
        (json!({"rope_scaling": "linear"}), vec!["`rope_scaling` is \"linear\"", "an object"]),
        (json!({"rope_scaling": {"type": "linear"}}), vec!["`rope_scaling.factor` is missing"]),
        (json!({"rope_scaling": {"type": "linear", "factor": 0}}), vec!["`rope_scaling.factor` is 0"]),
        (json!({"rope_parameters": {"rope_type": "dynamic", "factor": []}}), vec!["`rope_parameters.factor` is []"]),
        (json!({"rope_parameters": {"rope_theta": null, "rope_type": 7}}), vec!["`rope_parameters.rope_type` is 7"]),
        (
            json!({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}}),
            vec!["`rope_scaling.high_freq_factor` is 4", "more than"],
        ),
        (
            json!({"rope_scaling": {"type": "longrope", "short_factor": [1, 2], "long_factor": [1, 2]}}),
            vec!["`rope_scaling.short_factor` is [1,2]", "8 numbers"],
        ),
        (
            json!({"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 0}}),
            vec!["`rope_scaling.original_max_position_embeddings` is 0"],
        ),
        (json!({"layer_types": ["full_attention"]}), vec!["`layer_types`", "each of the 2 layers"]),
        (json!({"layer_types": ["full_attention", "sliding_attention"]}), vec!["`layer_types[1]`", "LlamaForCausalLM"]),
    ];
    for (changes, parts) in table {
        refused(&with(changes), ErrorKind::Input, &parts);
    }
}

#[test]
fn what_is_not_implemented_is_said_so() {
    let table = [
        (json!({"hidden_act": "gelu"}), vec!["`hidden_act` is \"gelu\"", "silu"]),
        (json!({"rope_scaling": {"rope_type": "mrope"}}), vec!["`rope_scaling.rope_type` is \"mrope\"", "longrope"]),
        (json!({"partial_rotary_factor": 0.5}), vec!["`partial_rotary_factor` is 0.5"]),
        (json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), vec!["`rope_parameters.partial_rotary_factor`"]),
        (json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}), vec!["one set of rotary parameters"]),
        (json!({"layer_types": ["full_attention", "chunked_attention"]}), vec!["`layer_types`", "sliding_attention"]),
        (
            json!({"hidden_size": 8, "rope_scaling": {"type": "dynamic", "factor": 2}}),
            vec!["`rope_scaling.type` is \"dynamic\""],
        ),
    ];
    for (changes, parts) in table {
        refused(&with(changes), ErrorKind::Unsupported, &parts);
    }
    let phi = json!({"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2}});
    refused(&with(phi), ErrorKind::Unsupported, &["`rope_scaling.type` is \"linear\"", "default, longrope"]);
}

#[test]
fn architectures_must_be_clear() {
    let known = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM";
    let unknown = json!({"architectures": ["MambaForCausalLM"], "model_type": "mamba"});
    refused(&with(unknown), ErrorKind::Unsupported, &["`MambaForCausalLM`", known, "--calib-samples 0"]);
    let two = json!({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]});
    refused(&with(two), ErrorKind::Input, &["2 names (LlamaForCausalLM, MistralForCausalLM)", "wanted one"]);
    refused(&with(json!({"architectures": "LlamaForCausalLM"})), ErrorKind::Input, &["`architectures`", "a list"]);
    refused(&with(json!({"architectures": [null]})), ErrorKind::Input, &["`architectures` is [null]"]);
    refused(&with(json!({"model_type": "qwen2"})), ErrorKind::Input, &["`model_type` is `qwen2`", "correct one"]);
    refused(&with(json!({"architectures": [], "model_type": "gpt2"})), ErrorKind::Input, &["`gpt2`", known]);
    refused(&with(json!({"architectures": null, "model_type": null})), ErrorKind::Input, &["neither", known]);
    refused(&Map::new(), ErrorKind::Input, &["neither", known]);
    for absent in [json!(null), json!([])] {
        let spec = DecoderSpec::from_config(&with(json!({"architectures": absent, "model_type": "qwen3"}))).unwrap();
        assert_eq!(spec.arch, "Qwen3ForCausalLM");
    }
    // An unknown `model_type` beside a known architecture is how derived models are published.
    DecoderSpec::from_config(&with(json!({"model_type": "Yi"}))).unwrap();
}

#[test]
fn absent_keys_mean_what_the_family_says() {
    let spec = DecoderSpec::from_config(&with(json!({"num_key_value_heads": null, "rope_theta": null}))).unwrap();
    assert_eq!((spec.sites().nth(1).unwrap().out_features, spec.rope.theta), (64, 10_000.0));
    let windows = |changes: Value| {
        let spec = DecoderSpec::from_config(&with(changes)).unwrap();
        let window = |b: &lite_decoder::BlockSpec| match &b.attn {
            lite_decoder::AttnSpec::Gqa(attn) => attn.window,
            _ => panic!("not grouped-query attention"),
        };
        spec.blocks.iter().map(window).collect::<Vec<_>>()
    };
    let mistral = |extra: Value| {
        let mut changes = json!({"architectures": ["MistralForCausalLM"], "model_type": "mistral"});
        changes.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        windows(changes)
    };
    assert_eq!(mistral(json!({})), [Some(4096), Some(4096)]);
    assert_eq!(mistral(json!({"sliding_window": null})), [None, None]);
    assert_eq!(mistral(json!({"sliding_window": 12})), [Some(12), Some(12)]);
    let qwen = |extra: Value| {
        let mut changes = json!({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "sliding_window": 9});
        changes.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        windows(changes)
    };
    assert_eq!(qwen(json!({"max_window_layers": 0})), [None, None]);
    assert_eq!(qwen(json!({"max_window_layers": 1, "use_sliding_window": true})), [None, Some(9)]);
    let types = json!({"use_sliding_window": true, "layer_types": ["sliding_attention", "full_attention"]});
    assert_eq!(qwen(types), [Some(9), None]);
    let scaling = |changes: Value| DecoderSpec::from_config(&with(changes)).unwrap().rope;
    // What is inside `rope_parameters` wins over what is beside it; `rope_scaling` wins over both.
    let rope = scaling(json!({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}));
    assert_eq!((rope.theta, rope.scaling), (7.0, RopeScaling::Default));
    let both = json!({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "dynamic", "factor": 3}});
    assert_eq!(scaling(both).scaling, RopeScaling::Linear { factor: 2.0 });
    let phi = json!({"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "max_position_embeddings": 8192,
        "rope_scaling": {"type": "su", "short_factor": vec![1; 8], "long_factor": vec![2; 8]}});
    assert!(matches!(scaling(phi).scaling, RopeScaling::LongRope { original: 4096, .. }));
}
