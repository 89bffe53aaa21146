//! One safetensors file that breaks the format.

use lite_model::ErrorKind::{Input, Unsupported};
use lite_model::{Checkpoint, Dtype, ModelError};

use crate::support::{CONFIG, bytes_file, container, folder, model, refused};

/// A header with one entry, `w`.
fn entry(dtype: &str, shape: &str, offsets: &str) -> String {
    format!("{{\"w\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":{offsets}}}}}")
}

#[test]
fn too_short_for_a_header() {
    for len in 0..8 {
        refused(model(&vec![b'x'; len]).path(), Input, &["model.safetensors", &format!("{len} bytes"), "too short"]);
    }
}

#[test]
fn header_length_beyond_the_file() {
    for length in [1 << 63, u64::MAX, 100_000_001] {
        let mut file = length.to_le_bytes().to_vec();
        file.extend_from_slice(b"{} some data");
        refused(model(&file).path(), Input, &[&length.to_string(), "limit is 100000000"]);
    }
    let mut file = 1000_u64.to_le_bytes().to_vec();
    file.extend_from_slice(b"{}");
    refused(model(&file).path(), Input, &["1000 bytes", "only 2 follow", "download it again"]);
}

#[test]
fn names_and_entries_have_limits() {
    let long = "n".repeat(10_000_000);
    refused(model(&bytes_file(&[(&long, 1)])).path(), Input, &["10000000 bytes", "limit 4096"]);
    let dims = vec!["1"; 1_000_000].join(",");
    refused(model(&container(&entry("U8", &format!("[{dims}]"), "[0,1]"), &[0])).path(), Input, &["more than 32 dim"]);
    refused(
        model(&container(&entry("U8", &format!("[{}]", vec!["1"; 100].join(",")), "[0,1]"), &[0])).path(),
        Input,
        &["`w`"],
    );
}

#[test]
fn many_entries_open() {
    let names: Vec<_> = (0..150_000).map(|i| format!("t{i}")).collect();
    let tensors: Vec<_> = names.iter().map(|n| (n.as_str(), 1)).collect();
    let dir = model(&bytes_file(&tensors));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.names().len(), 150_000);
    assert_eq!(checkpoint.tensor("t149999").unwrap().data[..], [(149_999 % 256) as u8]);
}

#[test]
fn too_many_entries() {
    let entry = "\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}";
    let entries: Vec<_> = (0..1_000_001).map(|i| format!("\"{i:x}{entry}")).collect();
    refused(
        model(&container(&format!("{{{}}}", entries.join(",")), &[])).path(),
        Input,
        &["more than 1000000 tensors"],
    );
}

#[test]
fn header_that_is_no_json_object() {
    let deep = format!("{{\"w\":{}1{}}}", "[".repeat(10_000), "]".repeat(10_000));
    let unknown = format!(
        "{{\"w\":{{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"x\":{}1{}}}}}",
        "[".repeat(10_000),
        "]".repeat(10_000)
    );
    for (json, words) in [
        ("[1]", "start with `{`"),
        ("  {}", "start with `{`"),
        ("{\"w\":", "header"),
        ("{\"w\":1}", "entry `w`"),
        ("{} {}", "header"),
        (deep.as_str(), "entry `w`"),
        (&format!("{{\"__metadata__\":{{\"k\":{}", "[".repeat(10_000)), "`__metadata__`"),
        (unknown.as_str(), "unknown field `x`"),
    ] {
        refused(model(&container(json, &[0])).path(), Input, &["model.safetensors", words]);
    }
    let mut file = container("{\"?\":1}", &[]);
    file[10] = 0xff;
    refused(model(&file).path(), Input, &["not UTF-8", "wrong byte at 2"]);
}

