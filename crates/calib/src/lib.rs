//! Calibration datasets: a name or a path becomes deterministic windows of token ids.
//!
//! * [`load`] makes calibration windows from a [`CalibRequest`]; [`held_out`] and [`eval_windows`] make evaluation windows.
//! * [`eval_text`] is a whole text for perplexity, [`load_task`] the questions of a multiple-choice task.
//! * [`ModelTokenizer`] is the model's own tokenizer with its chat template.
//! * [`registry`] lists the datasets known by name (`calib_data/registry.yaml`).
//!
//! The same request, files and tokenizer give the same windows on every machine; [`Windows::digest`] names them.
#![forbid(unsafe_code)]

mod builtin;
mod construct;
mod document;
mod error;
mod eval_text;
mod load;
mod registry;
mod rng;
mod shuffle;
mod source;
mod stream;
mod tasks;
mod template;
#[cfg(test)]
mod testing;
mod tojson;
mod tokenizer;
mod windows;

pub use document::Message;
pub use error::{CalibError, ErrorKind};
pub use eval_text::{EvalText, eval_text};
pub use load::{CalibRequest, DatasetFetcher, FetchError, eval_windows, held_out, load};
pub use registry::{Construction, Content, DatasetSpec, HubSource, find, registry};
pub use source::SourceFile;
pub use tasks::{Task, TaskItem, TaskName, load_task};
pub use tokenizer::ModelTokenizer;
pub use windows::{SourceInfo, Windows};
