//! Refusals, failures, and answers that are not those of a hub.

use std::time::Duration;

use lite_model::hub::{
    HubError, HubErrorKind, HubProgress, ModelSource, RepoType, Silent, fetch_file, fetch_model, list_repo,
    model_source,
};

use crate::server::{COMMIT, Reply, Repository, Server};
use crate::{Recorder, files_below, options, token};

fn model_error(server: &Server, secret: Option<&str>, progress: &dyn HubProgress) -> HubError {
    let cache = tempfile::tempdir().unwrap();
    let mut options = options(server, cache.path());
    options.token = secret.and_then(token);
    let error = fetch_model("org/name", &options, progress).unwrap_err();
    assert!(!format!("{error} {error:?} {options:?}").contains("hf_secret"), "{error:?}");
    error
}

#[test]
fn refusals_say_whether_a_token_was_sent() {
    for status in [401, 403] {
        let server = Server::start(move |_| Reply::new(status, "no"));
        let error = model_error(&server, None, &Silent);
        assert_eq!(error.kind(), HubErrorKind::Auth);
        let text = error.to_string();
        for word in ["org/name", "no token was sent", "HF_TOKEN", &status.to_string()] {
            assert!(text.contains(word), "{text}");
        }
        let text = model_error(&server, Some("hf_secret"), &Silent).to_string();
        assert!(text.contains("a token was sent") && !text.contains("no token"), "{text}");
        assert_eq!(server.seen().len(), 2, "refusals are not tried again");
        assert_eq!(server.seen()[1].header("authorization"), Some("Bearer hf_secret"));
    }
}

#[test]
fn gated_repositories_say_what_to_do() {
    // A server that repeats what it was sent.
    let server = Server::start(|seen| {
        let sent = seen.header("authorization").unwrap_or("nothing");
        Reply::new(403, "").with("X-Error-Code", "GatedRepo").with("X-Error-Message", format!("restricted, got {sent}"))
    });
    let error = model_error(&server, Some("hf_secret"), &Silent);
    assert!(matches!(&error, HubError::Denied { gated: true, .. }));
    assert!(error.to_string().contains("restricted, got Bearer ***"), "{error}");
    assert!(error.to_string().contains("accept the terms on the page of `org/name`"), "{error}");
    assert!(model_error(&server, None, &Silent).to_string().contains("then set `HF_TOKEN`"));
}

#[test]
fn what_does_not_exist_is_named() {
    for (code, what) in
        [("RepoNotFound", "repository"), ("RevisionNotFound", "revision"), ("", "repository or revision")]
    {
        let server = Server::start(move |_| Reply::new(404, "").with("X-Error-Code", code));
        let error = model_error(&server, None, &Silent);
        assert_eq!(error.kind(), HubErrorKind::NotFound);
        let text = error.to_string();
        assert!(text.starts_with(&format!("no such {what} on the hub: `org/name` at `main`")), "{text}");
        assert!(text.contains("spelling") && text.contains("HF_TOKEN"), "{text}");
    }
    let server = Repository::default().serve(|_| None);
    let cache = tempfile::tempdir().unwrap();
    let options = options(&server, cache.path());
    let error = fetch_file("o/d", RepoType::Dataset, "v2", "a/b.txt", &options, &Silent).unwrap_err();
    assert!(error.to_string().contains("no such file on the hub: `a/b.txt` in `o/d` at `v2`"), "{error}");
}

#[test]
fn too_many_requests_are_waited_for() {
    let headers = [("Retry-After", "3600"), ("RateLimit", "\"api\";r=0;t=55"), ("Retry-After", "0"), ("X", "y")];
    let cap = Duration::from_millis(20);
    let waits = [cap, cap, Duration::ZERO, Duration::from_millis(1)];
    for ((name, value), wait) in headers.into_iter().zip(waits) {
        let repository = Repository::model(300);
        let server = repository.serve(move |seen| {
            (seen.nth == 0 && seen.path.ends_with("config.json")).then(|| Reply::new(429, "").with(name, value))
        });
        let cache = tempfile::tempdir().unwrap();
        let progress = Recorder::default();
        fetch_model("org/name", &options(&server, cache.path()), &progress).unwrap();
        let retries = progress.retries.lock().unwrap();
        assert_eq!(retries.len(), 1, "{retries:?}");
        assert!(retries[0].0.contains("429"), "{retries:?}");
        assert_eq!(retries[0].1, wait, "{name}: {value}");
    }
}

#[test]
fn server_errors_are_tried_a_few_times() {
    for status in [500, 502, 503, 504, 408] {
        let server = Server::start(move |_| Reply::new(status, ""));
        let progress = Recorder::default();
        let error = model_error(&server, Some("hf_secret"), &progress);
        assert_eq!(error.kind(), HubErrorKind::Network);
        assert!(matches!(error, HubError::Network { tries: 3, .. }), "{error}");
        assert!(error.to_string().contains(&format!("HTTP {status}")), "{error}");
        assert_eq!(server.seen().len(), 3);
        let delays: Vec<u128> = progress.retries.lock().unwrap().iter().map(|(_, delay)| delay.as_millis()).collect();
        assert_eq!(delays, [1, 2]);
    }
    let server = Server::start(|_| Reply::new(418, ""));
    assert!(matches!(model_error(&server, None, &Silent), HubError::Status { status: 418, .. }));
    assert_eq!(server.seen().len(), 1);
}

