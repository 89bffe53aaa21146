//! Routers, experts and latents that config.json and the checkpoint do not agree on.

use std::collections::BTreeMap;

use lite_decoder::{AttnSpec, DecoderError, DecoderSpec, ErrorKind, Glu, RopeScaling, RouterSpec, Scoring};
use serde_json::{Map, Value, json};

use crate::fixture::{Fixture, object, root};

type Config = Map<String, Value>;

/// The config.json of a fixture with other values; null removes a key.
fn config(case: &str, changes: Value) -> Config {
    let mut config = object(&root().join("tests/fixtures/families").join(case).join("config.json"));
    for (key, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => config.remove(key),
            value => config.insert(key.clone(), value.clone()),
        };
    }
    config
}

#[test]
fn settings_that_contradict_each_other_are_named() {
    use ErrorKind::{Input, Unsupported};
    let table: Vec<(&str, Value, ErrorKind, Vec<&str>)> = vec![
        ("qwen3-moe", json!({"num_experts": null}), Input, vec!["`num_experts` is missing"]),
        ("qwen3-moe", json!({"num_experts": 0}), Input, vec!["`num_experts` is 0"]),
        ("qwen3-moe", json!({"num_experts": 1_000_000}), Input, vec!["`num_experts` is 1000000"]),
        ("qwen3-moe", json!({"num_experts_per_tok": 9}), Input, vec!["`num_experts_per_tok` is 9", "8 experts"]),
        ("qwen3-moe", json!({"num_experts_per_tok": null}), Input, vec!["`num_experts_per_tok` is missing"]),
        ("qwen3-moe", json!({"moe_intermediate_size": -1}), Input, vec!["`moe_intermediate_size` is -1"]),
        ("qwen3-moe", json!({"decoder_sparse_step": 0}), Input, vec!["`decoder_sparse_step` is 0"]),
        ("qwen3-moe", json!({"mlp_only_layers": "1"}), Input, vec!["`mlp_only_layers` is \"1\"", "a list"]),
        ("qwen3-moe", json!({"norm_topk_prob": 1}), Input, vec!["`norm_topk_prob` is 1"]),
        (
            "qwen3-moe",
            json!({"num_hidden_layers": 10_000, "num_experts": 16_384}),
            Input,
            vec!["16384 experts in each of 10000 layers"],
        ),
        (
            "qwen3-moe",
            json!({"num_hidden_layers": 10_000, "moe_intermediate_size": 1_000_000}),
            Input,
            vec!["`num_hidden_layers` ×", "no decoder is this large"],
        ),
        (
            "qwen2-moe",
            json!({"shared_expert_intermediate_size": null}),
            Input,
            vec!["`shared_expert_intermediate_size` is missing"],
        ),
        ("mixtral", json!({"num_local_experts": "8"}), Input, vec!["`num_local_experts` is \"8\""]),
        ("gpt-oss", json!({"num_local_experts": 0}), Input, vec!["`num_local_experts` is 0"]),
        ("gpt-oss", json!({"swiglu_limit": 0}), Input, vec!["`swiglu_limit` is 0", "from 0.001"]),
        ("gpt-oss", json!({"swiglu_limit": "7"}), Input, vec!["`swiglu_limit` is \"7\""]),
        ("gpt-oss", json!({"hidden_act": "gelu_new"}), Unsupported, vec!["`hidden_act`", "`silu` in this family"]),
        ("gpt-oss", json!({"attention_bias": "yes"}), Input, vec!["`attention_bias` is \"yes\""]),
        ("gpt-oss", json!({"layer_types": ["full_attention"]}), Input, vec!["`layer_types`", "each of the 2 layers"]),
        (
            "glm4-moe",
            json!({"n_group": 3}),
            Input,
            vec!["8 experts (`n_routed_experts`)", "`n_group` 3", "equal groups"],
        ),
        ("glm4-moe", json!({"n_group": 8}), Input, vec!["`n_group` 8", "`topk_group` 1", "room"]),
        ("glm4-moe", json!({"n_group": 8, "topk_group": 8}), Input, vec!["`n_group` is 8 for 8 experts", "two best"]),
        ("glm4-moe", json!({"n_group": 0}), Input, vec!["`n_group` is 0"]),
        ("glm4-moe", json!({"topk_group": 2}), Input, vec!["`topk_group` is 2", "from 1 to 1"]),
        (
            "glm4-moe",
            json!({"n_shared_experts": 16_384, "moe_intermediate_size": 65_536}),
            Input,
            vec!["the shared expert is 1073741824 wide"],
        ),
        ("glm4-moe", json!({"num_nextn_predict_layers": 65}), Input, vec!["`num_nextn_predict_layers` is 65", "64"]),
        ("glm4-moe", json!({"scoring_func": "softmax"}), Unsupported, vec!["`scoring_func` is \"softmax\"", "sigmoid"]),
        ("glm4-moe", json!({"moe_layer_freq": 2}), Unsupported, vec!["`moe_layer_freq` is 2"]),
        ("glm4-moe", json!({"first_k_dense_replace": 4}), Input, vec!["`first_k_dense_replace` is 4", "to 3"]),
        ("deepseek-v2", json!({"topk_method": "best"}), Unsupported, vec!["`topk_method` is \"best\"", "greedy"]),
        ("deepseek-v2", json!({"mlp_bias": true}), Unsupported, vec!["`mlp_bias` is true"]),
        ("deepseek-v2", json!({"topk_group": 1}), Input, vec!["`topk_group` 1", "`num_experts_per_tok` 3"]),
        ("deepseek-v3", json!({"topk_method": "greedy"}), Unsupported, vec!["`topk_method`", "noaux_tc"]),
        ("deepseek-v3", json!({"qk_rope_head_dim": 7}), Input, vec!["`qk_rope_head_dim` is 7", "even"]),
        (
            "deepseek-v3",
            json!({"num_key_value_heads": 2}),
            Input,
            vec!["`num_key_value_heads` is 2", "`num_attention_heads` is 4"],
        ),
        ("deepseek-v3", json!({"kv_lora_rank": 0}), Input, vec!["`kv_lora_rank` is 0"]),
        ("deepseek-v3", json!({"v_head_dim": 1_000_000}), Input, vec!["`v_head_dim`", "at most 1048576"]),
        ("deepseek-v3", json!({"rope_interleave": "yes"}), Input, vec!["`rope_interleave` is \"yes\""]),
        (
            "deepseek-v3",
            json!({"rope_scaling": {"type": "yarn", "factor": 4, "mscale_all_dim": "1"}}),
            Input,
            vec!["`rope_scaling.mscale_all_dim` is \"1\""],
        ),
    ];
    for (case, changes, kind, parts) in table {
        let error = match DecoderSpec::from_config(&config(case, changes.clone())) {
            Ok(_) => panic!("{case} was accepted with {changes}"),
            Err(error) => error,
        };
        let message = error.to_string();
        for part in parts {
            assert!(message.contains(part), "`{part}` is not in `{message}`");
        }
        assert_eq!(error.kind(), kind, "{message}");
    }
}

