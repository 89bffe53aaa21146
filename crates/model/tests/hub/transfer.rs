//! Bytes: complete, damaged, redirected.

use std::fs;
use std::path::Path;

use lite_model::hub::{HubError, HubErrorKind, RepoType, Silent, fetch_file, fetch_model, list_files};

use crate::server::{COMMIT, Reply, Repository, Server, blob_id, sha256};
use crate::{Recorder, files_below, options};

const SHARD: &str = "model-00002-of-00002.safetensors";

#[test]
fn a_model_is_downloaded_once() {
    let cache = tempfile::tempdir().unwrap();
    let repository = Repository::model(3 << 20);
    let server = repository.serve(|_| None);
    let options = options(&server, cache.path());
    let progress = Recorder::default();
    let folder = fetch_model("org/name", &options, &progress).unwrap();

    let wanted = [
        "README.md",
        "config.json",
        "model-00001-of-00002.safetensors",
        SHARD,
        "model.safetensors.index.json",
        "tokenizer.json",
    ];
    assert_eq!(folder, cache.path().join("models--org--name/snapshots").join(COMMIT));
    assert_eq!(files_below(&folder), wanted);
    for name in wanted {
        assert!(fs::read(folder.join(name)).unwrap() == repository.content(name), "{name}");
    }
    let bytes: usize = wanted.iter().map(|name| repository.content(name).len()).sum();
    assert_eq!(*progress.bytes.lock().unwrap(), bytes as u64);

    // The layout of huggingface_hub.
    let repo = cache.path().join("models--org--name");
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    let blob = sha256(repository.content(SHARD));
    assert_eq!(fs::read_link(folder.join(SHARD)).unwrap(), Path::new("../../blobs").join(&blob));
    let config = blob_id(repository.content("config.json"));
    assert_eq!(fs::read_link(folder.join("config.json")).unwrap(), Path::new("../../blobs").join(config));
    assert!(files_below(&repo.join("blobs")).iter().all(|name| !name.ends_with(".incomplete")));

    // Every file is asked for at the commit, so a branch that moves changes nothing.
    let gets = server.gets("");
    assert_eq!(gets.len(), wanted.len());
    assert!(gets.iter().all(|seen| seen.path.starts_with(&format!("/org/name/resolve/{COMMIT}/"))), "{gets:?}");

    let again = Recorder::default();
    assert_eq!(fetch_model("org/name", &options, &again).unwrap(), folder);
    assert_eq!(server.gets("").len(), wanted.len(), "nothing is downloaded twice");
    assert_eq!(again.cached.lock().unwrap().len(), wanted.len());
}

#[test]
fn a_dataset_file_is_downloaded_once() {
    let cache = tempfile::tempdir().unwrap();
    let repository = Repository::default().add_large("en/c4 train#1.json.gz", b"text");
    // The server sees the encoded name.
    let encoded = "/datasets/allenai/c4/resolve/main/en/c4%20train%231.json.gz";
    let server = repository.serve({
        let repository = repository.clone();
        move |seen| {
            let mut seen = seen.clone();
            seen.path = seen.path.replace("%20", " ").replace("%23", "#");
            Some(repository.answer(&seen))
        }
    });
    let options = options(&server, cache.path());
    let fetch = |revision: &str| {
        fetch_file("allenai/c4", RepoType::Dataset, revision, "en/c4 train#1.json.gz", &options, &Silent).unwrap()
    };
    let file = fetch("main");
    assert_eq!(fs::read(&file).unwrap(), b"text");
    let snapshot = cache.path().join("datasets--allenai--c4/snapshots").join(COMMIT);
    assert_eq!(file, snapshot.join("en/c4 train#1.json.gz"));
    assert!(fs::read_link(&file).unwrap().starts_with("../../../blobs"));
    let seen = server.seen();
    assert_eq!((seen[0].method.as_str(), seen[0].path.as_str()), ("HEAD", encoded));
    assert_eq!(seen[1].path, encoded.replace("main", COMMIT));

    assert_eq!(fetch("main"), file);
    assert_eq!(server.gets("").len(), 1, "asked for its commit, not downloaded again");
    let before = server.seen().len();
    assert_eq!(fetch(COMMIT), file);
    assert_eq!(server.seen().len(), before, "a commit never changes: no request at all");
}

