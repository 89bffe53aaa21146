//! A decoder as data: which tensors, which linears, which inputs they share, which rescalings are exact.

mod attn;
mod check;
mod config;
mod dense_families;
mod described;
mod dims;
mod ends;
mod families;
mod from_config;
mod mla;
mod moe;
mod moe_families;
mod must;
mod norm;
mod rope;
mod scales;
mod wrapper;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

pub use attn::{AttnSpec, GqaSpec, QkvLayout};
pub use check::TensorNeed;
pub use described::{Architecture, ArchitectureError, definition};
pub use ends::{EmbedSpec, HeadSpec};
pub use families::{FAMILIES, FamilyInfo};
pub use mla::{LATENT_ATTENTION, LatentSpec, MlaSpec};
pub use moe::{MoeSpec, RouterSpec, Scoring, SharedSpec};
pub use norm::{BlockNorms, NormKind, NormSpec};
pub use rope::{RopePairing, RopeScaling, RopeSpec};
pub use wrapper::{WRAPPERS, WrapperInfo};

/// A decoder, from embedding to head.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DecoderSpec {
    /// Architecture as `architectures` in config.json names it.
    pub arch: String,
    /// SHA-256 (lower-case hex) of the file that describes this architecture, if it is none of [`FAMILIES`].
    pub definition: Option<String>,
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
    /// That of the layers with a sliding window, where they have one of their own ([`GqaSpec::local_rope`]).
    pub local_rope: Option<RopeSpec>,
    /// How many layers of multi-token prediction (DeepSeek-V3, arXiv:2412.19437, §2.2) a checkpoint may hold behind the
    /// last block. No forward pass reads them.
    pub mtp_layers: usize,
}

/// Tokens of a usual batch: enough for products to be fast, few enough for little memory.
pub const BATCH_TOKENS: usize = 1536;

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

/// One decoder block: `x += r · norm(attn(norm(x))); x += r · norm(mlp(norm(x)))`, each norm there or not.
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
    /// What attention and feed-forward add to the residual stream is multiplied by this.
    pub residual_scale: f32,
}

impl BlockSpec {
    /// The linear with this role.
    pub fn site(&self, role: Role) -> Option<&Site> {
        self.sites.iter().find(|site| site.id.role == role)
    }

    /// Every input that a linear reads or a fold rescales, with its width.
    pub fn inputs(&self) -> BTreeMap<InputId, usize> {
        let mut inputs: BTreeMap<InputId, usize> = self.sites.iter().map(|s| (s.input, s.in_features)).collect();
        for fold in &self.folds {
            let width = fold.consumers.first().and_then(|id| self.site(id.role)).map(|site| site.in_features);
            inputs.extend(width.map(|width| (fold.input, width)));
        }
        inputs
    }

    /// The experts, if the feed-forward has a router.
    pub fn moe(&self) -> Option<&MoeSpec> {
        match &self.mlp {
            MlpSpec::Moe(moe) => Some(moe),
            _ => None,
        }
    }
}

/// The feed-forward of a block.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum MlpSpec {
    /// `down(act(gate(x)) · up(x))`.
    Gated(GatedSpec),
    /// `down(act(up(x)))`.
    Plain(PlainSpec),
    /// A mixture of experts.
    Moe(MoeSpec),
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

/// A feed-forward without a gate.
#[derive(Debug, Clone, PartialEq)]
pub struct PlainSpec {
    /// Width between up and down.
    pub intermediate: usize,
    /// Nonlinearity between them.
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

/// Nonlinearity of a feed-forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activation {
    /// `x / (1 + exp(−x))`.
    Silu,
    /// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))` (Hendrycks and Gimpel 2016, arXiv:1606.08415).
    GeluTanh,
}

/// How a gate and an up projection become one.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Glu {
    /// `act(gate) · up` (Shazeer 2020, arXiv:2002.05202).
    Product(Activation),
    /// `(u + 1) · g / (1 + exp(−slope · g))` with `g = min(gate, limit)` and `u` = up between `±limit` (gpt-oss).
    Clamped {
        /// Steepness of the sigmoid.
        slope: f32,
        /// Largest value of the gate, and largest magnitude of up.
        limit: f32,
    },
}

impl Glu {
    /// Whether the output grows in proportion to up, so that a factor on a row of up can be undone behind it.
    pub fn is_proportional_to_up(self) -> bool {
        matches!(self, Self::Product(_))
    }
}

impl From<Activation> for Glu {
    fn from(activation: Activation) -> Self {
        Self::Product(activation)
    }
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
    /// Input to the latent of queries; see [`MlaSpec`].
    QA,
    /// The latent of queries to queries.
    QB,
    /// Input to the latent of keys and values, and to the rotated piece of the keys.
    KvA,
    /// The latent of keys and values to both.
    KvB,
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
    /// A linear of a routed expert, by its number.
    Expert(u32, Part),
    /// A linear of the expert that every token passes through.
    Shared(Part),
}

/// A linear of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// Its gate.
    Gate,
    /// Its up projection.
    Up,
    /// Intermediate to hidden.
    Down,
}

/// What a linear reads. Linears with one stream share one input, hence one Gram matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stream {
    /// The normalised residual, read by q, k and v, or by the linears that make the latents.
    AttnIn,
    /// The normalised latent of queries, read by q_b.
    QLatent,
    /// The normalised latent of keys and values, read by kv_b.
    KvLatent,
    /// The heads' outputs, read by o.
    AttnOut,
    /// The normalised residual, read by gate and up.
    MlpIn,
    /// `act(gate) · up`, read by down.
    MlpMid,
    /// The rows of [`Stream::MlpIn`] that the router sends to this expert, read by its gate and up.
    ExpertIn(u32),
    /// What this expert's gate and up make ([`Glu`]), read by its down.
    ExpertMid(u32),
    /// `act(gate) · up` of the shared expert, read by its down.
    SharedMid,
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
    /// All linears that read that input. Under a router they may read some of its rows only.
    pub consumers: Vec<SiteId>,
    /// Other readers that are never quantized, as tensors `[n, channels]`: a router.
    pub plain_consumers: Vec<String>,
    /// Who can absorb `1/s`.
    pub producer: Producer,
}

/// What makes the channels of an input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Producer {
    /// A norm: its factor over `s` ([`NormKind::rescaled`]), and its bias over `s`.
    Norm {
        /// Tensor of the norm's weight.
        weight: String,
        /// Tensor of the norm's bias, if it has one.
        bias: Option<String>,
        /// How the weight is stored.
        kind: NormKind,
    },
    /// Rows of another linear's weight, and of its bias.
    Rows {
        /// That linear.
        site: SiteId,
        /// `rows[c]` is the row that makes the consumers' input channel `c`. Under grouped-query attention
        /// several channels share a row, and then must share one `s`.
        rows: Arc<[u32]>,
    },
}
