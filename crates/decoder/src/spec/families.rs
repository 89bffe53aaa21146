//! The known families, as a table. A new family with known parts is a new row.

use super::{GateUpLayout, QkvLayout};

/// A decoder family: where its tensors are, and what config.json means for it.
///
/// Defaults for absent keys are those of the family's own configuration class (transformers 5.17, or the
/// code published with InternLM2 and InternLM3).
#[derive(Debug)]
pub struct FamilyInfo {
    /// The entry of `architectures`.
    pub architecture: &'static str,
    /// `model_type`.
    pub model_type: &'static str,
    /// Which models this covers, for people.
    pub title: &'static str,
    pub(super) names: Names,
    pub(super) qkv_bias: Bias,
    pub(super) o_bias: Bias,
    pub(super) mlp_bias: Bias,
    /// Norms over each query and key head.
    pub(super) qk_norm: bool,
    /// `head_dim` if absent; `None`: `hidden_size / num_attention_heads`.
    pub(super) head_dim: Option<usize>,
    /// `num_key_value_heads` if absent; `None`: `num_attention_heads`.
    pub(super) kv_heads: Option<usize>,
    /// `rms_norm_eps` if absent.
    pub(super) eps: f64,
    /// `max_position_embeddings` if absent.
    pub(super) max_positions: usize,
    pub(super) window: Window,
    pub(super) rope: RopeRules,
}

/// Tensor names; block-relative ones are joined as `{blocks}.{index}.{part}`.
#[derive(Debug)]
pub(super) struct Names {
    pub(super) embed: &'static str,
    pub(super) blocks: &'static str,
    pub(super) final_norm: &'static str,
    pub(super) head: &'static str,
    pub(super) attn_norm: &'static str,
    pub(super) mlp_norm: &'static str,
    pub(super) attn: &'static str,
    pub(super) mlp: &'static str,
    pub(super) qkv: QkvLayout,
    /// q, k, v or the one fused matrix.
    pub(super) qkv_names: &'static [&'static str],
    pub(super) o: &'static str,
    pub(super) gate_up: GateUpLayout,
    /// gate, up or the one fused matrix.
    pub(super) gate_up_names: &'static [&'static str],
    pub(super) down: &'static str,
}

/// Whether a linear has a bias.
#[derive(Debug, Clone, Copy)]
pub(super) enum Bias {
    Never,
    Always,
    /// As a key of config.json says; the flag is its default.
    Key(&'static str, bool),
}

/// Which layers attend within a sliding window.
#[derive(Debug, Clone, Copy)]
pub(super) enum Window {
    /// None, whatever config.json says.
    Never,
    /// All, if `sliding_window` is a number; the number stands for an absent key.
    AllLayers(Option<usize>),
    /// If `use_sliding_window`, those that `layer_types` names, or else from `max_window_layers` on.
    SomeLayers,
}

/// What the family knows of rotary embeddings.
#[derive(Debug, Clone, Copy)]
pub(super) struct RopeRules {
    /// Accepted `rope_type`s.
    pub(super) types: &'static [&'static str],
    /// Older names of a type: (written, meant).
    pub(super) aliases: &'static [(&'static str, &'static str)],
    /// Whether `partial_rotary_factor` may differ from 1.
    pub(super) partial: bool,
    /// `original_max_position_embeddings` if absent everywhere; `None`: `max_position_embeddings`.
    pub(super) original_positions: Option<usize>,
}

const ROPE: RopeRules = RopeRules {
    types: &["default", "linear", "dynamic", "llama3", "yarn", "longrope"],
    aliases: &[],
    partial: false,
    original_positions: None,
};

const LLAMA_NAMES: Names = Names {
    embed: "model.embed_tokens",
    blocks: "model.layers",
    final_norm: "model.norm",
    head: "lm_head",
    attn_norm: "input_layernorm",
    mlp_norm: "post_attention_layernorm",
    attn: "self_attn",
    mlp: "mlp",
    qkv: QkvLayout::Separate,
    qkv_names: &["q_proj", "k_proj", "v_proj"],
    o: "o_proj",
    gate_up: GateUpLayout::Separate,
    gate_up_names: &["gate_proj", "up_proj"],
    down: "down_proj",
};

