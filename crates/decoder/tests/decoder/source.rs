//! Reading weights: from checkpoints on disk, and by rows.

use std::collections::BTreeMap;

use candle_core::Device;
use half::{bf16, f16};
use lite_decoder::{
    Block, CheckpointSource, DecoderError, DecoderSpec, Embedding, ErrorKind, Head, NoTap, Rope, WeightSource,
};
use lite_model::Checkpoint;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::fixture::{Fixture, Weights, root, values};

#[test]
fn a_checkpoint_on_disk_gives_the_reference_logits() {
    for case in ["llama3", "internlm2", "llama2"] {
        let fixture = Fixture::open(case);
        let checkpoint = Checkpoint::open(&root().join("tests/fixtures/families").join(case)).unwrap();
        let source = CheckpointSource::new(&checkpoint);
        let spec = DecoderSpec::from_config(checkpoint.config()).unwrap();
        spec.check_tensors(&|name| Some(checkpoint.info(name)?.shape.clone())).unwrap();
        let batch = &fixture.batches[0];
        let rope = Rope::new(&spec, batch.windows[0].len(), &Device::Cpu).unwrap();
        let embedding = Embedding::load_rows(&spec, &source, &batch.windows, &Device::Cpu).unwrap();
        let mut x = embedding.embed(&batch.windows).unwrap();
        for index in 0..spec.blocks.len() {
            x = Block::load(&spec, index, &source, &Device::Cpu).unwrap().forward(&x, &rope, &mut NoTap).unwrap();
        }
        let head = Head::load(&spec, &source, &Device::Cpu).unwrap();
        let logits = values(&head.logits(&x.flatten(0, 1).unwrap()).unwrap());
        assert_eq!(logits, fixture.logits(&batch.windows), "{case}");
    }
}

#[test]
fn rows_of_every_float_type_equal_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let numbers: Vec<f32> = (0..12).map(|i| i as f32 * 0.37 - 2.0).collect();
    let bytes: [Vec<u8>; 4] = [
        numbers.iter().flat_map(|v| v.to_le_bytes()).collect(),
        numbers.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        numbers.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        (0..12).collect(),
    ];
    let types = [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::I8];
    let mut tensors: BTreeMap<String, TensorView> = BTreeMap::new();
    for (dtype, bytes) in types.into_iter().zip(&bytes) {
        tensors.insert(format!("{dtype:?}"), TensorView::new(dtype, vec![4, 3], bytes).unwrap());
    }
    tensors.insert("vector".into(), TensorView::new(Dtype::F32, vec![12], &bytes[0]).unwrap());
    safetensors::serialize_to_file(&tensors, None, &dir.path().join("model.safetensors")).unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let source = CheckpointSource::new(&checkpoint);
    for name in ["F32", "F16", "BF16"] {
        let (shape, all) = source.load(name).unwrap();
        assert_eq!(shape, [4, 3]);
        let wanted: Vec<f32> = [3, 0, 3].iter().flat_map(|row| all[row * 3..][..3].to_vec()).collect();
        assert_eq!(source.rows(name, &[3, 0, 3]).unwrap(), wanted);
        assert!((wanted[1] - numbers[10]).abs() < 0.02);
        assert_eq!(
            source.rows(name, &[4]).unwrap_err().to_string(),
            format!("tensor `{name}`: has 4 rows, row 4 was wanted")
        );
    }
    assert_eq!(source.rows("I8", &[0]).unwrap_err().kind(), ErrorKind::Unsupported);
    assert!(source.rows("vector", &[0]).unwrap_err().to_string().contains("wanted a matrix"));
    assert!(source.contains("vector") && !source.contains("absent"));
    assert!(matches!(source.load("absent"), Err(DecoderError::Model(_))));
}

#[test]
fn the_default_for_rows_is_checked_too() {
    let mut source = Weights::default();
    source.tensors.insert("m".into(), (vec![2, 2], vec![1.0, 2.0, 3.0, 4.0]));
    source.tensors.insert("v".into(), (vec![4], vec![1.0, 2.0, 3.0, 4.0]));
    assert_eq!(source.rows("m", &[1, 1, 0]).unwrap(), [3.0, 4.0, 3.0, 4.0, 1.0, 2.0]);
    assert_eq!(source.rows("m", &[2]).unwrap_err().to_string(), "tensor `m`: has 2 rows, row 2 was wanted");
    assert!(source.rows("v", &[0]).is_err());
}
