//! Block tuning: after the codes of a decoder block were solved, its scales and codes are moved together so that the
//! block as a whole comes closer to the float block.
//!
//! A solver looks at one linear; what the block's residual sum, norms and attention make of all their errors only shows
//! at its end. Some hundred steps of Adam on a few calibration windows lower that, with every code held near where the
//! solver put it. Forward and backward are written out for the block ([`lite_decoder::Block`]'s own formulas), not
//! recorded by an autograd: that is several times faster.
#![forbid(unsafe_code)]

mod activation;
mod attention;
mod error;
#[cfg(test)]
mod gradient_tests;
mod kernels;
mod network;
mod norm;
mod pass;
mod rotate;
mod schedule;
mod settings;
mod shadow;
mod simd;
mod tune;

pub use error::TuneError;
pub use settings::{Side, TuneData, TuneLinear, TuneOutcome, TuneSettings, TunedLinear};
pub use tune::tune_block;