#[test]
fn absent_keys_mean_what_the_family_says() {
    let router = |case: &str, changes: Value| -> (RouterSpec, usize, Option<usize>) {
        let spec = DecoderSpec::from_config(&config(case, changes)).unwrap();
        let dense = spec.blocks.iter().take_while(|block| block.moe().is_none()).count();
        let moe = spec.blocks.last().unwrap().moe().unwrap();
        (moe.router.clone(), dense, moe.shared.as_ref().map(|shared| shared.intermediate))
    };
    let none = json!({"n_group": null, "topk_group": null, "routed_scaling_factor": null, "norm_topk_prob": null,
        "first_k_dense_replace": null, "n_shared_experts": null, "scoring_func": null, "topk_method": null});
    let (found, dense, shared) = router("deepseek-v2", none.clone());
    assert_eq!((found.groups, found.scale, found.normalize, found.scoring), ((1, 1), 1.0, false, Scoring::Softmax));
    assert_eq!((dense, shared), (0, Some(32)));
    let (found, dense, shared) = router("glm4-moe", none.clone());
    assert_eq!((found.groups, found.scale, found.normalize, found.scoring), ((1, 1), 1.0, true, Scoring::Sigmoid));
    assert_eq!((dense, shared), (1, Some(16)));
    let mut large = none;
    large
        .as_object_mut()
        .unwrap()
        .extend([("n_routed_experts".to_owned(), json!(16)), ("num_hidden_layers".to_owned(), json!(4))]);
    let (found, dense, shared) = router("deepseek-v3", large);
    assert_eq!((found.groups, found.scale, found.normalize, found.scoring), ((8, 4), 2.5, true, Scoring::Sigmoid));
    assert_eq!((dense, shared), (3, Some(16)));
    // Weights are either normalised or scaled, as in the code published with V2.
    let (found, ..) = router("deepseek-v2", json!({"norm_topk_prob": true}));
    assert!(found.normalize && found.scale == 1.0);
    // Both spellings of the number of layers of multi-token prediction, and the class's own.
    let layers = |changes| DecoderSpec::from_config(&config("deepseek-v3", changes)).unwrap().mtp_layers;
    assert_eq!(layers(json!({"num_nextn_predict_layers": null, "num_mtp_layers": 3})), 3);
    assert_eq!(layers(json!({"num_nextn_predict_layers": null})), 1);
    assert_eq!(layers(json!({"num_nextn_predict_layers": 0})), 0);
    assert_eq!(DecoderSpec::from_config(&config("qwen3-moe", json!({"num_mtp_layers": 2}))).unwrap().mtp_layers, 0);
}

