//! The writer: rules, order, and what is left when it fails.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use lite_model::{Checkpoint, CheckpointWriter, Dtype, ErrorKind, ModelError, OutputTensor};
use safetensors::SafeTensors;

use crate::support::CONFIG;

fn tensor(name: &str, dtype: Dtype, shape: &[usize]) -> OutputTensor {
    OutputTensor { name: name.into(), dtype, shape: shape.to_vec() }
}

fn three() -> Vec<OutputTensor> {
    vec![tensor("a", Dtype::U8, &[3]), tensor("b", Dtype::F32, &[2]), tensor("c", Dtype::BF16, &[1, 2])]
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn fill(writer: &CheckpointWriter) {
    // Not the order of the file.
    writer.write("c", &[9; 4]).unwrap();
    writer.write("a", &[7; 3]).unwrap();
    writer.write("b", &[8; 8]).unwrap();
}

#[test]
fn one_file_aligned_and_readable_by_the_safetensors_crate() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("not/yet");
    let writer = CheckpointWriter::create(&out, three(), 1000).unwrap();
    assert_eq!(names(&out), [".model.safetensors.partial"]);
    fill(&writer);
    let written = writer.finish().unwrap();
    assert_eq!(written.files, [out.join("model.safetensors")]);
    assert_eq!(written.total_bytes, 15);
    assert_eq!(names(&out), ["model.safetensors"]);
    let bytes = fs::read(&written.files[0]).unwrap();
    let (header, meta) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!((header + 8) % 8, 0);
    assert_eq!(meta.metadata().as_ref().unwrap()["format"], "pt");
    assert_eq!(meta.info("b").unwrap().data_offsets, (0, 8));
    assert_eq!(meta.info("c").unwrap().data_offsets, (8, 12));
    assert_eq!(meta.info("a").unwrap().data_offsets, (12, 15));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("c").unwrap().data(), [9; 4]);
    assert_eq!(file.tensor("a").unwrap().data(), [7; 3]);
}

#[test]
fn shards_and_their_index() {
    let dir = tempfile::tempdir().unwrap();
    let writer = CheckpointWriter::create(dir.path(), three(), 11).unwrap();
    fill(&writer);
    let written = writer.finish().unwrap();
    let shard = |i| format!("model-0000{i}-of-00002.safetensors");
    let wanted = [shard(1), shard(2), "model.safetensors.index.json".to_owned()];
    assert_eq!(names(dir.path()), wanted);
    assert_eq!(written.files, wanted.each_ref().map(|n| dir.path().join(n)));
    let index = fs::read_to_string(dir.path().join(&wanted[2])).unwrap();
    let text = "{\n  \"metadata\": {\n    \"total_size\": 15\n  },\n  \"weight_map\": {\n    \"a\": \"model-00001-of-00002.safetensors\",\n    \"b\": \"model-00001-of-00002.safetensors\",\n    \"c\": \"model-00002-of-00002.safetensors\"\n  }\n}\n";
    assert_eq!(index, text);
    fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert!(checkpoint.warnings.is_empty());
    assert_eq!(checkpoint.tensor("b").unwrap().data[..], [8; 8]);
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let run = |order: [&str; 3]| {
        let dir = tempfile::tempdir().unwrap();
        let writer = CheckpointWriter::create(dir.path(), three(), 11).unwrap();
        for name in order {
            let len = match name {
                "a" => 3,
                "b" => 8,
                _ => 4,
            };
            writer.write(name, &vec![1; len]).unwrap();
        }
        writer.finish().unwrap().files.iter().map(|f| fs::read(f).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(run(["a", "b", "c"]), run(["c", "b", "a"]));
}

#[test]
fn each_tensor_once_and_whole() {
    let dir = tempfile::tempdir().unwrap();
    let writer = CheckpointWriter::create(dir.path(), three(), 1000).unwrap();
    let error = writer.write("a", &[0; 4]).unwrap_err();
    assert!(matches!(error, ModelError::Length { found: 4, wanted: 3, .. }), "{error}");
    writer.write("a", &[1; 3]).unwrap();
    assert!(writer.write("a", &[2; 3]).unwrap_err().to_string().contains("`a` was written twice"));
    assert!(writer.write("z", &[]).unwrap_err().to_string().contains("`z` was not announced"));
    let message = writer.finish().unwrap_err().to_string();
    assert!(message.contains("2 of 3 tensors were never written: `b`, `c`"), "{message}");
    assert!(names(dir.path()).is_empty());
}

#[test]
fn many_missing_tensors_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = (0..100).map(|i| tensor(&format!("t{i}"), Dtype::U8, &[1])).collect();
    let message = CheckpointWriter::create(dir.path(), tensors, 10).unwrap().finish().unwrap_err().to_string();
    assert!(message.contains("100 of 100") && message.ends_with("`t4`, …"), "{message}");
}

#[test]
fn dropping_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("notes.txt"), "kept").unwrap();
    let writer = CheckpointWriter::create(dir.path(), three(), 1).unwrap();
    writer.write("a", &[0; 3]).unwrap();
    assert_eq!(names(dir.path()).len(), 4);
    drop(writer);
    assert_eq!(names(dir.path()), ["notes.txt"]);
}

