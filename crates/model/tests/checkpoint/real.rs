//! Models and configs from the wild, where the shared test data are present.

use std::fs;
use std::path::{Path, PathBuf};

use lite_model::{Checkpoint, edit_config, remove_from_config};
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};

use crate::support::shared;

fn sub_folders(path: &Path) -> Vec<PathBuf> {
    let mut folders: Vec<_> =
        fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).filter(|p| p.join("config.json").is_file()).collect();
    folders.sort();
    folders
}

/// Every tensor equal to what the safetensors crate reads.
fn assert_reads_like_safetensors(checkpoint: &Checkpoint) {
    let mut seen = 0;
    for path in checkpoint.shards() {
        let bytes = fs::read(path).unwrap();
        for (name, wanted) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let found = checkpoint.tensor(&name).unwrap();
            assert_eq!((found.dtype, found.shape), (wanted.dtype(), wanted.shape()), "{name}");
            assert!(found.data == wanted.data(), "{name}");
            seen += 1;
        }
    }
    assert_eq!(seen, checkpoint.names().len());
    assert!(checkpoint.warnings.is_empty(), "{:?}", checkpoint.warnings);
}

#[test]
fn the_bundled_model_opens() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/novels-llama-6m");
    let checkpoint = Checkpoint::open(&dir).unwrap();
    assert_reads_like_safetensors(&checkpoint);
    assert_eq!(checkpoint.names().len(), 56);
    assert!(checkpoint.side_files().contains(&PathBuf::from("tokenizer.json")));
}

#[test]
fn shared_models_open() {
    let Some(models) = shared("data/models") else {
        println!("skipped: no shared models");
        return;
    };
    let folders = sub_folders(&models);
    assert!(!folders.is_empty());
    for dir in folders {
        assert_reads_like_safetensors(&Checkpoint::open(&dir).unwrap());
    }
}

#[test]
fn a_tied_model_of_the_wild_resolves() {
    let Some(dir) = shared("data/models/tinystories-656k") else {
        println!("skipped: no shared models");
        return;
    };
    let checkpoint = Checkpoint::open(&dir).unwrap();
    assert_eq!(checkpoint.aliases().collect::<Vec<_>>(), [("model.embed_tokens.weight", "lm_head.weight")]);
    let (embed, head) = ("model.embed_tokens.weight", "lm_head.weight");
    assert_eq!(checkpoint.tensor_f32(embed).unwrap(), checkpoint.tensor_f32(head).unwrap());
    assert!(!checkpoint.is_alias("format"));
}

#[test]
fn real_configs_survive_an_edit() {
    let Some(configs) = shared("data/configs") else {
        println!("skipped: no shared configs");
        return;
    };
    let mut paths: Vec<_> = sub_folders(&configs).iter().map(|f| f.join("config.json")).collect();
    let many = fs::read_dir(configs.join("aiconfigurator-hf-configs"));
    paths.extend(
        many.into_iter().flatten().map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "json")),
    );
    assert!(!paths.is_empty());
    let mut edited_ones = 0;
    for path in paths {
        let text = fs::read_to_string(&path).unwrap();
        let Ok(old) = serde_json::from_str::<Map<String, Value>>(&text) else {
            // Python's Infinity, in some configs of state-space models.
            assert!(edit_config(&text, &[]).unwrap_err().to_string().contains("Infinity"), "{}", path.display());
            continue;
        };
        let added = json!({"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["lm_head"]});
        let edited = edit_config(&text, &[("lite_test_key", added.clone())]).unwrap();
        let mut wanted = old.clone();
        wanted.insert("lite_test_key".to_owned(), added);
        let new: Map<String, Value> = serde_json::from_str(&edited).unwrap();
        assert_eq!(new.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>(), "{}", path.display());
        assert_eq!(new, wanted, "{}", path.display());
        // Written as `transformers` writes it, only the new lines differ; the spelling of every number is kept.
        if text.starts_with("{\n  \"") && text.trim_end().ends_with("\n}") {
            let removed = remove_from_config(&edited, &["lite_test_key"]).unwrap();
            assert_eq!(removed.trim_end(), text.trim_end(), "{}", path.display());
            edited_ones += 1;
        }
    }
    assert!(edited_ones > 10, "{edited_ones}");
}
