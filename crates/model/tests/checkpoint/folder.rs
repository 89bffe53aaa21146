//! Folders that are not one complete model, and indexes that lie.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use lite_model::Checkpoint;
use lite_model::ErrorKind::{Input, Unsupported};

use crate::support::{CONFIG, bytes_file, folder, index, model, refused};

const INDEX: &str = "model.safetensors.index.json";

/// Two shards, `a` in the first and `b`, `c` in the second, under the given index.
fn sharded(index: &[u8]) -> tempfile::TempDir {
    folder(&[
        ("config.json", CONFIG.as_bytes()),
        ("m1.safetensors", &bytes_file(&[("a", 2)])),
        ("m2.safetensors", &bytes_file(&[("b", 3), ("c", 4)])),
        (INDEX, index),
    ])
}

const PLACES: [(&str, &str); 3] = [("c", "m2.safetensors"), ("b", "m2.safetensors"), ("a", "m1.safetensors")];

#[test]
fn no_folder_at_all() {
    let dir = model(&bytes_file(&[("a", 1)]));
    refused(&dir.path().join("none"), Input, &["does not exist"]);
    refused(&dir.path().join("model.safetensors"), Input, &["not a folder"]);
    refused(&dir.path().join("model.safetensors/deeper"), Input, &["not a folder"]);
    refused(&dir.path().join("line\nbreak"), Input, &["line\\u{a}break"]);
    refused(folder(&[]).path(), Input, &["empty"]);
    refused(folder(&[(".git/config", b"")]).path(), Input, &["empty"]);
}

#[test]
fn odd_paths_work() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["-rf", "with space", "line\nbreak", "权重"] {
        let path = dir.path().join(name);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("config.json"), CONFIG).unwrap();
        fs::write(path.join("model.safetensors"), bytes_file(&[("a", 1)])).unwrap();
        assert!(Checkpoint::open(&path).is_ok(), "{name:?}");
    }
    let long = dir.path().join("d/".repeat(2100));
    assert!(Checkpoint::open(&long).is_err());
}

#[test]
fn no_config() {
    refused(folder(&[("model.safetensors", &bytes_file(&[("a", 1)]))]).path(), Input, &["no config.json"]);
}

#[test]
fn no_weights() {
    refused(folder(&[("config.json", b"{}")]).path(), Input, &["no weights"]);
    let cache = folder(&[("snapshots/abc/config.json", b"{}"), ("refs/main", b"abc")]);
    refused(cache.path(), Input, &["snapshots"]);
}

#[test]
fn only_weights_of_other_formats() {
    for (name, words) in [
        ("pytorch_model.bin", ["pickles", "safe_serialization=True"]),
        ("consolidated.00.pth", ["pickles", "safe_serialization=True"]),
        ("model.pt", ["pickles", "safe_serialization=True"]),
        ("model.ckpt", ["pickles", "safe_serialization=True"]),
        ("model-Q4_K_M.gguf", ["GGUF", "safetensors"]),
        ("tf_model.h5", ["TensorFlow", "safetensors"]),
        ("model.onnx", ["ONNX", "safetensors"]),
        ("adapter_model.safetensors", ["LoRA", "merge"]),
    ] {
        refused(
            folder(&[("config.json", CONFIG.as_bytes()), (name, b"x")]).path(),
            Unsupported,
            &[name, words[0], words[1]],
        );
        refused(folder(&[(name, b"x")]).path(), Unsupported, &[name, words[0]]);
    }
}

#[test]
fn a_single_file_of_another_name() {
    let weights = bytes_file(&[("a", 1)]);
    let dir = folder(&[("config.json", CONFIG.as_bytes()), ("weights.safetensors", &weights)]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.shards(), [dir.path().join("weights.safetensors")]);
    fs::write(dir.path().join("other.safetensors"), &weights).unwrap();
    refused(dir.path(), Input, &["2 weight files", "`other.safetensors`", "`weights.safetensors`"]);
}