#[test]
fn absent_keys_of_gpt_oss_are_those_of_its_class() {
    let none = json!({"rope_scaling": null, "rope_theta": null, "sliding_window": null, "layer_types": null,
        "swiglu_limit": null, "attention_bias": null, "head_dim": null, "num_key_value_heads": null,
        "num_attention_heads": 16, "rms_norm_eps": null, "max_position_embeddings": null});
    let spec = DecoderSpec::from_config(&config("gpt-oss", none)).unwrap();
    let RopeScaling::Yarn { factor, attention_factor, original, truncate, .. } = spec.rope.scaling else {
        panic!("{:?}", spec.rope)
    };
    assert_eq!((factor, original, truncate, spec.rope.theta, spec.max_positions), (32.0, 4096, false, 15e4, 131_072));
    assert!((attention_factor - (0.1 * 32f64.ln() + 1.0)).abs() < 1e-12);
    let attn = |i: usize| match &spec.blocks[i].attn {
        AttnSpec::Gqa(attn) => attn,
        other => panic!("{other:?}"),
    };
    assert_eq!((attn(0).window, attn(1).window), (Some(128), None));
    assert_eq!((attn(0).head_dim, attn(0).kv_heads, attn(0).sinks.is_some()), (64, 8, true));
    let moe = spec.blocks[1].moe().unwrap();
    assert_eq!(moe.glu, Glu::Clamped { slope: 1.702, limit: 7.0 });
    assert_eq!(moe.router.bias.as_deref(), Some("model.layers.1.mlp.router.bias"));
    assert!(spec.sites().all(|site| site.bias));
}

#[test]
fn what_gpt_oss_lacks_is_named() {
    let (right, all) = (config("gpt-oss", json!({})), shapes("gpt-oss"));
    check(&right, &all).unwrap();
    for tensor in [
        "model.layers.0.self_attn.sinks",
        "model.layers.1.mlp.router.bias",
        "model.layers.1.mlp.experts.5.down_proj.bias",
        "model.layers.0.self_attn.o_proj.bias",
    ] {
        let mut shapes = all.clone();
        assert!(shapes.remove(tensor).is_some(), "{tensor}");
        let error = check(&right, &shapes).unwrap_err();
        assert!(matches!(error, DecoderError::MissingTensors { count: 1, .. }), "{error}");
        assert!(error.to_string().contains(&format!("`{tensor}`")), "{error}");
        shapes.insert(tensor.to_owned(), vec![3]);
        let error = check(&right, &shapes).unwrap_err();
        assert!(matches!(error, DecoderError::Shape { .. }) && error.to_string().contains(tensor), "{error}");
    }
    let fewer = config("gpt-oss", json!({"num_local_experts": 5}));
    let message = check(&fewer, &all).unwrap_err().to_string();
    assert!(
        message.contains("model.layers.0.mlp.router.weight`") && message.contains("num_local_experts"),
        "{message}"
    );
}

type Shapes = BTreeMap<String, Vec<usize>>;

/// What the headers of a fixture's file say.
fn shapes(case: &str) -> Shapes {
    Fixture::open(case).weights.tensors.into_iter().map(|(name, (shape, _))| (name, shape)).collect()
}

fn check(config: &Config, shapes: &Shapes) -> Result<(), DecoderError> {
    DecoderSpec::from_config(config).unwrap().check_tensors(&|name| shapes.get(name).cloned())
}

