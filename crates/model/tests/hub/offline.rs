//! The cache alone: empty, partial, complete, ours and that of `huggingface_hub`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use lite_model::hub::{HubError, HubErrorKind, HubOptions, RepoType, Silent, fetch_file, fetch_model, list_repo};

use crate::server::{COMMIT, Reply, Repository};
use crate::{Recorder, options};

const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

/// Options with an endpoint that would fail loudly.
fn offline(cache: &Path) -> HubOptions {
    let mut options = HubOptions::new(cache);
    options.endpoint = "http://127.0.0.1:9".to_owned();
    options.offline = true;
    options
}

fn missing(cache: &Path) -> Vec<String> {
    match fetch_model("org/name", &offline(cache), &Silent) {
        Err(error @ HubError::Offline { .. }) => {
            assert_eq!(error.kind(), HubErrorKind::Offline);
            let text = error.to_string();
            let HubError::Offline { missing, .. } = error else { unreachable!() };
            assert!(missing.iter().all(|name| text.contains(&format!("`{name}`"))), "{text}");
            assert!(text.contains("HF_HUB_OFFLINE") && text.contains("org/name"), "{text}");
            missing
        }
        other => panic!("{other:?}"),
    }
}

/// Lays a file into the cache the way `huggingface_hub` does.
fn place(cache: &Path, name: &str, content: &[u8]) {
    let repo = cache.join("models--org--name");
    let (blobs, snapshot) = (repo.join("blobs"), repo.join("snapshots").join(COMMIT));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    let blob = format!("blob-of-{name}");
    fs::write(blobs.join(&blob), content).unwrap();
    symlink(Path::new("../../blobs").join(&blob), snapshot.join(name)).unwrap();
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::write(repo.join("refs/main"), COMMIT).unwrap();
}

#[test]
fn an_empty_cache() {
    let cache = tempfile::tempdir().unwrap();
    assert_eq!(missing(cache.path()), ["config.json", "*.safetensors"]);
    let error = fetch_file("o/d", RepoType::Dataset, "main", "a.txt", &offline(cache.path()), &Silent).unwrap_err();
    assert!(matches!(&error, HubError::Offline { missing, .. } if missing == &["a.txt"]), "{error}");
    let error = list_repo("o/d", RepoType::Dataset, "main", &offline(cache.path()), &Silent).unwrap_err();
    assert_eq!(error.kind(), HubErrorKind::Offline);
}

#[test]
fn a_complete_cache_of_ours() {
    let cache = tempfile::tempdir().unwrap();
    let repository = Repository::model(3000);
    let server = repository.serve(|_| None);
    let online = options(&server, cache.path());
    let folder = fetch_model("org/name", &online, &Silent).unwrap();
    assert_eq!(fetch_model("org/name", &offline(cache.path()), &Silent).unwrap(), folder);
    // By its commit too, and the list of files is remembered with sizes and hashes.
    let mut by_commit = offline(cache.path());
    by_commit.revision = Some(COMMIT.to_owned());
    assert_eq!(fetch_model("org/name", &by_commit, &Silent).unwrap(), folder);
    let remembered = list_repo("org/name", RepoType::Model, "main", &offline(cache.path()), &Silent).unwrap();
    assert_eq!(remembered, list_repo("org/name", RepoType::Model, "main", &online, &Silent).unwrap());
    // `--download-dir` is another cache.
    let other = tempfile::tempdir().unwrap();
    let mut options = offline(cache.path());
    options.download_dir = Some(other.path().to_path_buf());
    assert!(fetch_model("org/name", &options, &Silent).is_err());
    options.cache_dir = other.path().to_path_buf();
    options.download_dir = Some(cache.path().to_path_buf());
    assert_eq!(fetch_model("org/name", &options, &Silent).unwrap(), folder);
}

#[test]
fn a_partial_cache_of_ours_lists_what_is_missing() {
    let cache = tempfile::tempdir().unwrap();
    let server = Repository::model(3000).serve(|_| None);
    let folder = fetch_model("org/name", &options(&server, cache.path()), &Silent).unwrap();
    fs::remove_file(folder.join(SHARDS[1])).unwrap();
    fs::remove_file(folder.join("tokenizer.json")).unwrap();
    assert_eq!(missing(cache.path()), ["tokenizer.json", SHARDS[1]]);
    // Cut short is missing too: the size is known.
    fs::write(folder.join(SHARDS[0]), b"short").unwrap();
    assert_eq!(missing(cache.path()), ["tokenizer.json", SHARDS[0], SHARDS[1]]);
    fs::remove_file(folder.join("model.safetensors.index.json")).unwrap();
    assert_eq!(missing(cache.path())[..2], ["model.safetensors.index.json", "tokenizer.json"]);
}