#[test]
fn files_beside_the_standard_one_are_told() {
    let weights = bytes_file(&[("a", 1)]);
    let dir = model(&weights);
    fs::write(dir.path().join("consolidated.safetensors"), &weights).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.shards(), [dir.path().join("model.safetensors")]);
    assert!(checkpoint.warnings.iter().any(|w| w.contains("consolidated.safetensors")), "{:?}", checkpoint.warnings);
    fs::write(dir.path().join("model-00001-of-00002.safetensors"), &weights).unwrap();
    refused(dir.path(), Input, &["ambiguous", "without an index"]);
}

#[test]
fn shards_without_their_index() {
    let weights = bytes_file(&[("a", 1)]);
    let dir = folder(&[("config.json", CONFIG.as_bytes()), ("model-00001-of-00002.safetensors", &weights)]);
    refused(dir.path(), Input, &["index.json"]);
}

#[test]
fn two_answers_are_no_answer() {
    let dir = sharded(&index(&PLACES, 9));
    fs::write(dir.path().join("model.safetensors"), bytes_file(&[("a", 2)])).unwrap();
    refused(dir.path(), Input, &["ambiguous", "`model.safetensors`", "index"]);
    let dir = sharded(&index(&PLACES, 9));
    fs::write(dir.path().join("other.safetensors.index.json"), index(&PLACES, 9)).unwrap();
    refused(dir.path(), Input, &["ambiguous", "2 shard indexes"]);
}

#[test]
fn shards_open_in_order() {
    let dir = sharded(&index(&PLACES, 9));
    fs::write(dir.path().join("consolidated.safetensors"), bytes_file(&[("z", 1)])).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(checkpoint.shards(), [dir.path().join("m1.safetensors"), dir.path().join("m2.safetensors")]);
    assert_eq!(checkpoint.info("c").unwrap().shard, 1);
    assert_eq!(checkpoint.tensor("c").unwrap().data[..], [1; 4]);
    assert_eq!(checkpoint.total_bytes(), 9);
    assert_eq!(checkpoint.warnings.len(), 1, "{:?}", checkpoint.warnings);
    assert!(checkpoint.warnings[0].contains("consolidated.safetensors"));
}

#[test]
fn index_and_shards_that_disagree() {
    for (places, words) in [
        (&PLACES[1..], ["shard `m2.safetensors` holds tensor `c`", "does not name"]),
        (
            &[("a", "m1.safetensors"), ("b", "m1.safetensors"), ("c", "m2.safetensors")],
            ["tensor `b` is in shard `m2", "places it in `m1"],
        ),
        (&[PLACES[0], PLACES[1], PLACES[2], ("d", "m1.safetensors")], ["places tensor `d`", "does not hold it"]),
        (&[PLACES[0], PLACES[1], PLACES[2], ("d", "m3.safetensors")], ["names shard `m3", "not in the folder"]),
    ] {
        refused(sharded(&index(places, 9)).path(), Input, &[INDEX, words[0], words[1]]);
    }
    let dir = sharded(&index(&PLACES, 9));
    fs::write(dir.path().join("m1.safetensors"), bytes_file(&[("a", 2), ("b", 3)])).unwrap();
    refused(dir.path(), Input, &["tensor `b` is in two shards"]);
}

#[test]
fn a_wrong_total_size_is_a_warning() {
    let dir = sharded(&index(&PLACES, 10));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert!(checkpoint.warnings[0].contains("10 bytes") && checkpoint.warnings[0].contains('9'));
    let dir = sharded(&index(&PLACES, 9));
    assert!(Checkpoint::open(dir.path()).unwrap().warnings.is_empty());
}

#[test]
fn indexes_of_another_shape() {
    for (text, words) in [
        ("", "empty"),
        ("[]", "`{`"),
        ("{}", "weight_map"),
        ("{\"weight_map\": []}", "weight_map"),
        ("{\"weight_map\": {}}", "is empty"),
        ("{\"weight_map\": {\"a\": 1}}", "`a` is not a string"),
        ("{\"weight_map\": {\"a\": \"m1.safetensors\", \"a\": \"m2.safetensors\"}}", "`a` appears twice"),
    ] {
        refused(sharded(text.as_bytes()).path(), Input, &[INDEX, words]);
    }
}