#[test]
fn listing_has_sizes_and_hashes() {
    let cache = tempfile::tempdir().unwrap();
    let repository = Repository::model(300);
    let server = repository.serve(|_| None);
    let files = list_files("org/name", RepoType::Model, "v1/a", &options(&server, cache.path()), &Silent).unwrap();
    assert_eq!(files.len(), repository.files.len());
    let shard = files.iter().find(|file| file.path == SHARD).unwrap();
    assert_eq!(shard.size, Some(200));
    assert_eq!(shard.sha256.as_deref(), Some(sha256(repository.content(SHARD)).as_str()));
    assert_eq!(files.iter().find(|file| file.path == "config.json").unwrap().sha256, None);
    assert_eq!(server.seen()[0].path, "/api/models/org/name/revision/v1%2Fa?blobs=true");
}

#[test]
fn a_wrong_hash_is_named_and_nothing_is_kept() {
    let cache = tempfile::tempdir().unwrap();
    let repository = Repository::model(90_000);
    let server = repository.serve({
        let repository = repository.clone();
        move |seen| {
            let mut reply = repository.answer(seen);
            seen.path.ends_with(SHARD).then(|| {
                reply.body[17] ^= 1;
                reply
            })
        }
    });
    let error = fetch_model("org/name", &options(&server, cache.path()), &Silent).unwrap_err();
    assert_eq!(error.kind(), HubErrorKind::Input);
    assert!(matches!(&error, HubError::WrongHash { file, .. } if file == SHARD), "{error}");
    let hash = sha256(repository.content(SHARD));
    assert!(error.to_string().contains(&hash) && error.to_string().contains(SHARD), "{error}");
    assert_eq!(server.gets(SHARD).len(), 1);
    let repo = cache.path().join("models--org--name");
    assert!(!files_below(&repo).iter().any(|name| name.contains(&hash) || name.ends_with(SHARD)));
    assert!(!repo.join("refs/main").exists(), "an incomplete snapshot is not the branch");
}

#[test]
fn a_wrong_size_is_named_and_nothing_is_kept() {
    for extra in [-1i64, 1] {
        let cache = tempfile::tempdir().unwrap();
        let repository = Repository::model(90_000);
        let server = repository.serve({
            let repository = repository.clone();
            move |seen| {
                let mut reply = repository.answer(seen);
                let size = reply.body.len().saturating_add_signed(extra as isize);
                reply.body.resize(size, 0);
                seen.path.ends_with(SHARD).then_some(reply)
            }
        });
        let error = fetch_model("org/name", &options(&server, cache.path()), &Silent).unwrap_err();
        let wanted = repository.content(SHARD).len() as u64;
        assert!(
            matches!(&error, HubError::WrongSize { file, found, wanted: w, .. }
                if file == SHARD && *w == wanted && *found == wanted.saturating_add_signed(extra)),
            "{error}"
        );
        let hash = sha256(repository.content(SHARD));
        assert!(!files_below(cache.path()).iter().any(|name| name.contains(&format!("blobs/{hash}"))));
    }
}

#[test]
fn a_body_without_a_length_is_stopped_at_the_announced_size() {
    for (name, fails) in [("config.json", true), ("tokenizer.json", false)] {
        let cache = tempfile::tempdir().unwrap();
        let repository = Repository::model(90_000);
        let server = repository.serve({
            let repository = repository.clone();
            move |seen| {
                let mut reply = repository.answer(seen);
                reply.no_length = true;
                if fails {
                    reply.body.resize(8 << 20, b' ');
                }
                (seen.method == "GET" && seen.path.ends_with(name)).then_some(reply)
            }
        });
        match fetch_model("org/name", &options(&server, cache.path()), &Silent) {
            Ok(_) => assert!(!fails),
            Err(error) => assert!(fails && matches!(error, HubError::WrongSize { .. }), "{error}"),
        }
    }
}

#[test]
fn a_damaged_cache_is_repaired() {
    let cache = tempfile::tempdir().unwrap();
    let repository = Repository::model(90_000);
    let server = repository.serve(|_| None);
    let options = options(&server, cache.path());
    let folder = fetch_model("org/name", &options, &Silent).unwrap();
    // A blob cut short, as a full disk leaves it, and a link to nowhere.
    fs::write(folder.join(SHARD), b"short").unwrap();
    let config = fs::canonicalize(folder.join("config.json")).unwrap();
    fs::remove_file(config).unwrap();
    fetch_model("org/name", &options, &Silent).unwrap();
    for name in [SHARD, "config.json"] {
        assert!(fs::read(folder.join(name)).unwrap() == repository.content(name), "{name}");
        assert_eq!(server.gets(name).len(), 2);
    }
    assert_eq!(server.gets("tokenizer.json").len(), 1);
}

