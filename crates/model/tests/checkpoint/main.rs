//! Checkpoints on disk: hostile folders in, whole folders out.
// A test that is skipped says so.
#![allow(clippy::print_stdout)]

mod container;
mod folder;
mod fused;
mod limits;
mod properties;
mod real;
mod side_files;
mod support;
mod tensors;
mod writer;
