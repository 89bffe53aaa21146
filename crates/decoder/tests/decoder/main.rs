//! The decoder against reference logits of every family, published configurations and bad ones.
// A test that is skipped, or that measures something, says so.
#![allow(clippy::print_stderr)]

mod bad_configs;
mod compute;
mod fixture;
mod folds;
mod forward;
mod logits;
mod published;
mod source;
