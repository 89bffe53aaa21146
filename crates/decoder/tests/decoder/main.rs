//! The decoder against reference logits of every family, published configurations and bad ones.
// A test that is skipped, or that measures something, says so.
#![allow(clippy::print_stderr)]

mod bad_configs;
mod bad_experts;
mod chatglm;
mod compute;
mod described;
mod fixture;
mod folds;
mod forward;
mod logits;
mod published;
mod source;
mod support_table;
mod wrappers;