#[test]
fn a_storage_host_gets_no_token() {
    let cache = tempfile::tempdir().unwrap();
    let repository = Repository::model(90_000);
    let storage = repository.serve({
        let repository = repository.clone();
        move |seen| {
            let mut seen = seen.clone();
            seen.path = format!("/org/name/resolve/{COMMIT}/{SHARD}");
            // The first signed link has expired.
            Some(if seen.nth == 0 { Reply::new(403, "expired") } else { repository.answer(&seen) })
        }
    });
    let location = format!("{}/signed?X-Signature=abc", storage.url());
    let hub = repository.serve({
        let location = location.clone();
        move |seen| seen.path.ends_with(SHARD).then(|| Reply::new(302, "").with("Location", location.clone()))
    });
    let mut options = options(&hub, cache.path());
    options.token = crate::token("hf_secret");
    let progress = Recorder::default();
    let folder = fetch_model("org/name", &options, &progress).unwrap();
    assert!(fs::read(folder.join(SHARD)).unwrap() == repository.content(SHARD));

    assert!(hub.seen().iter().all(|seen| seen.header("authorization") == Some("Bearer hf_secret")));
    let at_storage = storage.seen();
    assert_eq!(at_storage.len(), 2);
    for seen in at_storage {
        assert_eq!(seen.path, "/signed?X-Signature=abc");
        assert!(!seen.headers.iter().any(|(_, value)| value.contains("hf_secret")), "{seen:?}");
        assert_eq!(seen.header("authorization"), None);
    }
    let retries = progress.retries.lock().unwrap();
    assert!(retries.iter().all(|(reason, _)| !reason.contains("Signature")), "{retries:?}");
}

#[test]
fn a_renamed_repository_is_followed_with_the_token() {
    let cache = tempfile::tempdir().unwrap();
    let repository = Repository::default().add_large("a.txt", b"text");
    let server: Server = repository.serve(|seen| {
        let renamed = seen.path.replace("/old/", "/new/");
        (renamed != seen.path).then(|| Reply::new(307, "").with("Location", renamed))
    });
    let mut options = options(&server, cache.path());
    options.token = crate::token("hf_secret");
    let file = fetch_file("old/name", RepoType::Dataset, "main", "a.txt", &options, &Silent).unwrap();
    assert_eq!(fs::read(file).unwrap(), b"text");
    assert!(server.seen().iter().all(|seen| seen.header("authorization").is_some()));
}

#[test]
fn a_large_file_is_described_by_the_hub_and_sent_by_a_storage_host() {
    let repository = Repository::default().add_large("a.parquet", b"columns");
    let content = repository.content("a.parquet").to_vec();
    let storage = Server::start(move |_| Reply::new(200, content.clone()).with("ETag", "\"another\""));
    let location = format!("{}/signed", storage.url());
    for linked_size in [true, false] {
        let hash = sha256(b"columns");
        let location = location.clone();
        let hub = Server::start(move |_| {
            // The length is that of the redirect.
            let reply = Reply::new(302, "Found")
                .with("Location", location.clone())
                .with("X-Repo-Commit", COMMIT)
                .with("X-Linked-Etag", format!("\"{hash}\""));
            if linked_size { reply.with("X-Linked-Size", "7") } else { reply }
        });
        let cache = tempfile::tempdir().unwrap();
        let options = options(&hub, cache.path());
        match fetch_file("o/d", RepoType::Dataset, "main", "a.parquet", &options, &Silent) {
            Ok(file) => {
                assert!(linked_size);
                assert_eq!(fs::read(&file).unwrap(), b"columns");
                assert!(fs::read_link(&file).unwrap().ends_with(sha256(b"columns")));
            }
            Err(error) => assert!(!linked_size && matches!(error, HubError::NotAHub { .. }), "{error}"),
        }
        assert_eq!(storage.seen().len(), 1, "only the content is asked for there");
        assert_eq!(storage.seen()[0].method, "GET");
    }
}

#[test]
fn two_at_once_download_every_file_once() {
    let cache = tempfile::tempdir().unwrap();
    let repository = Repository::model(2 << 20);
    let server = repository.serve(|_| None);
    let options = options(&server, cache.path());
    let folders: Vec<_> = std::thread::scope(|scope| {
        let runs: Vec<_> =
            (0..2).map(|_| scope.spawn(|| fetch_model("org/name", &options, &Silent).unwrap())).collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect()
    });
    assert_eq!(folders[0], folders[1]);
    assert_eq!(server.gets("").len(), 6);
    assert!(fs::read(folders[0].join(SHARD)).unwrap() == repository.content(SHARD));
}
