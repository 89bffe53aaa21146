//! Families whose blocks are not quite Llama's: other norms, factors, nonlinearities, rotary embeddings.

use super::families::{
    Bias, FamilyInfo, LLAMA, LLAMA_NAMES, Names, NormRules, Positions, QkNorm, RMS, ROPE, RopeRules, Scales, Window,
};
use super::must::Must;
use super::{Activation, GateUpLayout, NormKind, QkvLayout, RopePairing};

pub(super) const QWEN2: FamilyInfo = FamilyInfo {
    architecture: "Qwen2ForCausalLM",
    model_type: "qwen2",
    title: "Qwen 1.5, 2, 2.5, QwQ",
    // With text alone all three positions of a vision model's rotary embedding are one.
    rope: RopeRules { aliases: &[("mrope", "default")], ..ROPE },
    qkv_bias: Bias::Always,
    o_bias: Bias::Never,
    mlp_bias: Bias::Never,
    kv_heads: Some(32),
    max_positions: Positions::Default(32_768),
    window: Window::SomeLayers { first: 28 },
    ..LLAMA
};

pub(super) const QWEN3: FamilyInfo = FamilyInfo {
    architecture: "Qwen3ForCausalLM",
    model_type: "qwen3",
    title: "Qwen3 (dense)",
    mlp_bias: Bias::Never,
    qk_norm: QkNorm::EachHead,
    head_dim: Some(128),
    kv_heads: Some(32),
    max_positions: Positions::Default(32_768),
    window: Window::SomeLayers { first: 28 },
    ..LLAMA
};

/// Qwen2-VL's decoder: Qwen2 with other defaults.
pub(super) const QWEN2_VL: FamilyInfo = FamilyInfo {
    architecture: "Qwen2VLTextModel",
    model_type: "qwen2_vl_text",
    title: "Qwen2-VL (its decoder)",
    kv_heads: Some(8),
    norm: NormRules { eps: 1e-5, ..RMS },
    window: Window::SomeLayers { first: 80 },
    rope: RopeRules { theta: 1_000_000.0, ..QWEN2.rope },
    ..QWEN2
};

pub(super) const QWEN2_5_VL: FamilyInfo = FamilyInfo {
    architecture: "Qwen2_5_VLTextModel",
    model_type: "qwen2_5_vl_text",
    title: "Qwen2.5-VL (its decoder)",
    ..QWEN2_VL
};

/// Dense Qwen3-VL's decoder: Qwen3 with other defaults.
pub(super) const QWEN3_VL: FamilyInfo = FamilyInfo {
    architecture: "Qwen3VLTextModel",
    model_type: "qwen3_vl_text",
    title: "Qwen3-VL (its decoder)",
    max_positions: Positions::Default(128_000),
    window: Window::Refused,
    rope: RopeRules { theta: 500_000.0, ..ROPE },
    ..QWEN3
};

pub(super) const GRANITE: FamilyInfo = FamilyInfo {
    architecture: "GraniteForCausalLM",
    model_type: "granite",
    title: "Granite 3.x and 4.x (dense, without Mamba)",
    scales: Scales::Granite,
    ..LLAMA
};

pub(super) const OLMO2: FamilyInfo = FamilyInfo {
    architecture: "Olmo2ForCausalLM",
    model_type: "olmo2",
    title: "OLMo 2",
    names: Names {
        attn_norm: None,
        attn_out_norm: Some("post_attention_layernorm"),
        mlp_norm: None,
        mlp_out_norm: Some("post_feedforward_layernorm"),
        ..LLAMA_NAMES
    },
    mlp_bias: Bias::Never,
    qk_norm: QkNorm::AllHeads,
    norm: NormRules { eps: 1e-5, ..RMS },
    ..LLAMA
};

pub(super) const GLM: FamilyInfo = FamilyInfo {
    architecture: "GlmForCausalLM",
    model_type: "glm",
    title: "GLM-4 9B (`-hf` checkpoints)",
    names: Names { gate_up: Some(GateUpLayout::Stacked), gate_up_names: &["gate_up_proj"], ..LLAMA_NAMES },
    qkv_bias: Bias::Key("attention_bias", true),
    o_bias: Bias::Never,
    mlp_bias: Bias::Never,
    head_dim: Some(128),
    kv_heads: Some(2),
    norm: NormRules { eps: 1.5625e-7, ..RMS },
    max_positions: Positions::Default(131_072),
    rope: RopeRules { partial: Some(0.5), pairing: RopePairing::Neighbours, ..ROPE },
    ..LLAMA
};

pub(super) const GLM4: FamilyInfo = FamilyInfo {
    architecture: "Glm4ForCausalLM",
    model_type: "glm4",
    title: "GLM-4-0414 (9B, 32B), GLM-Z1",
    names: Names {
        attn_out_norm: Some("post_self_attn_layernorm"),
        mlp_out_norm: Some("post_mlp_layernorm"),
        ..GLM.names
    },
    ..GLM
};

