//! The sibling of the quantizer: it opens what is on disk and judges that.
//!
//! Nothing here knows a quantization method; a checkpoint is read back through its layout, dequantized,
//! and run beside the original on held-out text, one block at a time for both models at once, so that a
//! model larger than memory can be judged.
#![forbid(unsafe_code)]

mod compare;
mod divergence;
mod error;
mod reopen;
mod stream;

pub use compare::{CompareProgress, Comparison, LayerError, compare};
pub use divergence::{Divergence, DivergenceSummary, TokenScore};
pub use error::RuntimeError;
pub use reopen::{QuantizedCheckpoint, QuantizedSource};
pub use stream::embed;
