//! Text generation with a model held in memory: a forward pass over new tokens with a key/value cache, and sampling.
//!
//! ```text
//! folder ─► ResidentModel (weights as compact as their values allow: float, or codes of 8 or 4 bits)
//! prompt ─► prefill: all its tokens at once ─► logits ─► sample ─► decode: one token at a time ─► …
//!                └────────────── KvCache (float, or rounded online to 8 bits, 4 bits or fp8) ◄┘
//! ```
//!
//! Decoding one token reads every weight once; [`lite_kernels`] turns codes into f32 in registers. A longer input is
//! expanded panel by panel and multiplied as a matrix. All work is cut by shape alone: results do not depend on the
//! number of threads.

mod attention;
mod cache;
mod forward;
mod linear;
mod memory;
mod mixture;
mod model;
mod norm;
mod ops;
mod precision;
mod run;
mod sample;
mod stop;

pub use cache::KvCache;
pub use forward::Wanted;
pub use memory::MemoryNeed;
pub use model::ResidentModel;
pub use precision::KvPrecision;
pub use run::{FinishReason, GenerateSettings, Generation, generate};
pub use sample::{Sampler, SamplerSettings};

#[cfg(test)]
mod tests;