#[test]
fn leftovers_of_a_killed_run_are_replaced() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(".model.safetensors.partial"), vec![0xff; 10_000]).unwrap();
    let writer = CheckpointWriter::create(dir.path(), three(), 1000).unwrap();
    fill(&writer);
    writer.finish().unwrap();
    fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().tensor("a").unwrap().data[..], [7; 3]);
}

#[test]
fn folders_that_are_not_written_to() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["model.safetensors", "model.safetensors.index.json", "model-00001-of-00009.safetensors"] {
        let out = dir.path().join(format!("with {name}"));
        fs::create_dir(&out).unwrap();
        fs::write(out.join(name), "old").unwrap();
        let error = CheckpointWriter::create(&out, three(), 1000).unwrap_err();
        assert!(matches!(error, ModelError::Output { .. }) && error.to_string().contains(name), "{error}");
        assert_eq!(names(&out), [name]);
        assert_eq!(fs::read(out.join(name)).unwrap(), b"old");
    }
    let file = dir.path().join("file");
    fs::write(&file, "old").unwrap();
    assert!(CheckpointWriter::create(&file, three(), 1000).unwrap_err().to_string().contains("in the way"));
    let error = CheckpointWriter::create(Path::new("/proc/none"), three(), 1000).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
}

#[test]
fn a_failure_half_way_through_the_renames_leaves_no_shard() {
    let dir = tempfile::tempdir().unwrap();
    let writer = CheckpointWriter::create(dir.path(), three(), 1).unwrap();
    fill(&writer);
    let way = dir.path().join("model-00002-of-00003.safetensors");
    fs::create_dir(&way).unwrap();
    let error = writer.finish().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert_eq!(names(dir.path()), ["model-00002-of-00003.safetensors"]);
    assert!(way.is_dir());
}

#[test]
fn threads_write_side_by_side() {
    let dir = tempfile::tempdir().unwrap();
    let tensors: Vec<_> = (0..64).map(|i| tensor(&format!("t{i}"), Dtype::U8, &[1000 + i])).collect();
    let writer = CheckpointWriter::create(dir.path(), tensors, 9000).unwrap();
    std::thread::scope(|scope| {
        for part in 0..4 {
            let writer = &writer;
            scope.spawn(move || {
                for i in (part..64).step_by(4) {
                    writer.write(&format!("t{i}"), &vec![i as u8; 1000 + i]).unwrap();
                }
            });
        }
    });
    writer.finish().unwrap();
    fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert!(checkpoint.shards().len() > 5);
    for i in 0..64 {
        assert_eq!(checkpoint.tensor(&format!("t{i}")).unwrap().data, vec![i as u8; 1000 + i]);
    }
}

#[test]
fn one_of_many_writers_of_a_tensor_wins() {
    let dir = tempfile::tempdir().unwrap();
    let writer = CheckpointWriter::create(dir.path(), vec![tensor("a", Dtype::U8, &[1 << 16])], 1 << 20).unwrap();
    let won = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for i in 0..8 {
            let (writer, won) = (&writer, &won);
            scope.spawn(move || {
                if writer.write("a", &vec![i; 1 << 16]).is_ok() {
                    won.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(won.into_inner(), 1);
    writer.finish().unwrap();
}
