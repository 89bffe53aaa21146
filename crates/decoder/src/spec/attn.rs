//! The attention of a block.

use super::{MlaSpec, NormSpec, Role};

/// The attention of a block.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum AttnSpec {
    /// Multi-head, grouped-query or multi-query attention.
    Gqa(GqaSpec),
    /// Multi-head latent attention.
    Mla(MlaSpec),
}

impl AttnSpec {
    /// The norms inside attention, with their widths.
    pub fn norms(&self) -> Vec<(&NormSpec, usize)> {
        match self {
            Self::Gqa(attn) => {
                let norms = [&attn.q_norm, &attn.k_norm].into_iter().zip(attn.norm_widths());
                norms.filter_map(|(norm, width)| Some((norm.as_ref()?, width))).collect()
            }
            Self::Mla(attn) => {
                attn.q_latent.iter().chain([&attn.kv_latent]).map(|latent| (&latent.norm, latent.width)).collect()
            }
        }
    }
}

/// Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245). Query head `h` reads key and value head
/// `h / (heads / kv_heads)`.
#[derive(Debug, Clone, PartialEq)]
pub struct GqaSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// How q, k and v are stored.
    pub qkv: QkvLayout,
    /// Norm of the queries before the rotation.
    pub q_norm: Option<NormSpec>,
    /// Norm of the keys before the rotation.
    pub k_norm: Option<NormSpec>,
    /// Whether these norms go over all heads of a token together, and not over each head.
    pub norm_all_heads: bool,
    /// A query sees this many keys, itself included; `None`: all before it.
    pub window: Option<usize>,
    /// Scores are multiplied by this: `1/sqrt(head_dim)` in most families.
    pub scale: f32,
    /// Then they become `cap · tanh(score / cap)`, if there is a cap.
    pub softcap: Option<f32>,
    /// Tensor `[heads]` of one more score per head: it takes its share of the softmax and adds nothing to the output
    /// (Xiao et al. 2023, arXiv:2309.17453; learned as in gpt-oss).
    pub sinks: Option<String>,
    /// Whether positions are those of [`DecoderSpec::local_rope`].
    pub local_rope: bool,
}

impl GqaSpec {
    /// Widths of the norms of queries and keys.
    pub fn norm_widths(&self) -> [usize; 2] {
        let heads = if self.norm_all_heads { [self.heads, self.kv_heads] } else { [1, 1] };
        heads.map(|heads| heads * self.head_dim)
    }

    /// Where each head starts in a row of the projection that holds it: for q, k and v the role of that
    /// projection and the column offsets.
    pub fn columns(&self) -> [(Role, Vec<usize>); 3] {
        let (h, kv, d) = (self.heads, self.kv_heads, self.head_dim);
        let run = |start: usize, count: usize| (0..count).map(|i| start + i * d).collect();
        match self.qkv {
            QkvLayout::Separate => [(Role::Q, run(0, h)), (Role::K, run(0, kv)), (Role::V, run(0, kv))],
            QkvLayout::Stacked => {
                [(Role::Qkv, run(0, h)), (Role::Qkv, run(h * d, kv)), (Role::Qkv, run((h + kv) * d, kv))]
            }
            QkvLayout::Grouped => {
                let group = h / kv;
                let slot = |head: usize, slot: usize| (head * (group + 2) + slot) * d;
                [
                    (Role::Qkv, (0..h).map(|i| slot(i / group, i % group)).collect()),
                    (Role::Qkv, (0..kv).map(|i| slot(i, group)).collect()),
                    (Role::Qkv, (0..kv).map(|i| slot(i, group + 1)).collect()),
                ]
            }
        }
    }
}

/// How the rows of q, k and v are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkvLayout {
    /// Three matrices.
    Separate,
    /// One matrix: all of q, all of k, all of v.
    Stacked,
    /// One matrix: per key head its query heads, then the key head, then the value head.
    Grouped,
}
