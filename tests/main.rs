//! End-to-end tests: the real binary on real (small) models, offline.
#![allow(clippy::print_stderr, reason = "a skipped test says so")]

mod e2e {
    mod bad_input;
    mod convert;
    mod determinism;
    mod eight_bit;
    mod env;
    mod eval;
    mod families;
    mod fp8_source;
    mod generate;
    mod gptq;
    mod layering;
    mod manifests;
    mod outputs;
    mod poison;
    mod quantize;
    mod recipes;
    mod report;
    mod resume;
    mod statistics;
    mod support;
    mod tied;
    mod verify;
}
