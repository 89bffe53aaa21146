use std::path::Path;

use super::*;
use crate::generate::ResidentModel;

fn fixtures() -> Vec<std::path::PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    let families = std::fs::read_dir(root.join("families")).unwrap().map(|entry| entry.unwrap().path());
    families.chain([root.join("novels-llama-6m")]).filter(|dir| dir.join("config.json").exists()).collect()
}

/// A folder with what a checkpoint of it has, and not the expected values beside it.
fn copy(from: &Path) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(from.join(file), dir.path().join(file)).unwrap();
    }
    dir
}

/// Plain weights take what they need, or less where f32 values fit a smaller type.
#[test]
fn weights_are_those_of_the_loaded_model() {
    let mut exact = 0;
    for fixture in fixtures() {
        let dir = copy(&fixture);
        let files = EvalModel::open(dir.path()).unwrap();
        let Ok(model) = ResidentModel::from_checkpoint(&files) else { continue };
        let need = MemoryNeed::of(&files, 10, 20);
        let found = model.weight_bytes() as u64;
        assert!(need.weights >= found && need.weights <= 2 * found, "{}: {need:?}, {found}", fixture.display());
        exact += usize::from(need.weights == found);
    }
    assert!(exact > 0);
}

#[test]
fn the_cache_grows_with_the_text_and_work_with_the_prompt() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/novels-llama-6m");
    let dir = copy(&root);
    let files = EvalModel::open(dir.path()).unwrap();
    let need = |prompt, total| MemoryNeed::of(&files, prompt, total);
    let GqaShape { blocks, kv_width } = gqa_shape(files.spec());
    // Keys and values, f32, in vectors that double.
    assert_eq!(need(10, 100).cache, (2 * 4 * 2 * blocks * kv_width * 100) as u64);
    assert_eq!(need(10, 300).cache, 3 * need(10, 100).cache);
    assert!(need(200, 300).work > need(10, 300).work && need(10, 300).weights == need(200, 300).weights);
    // A chunk bounds the work of a long prompt, but for the scores.
    assert_eq!(need(600, 5000).work, need(5000, 5000).work);
    // The embedding of 2 bytes a value is read as values of 4.
    assert_eq!(need(1, 2).loading, (files.spec().vocab * files.spec().hidden * 4) as u64);
    let all = need(10, 2000);
    assert_eq!(all.peak(), all.weights + all.loading.max(all.cache + all.work));
    assert_eq!(need(1, usize::MAX).peak(), u64::MAX);
}

struct GqaShape {
    blocks: usize,
    kv_width: usize,
}

fn gqa_shape(spec: &DecoderSpec) -> GqaShape {
    let AttnSpec::Gqa(attn) = &spec.blocks[0].attn else { panic!("not grouped-query attention") };
    GqaShape { blocks: spec.blocks.len(), kv_width: attn.kv_heads * attn.head_dim }
}