/// Not in transformers; from the code published with the models. ChatGLM2 has the same names, and with `rope_ratio` (its 32k
/// variant) another rotary embedding under the same keys, which is refused. The first ChatGLM calls itself by the same name
/// too, and is refused by its key `position_encoding_2d`.
pub(super) const CHATGLM: FamilyInfo = FamilyInfo {
    architecture: "ChatGLMModel",
    model_type: "chatglm",
    title: "ChatGLM3 and GLM-4 9B as first published",
    names: Names {
        embed: "transformer.embedding.word_embeddings",
        blocks: "transformer.encoder.layers",
        final_norm: "transformer.encoder.final_layernorm",
        head: "transformer.output_layer",
        attn: "self_attention",
        qkv: QkvLayout::Stacked,
        qkv_names: &["query_key_value"],
        o: "dense",
        gate_up: Some(GateUpLayout::Stacked),
        gate_up_names: &["dense_h_to_4h"],
        down: "dense_4h_to_h",
        ..LLAMA_NAMES
    },
    keys: &[
        ("num_hidden_layers", "num_layers"),
        ("intermediate_size", "ffn_hidden_size"),
        ("num_key_value_heads", "multi_query_group_num"),
        ("head_dim", "kv_channels"),
        ("vocab_size", "padded_vocab_size"),
        ("max_position_embeddings", "seq_length"),
    ],
    must: &[
        ("position_encoding_2d", Must::Absent),
        ("vision_config", Must::Absent),
        ("pre_seq_len", Must::Absent),
        ("prefix_projection", Must::Be(false)),
        ("quantization_bit", Must::Equal(0)),
        ("rmsnorm", Must::Be(true)),
        ("post_layer_norm", Must::Be(true)),
        ("apply_residual_connection_post_layernorm", Must::Be(false)),
        ("original_rope", Must::Be(true)),
        ("interleaved_qkv", Must::Be(false)),
    ],
    qkv_bias: Bias::AnyOf(&["add_qkv_bias", "add_bias_linear"]),
    o_bias: Bias::Key("add_bias_linear", false),
    mlp_bias: Bias::Key("add_bias_linear", false),
    head_dim: Some(128),
    kv_heads: Some(1),
    grouped_if: Some("multi_query_attention"),
    norm: NormRules { eps_key: "layernorm_epsilon", eps: 1e-5, ..RMS },
    rope: RopeRules {
        types: &["default"],
        partial: Some(0.5),
        pairing: RopePairing::Neighbours,
        ratio: Some("rope_ratio"),
        ratio_of_positions: Some("chatglm2"),
        ..ROPE
    },
    ..LLAMA
};

pub(super) const CHATGLM_CONDITIONAL: FamilyInfo = FamilyInfo {
    architecture: "ChatGLMForConditionalGeneration",
    title: "the same under its later name (GLM-4 9B, GLM-4 9B chat)",
    ..CHATGLM
};

pub(super) const GEMMA2: FamilyInfo = FamilyInfo {
    architecture: "Gemma2ForCausalLM",
    model_type: "gemma2",
    title: "Gemma 2",
    names: Names {
        attn_out_norm: Some("post_attention_layernorm"),
        mlp_norm: Some("pre_feedforward_layernorm"),
        mlp_out_norm: Some("post_feedforward_layernorm"),
        ..LLAMA_NAMES
    },
    mlp_bias: Bias::Never,
    head_dim: Some(256),
    kv_heads: Some(4),
    norm: NormRules { kind: NormKind::RmsPlusOne, ..RMS },
    activation: ("hidden_activation", Activation::GeluTanh),
    tied: true,
    scales: Scales::Gemma { attn_cap: Some(50.0), logits_cap: Some(30.0) },
    max_positions: Positions::Default(8192),
    window: Window::Alternating { period: 2, period_key: None, default: 4096 },
    ..LLAMA
};

pub(super) const GEMMA3: FamilyInfo = FamilyInfo {
    architecture: "Gemma3ForCausalLM",
    model_type: "gemma3_text",
    title: "Gemma 3 (text)",
    qk_norm: QkNorm::EachHead,
    scales: Scales::Gemma { attn_cap: None, logits_cap: None },
    max_positions: Positions::Default(131_072),
    window: Window::Alternating { period: 6, period_key: Some("sliding_window_pattern"), default: 4096 },
    rope: RopeRules { theta: 1_000_000.0, local_theta: Some(10_000.0), ..ROPE },
    ..GEMMA2
};

pub(super) const STARCODER2: FamilyInfo = FamilyInfo {
    architecture: "Starcoder2ForCausalLM",
    model_type: "starcoder2",
    title: "StarCoder2",
    names: Names { gate_up: None, gate_up_names: &["c_fc"], down: "c_proj", ..LLAMA_NAMES },
    qkv_bias: Bias::Key("use_bias", true),
    o_bias: Bias::Key("use_bias", true),
    mlp_bias: Bias::Key("use_bias", true),
    kv_heads: Some(2),
    norm: NormRules { kind: NormKind::Layer, eps_key: "norm_epsilon", eps: 1e-5 },
    activation: ("hidden_act", Activation::GeluTanh),
    tied: true,
    max_positions: Positions::Default(4096),
    window: Window::AllLayers(None),
    ..LLAMA
};

/// Not in transformers; from the code published with the model. The first Baichuan's 7B calls itself
/// `BaiChuanForCausalLM`, so rotary positions under this name are Baichuan2's.
pub(super) const BAICHUAN2: FamilyInfo = FamilyInfo {
    architecture: "BaichuanForCausalLM",
    model_type: "baichuan",
    title: "Baichuan2 7B (not 13B, which uses ALiBi)",
    names: Names { qkv: QkvLayout::Stacked, qkv_names: &["W_pack"], ..LLAMA_NAMES },
    qkv_bias: Bias::Never,
    o_bias: Bias::Never,
    mlp_bias: Bias::Never,
    normalised_head: true,
    max_positions: Positions::OrElse("a number, which the 7B models have: those without use ALiBi positions"),
    rope: RopeRules { types: &["default"], ..ROPE },
    ..LLAMA
};
