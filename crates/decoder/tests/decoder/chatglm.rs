//! ChatGLM3 and GLM-4 9B as first published, whose code is not in transformers.

use lite_decoder::{AttnSpec, DecoderSpec, ErrorKind, Producer, QkvLayout, Role, RopePairing, RopeScaling, Stream};
use serde_json::{Map, Value, json};

/// The keys that both published files have, and their values in THUDM/chatglm3-6b.
fn chatglm3() -> Map<String, Value> {
    let config = json!({
        "_name_or_path": "THUDM/chatglm3-6b", "model_type": "chatglm", "architectures": ["ChatGLMModel"],
        "add_bias_linear": false, "add_qkv_bias": true, "apply_query_key_layer_scaling": true,
        "apply_residual_connection_post_layernorm": false, "attention_dropout": 0.0,
        "attention_softmax_in_fp32": true, "bias_dropout_fusion": true, "ffn_hidden_size": 13696,
        "fp32_residual_connection": false, "hidden_dropout": 0.0, "hidden_size": 4096, "kv_channels": 128,
        "layernorm_epsilon": 1e-5, "multi_query_attention": true, "multi_query_group_num": 2,
        "num_attention_heads": 32, "num_layers": 28, "original_rope": true, "padded_vocab_size": 65024,
        "post_layer_norm": true, "rmsnorm": true, "seq_length": 8192, "use_cache": true, "torch_dtype": "float16",
        "transformers_version": "4.27.1", "tie_word_embeddings": false, "eos_token_id": 2, "pad_token_id": 0,
    });
    config.as_object().unwrap().clone()
}

/// THUDM/glm-4-9b-chat.
fn glm4() -> Map<String, Value> {
    let changes = json!({
        "_name_or_path": "THUDM/glm-4-9b-chat", "architectures": ["ChatGLMForConditionalGeneration"],
        "layernorm_epsilon": 1.5625e-7, "num_hidden_layers": 40, "num_layers": 40, "padded_vocab_size": 151_552,
        "rope_ratio": 500, "seq_length": 131_072, "torch_dtype": "bfloat16",
    });
    with(chatglm3(), changes)
}

fn with(mut config: Map<String, Value>, changes: Value) -> Map<String, Value> {
    config.extend(changes.as_object().unwrap().clone());
    config
}

fn shape(spec: &DecoderSpec, name: &str) -> Option<Vec<usize>> {
    spec.tensors().into_iter().find(|need| need.name == name).map(|need| need.shape)
}

#[test]
fn published_configurations_are_read() {
    for (config, layers, vocab, positions, theta, eps) in
        [(chatglm3(), 28, 65_024, 8192, 1e4, 1e-5f32), (glm4(), 40, 151_552, 131_072, 5e6, 1.5625e-7)]
    {
        let spec = DecoderSpec::from_config(&config).unwrap();
        assert_eq!((spec.blocks.len(), spec.vocab, spec.hidden, spec.max_positions), (layers, vocab, 4096, positions));
        assert_eq!((spec.rope.theta, spec.rope.rotary_dim, spec.rope.pairing), (theta, 64, RopePairing::Neighbours));
        assert!(spec.rope.scaling == RopeScaling::Default && spec.final_norm.eps == eps && !spec.head.tied);
        let AttnSpec::Gqa(attn) = &spec.blocks[0].attn else { panic!("not grouped-query attention") };
        assert_eq!((attn.heads, attn.kv_heads, attn.head_dim, attn.qkv), (32, 2, 128, QkvLayout::Stacked));
        assert_eq!(spec.tensors().len(), 7 * layers + 3);
        let block = format!("transformer.encoder.layers.{}", layers - 1);
        for (name, wanted) in [
            ("transformer.embedding.word_embeddings.weight".to_owned(), vec![vocab, 4096]),
            (format!("{block}.input_layernorm.weight"), vec![4096]),
            (format!("{block}.self_attention.query_key_value.weight"), vec![4608, 4096]),
            (format!("{block}.self_attention.query_key_value.bias"), vec![4608]),
            (format!("{block}.self_attention.dense.weight"), vec![4096, 4096]),
            (format!("{block}.post_attention_layernorm.weight"), vec![4096]),
            (format!("{block}.mlp.dense_h_to_4h.weight"), vec![27_392, 4096]),
            (format!("{block}.mlp.dense_4h_to_h.weight"), vec![4096, 13_696]),
            ("transformer.encoder.final_layernorm.weight".to_owned(), vec![4096]),
            ("transformer.output_layer.weight".to_owned(), vec![vocab, 4096]),
        ] {
            assert_eq!(shape(&spec, &name), Some(wanted), "{name}");
        }
    }
}

