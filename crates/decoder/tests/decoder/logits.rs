use std::collections::BTreeSet;

use crate::fixture::{CASES, Fixture, root};

/// Absolute, on logits with a standard deviation of about 2; transformers' own f32 is about 1e-6 from its f64.
const TOLERANCE: f32 = 1e-4;

#[test]
fn logits_agree_with_transformers_in_every_family() {
    for case in CASES {
        let fixture = Fixture::open(case);
        for batch in &fixture.batches {
            let logits = fixture.logits(&batch.windows);
            assert_eq!(logits.len(), batch.logits.len(), "{case}");
            let worst = logits.iter().zip(&batch.logits).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            let most = batch.logits.iter().map(|v| v.abs()).fold(0f32, f32::max);
            eprintln!(
                "{case:20} {:4} tokens: largest difference {worst:.1e} of logits up to {most:.1}",
                batch.windows[0].len()
            );
            assert!(worst <= TOLERANCE, "{case}: {worst}");
            assert!(logits.iter().all(|v| v.is_finite()), "{case}");
        }
    }
}

#[test]
fn every_fixture_is_tested() {
    let dirs = std::fs::read_dir(root().join("tests/fixtures/families")).unwrap();
    let found: BTreeSet<String> = dirs
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().join("config.json").is_file())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    assert_eq!(found, CASES.iter().map(|c| (*c).to_owned()).collect());
}

/// The spec names exactly what the file holds, and loading reads exactly what the spec names.
#[test]
fn tensors_are_those_of_the_file() {
    for case in CASES {
        let fixture = Fixture::open(case);
        let needs = fixture.spec.tensors();
        let needed: BTreeSet<(String, Vec<usize>)> = needs.iter().map(|n| (n.name.clone(), n.shape.clone())).collect();
        assert_eq!(needed.len(), needs.len(), "{case}: a tensor is listed twice");
        let all = fixture.weights.tensors.iter();
        let held = all.clone().filter(|(name, _)| !fixture.is_mtp(name) && !Fixture::is_buffer(name));
        let held = held.map(|(name, (shape, _))| (name.clone(), shape.clone())).collect();
        assert_eq!(needed, held, "{case}");
        let mtp = all.filter(|(name, _)| fixture.is_mtp(name)).count();
        assert_eq!(mtp > 20, ["deepseek-v3", "glm4-moe-mtp"].contains(case), "{case}: {mtp}");
        fixture.spec.check_tensors(&|name| Some(fixture.weights.tensors.get(name)?.0.clone())).unwrap();
        fixture.logits(&fixture.batches[0].windows);
        let read: BTreeSet<String> = fixture.weights.read.borrow().iter().cloned().collect();
        assert_eq!(read, needed.into_iter().map(|(name, _)| name).collect(), "{case}");
    }
}