#[test]
fn an_interrupted_download_is_not_the_branch() {
    let cache = tempfile::tempdir().unwrap();
    let server = Repository::model(3000).serve(|seen| seen.path.ends_with(SHARDS[1]).then(|| Reply::new(500, "")));
    fetch_model("org/name", &options(&server, cache.path()), &Silent).unwrap_err();
    assert_eq!(missing(cache.path()), ["config.json", "*.safetensors"]);
}

#[test]
fn a_cache_of_huggingface_hub() {
    let cache = tempfile::tempdir().unwrap();
    let index = format!(r#"{{"weight_map":{{"a":"{}","b":"{}"}}}}"#, SHARDS[0], SHARDS[1]);
    place(cache.path(), "tokenizer.json", b"{}");
    assert_eq!(missing(cache.path()), ["config.json", "*.safetensors"]);
    place(cache.path(), "config.json", b"{}");
    assert_eq!(missing(cache.path()), ["*.safetensors"]);
    place(cache.path(), SHARDS[0], b"weights");
    place(cache.path(), "model.safetensors.index.json", index.as_bytes());
    assert_eq!(missing(cache.path()), [SHARDS[1]]);
    place(cache.path(), SHARDS[1], b"weights");
    let folder = fetch_model("org/name", &offline(cache.path()), &Silent).unwrap();
    assert!(folder.ends_with(Path::new("snapshots").join(COMMIT)));
    let file = fetch_file("org/name", RepoType::Model, "main", "config.json", &offline(cache.path()), &Silent).unwrap();
    assert_eq!(file, folder.join("config.json"));
}

#[test]
fn files_of_huggingface_hub_are_not_downloaded_again() {
    let cache = tempfile::tempdir().unwrap();
    let repository = Repository::model(3000);
    for name in ["config.json", SHARDS[0]] {
        place(cache.path(), name, repository.content(name));
    }
    let server = repository.serve(|_| None);
    fetch_model("org/name", &options(&server, cache.path()), &Silent).unwrap();
    assert_eq!(server.gets("config.json").len() + server.gets(SHARDS[0]).len(), 0);
    assert_eq!(server.gets(SHARDS[1]).len(), 1);
}

#[test]
fn a_missing_licence_is_a_warning() {
    let cache = tempfile::tempdir().unwrap();
    let server = Repository::model(3000).serve(|_| None);
    let folder = fetch_model("org/name", &options(&server, cache.path()), &Silent).unwrap();
    fs::remove_file(folder.join("README.md")).unwrap();
    let progress = Recorder::default();
    assert_eq!(fetch_model("org/name", &offline(cache.path()), &progress).unwrap(), folder);
    assert!(progress.warnings.lock().unwrap()[0].contains("README.md"));
}

#[test]
fn an_unreachable_hub_falls_back_on_a_complete_cache_with_a_warning() {
    let cache = tempfile::tempdir().unwrap();
    let server = Repository::model(3000).add("a.txt", "text").serve(|_| None);
    let folder = fetch_model("org/name", &options(&server, cache.path()), &Silent).unwrap();
    drop(server);
    let down = crate::server::Server::start(|_| Reply::new(503, ""));
    let options = options(&down, cache.path());
    let progress = Recorder::default();
    assert_eq!(fetch_model("org/name", &options, &progress).unwrap(), folder);
    let file = fetch_file("org/name", RepoType::Model, "main", "a.txt", &options, &progress).unwrap();
    assert_eq!(fs::read(file).unwrap(), b"text");
    let warnings = progress.warnings.lock().unwrap();
    assert_eq!(warnings.len(), 2);
    assert!(warnings.iter().all(|text| text.contains("503") && text.contains("using what was downloaded")));
    // An incomplete one is no replacement: the network's error stays.
    fs::remove_file(folder.join(SHARDS[0])).unwrap();
    let error = fetch_model("org/name", &options, &Silent).unwrap_err();
    assert!(matches!(error, HubError::Network { .. }), "{error}");
}

#[test]
fn hostile_cache_files_are_ignored_or_refused() {
    let cache = tempfile::tempdir().unwrap();
    place(cache.path(), "config.json", b"{}");
    place(cache.path(), "model.safetensors", b"weights");
    let repo = cache.path().join("models--org--name");
    fs::create_dir_all(repo.join("trees")).unwrap();
    for tree in [
        "",
        "{",
        "[]",
        r#"{"format_version":9,"files":{}}"#,
        r#"{"format_version":1,"files":{"../x":{"size":1,"blob_id":"a"}}}"#,
    ] {
        fs::write(repo.join("trees").join(format!("{COMMIT}.json")), tree).unwrap();
        fetch_model("org/name", &offline(cache.path()), &Silent).unwrap();
    }
    for branch in ["", "../../..", "main", "0123"] {
        fs::write(repo.join("refs/main"), branch).unwrap();
        assert_eq!(missing(cache.path()), ["config.json", "*.safetensors"]);
    }
}
