//! End-to-end tests: the real binary on real (small) models, offline.

mod e2e {
    mod bad_input;
    mod determinism;
    mod families;
    mod layering;
    mod outputs;
    mod quantize;
    mod support;
    mod tied;
}