#[test]
fn an_address_where_nobody_listens() {
    let server = Server::start(|_| Reply::new(200, ""));
    let cache = tempfile::tempdir().unwrap();
    let options = options(&server, cache.path());
    drop(server);
    let error = fetch_model("org/name", &options, &Silent).unwrap_err();
    assert!(matches!(error, HubError::Network { tries: 3, .. }), "{error}");
    assert!(error.to_string().contains("HF_HUB_OFFLINE=1"), "{error}");
}

#[test]
fn login_pages_are_recognised() {
    let page = "<!DOCTYPE html><html><title>Wi-Fi login</title></html>";
    let html = move |_: &crate::server::Seen| Reply::new(200, page).with("Content-Type", "text/html; charset=utf-8");
    // As a page, as a page that calls itself JSON, and behind a redirect to another host.
    let portal = Server::start(html);
    let location = format!("{}/login", portal.url());
    let servers = [
        Server::start(html),
        Server::start(move |_| Reply::new(200, page).with("Content-Type", "application/json")),
        Server::start(move |_| Reply::new(302, "").with("Location", location.clone())),
    ];
    for server in &servers {
        let error = model_error(server, Some("hf_secret"), &Silent);
        assert!(matches!(error, HubError::NotAHub { .. }), "{error}");
        assert!(error.to_string().contains("HTML") && error.to_string().contains("login page"), "{error}");
        assert_eq!(server.seen().len(), 1);
        let cache = tempfile::tempdir().unwrap();
        let options = options(server, cache.path());
        let error = fetch_file("o/d", RepoType::Dataset, "main", "a.txt", &options, &Silent).unwrap_err();
        assert!(matches!(error, HubError::NotAHub { .. }), "{error}");
    }
    assert!(portal.seen().iter().all(|seen| seen.header("authorization").is_none()));

    // Only the download meets it: of the same length as the file, so that only its type gives it away.
    let repository = Repository::model(300);
    let server = repository.serve(move |seen| {
        let size = 22;
        (seen.method == "GET" && seen.path.ends_with("config.json"))
            .then(|| Reply::new(200, &page.as_bytes()[..size]).with("Content-Type", "text/html"))
    });
    assert!(matches!(model_error(&server, None, &Silent), HubError::NotAHub { .. }));
}