#[test]
fn keys_are_followed() {
    let qkv = "transformer.encoder.layers.0.self_attention.query_key_value.weight";
    let heads = |changes| shape(&DecoderSpec::from_config(&with(chatglm3(), changes)).unwrap(), qkv).unwrap()[0];
    // Without multi-query attention every head has keys of its own, whatever the number of groups.
    assert_eq!(heads(json!({"multi_query_attention": false})), 3 * 4096);
    assert_eq!(heads(json!({"multi_query_attention": null})), 3 * 4096);
    assert_eq!(heads(json!({"kv_channels": null})), 4608, "128 by default");
    let mut one_group = chatglm3();
    one_group.remove("multi_query_group_num");
    let one_group = DecoderSpec::from_config(&one_group).unwrap();
    assert_eq!(shape(&one_group, qkv).unwrap()[0], 4096 + 2 * 128, "one group by default");
    let biases = |changes| {
        let spec = DecoderSpec::from_config(&with(chatglm3(), changes)).unwrap();
        spec.blocks[0].sites.iter().filter(|site| site.bias).count()
    };
    assert_eq!(biases(json!({"add_qkv_bias": false})), 0);
    assert_eq!(biases(json!({"add_qkv_bias": null, "add_bias_linear": true})), 4);
    for config in [chatglm3(), glm4()] {
        let mut unnamed = config.clone();
        unnamed.remove("architectures");
        assert_eq!(
            DecoderSpec::from_config(&unnamed).unwrap().blocks,
            DecoderSpec::from_config(&config).unwrap().blocks
        );
    }
}

/// The published code without multi-query attention: `mixed.view(heads, 3 * head_dim)`, and each head split into q, k, v.
#[test]
fn without_multi_query_attention_each_head_has_its_three_parts_together() {
    let mut absent = chatglm3();
    absent.remove("multi_query_attention");
    for config in [
        absent,
        with(chatglm3(), json!({"multi_query_attention": false})),
        with(chatglm3(), json!({"multi_query_attention": null})),
    ] {
        let spec = DecoderSpec::from_config(&config).unwrap();
        let block = &spec.blocks[0];
        let AttnSpec::Gqa(attn) = &block.attn else { panic!("not grouped-query attention") };
        assert_eq!((attn.heads, attn.kv_heads, attn.qkv), (32, 32, QkvLayout::Grouped));
        let at = |part: usize| (0..32).map(|head| (3 * head + part) * 128).collect::<Vec<usize>>();
        assert_eq!(attn.columns(), [(Role::Qkv, at(0)), (Role::Qkv, at(1)), (Role::Qkv, at(2))]);
        let fold = block.folds.iter().find(|fold| fold.input.stream == Stream::AttnOut).unwrap();
        let Producer::Rows { rows, .. } = &fold.producer else { panic!("no rows") };
        let values: Vec<u32> = (0..4096).map(|c| 384 * (c / 128) + 256 + c % 128).collect();
        assert_eq!(rows.to_vec(), values);
    }
    // With it: all of q, then k, then v.
    let spec = DecoderSpec::from_config(&chatglm3()).unwrap();
    let AttnSpec::Gqa(attn) = &spec.blocks[0].attn else { panic!("not grouped-query attention") };
    let [(_, q), (_, k), (_, v)] = attn.columns();
    assert_eq!((q[31], k, v), (31 * 128, vec![4096, 4224], vec![4352, 4480]));
}

