//! What taps gather while the calibration windows run through a decoder block.
//!
//! One [`InputStats`] per shared input: q, k and v read one tensor and share one Gram matrix, and so do
//! gate and up, so a dense block needs four. Only real tokens enter; there is no padding.
#![forbid(unsafe_code)]

mod cross;
mod device;
mod input;
mod tap;

pub use cross::CrossStats;
pub use input::InputStats;
pub use tap::{BlockStats, StatsError, StatsTap};
