//! Finding linears by tensor names and shapes alone, for decoders that nobody described.
//!
//! A tensor is taken for the weight of a linear if it is called `….weight`, has two dimensions, and lies inside a
//! numbered block (`layers.N`, `h.N`, `blocks.N`, `layer.N`, `block.N`). Left plain, by a word of its path:
//!
//! | what | a part of the path that is, or has in it |
//! |---|---|
//! | routers and gates | is `gate`, `router`, `wg`, `weights_proj`; ends in `_gate`, `_router` (`gate_proj` is no gate) |
//! | norms, embeddings, positions | has `norm`, `embed`, `rotary`, `wte`, `wpe`; ends in `_bias` |
//! | heads | is `head`, `score`, `classifier`; ends in `_head` |
//! | other modalities and what leads to the text | has `vision`, `visual`, `image`, `audio`, `video`, `projector`, `resampler`, `connector`, `merger`, `aligner`; is `mlp1`, `vit` |
//! | adapters | has `lora_` |
//!
//! Experts stacked in one tensor are read one by one where their names and shapes are known (`lite_model`); others have no
//! name per expert that a layout could use, and stay plain. So do the matrices of GPT-2, which are stored `[in, out]`.

use lite_model::Checkpoint;
use serde_json::{Map, Value};

/// What a tensor is taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    /// The weight of a linear in this block.
    Linear(usize),
    /// Experts of this block in one tensor.
    StackedExperts(usize),
    /// Anything else.
    Other,
}

/// The rule above, for one tensor.
pub(crate) fn taken_for(name: &str, shape: &[usize]) -> Taken {
    let Some(block) = block_number(name) else { return Taken::Other };
    if name.split('.').any(is_plain) || shape.contains(&0) {
        return Taken::Other;
    }
    match (name.strip_suffix(".weight"), shape) {
        (Some(_), [_, _]) => Taken::Linear(block),
        (_, [_, _, _]) if name.split('.').any(|part| part == "experts") => Taken::StackedExperts(block),
        _ => Taken::Other,
    }
}

