//! A decoder as data: which tensors, which linears, which inputs they share, which rescalings are exact.

mod check;
mod config;
mod families;
mod from_config;
mod rope;

use std::fmt;

pub use check::TensorNeed;
pub use families::{FAMILIES, FamilyInfo};
pub use rope::{RopeScaling, RopeSpec};

/// A decoder, from embedding to head.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DecoderSpec {
    /// Architecture as `architectures` in config.json names it.
    pub arch: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// `max_position_embeddings`.
    pub max_positions: usize,
    /// The blocks, in order.
    pub blocks: Vec<BlockSpec>,
    /// Token embedding.
    pub embed: EmbedSpec,
    /// The norm between the last block and the head.
    pub final_norm: NormSpec,
    /// Hidden states to logits.
    pub head: HeadSpec,
    /// Rotary position embedding.
    pub rope: RopeSpec,
}

impl DecoderSpec {
    /// All linears inside blocks, in order of execution.
    pub fn sites(&self) -> impl Iterator<Item = &Site> {
        self.blocks.iter().flat_map(|block| &block.sites)
    }

    /// The linear with this id.
    pub fn site(&self, id: SiteId) -> Option<&Site> {
        self.blocks.get(id.block)?.site(id.role)
    }
}

/// Token embedding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbedSpec {
    /// Tensor `[vocab, hidden]`.
    pub weight: String,
}

/// A normalisation over the last dimension.
#[derive(Debug, Clone, PartialEq)]
pub struct NormSpec {
    /// Tensor `[width]`.
    pub weight: String,
    /// Tensor `[width]`, if there is one. No present family has one, and loading refuses it.
    pub bias: Option<String>,
    /// Added to the mean square.
    pub eps: f32,
    /// The formula.
    pub kind: NormKind,
}

/// The formula of a norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum NormKind {
    /// `w · x / sqrt(mean(x²) + eps)` (Zhang and Sennrich 2019, arXiv:1910.07467).
    Rms,
}

/// Hidden states to logits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadSpec {
    /// Module name of the head, also if it is tied: `lm_head` or `output`.
    pub module: String,
    /// Tensor `[vocab, hidden]` to read: the embedding's if tied.
    pub weight: String,
    /// Whether head and embedding are one matrix (`tie_word_embeddings`).
    pub tied: bool,
    /// Tensor `[vocab]`, if there is one.
    pub bias: Option<String>,
}

/// One decoder block: `x += attn(norm(x)); x += mlp(norm(x))`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct BlockSpec {
    /// Position in the decoder, from 0.
    pub index: usize,
    /// The linears, in order of execution.
    pub sites: Vec<Site>,
    /// The rescalings that leave the block's function unchanged.
    pub folds: Vec<Fold>,
    /// Attention.
    pub attn: AttnSpec,
    /// Feed-forward.
    pub mlp: MlpSpec,
    /// The norms on the residual stream.
    pub norms: BlockNorms,
}

impl BlockSpec {
    /// The linear with this role.
    pub fn site(&self, role: Role) -> Option<&Site> {
        self.sites.iter().find(|site| site.id.role == role)
    }
}

/// The norms on the residual stream.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct BlockNorms {
    /// Before attention.
    pub attn: NormSpec,
    /// Before the feed-forward.
    pub mlp: NormSpec,
}

/// The attention of a block.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum AttnSpec {
    /// Multi-head, grouped-query or multi-query attention.
    Gqa(GqaSpec),
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
    /// Norm over each query head before the rotation.
    pub q_norm: Option<NormSpec>,
    /// Norm over each key head before the rotation.
    pub k_norm: Option<NormSpec>,
    /// A query sees this many keys, itself included; `None`: all before it.
    pub window: Option<usize>,
    /// Scores are multiplied by this: `1/sqrt(head_dim)`.
    pub scale: f32,
}

impl GqaSpec {
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

/// The feed-forward of a block.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum MlpSpec {
    /// `down(act(gate(x)) · up(x))`.
    Gated(GatedSpec),
}

/// A gated feed-forward (Shazeer 2020, arXiv:2002.05202).
#[derive(Debug, Clone, PartialEq)]
pub struct GatedSpec {
    /// Width between up and down.
    pub intermediate: usize,
    /// How gate and up are stored.
    pub layout: GateUpLayout,
    /// Nonlinearity of the gate.
    pub activation: Activation,
}

/// How the rows of gate and up are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateUpLayout {
    /// Two matrices.
    Separate,
    /// One matrix: all of gate, all of up.
    Stacked,
}

/// Nonlinearity of a gated feed-forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activation {
    /// `x / (1 + exp(−x))`.
    Silu,
}

/// What a linear does in its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Queries, keys and values in one matrix; see [`QkvLayout`].
    Qkv,
    /// Heads to hidden.
    O,
    /// Gate of the feed-forward.
    Gate,
    /// Up projection of the feed-forward.
    Up,
    /// Gate and up in one matrix; see [`GateUpLayout`].
    GateUp,
    /// Intermediate to hidden.
    Down,
}

/// What a linear reads. Linears with one stream share one input, hence one Gram matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stream {
    /// The normalised residual, read by q, k and v.
    AttnIn,
    /// The heads' outputs, read by o.
    AttnOut,
    /// The normalised residual, read by gate and up.
    MlpIn,
    /// `act(gate) · up`, read by down.
    MlpMid,
}

/// A linear's place in the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SiteId {
    /// Block index.
    pub block: usize,
    /// Role in the block.
    pub role: Role,
}

/// An input's place in the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InputId {
    /// Block index.
    pub block: usize,
    /// Which input of the block.
    pub stream: Stream,
}

impl fmt::Display for SiteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {} {:?}", self.block, self.role)
    }
}

impl fmt::Display for InputId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {} {:?}", self.block, self.stream)
    }
}

/// A linear inside a block, known without touching weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// Its place.
    pub id: SiteId,
    /// Full module name; the tensors are `{module}.weight` and, if [`Site::bias`], `{module}.bias`.
    pub module: String,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// What it reads.
    pub input: InputId,
    /// Whether it has a bias `[out_features]`.
    pub bias: bool,
    /// Linears that engines run as one matrix (q, k, v; gate, up) share this name; others have their module here.
    pub fused_group: String,
}

/// A rescaling that leaves the function of the block unchanged: the consumers' columns times `s`, the
/// producer's output divided by `s`, with one `s > 0` per channel of `input`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fold {
    /// The input whose channels are rescaled.
    pub input: InputId,
    /// All readers of that input.
    pub consumers: Vec<SiteId>,
    /// Who can absorb `1/s`.
    pub producer: Producer,
}

/// What makes the channels of an input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Producer {
    /// A norm: `w' = w / s`, and the same for its bias.
    Norm {
        /// Tensor of the norm's weight.
        weight: String,
        /// Tensor of the norm's bias, if it has one.
        bias: Option<String>,
    },
    /// Rows of another linear's weight, and of its bias.
    Rows {
        /// That linear.
        site: SiteId,
        /// `rows[c]` is the row that makes the consumers' input channel `c`. Under grouped-query attention
        /// several channels share a row, and then must share one `s`.
        rows: Vec<u32>,
    },
}
