//! The known families, as a table. A new family with known parts is a new row.

use super::config::Section;
use super::dense_families::{
    BAICHUAN2, CHATGLM, CHATGLM_CONDITIONAL, GEMMA2, GEMMA3, GLM, GLM4, GRANITE, OLMO2, QWEN2, QWEN2_5_VL, QWEN2_VL,
    QWEN3, QWEN3_VL, STARCODER2,
};
use super::described::described;
use super::mla::MlaRules;
use super::moe::MoeRules;
use super::moe_families::{DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE, GPT_OSS, MIXTRAL, QWEN2_MOE, QWEN3_MOE, QWEN3_VL_MOE};
use super::must::Must;
use super::wrapper::WRAPPERS;
use super::{Activation, GateUpLayout, NormKind, QkvLayout, RopePairing, RopeScaling};
use crate::DecoderError;
use crate::error::clean;

/// A decoder family: where its tensors are, and what config.json means for it.
///
/// Defaults for absent keys are those of the family's own configuration class (transformers 5.17, or the
/// code published with InternLM2 and InternLM3).
#[derive(Debug, Clone)]
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
    pub(super) qk_norm: QkNorm,
    /// Whether attention has sinks, `{attn}.sinks`.
    pub(super) sinks: bool,
    /// `head_dim` if absent; `None`: `hidden_size / num_attention_heads`.
    pub(super) head_dim: Option<usize>,
    /// `num_key_value_heads` if absent; `None`: `num_attention_heads`.
    pub(super) kv_heads: Option<usize>,
    pub(super) norm: NormRules,
    /// The key of the nonlinearity, and what it is if absent.
    pub(super) activation: (&'static str, Activation),
    /// `tie_word_embeddings` if absent.
    pub(super) tied: bool,
    /// Whether the head's rows are normalised; see [`super::HeadSpec::normalised`].
    pub(super) normalised_head: bool,
    pub(super) scales: Scales,
    /// `max_position_embeddings` if absent.
    pub(super) max_positions: Positions,
    pub(super) window: Window,
    pub(super) rope: RopeRules,
    /// Experts, in the layers that have them.
    pub(super) moe: Option<MoeRules>,
    /// Latent attention, in families that have it.
    pub(super) mla: Option<MlaRules>,
    /// Layers of multi-token prediction if no key names their number; `None`: the family has none.
    pub(super) mtp: Option<usize>,
    /// What config.json calls keys that other families agree on: (the usual name, the name here).
    pub(super) keys: &'static [(&'static str, &'static str)],
    /// Keys that would change the function, with the value that leaves it as it is here; absent and null are that value.
    pub(super) must: &'static [(&'static str, Must)],
    /// `num_key_value_heads` counts only if this key is true; otherwise every head has keys of its own.
    pub(super) grouped_if: Option<&'static str>,
    /// SHA-256 of the file that describes this family, if one does.
    pub(super) definition: Option<&'static str>,
}

/// Tensor names; block-relative ones are joined as `{blocks}.{index}.{part}`.
#[derive(Debug, Clone)]
pub(super) struct Names {
    pub(super) embed: &'static str,
    pub(super) blocks: &'static str,
    pub(super) final_norm: &'static str,
    pub(super) head: &'static str,
    /// Norms of [`super::BlockNorms`], where they are.
    pub(super) attn_norm: Option<&'static str>,
    pub(super) attn_out_norm: Option<&'static str>,
    pub(super) mlp_norm: Option<&'static str>,
    pub(super) mlp_out_norm: Option<&'static str>,
    pub(super) attn: &'static str,
    pub(super) mlp: &'static str,
    /// Norms of queries and keys inside attention, where they are.
    pub(super) qk_norms: [&'static str; 2],
    pub(super) qkv: QkvLayout,
    /// q, k, v or the one fused matrix.
    pub(super) qkv_names: &'static [&'static str],
    pub(super) o: &'static str,
    /// `None`: there is no gate.
    pub(super) gate_up: Option<GateUpLayout>,
    /// gate, up, or the one matrix: fused or alone.
    pub(super) gate_up_names: &'static [&'static str],
    pub(super) down: &'static str,
}

/// Norms of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum QkNorm {
    None,
    /// Over each head.
    EachHead,
    /// The same if this key is true.
    EachHeadIf(&'static str),
    /// Over all heads of a token.
    AllHeads,
}

/// The formula of all norms, and where its ε is.
#[derive(Debug, Clone, Copy)]
pub(super) struct NormRules {
    pub(super) kind: NormKind,
    pub(super) eps_key: &'static str,
    /// If the key is absent.
    pub(super) eps: f64,
}