#[test]
fn equal_names() {
    let one = "\"w\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}";
    for two in [
        one,
        "\"w\":{\"dtype\":\"I8\",\"shape\":[1],\"data_offsets\":[1,2]}",
        "\"\\u0077\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}",
    ] {
        refused(model(&container(&format!("{{{one},{two}}}"), &[0, 0])).path(), Input, &["`w`", "twice"]);
    }
    let meta = "\"__metadata__\":{\"a\":\"b\"}";
    refused(
        model(&container(&format!("{{{meta},{one},{meta}}}"), &[0])).path(),
        Input,
        &["`__metadata__` appears twice"],
    );
    refused(model(&container(r#"{"__metadata__":{"a":"b","a":"c"}}"#, &[])).path(), Input, &["key `a` appears twice"]);
}

#[test]
fn offsets_that_are_no_range() {
    for offsets in
        ["[1,0]", "[-1,0]", "[0.0,1.0]", "[\"0\",\"1\"]", "[0]", "[0,1,2]", "{}", "null", "[0,18446744073709551616]"]
    {
        refused(model(&container(&entry("U8", "[1]", offsets), &[0])).path(), Input, &["`w`"]);
    }
    for shape in ["[-1]", "[1.0]", "[\"1\"]", "1", "null", "[[1]]"] {
        refused(model(&container(&entry("U8", shape, "[0,1]"), &[0])).path(), Input, &["`w`"]);
    }
    for json in [
        r#"{"w":{"shape":[1],"data_offsets":[0,1]}}"#,
        r#"{"w":{"dtype":"U8","data_offsets":[0,1]}}"#,
        r#"{"w":{"dtype":"U8","shape":[1]}}"#,
        r#"{"w":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}"#,
    ] {
        refused(model(&container(json, &[0])).path(), Input, &["`w`"]);
    }
}

#[test]
fn overlaps_holes_and_trailing_bytes() {
    let two = |a: &str, b: &str| {
        format!(
            "{{\"a\":{{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":{a}}},\"b\":{{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":{b}}}}}"
        )
    };
    for (a, b, len, words) in [
        ("[0,4]", "[3,7]", 7, ["`b`", "overlaps that of `a`"]),
        ("[0,4]", "[0,4]", 4, ["`b`", "overlaps that of `a`"]),
        ("[0,4]", "[5,9]", 9, ["`b`", "1 bytes before"]),
        ("[6,10]", "[2,6]", 10, ["`b`", "2 bytes before"]),
        ("[0,4]", "[4,8]", 11, ["model.safetensors", "3 bytes after the last tensor"]),
    ] {
        refused(model(&container(&two(a, b), &vec![0; len])).path(), Input, &words);
    }
    refused(model(&container("{}", &[0])).path(), Input, &["1 bytes after"]);
}

#[test]
fn an_empty_tensor_inside_another_overlaps() {
    let json =
        r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"e":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}}"#;
    refused(model(&container(json, &[0; 4])).path(), Input, &["`e`", "overlaps"]);
}

#[test]
fn empty_tensors_and_scalars_open() {
    let json = r#"{"e":{"dtype":"F32","shape":[0,4],"data_offsets":[0,0]},"f":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},
        "s":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#;
    let dir = model(&container(json, &1.5_f32.to_le_bytes()));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.tensor_f32("s").unwrap(), [1.5]);
    assert!(checkpoint.tensor_f32("e").unwrap().is_empty());
    assert_eq!(checkpoint.info("s").unwrap().elements(), 1);
    assert_eq!(checkpoint.info("e").unwrap().elements(), 0);
    checkpoint.release(["e", "s", "unknown"]);
}

#[test]
fn shapes_that_overflow_or_do_not_match() {
    let shape = "[4194305, 4194305, 211106198978564]";
    refused(model(&container(&entry("U8", shape, "[0,4]"), &[0; 4])).path(), Input, &["`w`", "overflows 64 bits"]);
    refused(model(&container(&entry("F32", "[4611686018427387905]", "[0,4]"), &[0; 4])).path(), Input, &["overflows"]);
    refused(
        model(&container(&entry("F32", "[2,2]", "[0,8]"), &[0; 8])).path(),
        Input,
        &["`w`", "takes 16 bytes", "give 8"],
    );
    let small = model(&container(&entry("F32", "[1]", "[0,8]"), &[0; 8]));
    refused(small.path(), Input, &["`w`", "takes 4 bytes", "give 8"]);
}