#[test]
fn answers_of_the_wrong_shape() {
    let commit = |sha: &str| format!(r#"{{"sha":"{sha}","siblings":[]}}"#);
    let hash = format!(r#"{{"sha":"{COMMIT}","siblings":[{{"rfilename":"a","lfs":{{"sha256":"../../x"}}}}]}}"#);
    let twice = format!(r#"{{"sha":"{COMMIT}","siblings":[{{"rfilename":"a"}},{{"rfilename":"a"}}]}}"#);
    let answers = [
        "".to_owned(),
        "[]".to_owned(),
        "{}".to_owned(),
        "null".to_owned(),
        r#"{"sha":1}"#.to_owned(),
        commit("main"),
        commit("../../../etc"),
        commit(&COMMIT.to_uppercase()),
        hash,
        twice,
        "[".repeat(100_000),
    ];
    for answer in answers {
        let server = Server::start({
            let answer = answer.clone();
            move |_| Reply::new(200, answer.clone())
        });
        let error = model_error(&server, None, &Silent);
        assert!(matches!(error, HubError::NotAHub { .. }), "{answer:.80}: {error}");
    }
    // Asked for one commit, answered with another.
    let server = Repository::model(300).serve(|_| None);
    let cache = tempfile::tempdir().unwrap();
    let mut options = options(&server, cache.path());
    options.revision = Some("f".repeat(40));
    let error = fetch_model("org/name", &options, &Silent).unwrap_err();
    assert!(error.to_string().contains(COMMIT), "{error}");
}

#[test]
fn file_headers_of_the_wrong_shape() {
    let good = |_: &crate::server::Seen| {
        Reply::new(200, "text").with("X-Repo-Commit", COMMIT).with("ETag", "\"abc\"").with("X-Linked-Size", "4")
    };
    let cases = [
        ("X-Repo-Commit", "../../.."),
        ("ETag", "\"../../../evil\""),
        ("X-Linked-Etag", "\"/etc/passwd\""),
        ("ETag", ""),
        ("X-Linked-Size", "many"),
        ("X-Linked-Size", "-1"),
    ];
    for (name, value) in cases {
        let server = Server::start(move |seen| good(seen).with(name, value));
        let cache = tempfile::tempdir().unwrap();
        let options = options(&server, cache.path());
        let error = fetch_file("o/d", RepoType::Dataset, "main", "a.txt", &options, &Silent).unwrap_err();
        assert!(matches!(error, HubError::NotAHub { .. }), "{name}: {value}: {error}");
        assert_eq!(files_below(cache.path()), Vec::<String>::new());
    }
    let server = Server::start(good);
    let cache = tempfile::tempdir().unwrap();
    let options = options(&server, cache.path());
    fetch_file("o/d", RepoType::Dataset, "main", "a.txt", &options, &Silent).unwrap();
}

#[test]
fn names_that_leave_the_folder_are_refused() {
    let names =
        ["../../evil.json", "/tmp/evil.json", "a\\..\\evil.json", "evil\0.json", "a/../../evil.json", "C:\\evil.json"];
    for name in names {
        let server = Repository::model(300).add(name, "{}").serve(|_| None);
        let outside = tempfile::tempdir().unwrap();
        let cache = outside.path().join("cache");
        let error = fetch_model("org/name", &options(&server, &cache), &Silent).unwrap_err();
        assert!(matches!(&error, HubError::BadName { name: found, .. } if found == name), "{name}: {error}");
        assert_eq!(error.kind(), HubErrorKind::Input);
        assert_eq!(files_below(outside.path()), Vec::<String>::new());
        assert_eq!(server.gets("").len(), 0);
    }
    // The same in an index, which is a file like any other.
    let index = r#"{"weight_map":{"a":"../../../../evil.safetensors"}}"#;
    let server = Repository::model(300).add("model.safetensors.index.json", index).serve(|_| None);
    let cache = tempfile::tempdir().unwrap();
    let error = fetch_model("org/name", &options(&server, cache.path()), &Silent).unwrap_err();
    assert!(matches!(error, HubError::BadName { .. }), "{error}");
    assert_eq!(server.gets(".safetensors").len(), 0);
}

#[test]
fn names_given_by_the_user_are_checked_before_any_request() {
    let server = Repository::model(300).serve(|_| None);
    let cache = tempfile::tempdir().unwrap();
    let mut options = options(&server, cache.path());
    let file = |id: &str, revision: &str, path: &str| {
        fetch_file(id, RepoType::Dataset, revision, path, &options, &Silent).unwrap_err()
    };
    assert!(matches!(file("../x", "main", "a"), HubError::BadId { .. }));
    assert!(matches!(file("o/d", "../..", "a"), HubError::BadRevision { .. }));
    assert!(matches!(file("o/d", "main", "../a"), HubError::BadName { .. }));
    assert!(matches!(list_repo("a/b/c", RepoType::Model, "main", &options, &Silent), Err(HubError::BadId { .. })));
    assert!(matches!(fetch_model("a--b/c", &options, &Silent), Err(HubError::BadId { .. })));
    options.revision = Some("a/../../b".to_owned());
    assert!(matches!(fetch_model("o/r", &options, &Silent), Err(HubError::BadRevision { .. })));
    options.revision = None;
    options.endpoint = "https://user:hf_secret@example.invalid".to_owned();
    let error = fetch_model("o/r", &options, &Silent).unwrap_err();
    assert!(!error.to_string().contains("hf_secret"), "{error}");
    assert_eq!(server.seen().len(), 0);
}

#[test]
fn certificates_must_be_certificates() {
    let server = Repository::model(300).serve(|_| None);
    let cache = tempfile::tempdir().unwrap();
    let mut options = options(&server, cache.path());
    let file = cache.path().join("ca.pem");
    for content in ["", "no certificate", "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"] {
        std::fs::write(&file, content).unwrap();
        options.ca_bundle = Some(file.clone());
        let error = fetch_model("org/name", &options, &Silent).unwrap_err();
        assert!(error.to_string().contains("SSL_CERT_FILE"), "{content:?}: {error}");
    }
    options.ca_bundle = Some(cache.path().join("absent.pem"));
    assert_eq!(fetch_model("org/name", &options, &Silent).unwrap_err().kind(), HubErrorKind::Io);
}

#[test]
fn repositories_without_weights_are_refused_before_any_download() {
    let server = Repository::default().add("config.json", "{}").add("pytorch_model.bin", "").serve(|_| None);
    let error = model_error(&server, None, &Silent);
    assert!(matches!(error, HubError::NoModel { .. }), "{error}");
    assert!(error.to_string().contains("pytorch_model.bin"), "{error}");
    assert_eq!(server.gets("").len(), 0);
}

#[test]
fn a_local_path_goes_first() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    assert_eq!(model_source(path).unwrap(), ModelSource::Local(path.into()));
    // A relative path of the form of an id: `tests/hub` exists beside the manifest, where tests run.
    assert_eq!(model_source("tests/hub").unwrap(), ModelSource::Local("tests/hub".into()));
    assert_eq!(model_source("tests/no-such").unwrap(), ModelSource::Hub("tests/no-such".to_owned()));
    for neither in ["", "gpt2", "./no-such", "/no/such/folder", "a/b/c"] {
        let error = model_source(neither).unwrap_err();
        assert!(matches!(error, HubError::NotAModel { .. }), "{neither}");
    }
}
