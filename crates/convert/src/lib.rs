//! From one layout of a quantized checkpoint to another: unpack, pack, and compare what is then on disk.
//!
//! ```text
//! source ─► survey every linear ─► plan ─► per linear: unpack ─► same codes, other words ─► pack ─► write
//!                                  ─► reopen, unpack, compare ─► publish (as a quantization run does)
//! ```
//!
//! Nothing is rounded unless [`Recipe::requantize`] asks for it: the dequantized weights of source and result are equal
//! bit by bit, or there is no result. One linear is in memory at a time. Prints nothing; events go to a
//! [`lite_job::Observer`].
#![forbid(unsafe_code)]

mod adapt;
mod choose;
mod documents;
mod error;
mod nearest;
mod plain;
mod plan;
mod run;
mod source;

pub use documents::{Converted, Documents};
pub use error::ConvertError;
pub use plan::Recipe;
pub use run::{ConvertReport, LinearError, convert, convert_with};

/// The name that asks for a checkpoint without codes.
pub const PLAIN: &str = "plain";