#[test]
fn dtypes_that_are_not_read() {
    refused(model(&container(&entry("F128", "[1]", "[0,16]"), &[0; 16])).path(), Unsupported, &["`w`", "`F128`"]);
    refused(model(&container(&entry("\\u001b[31m", "[1]", "[0,1]"), &[0])).path(), Unsupported, &["\\u{1b}[31m"]);
    refused(
        model(&container(&entry("F4", "[3]", "[0,1]"), &[0])).path(),
        Unsupported,
        &["`w`", "whole number of bytes"],
    );
    let dir = model(&container(&entry("F4", "[3,2]", "[0,3]"), &[1, 2, 3]));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.info("w").unwrap().dtype, Dtype::F4);
    assert!(matches!(checkpoint.tensor_f32("w"), Err(ModelError::NotFloat { dtype: Dtype::F4, .. })));
}

#[test]
fn a_file_cut_at_any_place() {
    let whole = bytes_file(&[("a", 5), ("b", 3)]);
    for len in 0..whole.len() {
        let error = Checkpoint::open(model(&whole[..len]).path()).unwrap_err();
        assert_eq!(error.kind(), Input, "{len}");
    }
    let words = [format!("found {} bytes", whole.len() - 1), format!("asks for {}", whole.len())];
    refused(model(&whole[..whole.len() - 1]).path(), Input, &[&words[0], &words[1], "download it again"]);
}

#[test]
fn metadata_holds_strings() {
    for value in ["1", "null", "{}", "[\"x\"]"] {
        let json = format!("{{\"__metadata__\":{{\"k\":{value}}}}}");
        refused(model(&container(&json, &[])).path(), Input, &["`__metadata__`"]);
    }
    let large = format!("{{\"__metadata__\":{{\"k\":\"{}\"}}}}", "v".repeat(50_000_000));
    assert!(Checkpoint::open(model(&container(&large, &[])).path()).is_ok());
}

#[test]
fn control_characters_are_never_echoed() {
    let name = "w\\u001b[2J\\u202e\\n";
    let json = format!("{{\"{name}\":{{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,1]}}}}");
    let error = refused(model(&container(&json, &[0])).path(), Input, &["w\\u{1b}[2J\\u{202e}\\u{a}"]);
    assert!(!error.to_string().contains('\u{202e}'));
}

#[test]
fn files_of_another_kind_under_this_name() {
    let lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
    refused(model(lfs.as_bytes()).path(), Input, &["Git LFS", "git lfs pull"]);
    refused(model(b"<!DOCTYPE html><html><head><title>Log in</title>").path(), Input, &["HTML", "log in"]);
    refused(model(b"PK\x03\x04\0\0\0\0archive/data.pkl").path(), Input, &["zip", "safe_serialization=True"]);
    refused(model(b"\x80\x02}q\0X\x06\0\0\0weight").path(), Input, &["pickle", "safe_serialization=True"]);
    refused(model(b"GGUF\x03\0\0\0\0\0\0\0").path(), Input, &["GGUF"]);
    refused(model(&[0; 4096]).path(), Input, &["zeros", "download"]);
    let config = folder(&[("config.json", lfs.as_bytes()), ("model.safetensors", &bytes_file(&[("a", 1)]))]);
    refused(config.path(), Input, &["config.json", "git lfs pull"]);
    let index = folder(&[("config.json", CONFIG.as_bytes()), ("model.safetensors.index.json", lfs.as_bytes())]);
    refused(index.path(), Input, &["index.json", "git lfs pull"]);
}
