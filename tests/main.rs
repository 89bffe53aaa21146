//! End-to-end tests: the real binary on real (small) models, offline.
#![allow(clippy::print_stderr, reason = "a skipped test says so")]

mod e2e {
    mod arch;
    mod bad_input;
    mod bad_matrix;
    mod convert;
    mod determinism;
    mod eight_bit;
    mod env;
    mod eval;
    mod experts;
    mod families;
    mod faults;
    mod fp8_source;
    mod fused;
    mod generate;
    mod gptq;
    mod layering;
    mod manifests;
    mod mixtures;
    mod outputs;
    mod plans;
    mod poison;
    mod quantize;
    mod recipes;
    mod report;
    mod resume;
    mod statistics;
    mod support;
    mod tied;
    mod verify;
    mod wrappers;
}
