//! What a decoder reads, and whether a checkpoint holds it.

use super::mla;
use super::{AttnSpec, BlockSpec, DecoderSpec, NormSpec, Role};
use crate::DecoderError;
use crate::error::clean;

/// How many missing tensors an error lists.
const LISTED: usize = 5;

/// A tensor that the decoder reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorNeed {
    /// Name in the checkpoint.
    pub name: String,
    /// Shape that follows from config.json.
    pub shape: Vec<usize>,
    /// The block that reads it; `None` for embedding, final norm and head.
    pub block: Option<usize>,
    /// Whether the decoder also runs without it. No present family has such a tensor.
    pub optional: bool,
    /// The keys of config.json that the shape was computed from.
    pub keys: &'static str,
}

impl DecoderSpec {
    /// Every tensor the decoder reads, each once, in order of first use. A tied head reads the embedding.
    pub fn tensors(&self) -> Vec<TensorNeed> {
        let mut out = Vec::new();
        let mut need = |name: &str, shape: &[usize], block, keys| {
            out.push(TensorNeed { name: name.to_owned(), shape: shape.to_vec(), block, optional: false, keys });
        };
        const VOCAB: &str = "`vocab_size`, `hidden_size`";
        const HIDDEN: &str = "`hidden_size`";
        need(&self.embed.weight, &[self.vocab, self.hidden], None, VOCAB);
        for block in &self.blocks {
            let at = Some(block.index);
            let mut norm = |norm: &NormSpec, width: usize, keys| {
                for name in norm.tensors() {
                    need(name, &[width], at, keys);
                }
            };
            for block_norm in block.norms.all() {
                norm(block_norm, self.hidden, HIDDEN);
            }
            let inner = if is_latent(block) { mla::KEYS } else { "`head_dim`" };
            for (attn_norm, width) in block.attn.norms() {
                norm(attn_norm, width, inner);
            }
            if let AttnSpec::Gqa(attn) = &block.attn
                && let Some(sinks) = &attn.sinks
            {
                need(sinks, &[attn.heads], at, "`num_attention_heads`");
            }
            if let Some(moe) = block.moe() {
                let keys =
                    "the number of experts (`num_experts`, `num_local_experts` or `n_routed_experts`), `hidden_size`";
                need(&moe.router.weight, &[moe.experts, self.hidden], at, keys);
                for vector in moe.router.vectors() {
                    need(vector, &[moe.experts], at, keys);
                }
                if let Some(gate) = moe.shared.iter().find_map(|shared| shared.gate.as_ref()) {
                    need(gate, &[1, self.hidden], at, HIDDEN);
                }
            }
            for site in &block.sites {
                let keys = keys(block, site.id.role);
                need(&format!("{}.weight", site.module), &[site.out_features, site.in_features], at, keys);
                if site.bias {
                    need(&format!("{}.bias", site.module), &[site.out_features], at, keys);
                }
            }
        }
        for name in self.final_norm.tensors() {
            need(name, &[self.hidden], None, HIDDEN);
        }
        if !self.head.tied {
            need(&self.head.weight, &[self.vocab, self.hidden], None, VOCAB);
        }
        if let Some(bias) = &self.head.bias {
            need(bias, &[self.vocab], None, "`vocab_size`");
        }
        out
    }

