//! What an open checkpoint hands out.

use std::fs;

use lite_model::{Checkpoint, Dtype, DtypeCount, ErrorKind, ModelError};

use crate::support::{bytes_file, container, model, resident};

/// F32 `[2]`, BF16 `[3]` at an odd address, F16 `[1]`, I32 `[1]`; the U8 in front shifts them.
fn mixed() -> Vec<u8> {
    let json = r#"{"pad":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
        "f32":{"dtype":"F32","shape":[2],"data_offsets":[1,9]},
        "bf16":{"dtype":"BF16","shape":[3,1],"data_offsets":[9,15]},
        "f16":{"dtype":"F16","shape":[1],"data_offsets":[15,17]},
        "i32":{"dtype":"I32","shape":[1],"data_offsets":[17,21]}}"#;
    let mut data = vec![7];
    data.extend(1.25_f32.to_le_bytes());
    data.extend((-0.0_f32).to_le_bytes());
    data.extend([0x80, 0x3f, 0x00, 0xc0, 0x80, 0x7f]); // 1, -2, inf
    data.extend([0x00, 0x3e]); // 1.5
    data.extend(5_i32.to_le_bytes());
    container(json, &data)
}

#[test]
fn floats_at_any_address() {
    let dir = model(&mixed());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let f32s = checkpoint.tensor_f32("f32").unwrap();
    assert_eq!(f32s.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), [1.25_f32.to_bits(), (-0.0_f32).to_bits()]);
    assert_eq!(checkpoint.tensor_f32("bf16").unwrap(), [1.0, -2.0, f32::INFINITY]);
    assert_eq!(checkpoint.tensor_f32("f16").unwrap(), [1.5]);
    assert_eq!(checkpoint.tensor("bf16").unwrap().shape, [3, 1]);
    let error = checkpoint.tensor_f32("i32").unwrap_err();
    assert!(matches!(error, ModelError::NotFloat { dtype: Dtype::I32, .. }));
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("`i32` has dtype I32"));
    let error = checkpoint.tensor_f32_into("f16", &mut [0.0; 2]).unwrap_err();
    assert!(matches!(error, ModelError::Length { found: 2, wanted: 1, .. }), "{error}");
}

#[test]
fn census_and_unknown_names() {
    let dir = model(&mixed());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let census = checkpoint.dtype_census();
    assert_eq!(census[&Dtype::BF16], DtypeCount { tensors: 1, bytes: 6 });
    assert_eq!(census.values().map(|c| c.bytes).sum::<u64>(), checkpoint.total_bytes());
    let message = checkpoint.tensor("nope").unwrap_err().to_string();
    assert!(message.contains("`nope`") && message.contains("5 tensors") && message.contains("`pad`"), "{message}");
    assert_eq!(checkpoint.root(), dir.path());
}

#[test]
fn tied_tensors_under_their_other_name() {
    let json = r#"{"__metadata__":{"format":"pt","embed":"head","head":"w","ghost":"gone","chain":"embed"},
        "head":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
    let dir = model(&container(json, &[1.0_f32.to_le_bytes(), 2.0_f32.to_le_bytes()].concat()));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.resolve_alias("embed"), Some("head"));
    assert_eq!(checkpoint.aliases().collect::<Vec<_>>(), [("embed", "head")]);
    assert!(checkpoint.is_alias("embed"));
    assert_eq!(checkpoint.tensor_f32("embed").unwrap(), [1.0]);
    assert_eq!(checkpoint.info("embed").unwrap().name, "head");
    // A stored tensor is never an alias, and what leads nowhere is none either.
    for name in ["head", "format", "ghost", "chain", "pt"] {
        assert!(!checkpoint.is_alias(name) && checkpoint.resolve_alias(name).is_none(), "{name}");
    }
    assert_eq!(checkpoint.tensor_f32("head").unwrap(), [1.0]);
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["head", "w"]);
}

#[test]
fn the_fingerprint_covers_config_and_headers() {
    let digest = |config: &str, tensors: &[(&str, usize)]| {
        let dir = model(&bytes_file(tensors));
        fs::write(dir.path().join("config.json"), config).unwrap();
        Checkpoint::open(dir.path()).unwrap().header_digest().to_owned()
    };
    let base = digest("{}", &[("a", 2)]);
    assert_eq!(base.len(), 64);
    assert_eq!(base, digest("{}", &[("a", 2)]));
    assert_ne!(base, digest("{ }", &[("a", 2)]));
    assert_ne!(base, digest("{}", &[("b", 2)]));
    assert_ne!(base, digest("{}", &[("a", 3)]));
}

#[test]
fn a_file_that_changes_during_the_run() {
    let whole = bytes_file(&[("a", 100_000)]);
    for change in [
        &(|file: &fs::File| file.set_len(100)) as &dyn Fn(&fs::File) -> std::io::Result<()>,
        &|file| file.set_len(1_000_000),
        &|file| file.set_modified(std::time::SystemTime::UNIX_EPOCH),
    ] {
        let dir = model(&whole);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert!(checkpoint.tensor("a").is_ok());
        change(&fs::File::options().write(true).open(dir.path().join("model.safetensors")).unwrap()).unwrap();
        let error = checkpoint.tensor("a").unwrap_err();
        assert!(matches!(error, ModelError::Changed { .. }) && error.kind() == ErrorKind::Io, "{error}");
    }
}

#[test]
fn released_tensors_are_no_longer_resident_and_read_again() {
    let dir = model(&bytes_file(&[("a", 1 << 22), ("b", 1 << 22)]));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let sum = |name| checkpoint.tensor(name).unwrap().data.iter().map(|b| u64::from(*b)).sum::<u64>();
    assert_eq!((sum("a"), sum("b")), (0, 1 << 22));
    let path = dir.path().canonicalize().unwrap().join("model.safetensors");
    let before = resident(&path);
    checkpoint.release(["b", "unknown"]);
    if let (Some(before), Some(after)) = (before, resident(&path)) {
        assert!(before >= 1 << 23 && after < (1 << 22) + (1 << 20), "{before} before, {after} after");
    } else {
        println!("skipped the count: /proc/self/smaps is not there");
    }
    assert_eq!((sum("a"), sum("b")), (0, 1 << 22));
}