/// The linears of a checkpoint: `(module, block, N, K)` by block and name, and what to say of the rest.
pub(crate) fn linears(checkpoint: &Checkpoint, notes: &mut Vec<String>) -> Vec<(String, usize, usize, usize)> {
    if stored_transposed(checkpoint.config()) {
        notes.push("the matrices of GPT-2 are stored [in, out]; they stay plain".to_owned());
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut stacked = 0usize;
    for info in checkpoint.names().filter_map(|name| checkpoint.info(name)) {
        match (taken_for(&info.name, &info.shape), info.shape.as_slice(), info.name.strip_suffix(".weight")) {
            (Taken::Linear(block), &[n, k], Some(module)) => found.push((module.to_owned(), block, n, k)),
            (Taken::StackedExperts(_), ..) => stacked += 1,
            _ => {}
        }
    }
    if stacked > 0 {
        notes.push(format!(
            "{stacked} tensors hold the experts of a block stacked in one; no layout can name their parts, so they stay plain"
        ));
    }
    found.sort_by(|a, b| (a.1, &a.0).cmp(&(b.1, &b.0)));
    found
}

/// GPT-2 and what it was copied into use `Conv1D`, whose weight is `[in, out]`.
fn stored_transposed(config: &Map<String, Value>) -> bool {
    matches!(
        config.get("model_type").and_then(Value::as_str),
        Some("gpt2" | "openai-gpt" | "imagegpt" | "decision_transformer")
    )
}

/// Whether a part of a path says that the tensor is no linear to quantize.
fn is_plain(part: &str) -> bool {
    const IS: [&str; 9] = ["gate", "router", "wg", "weights_proj", "head", "score", "classifier", "mlp1", "vit"];
    const ENDS: [&str; 4] = ["_gate", "_router", "_head", "_bias"];
    const HAS: [&str; 17] = [
        "norm",
        "embed",
        "rotary",
        "wte",
        "wpe",
        "vision",
        "visual",
        "image",
        "audio",
        "video",
        "projector",
        "resampler",
        "connector",
        "merger",
        "aligner",
        "lora_",
        "mm_",
    ];
    let part = part.to_ascii_lowercase();
    IS.contains(&part.as_str())
        || ENDS.iter().any(|word| part.ends_with(word))
        || HAS.iter().any(|word| part.contains(word))
}

/// N of `….layers.N.…` and its like: the outermost number.
fn block_number(name: &str) -> Option<usize> {
    let mut parts = name.split('.').peekable();
    while let Some(part) = parts.next() {
        if matches!(part, "layers" | "h" | "blocks" | "layer" | "block")
            && let Some(number) = parts.peek().and_then(|next| next.parse().ok())
        {
            return Some(number);
        }
    }
    None
}

/// Engines run q, k, v and gate, up as one; what they share needs one scheme, and one scale where there is one for a
/// whole tensor.
pub(crate) fn fused_group(module: &str) -> String {
    let Some((parent, leaf)) = module.rsplit_once('.') else { return module.to_owned() };
    match leaf {
        "q_proj" | "k_proj" | "v_proj" => format!("{parent}.qkv"),
        "gate_proj" | "up_proj" | "w1" | "w3" => format!("{parent}.gate_up"),
        "q_a_proj" | "kv_a_proj_with_mqa" => format!("{parent}.qkv_a"),
        _ => module.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(name: &str) -> Taken {
        taken_for(name, &[64, 32])
    }

    /// Names as published checkpoints have them.
    #[test]
    fn linears_of_published_checkpoints_are_found() {
        for (name, block) in [
            ("model.layers.12.self_attn.q_proj.weight", 12),
            ("transformer.h.3.attn.c_attn.weight", 3),
            ("h.0.self_attention.query_key_value.weight", 0),
            ("transformer.h.31.mlp.dense_4h_to_h.weight", 31),
            ("transformer.encoder.layers.5.mlp.dense_h_to_4h.weight", 5),
            ("model.layers.3.mlp.gate_proj.weight", 3),
            ("model.layers.3.mlp.gate_up_proj.weight", 3),
            ("model.layers.7.mlp.experts.63.down_proj.weight", 7),
            ("model.layers.7.mlp.shared_experts.up_proj.weight", 7),
            ("model.layers.7.mlp.shared_expert.gate_proj.weight", 7),
            ("model.layers.31.block_sparse_moe.experts.7.w2.weight", 31),
            ("model.layers.60.self_attn.kv_a_proj_with_mqa.weight", 60),
            ("model.language_model.layers.4.linear_attn.in_proj_qkvz.weight", 4),
            ("backbone.layers.4.mixer.in_proj.weight", 4),
            ("model.layers.61.eh_proj.weight", 61),
            ("decoder.block.2.layer.0.SelfAttention.q.weight", 2),
            ("model.decoder.layers.1.fc1.weight", 1),
            ("gpt_neox.layers.1.attention.dense.weight", 1),
        ] {
            assert_eq!(taken(name), Taken::Linear(block), "{name}");
        }
    }

    #[test]
    fn what_is_no_linear_stays_plain() {
        for name in [
            "lm_head.weight",
            "model.embed_tokens.weight",
            "model.layers.3.mlp.gate.weight",
            "model.layers.3.mlp.gate.wg.weight",
            "model.layers.3.block_sparse_moe.gate.weight",
            "model.layers.3.feed_forward.router.weight",
            "model.layers.3.mlp.router.weight",
            "model.layers.3.mlp.shared_expert_gate.weight",
            "model.layers.3.self_attn.indexer.weights_proj.weight",
            "model.layers.3.input_layernorm.weight",
            "model.layers.3.self_attn.q_norm.weight",
            "model.layers.61.embed_tokens.weight",
            "model.layers.61.shared_head.head.weight",
            "visual.blocks.5.attn.qkv.weight",
            "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight",
            "vision_model.encoder.layers.2.mlp.fc1.weight",
            "audio_tower.layers.0.self_attn.k_proj.weight",
            "multi_modal_projector.layers.0.weight",
            "model.mm_projector.layers.0.weight",
            "mlp1.1.weight",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "model.layers.3.self_attn.q_proj.bias",
            "model.layers.3.self_attn.q_proj.lora_A.weight",
        ] {
            assert_eq!(taken(name), Taken::Other, "{name}");
        }
        assert_eq!(taken_for("model.layers.3.mlp.up_proj.weight", &[64]), Taken::Other);
        assert_eq!(taken_for("model.layers.3.mlp.up_proj.weight", &[0, 64]), Taken::Other);
        assert_eq!(taken_for("backbone.layers.4.mixer.conv1d.weight", &[64, 1, 4]), Taken::Other);
        for experts in
            ["model.layers.3.mlp.experts.gate_up_proj", "language_model.model.layers.3.feed_forward.experts.down_proj"]
        {
            assert_eq!(taken_for(experts, &[8, 64, 32]), Taken::StackedExperts(3), "{experts}");
        }
    }

    #[test]
    fn shards_of_a_fused_linear_share_a_name() {
        assert_eq!(fused_group("model.layers.0.self_attn.k_proj"), "model.layers.0.self_attn.qkv");
        assert_eq!(fused_group("model.layers.0.mlp.experts.3.w3"), "model.layers.0.mlp.experts.3.gate_up");
        assert_eq!(fused_group("model.layers.0.mlp.down_proj"), "model.layers.0.mlp.down_proj");
    }

    /// Every tensor of a real index is judged as its author would.
    #[test]
    fn a_published_index_is_split_as_it_should_be() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../../shared/data/configs/internlm3-8b-instruct/model.safetensors.index.json");
        let Ok(text) = std::fs::read_to_string(&path) else { return };
        let index: Value = serde_json::from_str(&text).unwrap();
        let names = index["weight_map"].as_object().unwrap().keys();
        let linears = names.filter(|name| {
            // Only the index is there: a vector is told by its name.
            matches!(taken(name), Taken::Linear(_))
        });
        // 48 blocks of q, k, v, o, gate, up, down.
        assert_eq!(linears.count(), 48 * 7);
    }
}
