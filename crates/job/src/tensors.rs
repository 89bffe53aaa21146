//! What happens to each tensor of the source.

use lite_decoder::{DecoderSpec, SiteId};
use lite_model::{Checkpoint, OutputTensor};
use lite_quant::Scheme;

/// A linear that is quantized.
#[derive(Debug, Clone)]
pub struct QuantSite {
    /// Full module name, without `.weight`.
    pub module: String,
    /// Decoder block it belongs to.
    pub block: usize,
    /// N.
    pub out_features: usize,
    /// K.
    pub in_features: usize,
    /// Linears that an engine fuses share this name.
    pub fused_group: String,
    /// Bits, group size, symmetry, scale type.
    pub scheme: Scheme,
    /// Its place in the decoder; `None` for architectures that are only known by tensor names.
    pub site: Option<SiteId>,
}

/// The fate of one source tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Replaced by the packed tensors of a quantized linear.
    Quantize {
        /// Index into [`crate::Plan::sites`].
        site: usize,
    },
    /// A norm weight or a bias that absorbs scales.
    Rescale,
    /// Written unchanged.
    Copy,
    /// Written in another float type.
    Convert,
    /// Not written.
    Drop {
        /// The rule.
        reason: &'static str,
    },
}

/// One row of the plan: every source tensor has exactly one.
#[derive(Debug, Clone)]
pub struct TensorPlan {
    /// Name in the source.
    pub source: String,
    /// What happens to it.
    pub action: Action,
    /// What is written for it.
    pub outputs: Vec<OutputTensor>,
}

/// The linears of a known decoder.
pub(crate) fn sites_of(spec: &DecoderSpec, scheme: Scheme) -> Vec<QuantSite> {
    spec.sites()
        .map(|site| QuantSite {
            module: site.module.clone(),
            block: site.id.block,
            out_features: site.out_features,
            in_features: site.in_features,
            fused_group: site.fused_group.clone(),
            scheme,
            site: Some(site.id),
        })
        .collect()
}

/// The linears of a decoder that is known by its tensor names alone: two-dimensional `….weight` tensors
/// inside numbered blocks, without norms, embeddings, routers, gates and vision towers.
pub(crate) fn guess_sites(checkpoint: &Checkpoint, scheme: Scheme) -> Vec<QuantSite> {
    const PLAIN: [&str; 9] =
        ["norm", "embed", "router", "vision", "visual", "audio", "rotary", "shared_expert_gate", "lm_head"];
    let mut sites = Vec::new();
    for info in checkpoint.names().filter_map(|name| checkpoint.info(name)) {
        let Some(module) = info.name.strip_suffix(".weight") else { continue };
        let (Some(block), [n, k]) = (block_number(module), info.shape.as_slice()) else { continue };
        let skipped = PLAIN.iter().any(|word| module.contains(word)) || module.ends_with(".gate");
        if skipped || *n == 0 || *k == 0 {
            continue;
        }
        sites.push(QuantSite {
            module: module.to_owned(),
            block,
            out_features: *n,
            in_features: *k,
            fused_group: fused_group(module),
            scheme,
            site: None,
        });
    }
    sites.sort_by(|a, b| (a.block, &a.module).cmp(&(b.block, &b.module)));
    sites
}

/// N of `….layers.N.…`, `….h.N.…` or `….blocks.N.…`.
fn block_number(module: &str) -> Option<usize> {
    let parts: Vec<&str> = module.split('.').collect();
    parts
        .windows(2)
        .find(|pair| matches!(pair[0], "layers" | "h" | "blocks" | "layer"))
        .and_then(|pair| pair[1].parse().ok())
}

/// Engines fuse q, k, v and gate, up; siblings must agree.
fn fused_group(module: &str) -> String {
    let Some((parent, leaf)) = module.rsplit_once('.') else { return module.to_owned() };
    match leaf {
        "q_proj" | "k_proj" | "v_proj" => format!("{parent}.qkv"),
        "gate_proj" | "up_proj" | "w1" | "w3" => format!("{parent}.gate_up"),
        _ => module.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_numbered_by_their_path() {
        assert_eq!(block_number("model.layers.12.self_attn.q_proj"), Some(12));
        assert_eq!(block_number("transformer.h.3.attn.c_attn"), Some(3));
        assert_eq!(block_number("model.embed_tokens"), None);
        assert_eq!(block_number("model.layers.x.q_proj"), None);
        assert_eq!(fused_group("model.layers.0.self_attn.k_proj"), "model.layers.0.self_attn.qkv");
        assert_eq!(fused_group("model.layers.0.mlp.down_proj"), "model.layers.0.mlp.down_proj");
    }
}