    /// Compares a checkpoint's headers with config.json. `shape_of` gives the shape of a tensor, or `None` if
    /// the checkpoint lacks it.
    ///
    /// # Errors
    /// [`DecoderError::MissingTensors`], [`DecoderError::Shape`], [`DecoderError::ExtraBlock`].
    pub fn check_tensors(&self, shape_of: &dyn Fn(&str) -> Option<Vec<usize>>) -> Result<(), DecoderError> {
        let needs = self.tensors();
        let found: Vec<Option<Vec<usize>>> = needs.iter().map(|need| shape_of(&need.name)).collect();
        // A wrong shape first: with a wrong config.json it explains the missing tensors as well.
        let wrong: Vec<(&TensorNeed, &Vec<usize>)> = needs
            .iter()
            .zip(&found)
            .filter_map(|(need, found)| Some((need, found.as_ref()?)))
            .filter(|(need, found)| need.shape != **found)
            .collect();
        if let Some((need, found)) = wrong.first() {
            return Err(DecoderError::Shape {
                tensor: need.name.clone(),
                found: (*found).clone(),
                wanted: need.shape.clone(),
                keys: need.keys,
                more: match wrong.len() {
                    1 => String::new(),
                    n => format!("; {} more tensors disagree", n - 1),
                },
            });
        }
        let missing: Vec<&str> = needs
            .iter()
            .zip(&found)
            .filter(|(need, found)| found.is_none() && !need.optional)
            .map(|(need, _)| need.name.as_str())
            .collect();
        if !missing.is_empty() {
            let listed: Vec<String> = missing.iter().take(LISTED).map(|name| format!("`{}`", clean(name))).collect();
            let dots = if missing.len() > LISTED { ", …" } else { "" };
            return Err(DecoderError::MissingTensors {
                count: missing.len(),
                total: needs.len(),
                first: listed.join(", ") + dots,
            });
        }
        if let Some(tensor) = self.beyond().into_iter().find(|name| shape_of(name).is_some()) {
            return Err(DecoderError::ExtraBlock { tensor, layers: self.blocks.len(), mtp: self.mtp_layers });
        }
        let extra = |block: &BlockSpec| {
            let experts = block.moe()?.experts;
            let names = next_expert(block, experts).into_iter();
            Some((names.into_iter().find(|name| shape_of(name).is_some())?, experts))
        };
        match self.blocks.iter().find_map(extra) {
            Some((tensor, experts)) => Err(DecoderError::ExtraExpert { tensor, experts }),
            None => Ok(()),
        }
    }

    /// The tensors that one more block would have.
    fn beyond(&self) -> Vec<String> {
        let Some(last) = self.blocks.last() else { return Vec::new() };
        // In range: both are small.
        let next = last.index + 1 + self.mtp_layers;
        let (last_part, next_part) = (format!(".{}.", last.index), format!(".{next}."));
        let norms = last.norms.all().map(|norm| norm.weight.clone());
        let weights = last.sites.iter().map(|site| format!("{}.weight", site.module));
        let next = norms.chain(weights).map(|name| name.replacen(&last_part, &next_part, 1));
        next.collect()
    }
}

/// The weights that one more expert of `block` would have.
fn next_expert(block: &BlockSpec, experts: usize) -> Vec<String> {
    let first = block.sites.iter().filter(|site| matches!(site.id.role, Role::Expert(0, _)));
    first
        .map(|site| format!("{}.weight", site.module.replace(".experts.0.", &format!(".experts.{experts}."))))
        .collect()
}

fn is_latent(block: &BlockSpec) -> bool {
    matches!(block.attn, AttnSpec::Mla(_))
}

/// The keys of config.json that a linear's shape was computed from.
fn keys(block: &BlockSpec, role: Role) -> &'static str {
    match role {
        Role::QA | Role::QB | Role::KvA | Role::KvB => mla::KEYS,
        Role::Q | Role::O if is_latent(block) => mla::KEYS,
        Role::Q | Role::O => "`num_attention_heads`, `head_dim`, `hidden_size`",
        Role::K | Role::V => "`num_key_value_heads`, `head_dim`, `hidden_size`",
        Role::Qkv => "`num_attention_heads`, `num_key_value_heads`, `head_dim`, `hidden_size`",
        Role::Gate | Role::Up | Role::GateUp | Role::Down => "`intermediate_size`, `hidden_size`",
        Role::Expert(..) => "the width of experts and `hidden_size`",
        Role::Shared(_) => "the width of the shared expert and `hidden_size`",
    }
}