#[test]
fn experts_that_are_missing_or_too_many_are_named() {
    for (case, key, module) in [
        ("qwen3-moe", "num_experts", "model.layers.0.mlp"),
        ("mixtral", "num_local_experts", "model.layers.0.block_sparse_moe"),
        ("deepseek-v3", "n_routed_experts", "model.layers.1.mlp"),
    ] {
        let (right, all) = (config(case, json!({})), shapes(case));
        check(&right, &all).unwrap();
        let experts = right[key].as_u64().unwrap();

        // A router alone.
        let mut shapes = all.clone();
        assert!(shapes.remove(&format!("{module}.gate.weight")).is_some());
        let error = check(&right, &shapes).unwrap_err();
        assert!(matches!(error, DecoderError::MissingTensors { count: 1, .. }), "{error}");
        assert!(error.to_string().contains(&format!("`{module}.gate.weight`")), "{error}");

        // The last expert of one layer.
        let last = format!("{module}.experts.{}.", experts - 1);
        let mut shapes = all.clone();
        shapes.retain(|name, _| !name.starts_with(&last));
        let error = check(&right, &shapes).unwrap_err();
        assert!(matches!(error, DecoderError::MissingTensors { count: 3, .. }), "{error}");
        assert!(error.to_string().contains(&last), "{error}");

        // config.json counts more or fewer: the router says so first.
        for other in [experts - 1, experts + 1] {
            let mut changes = Map::new();
            changes.insert(key.to_owned(), other.into());
            changes.insert("n_group".to_owned(), 1.into());
            changes.insert("topk_group".to_owned(), 1.into());
            let message = check(&config(case, Value::Object(changes)), &all).unwrap_err().to_string();
            assert!(message.contains(&format!("{module}.gate.weight`")) && message.contains(key), "{message}");
        }

        // One expert more than the router knows, in one layer.
        let mut shapes = all.clone();
        for (name, shape) in &all {
            if let Some(rest) = name.strip_prefix(&last) {
                shapes.insert(format!("{module}.experts.{experts}.{rest}"), shape.clone());
            }
        }
        let error = check(&right, &shapes).unwrap_err();
        assert!(
            matches!(&error, DecoderError::ExtraExpert { experts: found, .. } if *found as u64 == experts),
            "{error}"
        );
        assert!(error.to_string().contains(&format!("{module}.experts.{experts}.")), "{error}");
        assert_eq!(error.kind(), ErrorKind::Input);
    }
}

#[test]
fn latents_of_another_width_are_named() {
    let all = shapes("deepseek-v2");
    for (key, value, tensor) in [
        ("kv_lora_rank", 8, "kv_a_layernorm"),
        ("q_lora_rank", 16, "q_a_layernorm"),
        ("v_head_dim", 16, "kv_b_proj"),
        ("qk_nope_head_dim", 8, "q_b_proj"),
    ] {
        let mut changes = Map::new();
        changes.insert(key.to_owned(), value.into());
        let message = check(&config("deepseek-v2", Value::Object(changes)), &all).unwrap_err().to_string();
        assert!(message.contains(tensor) && message.contains(&format!("`{key}`")), "{message}");
    }
    // Queries without a latent are other tensors.
    let message = check(&config("deepseek-v2-lite", json!({"q_lora_rank": 16})), &shapes("deepseek-v2-lite"));
    assert!(message.unwrap_err().to_string().contains("q_a_layernorm"));
}

#[test]
fn layers_of_multi_token_prediction_are_allowed_where_they_are_declared() {
    for case in ["deepseek-v3", "glm4-moe-mtp"] {
        let all = shapes(case);
        check(&config(case, json!({})), &all).unwrap();
        // They need not be there.
        let mut without = all.clone();
        without.retain(|name, _| !name.starts_with("model.layers.2."));
        assert!(without.len() < all.len());
        check(&config(case, json!({})), &without).unwrap();
        // Not declared: a block too many.
        let error = check(&config(case, json!({"num_nextn_predict_layers": 0})), &all).unwrap_err();
        assert!(error.to_string().contains("`num_hidden_layers` is 2, so blocks end at 1"), "{error}");
        // One more than declared.
        let mut more = all.clone();
        more.insert("model.layers.3.input_layernorm.weight".to_owned(), vec![32]);
        let error = check(&config(case, json!({})), &more).unwrap_err();
        assert!(matches!(&error, DecoderError::ExtraBlock { layers: 2, mtp: 1, .. }), "{error}");
        let wanted = "`num_hidden_layers` is 2 and `num_nextn_predict_layers` is 1, so blocks end at 2";
        assert!(error.to_string().contains(wanted), "{error}");
    }
}
