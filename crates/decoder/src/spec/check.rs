//! What a decoder reads, and whether a checkpoint holds it.

use super::{AttnSpec, DecoderSpec, NormSpec, Role};
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
                for name in std::iter::once(&norm.weight).chain(&norm.bias) {
                    need(name, &[width], at, keys);
                }
            };
            norm(&block.norms.attn, self.hidden, HIDDEN);
            norm(&block.norms.mlp, self.hidden, HIDDEN);
            let AttnSpec::Gqa(attn) = &block.attn;
            for head_norm in attn.q_norm.iter().chain(&attn.k_norm) {
                norm(head_norm, attn.head_dim, "`head_dim`");
            }
            for site in &block.sites {
                let keys = keys(site.id.role);
                need(&format!("{}.weight", site.module), &[site.out_features, site.in_features], at, keys);
                if site.bias {
                    need(&format!("{}.bias", site.module), &[site.out_features], at, keys);
                }
            }
        }
        for name in std::iter::once(&self.final_norm.weight).chain(&self.final_norm.bias) {
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
        match self.beyond().into_iter().find(|name| shape_of(name).is_some()) {
            Some(tensor) => Err(DecoderError::ExtraBlock { tensor, layers: self.blocks.len() }),
            None => Ok(()),
        }
    }

    /// The tensors that one more block would have.
    fn beyond(&self) -> Vec<String> {
        let Some(last) = self.blocks.last() else { return Vec::new() };
        let (last_part, next_part) = (format!(".{}.", last.index), format!(".{}.", last.index + 1));
        let norms = [&last.norms.attn.weight, &last.norms.mlp.weight].map(String::clone);
        let weights = last.sites.iter().map(|site| format!("{}.weight", site.module));
        norms.into_iter().chain(weights).map(|name| name.replacen(&last_part, &next_part, 1)).collect()
    }
}

/// The keys of config.json that a linear's shape was computed from.
fn keys(role: Role) -> &'static str {
    match role {
        Role::Q | Role::O => "`num_attention_heads`, `head_dim`, `hidden_size`",
        Role::K | Role::V => "`num_key_value_heads`, `head_dim`, `hidden_size`",
        Role::Qkv => "`num_attention_heads`, `num_key_value_heads`, `head_dim`, `hidden_size`",
        Role::Gate | Role::Up | Role::GateUp | Role::Down => "`intermediate_size`, `hidden_size`",
    }
}
