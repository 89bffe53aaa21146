use super::*;
use crate::document::Fields;
use crate::registry::{Construction, find};
use crate::source::{Collector, Limits, read_file};
use crate::testing::{testdata, tokenizer};
use crate::windows::{SourceInfo, Windows};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    set: String,
    seed: u64,
    digest: String,
    first: Vec<u32>,
}

fn documents(spec: &DatasetSpec) -> Vec<Document> {
    let fields = Fields::of(spec.content, spec.column.as_deref(), &spec.roles);
    let mut into = Collector::new(Limits::default(), spec.rows);
    read_file(&testdata().join("rows.jsonl"), "rows.jsonl", &fields, &mut into).expect("readable");
    into.documents
}

fn cut(cutter: &Cutter<'_>, documents: &[Document]) -> Result<Cut, CalibError> {
    match cutter.spec.construction {
        Construction::RandomWindows => cutter.random_windows(documents),
        Construction::RandomDocuments => cutter.random_documents(documents),
        Construction::Concatenate => cutter.concatenate(documents),
        _ => cutter.random_tokens(),
    }
}

/// Each construction against transformers, datasets and CPython's random (`testdata/make.py`).
#[test]
fn windows_equal_python() {
    let golden: Vec<Golden> = serde_json::from_str(include_str!("../testdata/golden.json")).expect("golden file");
    assert_eq!(golden.len(), 16);
    let tokenizer = tokenizer();
    for Golden { set, seed, digest, first } in golden {
        let spec = find(&set).expect("parses").expect("registered");
        let cutter = Cutter { spec: &spec, tokenizer: &tokenizer, samples: 9, seqlen: 32, seed };
        let (windows, tokens) = cut(&cutter, &documents(&spec)).expect("enough text");
        assert_eq!(windows[0][..8], first, "{set}, seed {seed}");
        let source = SourceInfo {
            name: set.clone(),
            description: String::new(),
            files: vec![],
            documents: 0,
            tokens_available: tokens,
        };
        assert_eq!(Windows::new(windows, source, vec![]).digest, digest, "{set}, seed {seed}");
    }
}

#[test]
fn too_little_text_is_counted() {
    let tokenizer = tokenizer();
    for (set, seqlen, wanted) in [
        ("wikitext2", 1 << 20, "usable tokens, but 4 windows"),
        ("gsm8k", 1 << 10, "--calib-samples 2 or less"),
        ("c4", 1 << 12, "none of 90 tried has 4096 tokens (longest: "),
        ("openwebtext", 1 << 12, "none of 90 tried has 4096 tokens"),
    ] {
        let spec = find(set).expect("parses").expect("registered");
        let cutter = Cutter { spec: &spec, tokenizer: &tokenizer, samples: 4, seqlen, seed: 0 };
        let error = cut(&cutter, &documents(&spec)).expect_err(set).to_string();
        assert!(error.contains(wanted), "{error}");
        assert!(cut(&cutter, &[]).is_err());
    }
}

#[test]
fn random_tokens_are_plain_and_repeatable() {
    let tokenizer = tokenizer();
    let spec = find("random").expect("parses").expect("registered");
    let draw = |seed| Cutter { spec: &spec, tokenizer: &tokenizer, samples: 3, seqlen: 500, seed }.random_tokens();
    let (windows, tokens) = draw(1).expect("plain tokens");
    assert_eq!((windows.len(), tokens), (3, 1500));
    assert!(windows.iter().all(|w| w.len() == 500 && w.iter().all(|id| (2..400).contains(id))));
    let mut seen: Vec<u32> = windows.concat();
    seen.sort_unstable();
    seen.dedup();
    assert!(seen.len() > 300, "{}", seen.len());
    assert_eq!(draw(1).expect("again").0, windows);
    assert_ne!(draw(2).expect("other").0, windows);
}
