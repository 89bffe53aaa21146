//! Files that travel unchanged.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use lite_model::{Checkpoint, ErrorKind, ModelError};

use crate::support::{CONFIG, bytes_file, folder};

#[test]
fn everything_but_weights_and_our_own_files() {
    let dir = folder(&[
        ("config.json", CONFIG.as_bytes()),
        ("model.safetensors", &bytes_file(&[("a", 1)])),
        ("pytorch_model.bin", b"x"),
        ("pytorch_model.bin.index.json", b"{}"),
        ("quantize_config.json", b"{}"),
        ("hf_quant_config.json", b"{}"),
        ("Quantize_Config.json", b"{}"),
        ("tokenizer.json", b"\0\xff\r\n"),
        ("modeling_custom.py", b"import os"),
        ("onnx/config.json", b"{}"),
        ("original/params.json", b"{}"),
        ("original/consolidated.00.pth", b"x"),
        ("1_Pooling/config.json", b"{}"),
        (".gitattributes", b"x"),
        (".git/HEAD", b"x"),
        (".cache/huggingface/x", b"x"),
    ]);
    let latin = OsStr::from_bytes(b"caf\xe9.txt");
    fs::write(dir.path().join(latin), "x").unwrap();
    symlink("tokenizer.json", dir.path().join("alias.json")).unwrap();
    symlink("original", dir.path().join("folder_link")).unwrap();
    symlink("gone", dir.path().join("dangling")).unwrap();
    assert!(Command::new("mkfifo").arg(dir.path().join("pipe")).status().unwrap().success());
    let secret = folder(&[("key", b"secret")]);
    symlink(secret.path().join("key"), dir.path().join("outside.txt")).unwrap();

    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let wanted: Vec<PathBuf> = [
        OsStr::new("1_Pooling/config.json"),
        OsStr::new("alias.json"),
        latin,
        OsStr::new("modeling_custom.py"),
        OsStr::new("original/params.json"),
        OsStr::new("outside.txt"),
        OsStr::new("tokenizer.json"),
    ]
    .iter()
    .map(PathBuf::from)
    .collect();
    assert_eq!(checkpoint.side_files(), wanted);
    for word in [
        "`Quantize_Config.json` differs from `quantize_config.json`",
        "`folder_link` is a link to a folder",
        "`dangling` is a link that leads nowhere",
        "`pipe` is a named pipe",
        "`outside.txt` is a link out of the model folder",
        "`original/consolidated.00.pth`",
    ] {
        assert_eq!(
            checkpoint.warnings.iter().filter(|w| w.contains(word)).count(),
            1,
            "{word}: {:?}",
            checkpoint.warnings
        );
    }

    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("new/folder");
    checkpoint.copy_side_files(&target).unwrap();
    for file in &wanted {
        assert_eq!(fs::read(target.join(file)).unwrap(), fs::read(dir.path().join(file)).unwrap());
        assert!(fs::symlink_metadata(target.join(file)).unwrap().is_file());
    }
    assert_eq!(fs::read_dir(&target).unwrap().count(), 7);
}

#[test]
fn never_onto_itself() {
    let dir =
        folder(&[("config.json", CONFIG.as_bytes()), ("model.safetensors", &bytes_file(&[("a", 1)])), ("t", b"t")]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let link = tempfile::tempdir().unwrap();
    symlink(dir.path(), link.path().join("same")).unwrap();
    for target in [dir.path(), &link.path().join("same")] {
        let error = checkpoint.copy_side_files(target).unwrap_err();
        assert!(matches!(error, ModelError::Output { .. }) && error.to_string().contains("choose another"), "{error}");
    }
    let error = checkpoint.copy_side_files(Path::new("/proc/none")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    // A file that went away since is an error that names it.
    fs::remove_file(dir.path().join("t")).unwrap();
    let error = checkpoint.copy_side_files(&link.path().join("out")).unwrap_err();
    assert!(error.to_string().contains("/t`"), "{error}");
}
