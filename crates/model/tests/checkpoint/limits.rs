//! Writes that the system cuts short: a child process runs under a small limit on file sizes.

use std::fs;
use std::path::Path;
use std::process::Command;

use lite_model::{CheckpointWriter, Dtype, ErrorKind, ModelError, OutputTensor, atomic_write};

/// The folder a child writes to.
const FOLDER: &str = "LITE_MODEL_LIMITED_FOLDER";

#[test]
fn a_refused_write_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    // `ulimit -f` counts blocks of 512 or 1024 bytes; the ignored signal turns the limit into an error of write(2).
    let script =
        "ulimit -f 4 && trap '' XFSZ && exec \"$0\" --exact limits::under_the_limit --include-ignored --nocapture";
    let output = Command::new("sh")
        .args(["-c", script])
        .arg(std::env::current_exe().unwrap())
        .env(FOLDER, dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    assert_eq!(fs::read(dir.path().join("config.json")).unwrap(), b"old");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// The body of the child; does nothing where it was not started by the test above.
#[test]
#[ignore = "runs inside a_refused_write_leaves_nothing_behind"]
fn under_the_limit() {
    let Some(dir) = std::env::var_os(FOLDER) else { return };
    let dir = Path::new(&dir);
    let path = dir.join("config.json");
    atomic_write(&path, b"old").unwrap();
    for error in [
        atomic_write(&path, &vec![b'x'; 1 << 20]).unwrap_err(),
        CheckpointWriter::create(
            dir,
            vec![
                OutputTensor { name: "small".into(), dtype: Dtype::U8, shape: vec![10] },
                OutputTensor { name: "large".into(), dtype: Dtype::U8, shape: vec![1 << 20] },
            ],
            1000,
        )
        .unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Io);
        let ModelError::Io { source, .. } = error else { panic!("{error}") };
        assert_eq!(source.kind(), std::io::ErrorKind::FileTooLarge);
    }
}