#[test]
fn chatglm2_with_a_rope_ratio_is_refused() {
    for name in ["THUDM/chatglm2-6b-32k", "/models/ChatGLM2-6B-32K"] {
        let config = |ratio: Value| with(chatglm3(), json!({"_name_or_path": name, "rope_ratio": ratio}));
        let error = DecoderSpec::from_config(&config(json!(16))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let message = error.to_string();
        let wanted =
            "`rope_ratio` is 16, which is not supported; supported: 1 where `_name_or_path` contains `chatglm2`";
        assert!(message.contains(wanted), "{message}");
        for same in [json!(1), json!(1.0), json!(null)] {
            assert_eq!(DecoderSpec::from_config(&config(same)).unwrap().rope.theta, 1e4);
        }
    }
    let other = with(chatglm3(), json!({"_name_or_path": "THUDM/chatglm3-6b-128k", "rope_ratio": 500}));
    assert_eq!(DecoderSpec::from_config(&other).unwrap().rope.theta, 5e6);
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    use ErrorKind::{Input, Unsupported};
    for (changes, kind, says) in [
        (json!({"rmsnorm": false}), Unsupported, "`rmsnorm` is false, which is not supported; supported: true"),
        (json!({"apply_residual_connection_post_layernorm": true}), Unsupported, "supported: false"),
        (json!({"post_layer_norm": false}), Unsupported, "`post_layer_norm` is false"),
        (json!({"original_rope": false}), Unsupported, "`original_rope` is false"),
        (json!({"original_rope": "no"}), Unsupported, "`original_rope` is \"no\""),
        (json!({"prefix_projection": true}), Unsupported, "`prefix_projection` is true"),
        (json!({"pre_seq_len": 128}), Unsupported, "`pre_seq_len` is 128, which is not supported; supported: null"),
        (json!({"quantization_bit": 4}), Unsupported, "`quantization_bit` is 4, which is not supported; supported: 0"),
        (json!({"interleaved_qkv": true}), Unsupported, "`interleaved_qkv` is true"),
        // The first ChatGLM, and GLM-4V.
        (json!({"position_encoding_2d": true}), Unsupported, "`position_encoding_2d` is true"),
        (json!({"vision_config": {"depth": 1}}), Unsupported, "`vision_config` is {"),
        (json!({"rope_scaling": {"type": "linear", "factor": 2}}), Unsupported, "`rope_scaling.type`"),
        (json!({"rope_ratio": 0}), Input, "`rope_ratio` is 0"),
        (json!({"rope_ratio": "big"}), Input, "`rope_ratio` is \"big\""),
        (json!({"ffn_hidden_size": null}), Input, "`ffn_hidden_size` is null"),
        (json!({"num_layers": 0}), Input, "`num_layers` is 0"),
        (json!({"padded_vocab_size": -1}), Input, "`padded_vocab_size` is -1"),
        (json!({"multi_query_group_num": 3}), Input, "is not a multiple of"),
        (json!({"num_hidden_layers": 27}), Input, "`num_hidden_layers` is 27 and `num_layers` is 28"),
        (json!({"model_type": "glm"}), Input, "which belongs to `GlmForCausalLM`"),
    ] {
        let error = DecoderSpec::from_config(&with(chatglm3(), changes.clone())).unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(says), "{changes}: {error}");
    }
    for harmless in [
        json!({"pre_seq_len": null, "prefix_projection": false, "quantization_bit": 0, "interleaved_qkv": false}),
        json!({"num_hidden_layers": 28, "vocab_size": 65_024}),
    ] {
        DecoderSpec::from_config(&with(chatglm3(), harmless)).unwrap();
    }
}