const LLAMA: FamilyInfo = FamilyInfo {
    architecture: "LlamaForCausalLM",
    model_type: "llama",
    title: "Llama 1 to 3.x and everything published in its shape (Yi, Vicuna, DeepSeek-R1-Distill-Llama, …)",
    names: LLAMA_NAMES,
    qkv_bias: Bias::Key("attention_bias", false),
    o_bias: Bias::Key("attention_bias", false),
    mlp_bias: Bias::Key("mlp_bias", false),
    qk_norm: false,
    head_dim: None,
    kv_heads: None,
    eps: 1e-6,
    max_positions: 2048,
    window: Window::Never,
    rope: ROPE,
};

/// The decoder families that can be run, and hence calibrated.
pub static FAMILIES: &[FamilyInfo] = &[
    LLAMA,
    FamilyInfo {
        architecture: "MistralForCausalLM",
        model_type: "mistral",
        title: "Mistral 7B, Nemo, Small (text)",
        qkv_bias: Bias::Never,
        o_bias: Bias::Never,
        mlp_bias: Bias::Never,
        kv_heads: Some(8),
        max_positions: 131_072,
        window: Window::AllLayers(Some(4096)),
        ..LLAMA
    },
    FamilyInfo {
        architecture: "Qwen2ForCausalLM",
        model_type: "qwen2",
        title: "Qwen 1.5, 2, 2.5, QwQ",
        qkv_bias: Bias::Always,
        o_bias: Bias::Never,
        mlp_bias: Bias::Never,
        kv_heads: Some(32),
        max_positions: 32_768,
        window: Window::SomeLayers,
        ..LLAMA
    },
    FamilyInfo {
        architecture: "Qwen3ForCausalLM",
        model_type: "qwen3",
        title: "Qwen3 (dense)",
        mlp_bias: Bias::Never,
        qk_norm: true,
        head_dim: Some(128),
        kv_heads: Some(32),
        max_positions: 32_768,
        window: Window::SomeLayers,
        ..LLAMA
    },
    FamilyInfo {
        architecture: "InternLM2ForCausalLM",
        model_type: "internlm2",
        title: "InternLM2 and 2.5",
        names: Names {
            embed: "model.tok_embeddings",
            head: "output",
            attn_norm: "attention_norm",
            mlp_norm: "ffn_norm",
            attn: "attention",
            mlp: "feed_forward",
            qkv: QkvLayout::Grouped,
            qkv_names: &["wqkv"],
            o: "wo",
            gate_up_names: &["w1", "w3"],
            down: "w2",
            ..LLAMA_NAMES
        },
        qkv_bias: Bias::Key("bias", true),
        o_bias: Bias::Key("bias", true),
        mlp_bias: Bias::Never,
        rope: RopeRules { types: &["default", "linear", "dynamic"], ..ROPE },
        ..LLAMA
    },
    FamilyInfo {
        architecture: "InternLM3ForCausalLM",
        model_type: "internlm3",
        title: "InternLM3",
        qkv_bias: Bias::Key("qkv_bias", false),
        o_bias: Bias::Key("bias", false),
        mlp_bias: Bias::Key("bias", false),
        kv_heads: Some(32),
        max_positions: 32_768,
        ..LLAMA
    },
    FamilyInfo {
        architecture: "Phi3ForCausalLM",
        model_type: "phi3",
        title: "Phi-3, Phi-3.5 and Phi-4 (dense, text)",
        names: Names {
            qkv: QkvLayout::Stacked,
            qkv_names: &["qkv_proj"],
            gate_up: GateUpLayout::Stacked,
            gate_up_names: &["gate_up_proj"],
            ..LLAMA_NAMES
        },
        qkv_bias: Bias::Never,
        o_bias: Bias::Never,
        mlp_bias: Bias::Never,
        eps: 1e-5,
        max_positions: 4096,
        window: Window::AllLayers(None),
        rope: RopeRules {
            types: &["default", "longrope"],
            // Phi-3's first published names of what became LongRoPE.
            aliases: &[("su", "longrope"), ("yarn", "longrope")],
            partial: true,
            original_positions: Some(4096),
        },
        ..LLAMA
    },
];

/// All architectures, for messages.
pub(super) fn known() -> String {
    FAMILIES.iter().map(|f| f.architecture).collect::<Vec<_>>().join(", ")
}
