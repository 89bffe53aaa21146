//! Decoders as data: `config.json` becomes a [`DecoderSpec`], and one generic [`Block`] forward runs
//! any of them, one block in memory at a time.
//!
//! ```text
//! config.json ─► DecoderSpec ─► sites (every linear), folds (exact rescalings), tensors (what is read)
//!                     │
//! token windows ─► Embedding ─► Block 0 ─► … ─► Block n−1 ─► Head ─► logits
//!                                 └─ Tap: the input of every linear
//! ```
//!
//! No family has code of its own: a family is a row of [`FAMILIES`], or a file ([`Architecture`]). Shapes are written
//! `(windows, tokens, hidden)` for activations and `[out, in]` for weights; everything is f32. On the CPU all work is cut by
//! shape alone, so results do not depend on the number of threads.
//!
//! This crate knows nothing about quantization, files' bytes or calibration data.
#![forbid(unsafe_code)]

mod activations;
mod attention;
mod block;
mod compute;
mod differentiable;
mod embedding;
mod engine;
mod error;
mod gpu;
mod head;
mod kernels;
mod kv;
mod mla;
mod moe;
mod norm;
mod ops;
mod rope;
mod segments;
mod source;
mod spec;
mod tap;

pub use block::Block;
pub use compute::Compute;
pub use embedding::Embedding;
pub use engine::InputTransform;
pub use error::{DecoderError, ErrorKind};
pub use gpu::{Gpu, gpus};
pub use head::{FinalNorm, Head};
pub use kernels::exp;
pub use kv::{KvPart, KvTransform};
pub use moe::{Routing, gather, scatter};
pub use ops::with_cpu_slice;
pub use rope::{Rope, RopeTables};
pub use source::{CheckpointSource, WeightSource};
pub use spec::{
    Activation, Architecture, ArchitectureError, AttnSpec, BATCH_TOKENS, BlockNorms, BlockSpec, DecoderSpec, EmbedSpec,
    FAMILIES, FamilyInfo, Fold, GateUpLayout, GatedSpec, Glu, GqaSpec, HeadSpec, InputId, LATENT_ATTENTION, LatentSpec,
    MlaSpec, MlpSpec, MoeSpec, NormKind, NormSpec, Part, PlainSpec, Producer, QkvLayout, Role, RopePairing,
    RopeScaling, RopeSpec, RouterSpec, Scoring, SharedSpec, Site, SiteId, Stream, TensorNeed, WRAPPERS, WrapperInfo,
    definition,
};
pub use tap::{NoTap, Tap};
