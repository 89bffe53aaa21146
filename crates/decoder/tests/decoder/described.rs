//! Families that files describe, beside those that are built in.

use lite_decoder::{Architecture, DecoderSpec, ErrorKind, FAMILIES, WRAPPERS};
use serde_json::{Map, Value, json};

fn register(file: Value) -> Result<(), String> {
    let architecture: Architecture = serde_json::from_value(file).unwrap();
    architecture.register("00").map_err(|error| error.to_string())
}

fn config(changes: Value) -> Map<String, Value> {
    let mut config = json!({"hidden_size": 64, "intermediate_size": 96, "vocab_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2});
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config.as_object().unwrap().clone()
}

#[test]
fn a_described_model_type_shadows_no_built_in_one() {
    register(json!({"architecture": "TernForCausalLM", "model_type": "granite", "extends": "LlamaForCausalLM"}))
        .unwrap();
    register(json!({"architecture": "PloverForCausalLM", "model_type": "plover", "extends": "LlamaForCausalLM"}))
        .unwrap();
    let arch = |changes| DecoderSpec::from_config(&config(changes)).map(|spec| spec.arch);
    // Nothing but `model_type`: what it is without a file.
    assert_eq!(arch(json!({"model_type": "granite"})).unwrap(), "GraniteForCausalLM");
    assert_eq!(arch(json!({"model_type": "plover"})).unwrap(), "PloverForCausalLM");
    for (architecture, model_type) in [
        ("GraniteForCausalLM", "granite"),
        ("TernForCausalLM", "granite"),
        ("TernForCausalLM", "unheard-of"),
        ("PloverForCausalLM", "plover"),
    ] {
        let found = arch(json!({"architectures": [architecture], "model_type": model_type})).unwrap();
        assert_eq!(found, architecture, "{model_type}");
    }
    // The type of another family is that of the built-in one, and told so.
    let error = arch(json!({"architectures": ["LlamaForCausalLM"], "model_type": "granite"})).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Input);
    assert!(error.to_string().contains("which belongs to `GraniteForCausalLM`"), "{error}");
}

#[test]
fn no_built_in_name_is_described_again() {
    let inner = ["Qwen2VLTextModel", "Qwen2_5_VLTextModel", "Qwen3VLTextModel", "Qwen3VLMoeTextModel"];
    let all = FAMILIES.iter().map(|f| f.architecture).chain(WRAPPERS.iter().map(|w| w.architecture)).chain(inner);
    for name in all {
        let file = json!({"architecture": name, "model_type": "mine", "extends": "LlamaForCausalLM"});
        let message = register(file).unwrap_err();
        assert!(message.contains(&format!("`architecture` is `{name}`, which is known without a file")), "{message}");
    }
}

#[test]
fn two_norms_of_a_block_have_two_names() {
    let told = |names: Value| {
        register(json!({"architecture": "KiteForCausalLM", "model_type": "kite", "extends": "Gemma3ForCausalLM",
            "names": names}))
        .unwrap_err()
    };
    for (names, wanted) in [
        (json!({"attn_norm": "ln", "attn_out_norm": "ln"}), "`names.attn_out_norm` gives the norm `ln`"),
        (json!({"mlp_out_norm": "input_layernorm"}), "`names.mlp_out_norm` gives the norm `input_layernorm`"),
        (json!({"attn_norm": "pre_feedforward_layernorm"}), "`names.attn_norm` gives"),
        (json!({"q_norm": "k_norm"}), "`names.q_norm` gives the norm `self_attn.k_norm`"),
        (json!({"attn_norm": "self_attn.q_norm"}), "`names.attn_norm` gives the norm `self_attn.q_norm`"),
    ] {
        let message = told(names.clone());
        assert!(message.contains(wanted), "{names}: {message}");
    }
    register(json!({"architecture": "KiteForCausalLM", "model_type": "kite", "extends": "Gemma3ForCausalLM",
        "names": {"attn_norm": "pre_feedforward_layernorm", "mlp_norm": "input_layernorm", "attn_out_norm": "none"}}))
    .unwrap();
}

#[test]
fn names_that_latent_attention_would_not_read_are_refused() {
    let told = |names: Value| {
        let file = json!({"architecture": "SkuaForCausalLM", "model_type": "skua", "extends": "DeepseekV3ForCausalLM",
            "names": names});
        register(file)
    };
    for key in ["o", "q_norm", "k_norm", "qkv"] {
        let value = if key == "qkv" { json!({"stacked": "x"}) } else { json!("x") };
        let message = told(json!({key: value})).unwrap_err();
        assert!(message.contains(&format!("`names.{key}` is here, and DeepseekV3ForCausalLM has latent")), "{message}");
    }
    told(json!({"attn": "attention", "attn_norm": "ln"})).unwrap();
}
