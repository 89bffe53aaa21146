//! Judging a checkpoint: perplexity, divergence from the original, multiple-choice tasks, greedy continuations, and
//! gates over all of that.
//!
//! Everything but the continuations runs layer by layer, so that memory does not grow with depth.

mod canary;
mod gates;
mod kv;
mod model;
mod perplexity;
mod statistics;
mod tasks;

pub use canary::{Canary, Continue, Repetition, canaries, canary, repetition};
pub use gates::{Gate, GateResult, Measured};
pub use model::{EvalModel, EvalSource};
pub use perplexity::{Perplexity, perplexity};
pub use statistics::{Estimate, quantile};
pub use tasks::{Request, ScoredItem, TaskScore, flips, log_likelihoods, score_items};
