//! The keys of config.json that a family may call by another name.

use serde::Deserialize;

macro_rules! usual_keys {
    ($($variant:ident = $name:literal),* $(,)?) => {
        /// A key of config.json that may have another name.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
        pub(in crate::spec) enum UsualKey {
            $(#[serde(rename = $name)] $variant),*
        }

        impl UsualKey {
            pub(in crate::spec) fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name),*
                }
            }
        }
    };
}

usual_keys! {
    HiddenSize = "hidden_size",
    IntermediateSize = "intermediate_size",
    VocabSize = "vocab_size",
    Layers = "num_hidden_layers",
    Heads = "num_attention_heads",
    KvHeads = "num_key_value_heads",
    HeadDim = "head_dim",
    MaxPositions = "max_position_embeddings",
    Tied = "tie_word_embeddings",
    SlidingWindow = "sliding_window",
    UseSlidingWindow = "use_sliding_window",
    MaxWindowLayers = "max_window_layers",
    LayerTypes = "layer_types",
    RopeTheta = "rope_theta",
    RopeLocalTheta = "rope_local_base_freq",
    RopeScaling = "rope_scaling",
    PartialRotary = "partial_rotary_factor",
    OriginalPositions = "original_max_position_embeddings",
    TopK = "num_experts_per_tok",
    NormTopK = "norm_topk_prob",
    RoutedScale = "routed_scaling_factor",
    Groups = "n_group",
    TopKGroup = "topk_group",
    SparseStep = "decoder_sparse_step",
    DenseLayers = "mlp_only_layers",
    FirstDense = "first_k_dense_replace",
    QRank = "q_lora_rank",
    KvRank = "kv_lora_rank",
    NopeDim = "qk_nope_head_dim",
    RopeDim = "qk_rope_head_dim",
    ValueDim = "v_head_dim",
    EmbeddingMultiplier = "embedding_multiplier",
    AttentionMultiplier = "attention_multiplier",
    ResidualMultiplier = "residual_multiplier",
    LogitsScaling = "logits_scaling",
    AttnScalar = "query_pre_attn_scalar",
}
