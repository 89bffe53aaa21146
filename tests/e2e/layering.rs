//! The shape of the workspace, held by the build's own metadata.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use super::support::root;

/// Direct dependencies within the workspace, without dev-dependencies.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut found = BTreeMap::new();
    for package in metadata["packages"].as_array().unwrap() {
        let names = package["dependencies"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|d| d["kind"].is_null())
            .map(|d| d["name"].as_str().unwrap().to_owned());
        found.insert(package["name"].as_str().unwrap().to_owned(), names.collect());
    }
    found
}

const METHODS: [&str; 3] = ["lite-awq", "lite-gptq", "lite-smoothquant"];

#[test]
fn methods_know_no_layouts_files_or_tensors() {
    let all = dependencies();
    for method in METHODS {
        for forbidden in ["lite-pack", "lite-model", "lite-decoder", "lite-calib", "candle-core", "safetensors"] {
            assert!(!all[method].contains(forbidden), "{method} depends on {forbidden}");
        }
    }
}

#[test]
fn layouts_and_the_runtime_know_no_methods() {
    let all = dependencies();
    for judge in ["lite-pack", "lite-runtime"] {
        for method in METHODS.iter().chain(&["lite-stats", "lite-calib", "lite-job"]) {
            assert!(!all[judge].contains(*method), "{judge} depends on {method}");
        }
    }
}

#[test]
fn layers_point_downwards() {
    let layers: [&[&str]; 8] = [
        &["lite-linalg", "lite-kernels"],
        &["lite-quant", "lite-model"],
        &["lite-calib", "lite-decoder"],
        &["lite-stats"],
        &["lite-awq", "lite-gptq", "lite-pack", "lite-smoothquant", "lite-tune"],
        &["lite-runtime"],
        &["lite-job"],
        &["lite-convert", "lite-recipe", "lite-report"],
    ];
    let level = |name: &str| layers.iter().position(|layer| layer.contains(&name));
    for (name, needs) in dependencies() {
        for need in needs.iter().filter(|n| n.starts_with("lite-")) {
            if let Some(own) = level(&name) {
                let below = level(need).unwrap_or_else(|| panic!("{need} has no layer"));
                assert!(below < own, "{name} depends on {need}, which is not below it");
            } else {
                assert_eq!(name, "lite", "{name} has no layer");
            }
        }
    }
}
