//! End-to-end tests: the real binary on real (small) models, offline.
#![allow(clippy::print_stderr, reason = "a skipped test says so")]

mod e2e {
    mod bad_input;
    mod determinism;
    mod families;
    mod gptq;
    mod layering;
    mod outputs;
    mod quantize;
    mod statistics;
    mod support;
    mod tied;
}