/// Which factors and caps config.json holds.
#[derive(Debug, Clone, Copy)]
pub(super) enum Scales {
    /// None but `1/sqrt(head_dim)` on scores.
    Plain,
    /// `embedding_multiplier`, `attention_multiplier`, `residual_multiplier`, `logits_scaling`.
    Granite,
    /// Embeddings times `sqrt(hidden_size)`, `query_pre_attn_scalar`, soft caps with their defaults; `attn_cap: None`
    /// where scores are never capped.
    Gemma { attn_cap: Option<f64>, logits_cap: Option<f64> },
}

/// `max_position_embeddings` if absent.
#[derive(Debug, Clone, Copy)]
pub(super) enum Positions {
    Default(usize),
    /// It must be there: a model without it is another one, for which this is said.
    OrElse(&'static str),
}

/// Whether a linear has a bias.
#[derive(Debug, Clone, Copy)]
pub(super) enum Bias {
    Never,
    Always,
    /// As a key of config.json says; the flag is its default.
    Key(&'static str, bool),
    /// If one of these keys is true.
    AnyOf(&'static [&'static str]),
}

/// Which layers attend within a sliding window.
#[derive(Debug, Clone, Copy)]
pub(super) enum Window {
    /// None, whatever config.json says.
    Never,
    /// All, if `sliding_window` is a number; the number stands for an absent key.
    AllLayers(Option<usize>),
    /// If `use_sliding_window`, those that `layer_types` names, or else from `max_window_layers` (`first` if absent) on.
    SomeLayers { first: usize },
    /// Those that `layer_types` names, or else all but every `period`th.
    Alternating { period: usize, period_key: Option<&'static str>, default: usize },
    /// None; a config that asks for one is refused.
    Refused,
}

/// What the family knows of rotary embeddings.
#[derive(Debug, Clone, Copy)]
pub(super) struct RopeRules {
    /// Accepted `rope_type`s.
    pub(super) types: &'static [&'static str],
    /// Older names of a type: (written, meant).
    pub(super) aliases: &'static [(&'static str, &'static str)],
    /// `partial_rotary_factor` if absent; `None`: it must be 1.
    pub(super) partial: Option<f64>,
    pub(super) pairing: RopePairing,
    /// θ if absent.
    pub(super) theta: f64,
    /// θ of layers with a sliding window if absent, where they have their own.
    pub(super) local_theta: Option<f64>,
    /// `original_max_position_embeddings` if absent everywhere; `None`: `max_position_embeddings`.
    pub(super) original_positions: Option<usize>,
    /// The scaling of a config without rotary parameters; `None`: there is none.
    pub(super) if_absent: Option<&'static RopeScaling>,
    /// θ is multiplied by this key, if it is there.
    pub(super) ratio: Option<&'static str>,
    /// Models whose `_name_or_path` has this in it (lower case) divide positions by that key, and are refused with it.
    pub(super) ratio_of_positions: Option<&'static str>,
}

pub(super) const ROPE: RopeRules = RopeRules {
    types: &["default", "linear", "dynamic", "llama3", "yarn", "longrope"],
    aliases: &[],
    partial: None,
    pairing: RopePairing::Halves,
    theta: 10_000.0,
    local_theta: None,
    original_positions: None,
    if_absent: None,
    ratio: None,
    ratio_of_positions: None,
};

pub(super) const RMS: NormRules = NormRules { kind: NormKind::Rms, eps_key: "rms_norm_eps", eps: 1e-6 };

pub(super) const LLAMA_NAMES: Names = Names {
    embed: "model.embed_tokens",
    blocks: "model.layers",
    final_norm: "model.norm",
    head: "lm_head",
    attn_norm: Some("input_layernorm"),
    attn_out_norm: None,
    mlp_norm: Some("post_attention_layernorm"),
    mlp_out_norm: None,
    attn: "self_attn",
    mlp: "mlp",
    qk_norms: ["q_norm", "k_norm"],
    qkv: QkvLayout::Separate,
    qkv_names: &["q_proj", "k_proj", "v_proj"],
    o: "o_proj",
    gate_up: Some(GateUpLayout::Separate),
    gate_up_names: &["gate_proj", "up_proj"],
    down: "down_proj",
};

pub(super) const LLAMA: FamilyInfo = FamilyInfo {
    architecture: "LlamaForCausalLM",
    model_type: "llama",
    title: "Llama 1 to 3.x and everything published in its shape (Yi, DeepSeek-LLM, Vicuna, DeepSeek-R1-Distill-Llama, …)",
    names: LLAMA_NAMES,
    qkv_bias: Bias::Key("attention_bias", false),
    o_bias: Bias::Key("attention_bias", false),
    mlp_bias: Bias::Key("mlp_bias", false),
    qk_norm: QkNorm::None,
    sinks: false,
    head_dim: None,
    kv_heads: None,
    norm: RMS,
    activation: ("hidden_act", Activation::Silu),
    tied: false,
    normalised_head: false,
    scales: Scales::Plain,
    max_positions: Positions::Default(2048),
    window: Window::Never,
    rope: ROPE,
    moe: None,
    mla: None,
    mtp: None,
    keys: &[],
    must: &[],
    grouped_if: None,
    definition: None,
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
        max_positions: Positions::Default(131_072),
        window: Window::AllLayers(Some(4096)),
        ..LLAMA
    },
    QWEN2,
    QWEN3,
    FamilyInfo {
        architecture: "InternLM2ForCausalLM",
        model_type: "internlm2",
        title: "InternLM2 and 2.5",
        names: Names {
            embed: "model.tok_embeddings",
            head: "output",
            attn_norm: Some("attention_norm"),
            mlp_norm: Some("ffn_norm"),
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
        max_positions: Positions::Default(32_768),
        ..LLAMA
    },
    FamilyInfo {
        architecture: "Phi3ForCausalLM",
        model_type: "phi3",
        title: "Phi-3, Phi-3.5 and Phi-4 (dense, text)",
        names: Names {
            qkv: QkvLayout::Stacked,
            qkv_names: &["qkv_proj"],
            gate_up: Some(GateUpLayout::Stacked),
            gate_up_names: &["gate_up_proj"],
            ..LLAMA_NAMES
        },
        qkv_bias: Bias::Never,
        o_bias: Bias::Never,
        mlp_bias: Bias::Never,
        norm: NormRules { eps: 1e-5, ..RMS },
        max_positions: Positions::Default(4096),
        window: Window::AllLayers(None),
        rope: RopeRules {
            types: &["default", "longrope"],
            // Phi-3's first published names of what became LongRoPE.
            aliases: &[("su", "longrope"), ("yarn", "longrope")],
            partial: Some(1.0),
            original_positions: Some(4096),
            ..ROPE
        },
        ..LLAMA
    },
    GRANITE,
    OLMO2,
    GLM,
    GLM4,
    CHATGLM,
    CHATGLM_CONDITIONAL,
    GEMMA2,
    GEMMA3,
    STARCODER2,
    BAICHUAN2,
    QWEN3_MOE,
    QWEN2_MOE,
    MIXTRAL,
    GPT_OSS,
    GLM4_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
];

/// The family that `architectures` names, or if that is absent `model_type`; built-in ones before those of files.
pub(super) fn family(config: &Section) -> Result<&'static FamilyInfo, DecoderError> {
    let unclear = |reason: String| DecoderError::UnclearArchitecture { reason, known: known() };
    let by_type = |name: &str| FAMILIES.iter().chain(described()).find(|f| f.model_type == name);
    let model_type = config.text("model_type")?;
    let found = match config.texts("architectures")?.as_deref() {
        None | Some([]) => {
            let Some(name) = model_type else {
                return Err(unclear(
                    "neither `architectures` nor `model_type` is there, wanted `architectures`".into(),
                ));
            };
            return by_type(name).ok_or_else(|| {
                unclear(format!("`architectures` is empty and `model_type` is `{}`, which is unknown", clean(name)))
            });
        }
        Some([one]) => *one,
        Some(many) => {
            let list = clean(&many.join(", "));
            return Err(unclear(format!("`architectures` holds {} names ({list}), wanted one", many.len())));
        }
    };
    let family = by_architecture(found)
        .ok_or_else(|| DecoderError::UnknownArchitecture { found: format!("`{}`", clean(found)), known: known() })?;
    match model_type.filter(|name| *name != family.model_type).and_then(by_type) {
        Some(other) => Err(unclear(format!(
            "`architectures` is `{}`, but `model_type` is `{}`, which belongs to `{}`; correct one of them",
            family.architecture, other.model_type, other.architecture
        ))),
        None => Ok(family),
    }
}

/// Decoders that are only published inside other models.
pub(super) static INNER_FAMILIES: &[FamilyInfo] = &[QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE];

/// The families that files describe, then those of [`FAMILIES`].
fn all() -> impl Iterator<Item = &'static FamilyInfo> {
    described().into_iter().chain(FAMILIES)
}

/// The family with this entry of `architectures`, or of this name inside another model.
pub(super) fn by_architecture(name: &str) -> Option<&'static FamilyInfo> {
    all().chain(INNER_FAMILIES).find(|family| family.architecture == name)
}

/// All architectures, for messages.
fn known() -> String {
    let wrappers = WRAPPERS.iter().map(|w| w.architecture);
    all().map(|f| f.architecture).chain(wrappers).collect::<Vec<_>>().join(", ")
}
