//! The families with experts.

use super::RopePairing;
use super::families::{Bias, FamilyInfo, LLAMA, NormRules, Positions, QkNorm, RMS, ROPE, RopeRules, Window};
use super::mla::MlaRules;
use super::moe::{Joined, MoeRules, Routing, SharedWidth, Sparse};
use super::rope::RopeScaling;

/// What most families have in common.
const MOE: MoeRules = MoeRules {
    module: "mlp",
    parts: ["gate_proj", "up_proj", "down_proj"],
    bias: false,
    router: ("gate", false),
    joined: Joined::Product,
    shared: None,
    shared_gate: false,
    experts: &["num_experts", "num_local_experts"],
    intermediate: "moe_intermediate_size",
    shared_width: SharedWidth::Times("n_shared_experts", 0),
    routing: Routing::Softmax { normalize: None },
    sparse: Sparse::Steps,
};

pub(super) const QWEN3_MOE: FamilyInfo = FamilyInfo {
    architecture: "Qwen3MoeForCausalLM",
    model_type: "qwen3_moe",
    title: "Qwen3 MoE (30B-A3B, 235B-A22B, Coder)",
    qkv_bias: Bias::Key("attention_bias", false),
    o_bias: Bias::Key("attention_bias", false),
    mlp_bias: Bias::Never,
    qk_norm: QkNorm::EachHead,
    kv_heads: Some(4),
    max_positions: Positions::Default(32_768),
    window: Window::Refused,
    moe: Some(MOE),
    ..LLAMA
};

/// Qwen3-VL-MoE's decoder: Qwen3 MoE, whose routers always normalise.
pub(super) const QWEN3_VL_MOE: FamilyInfo = FamilyInfo {
    architecture: "Qwen3VLMoeTextModel",
    model_type: "qwen3_vl_moe_text",
    title: "Qwen3-VL MoE (its decoder)",
    kv_heads: Some(16),
    max_positions: Positions::Default(128_000),
    rope: RopeRules { theta: 500_000.0, ..ROPE },
    moe: Some(MoeRules { routing: Routing::Softmax { normalize: Some(true) }, ..MOE }),
    ..QWEN3_MOE
};

pub(super) const QWEN2_MOE: FamilyInfo = FamilyInfo {
    architecture: "Qwen2MoeForCausalLM",
    model_type: "qwen2_moe",
    title: "Qwen 1.5 and 2 MoE (A2.7B, 57B-A14B)",
    qkv_bias: Bias::Key("qkv_bias", true),
    o_bias: Bias::Never,
    mlp_bias: Bias::Never,
    kv_heads: Some(16),
    max_positions: Positions::Default(32_768),
    window: Window::Refused,
    moe: Some(MoeRules {
        shared: Some("shared_expert"),
        shared_gate: true,
        shared_width: SharedWidth::Key("shared_expert_intermediate_size"),
        ..MOE
    }),
    ..LLAMA
};

pub(super) const MIXTRAL: FamilyInfo = FamilyInfo {
    architecture: "MixtralForCausalLM",
    model_type: "mixtral",
    title: "Mixtral 8x7B, 8x22B",
    qkv_bias: Bias::Never,
    o_bias: Bias::Never,
    mlp_bias: Bias::Never,
    kv_heads: Some(8),
    norm: NormRules { eps: 1e-5, ..RMS },
    max_positions: Positions::Default(131_072),
    window: Window::AllLayers(None),
    moe: Some(MoeRules {
        module: "block_sparse_moe",
        parts: ["w1", "w3", "w2"],
        experts: &["num_local_experts"],
        intermediate: "intermediate_size",
        routing: Routing::Softmax { normalize: Some(true) },
        sparse: Sparse::All,
        ..MOE
    }),
    ..LLAMA
};

/// gpt-oss's rotary embedding where config.json has none.
static GPT_OSS_YARN: RopeScaling = RopeScaling::Yarn {
    factor: 32.0,
    // 0.1 · ln 32 + 1
    attention_factor: 1.346_573_590_279_972_7,
    beta_fast: 32.0,
    beta_slow: 1.0,
    truncate: false,
    original: 4096,
};

