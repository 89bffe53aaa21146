//! Checkpoints on disk: what comes in is hostile, what goes out is atomic.
//!
//! * [`Checkpoint`] opens a Hugging Face model folder (`config.json` plus safetensors, single or sharded) and checks
//!   every header before it relies on anything in it. Experts that a file holds in one tensor per layer appear as one
//!   tensor per expert.
//! * [`CheckpointWriter`] writes one: headers first, every tensor placed by offset from any thread, nothing visible
//!   under its final name until all of it is on disk.
//! * [`edit_config`] changes top-level keys of `config.json` and leaves every other byte of its values alone.
//! * [`hub`] downloads checkpoints.
//!
//! Formats: safetensors as in <https://github.com/huggingface/safetensors>, shard index as written by
//! `transformers` (`model.safetensors.index.json`).
#![deny(unsafe_code)]

mod checkpoint;
mod config;
mod convert;
mod discover;
mod error;
mod fused;
mod header;
pub mod hub;
mod index;
mod json;
#[allow(unsafe_code)]
mod map;
mod open_file;
mod place;
mod shards;
mod side_files;
mod sniff;
mod tensor;
mod text;
mod writer;

pub use checkpoint::Checkpoint;
pub use config::{edit_config, remove_from_config};
pub use error::{ErrorKind, ModelError};
pub use safetensors::Dtype;
pub use tensor::{DtypeCount, TensorInfo, TensorView};
pub use text::{printable, printable_path};
pub use writer::{CheckpointWriter, OutputTensor, Written, atomic_write, free_space};
