//! The sibling of the quantizer: it opens what is on disk and judges that.
//!
//! Nothing here knows a quantization method; a checkpoint is read back through its layout, dequantized,
//! and run beside the original on held-out text, one block at a time for both models at once, so that a
//! model larger than memory can be judged.
#![forbid(unsafe_code)]

mod compare;
mod divergence;
mod engine;
mod error;
pub mod eval;
mod float_source;
pub mod generate;
mod ignored;
mod inspect;
mod reopen;
mod stored;
mod stream;
pub mod verify;

pub use compare::{CompareProgress, Comparison, LayerError, check_alike, compare, compare_subjects};
pub use divergence::{Divergence, DivergenceSummary, KlHistogram, TokenScore};
pub use engine::{CacheScales, Engine, attention_module, kv_heads};
pub use error::RuntimeError;
pub use float_source::FloatSource;
pub use inspect::{DtypeTotal, Inspection, LinearFacts, TensorFacts, inspect};
pub use reopen::{QuantizedCheckpoint, QuantizedSource};
pub use stored::{Storage, StoredLinear, stored_linears};
pub use stream::{Subject, embed};