/// Experts as the checkpoint reader presents them: one by one, gate and up apart.
pub(super) const GPT_OSS: FamilyInfo = FamilyInfo {
    architecture: "GptOssForCausalLM",
    model_type: "gpt_oss",
    title: "gpt-oss 20B, 120B",
    qkv_bias: Bias::Key("attention_bias", true),
    o_bias: Bias::Key("attention_bias", true),
    mlp_bias: Bias::Never,
    sinks: true,
    head_dim: Some(64),
    kv_heads: Some(8),
    norm: NormRules { eps: 1e-5, ..RMS },
    max_positions: Positions::Default(131_072),
    window: Window::Alternating { period: 2, period_key: None, default: 128 },
    rope: RopeRules { theta: 150_000.0, if_absent: Some(&GPT_OSS_YARN), ..ROPE },
    moe: Some(MoeRules {
        bias: true,
        router: ("router", true),
        joined: Joined::Clamped { slope: 1.702, limit: ("swiglu_limit", 7.0) },
        experts: &["num_local_experts", "num_experts"],
        intermediate: "intermediate_size",
        // A softmax over the chosen logits is that over all, normalised.
        routing: Routing::Softmax { normalize: Some(true) },
        sparse: Sparse::All,
        ..MOE
    }),
    ..LLAMA
};

/// DeepSeek's experts, as DeepSeek-V2 has them.
const DEEPSEEK_MOE: MoeRules = MoeRules {
    shared: Some("shared_experts"),
    experts: &["n_routed_experts", "num_experts", "num_local_experts"],
    shared_width: SharedWidth::Times("n_shared_experts", 2),
    routing: Routing::SoftmaxGroups,
    sparse: Sparse::AfterFirst(0),
    ..MOE
};

pub(super) const GLM4_MOE: FamilyInfo = FamilyInfo {
    architecture: "Glm4MoeForCausalLM",
    model_type: "glm4_moe",
    title: "GLM-4.5, GLM-4.5-Air, GLM-4.6 (text)",
    qkv_bias: Bias::Key("attention_bias", false),
    o_bias: Bias::Never,
    mlp_bias: Bias::Never,
    qk_norm: QkNorm::EachHeadIf("use_qk_norm"),
    kv_heads: Some(8),
    norm: NormRules { eps: 1e-5, ..RMS },
    max_positions: Positions::Default(131_072),
    rope: RopeRules { partial: Some(0.5), ..ROPE },
    moe: Some(MoeRules {
        shared_width: SharedWidth::Times("n_shared_experts", 1),
        routing: Routing::SigmoidGroups { groups: (1, 1), scale: 1.0 },
        sparse: Sparse::AfterFirst(1),
        ..DEEPSEEK_MOE
    }),
    mtp: Some(1),
    ..LLAMA
};

pub(super) const DEEPSEEK_V2: FamilyInfo = FamilyInfo {
    architecture: "DeepseekV2ForCausalLM",
    model_type: "deepseek_v2",
    title: "DeepSeek-V2, V2.5, V2-Lite, Coder-V2",
    qkv_bias: Bias::Key("attention_bias", false),
    o_bias: Bias::Key("attention_bias", false),
    mlp_bias: Bias::Key("mlp_bias", false),
    rope: RopeRules { pairing: RopePairing::Neighbours, ..ROPE },
    moe: Some(DEEPSEEK_MOE),
    mla: Some(MlaRules { interleave: None }),
    ..LLAMA
};

pub(super) const DEEPSEEK_V3: FamilyInfo = FamilyInfo {
    architecture: "DeepseekV3ForCausalLM",
    model_type: "deepseek_v3",
    title: "DeepSeek-V3, V3.1, R1, Kimi K2",
    mlp_bias: Bias::Never,
    max_positions: Positions::Default(4096),
    moe: Some(MoeRules {
        shared_width: SharedWidth::Times("n_shared_experts", 1),
        routing: Routing::SigmoidGroups { groups: (8, 4), scale: 2.5 },
        sparse: Sparse::AfterFirst(3),
        ..DEEPSEEK_MOE
    }),
    mla: Some(MlaRules { interleave: Some("rope_interleave") }),
    mtp: Some(1),
    ..DEEPSEEK_V2
};