#[test]
fn shard_names_that_leave_the_folder() {
    let outside = folder(&[("x.safetensors", &bytes_file(&[("a", 2)]))]);
    let absolute = outside.path().join("x.safetensors");
    let long = format!("{}.safetensors", "x".repeat(5000));
    for name in [
        "../x.safetensors",
        absolute.to_str().unwrap(),
        "C:\\x.safetensors",
        "file://x.safetensors",
        "x\0.safetensors",
        "x.safetensors.",
        "",
        "sub/x.safetensors",
        &long,
        "model.bin",
    ] {
        let map = serde_json::json!({"weight_map": {"a": name}}).to_string();
        refused(sharded(map.as_bytes()).path(), Input, &["shard name", "plain file name"]);
    }
}

#[test]
fn shards_that_are_no_files() {
    let with = |make: &dyn Fn(&Path)| {
        let dir = folder(&[("config.json", CONFIG.as_bytes())]);
        make(&dir.path().join("model.safetensors"));
        dir
    };
    refused(with(&|p| fs::create_dir(p).unwrap()).path(), Input, &["a folder"]);
    refused(with(&|p| symlink("/dev/zero", p).unwrap()).path(), Input, &["a device"]);
    refused(with(&|p| symlink("model.safetensors", p).unwrap()).path(), Input, &["back to itself"]);
    refused(with(&|p| symlink("gone", p).unwrap()).path(), Input, &["does not exist"]);
    let fifo = |p: &Path| assert!(Command::new("mkfifo").arg(p).status().unwrap().success());
    refused(with(&fifo).path(), Input, &["a named pipe"]);
    let dir = sharded(&index(&PLACES, 9));
    fs::remove_file(dir.path().join("m1.safetensors")).unwrap();
    symlink("m1.safetensors", dir.path().join("m1.safetensors")).unwrap();
    refused(dir.path(), Input, &["back to itself"]);
}

#[test]
fn a_hub_cache_snapshot_opens() {
    let weights = bytes_file(&[("a", 3)]);
    let cache = folder(&[("blobs/1111", CONFIG.as_bytes()), ("blobs/2222", &weights), ("blobs/3333", b"{}")]);
    let snapshot = cache.path().join("snapshots/abc");
    fs::create_dir_all(&snapshot).unwrap();
    for (name, blob) in [("config.json", "1111"), ("model.safetensors", "2222"), ("tokenizer.json", "3333")] {
        symlink(format!("../../blobs/{blob}"), snapshot.join(name)).unwrap();
    }
    let checkpoint = Checkpoint::open(&snapshot).unwrap();
    assert_eq!(checkpoint.tensor("a").unwrap().data[..], [0; 3]);
    assert_eq!(checkpoint.side_files(), [Path::new("tokenizer.json")]);
    assert!(checkpoint.warnings.is_empty(), "{:?}", checkpoint.warnings);
}

#[test]
fn configs_that_are_not_read() {
    let with = |config: &[u8]| folder(&[("config.json", config), ("model.safetensors", &bytes_file(&[("a", 1)]))]);
    for (config, words) in [
        (&b""[..], "empty"),
        (b"[]", "`{`"),
        (b"{\"a\": \"\xff\"}", "not UTF-8"),
        (b"{\"a\": 1, // heads\n\"b\": 2}", "no comments"),
        (b"{\"a\": NaN}", "`NaN`"),
        (b"{\"a\": -Infinity}", "`Infinity`"),
        (b"{\"a\": {\"b\": 1, \"b\": 2}}", "`b` appears twice"),
        (b"{\"a\": 1,}", "not valid JSON"),
        (b"<html>", "HTML"),
    ] {
        refused(with(config).path(), Input, &["config.json", words]);
    }
    refused(with(&vec![b' '; 16_000_001]).path(), Input, &["16000001 bytes", "limit"]);
    let huge = with(b"{}");
    fs::File::options().write(true).open(huge.path().join("config.json")).unwrap().set_len(1 << 30).unwrap();
    refused(huge.path(), Input, &["1073741824 bytes"]);
    let marked = with("\u{feff}{\"a\": 1}".as_bytes());
    let checkpoint = Checkpoint::open(marked.path()).unwrap();
    assert_eq!(checkpoint.config()["a"], 1);
    assert_eq!(checkpoint.config_text(), "{\"a\": 1}");
    refused(folder(&[("config.json/x", b""), ("model.safetensors", b"x")]).path(), Input, &["a folder"]);
}
