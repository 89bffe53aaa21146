//! Helpers of this crate's tests.

use std::path::{Path, PathBuf};

use crate::load::{DatasetFetcher, FetchError};
use crate::tokenizer::ModelTokenizer;

/// The folder with the small tokenizer and datasets, and what Python makes of them (`make.py`).
pub(crate) fn testdata() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata")
}

/// A byte-level BPE of 400 tokens with a chat template; `<s>` is put first.
pub(crate) fn tokenizer() -> ModelTokenizer {
    ModelTokenizer::from_dir(&testdata(), 400).expect("the test tokenizer loads")
}

/// The same without a chat template.
pub(crate) fn bare_tokenizer() -> ModelTokenizer {
    let dir = tempfile::tempdir().expect("temp dir");
    std::fs::copy(testdata().join("tokenizer.json"), dir.path().join("tokenizer.json")).expect("copy");
    ModelTokenizer::from_dir(dir.path(), 400).expect("the test tokenizer loads")
}

/// Data beside the repository that is not part of it; tests that read it skip where it is absent.
pub(crate) fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(path);
    if path.exists() {
        return Some(path);
    }
    skip(&path);
    None
}

#[allow(clippy::print_stderr)]
fn skip(path: &Path) {
    eprintln!("skipped: `{}` is not there", path.display());
}

/// A hub that answers every file with the same one, or with none.
pub(crate) struct FakeHub(pub(crate) Option<PathBuf>);

impl DatasetFetcher for FakeHub {
    fn fetch(&self, repo: &str, _revision: Option<&str>, file: &str) -> Result<PathBuf, FetchError> {
        self.0.clone().ok_or_else(|| FetchError::Offline(format!("{repo}/{file}")))
    }

    fn offline(&self) -> bool {
        self.0.is_none()
    }
}
