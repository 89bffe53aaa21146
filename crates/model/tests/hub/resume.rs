//! Downloads that stop half way: cut, resumed, stalled, stopped.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lite_model::hub::{HubError, HubErrorKind, HubProgress, Silent, fetch_model};

use crate::server::{Reply, Repository, sha256};
use crate::{Recorder, options};

const SHARD: &str = "model-00002-of-00002.safetensors";

#[test]
fn a_cut_download_goes_on_with_a_range() {
    let cache = tempfile::tempdir().unwrap();
    let repository = Repository::model(900_000);
    let size = repository.content(SHARD).len();
    let cut = size * 9 / 10;
    let hook = {
        let repository = repository.clone();
        move |seen: &crate::server::Seen| {
            (seen.method == "GET" && seen.path.ends_with(SHARD) && seen.nth == 0)
                .then(|| repository.answer(seen).cut(cut))
        }
    };
    let server = repository.serve(hook);
    let progress = Recorder::default();
    let folder = fetch_model("org/name", &options(&server, cache.path()), &progress).unwrap();
    let gets = server.gets(SHARD);
    assert_eq!(gets.len(), 2);
    assert_eq!(gets[0].header("range"), None);
    assert_eq!(gets[1].header("range"), Some(format!("bytes={cut}-").as_str()));
    assert!(fs::read(folder.join(SHARD)).unwrap() == repository.content(SHARD));
    assert_eq!(progress.retries.lock().unwrap().len(), 1);
}

#[test]
fn a_later_run_goes_on_where_an_earlier_one_stopped() {
    let cache = tempfile::tempdir().unwrap();
    let repository = Repository::model(300_000);
    let whole = repository.content(SHARD).to_vec();
    let blobs = cache.path().join("models--org--name/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(format!("{}.incomplete", sha256(&whole))), &whole[..1234]).unwrap();
    let server = repository.serve(|_| None);
    let folder = fetch_model("org/name", &options(&server, cache.path()), &Silent).unwrap();
    assert_eq!(server.gets(SHARD)[0].header("range"), Some("bytes=1234-"));
    assert!(fs::read(folder.join(SHARD)).unwrap() == whole);
}

#[test]
fn progress_renews_the_tries_and_standing_still_does_not() {
    // Nine pieces with three tries: each brings more than 1 MiB.
    let repository = Repository::model(15 << 20);
    let cache = tempfile::tempdir().unwrap();
    let server = repository.serve({
        let repository = repository.clone();
        move |seen| {
            let reply = repository.answer(seen);
            let piece = reply.body.len().min(1_200_000);
            seen.path.ends_with(SHARD).then(|| reply.cut(piece))
        }
    });
    let folder = fetch_model("org/name", &options(&server, cache.path()), &Silent).unwrap();
    assert!(fs::read(folder.join(SHARD)).unwrap() == repository.content(SHARD));
    assert_eq!(server.gets(SHARD).len(), (10usize << 20).div_ceil(1_200_000));

    // Always from the beginning, always cut before anything new: three tries, then the one that would succeed is late.
    let cache = tempfile::tempdir().unwrap();
    let server = repository.serve({
        let repository = repository.clone();
        move |seen| {
            let mut plain = seen.clone();
            plain.headers.clear();
            let reply = repository.answer(&plain);
            seen.path.ends_with(SHARD).then(|| match seen.nth {
                20.. => reply,
                n if n % 2 == 0 => reply.cut(2 << 20),
                _ => reply.cut(100),
            })
        }
    });
    let error = fetch_model("org/name", &options(&server, cache.path()), &Silent).unwrap_err();
    assert!(matches!(error, HubError::Network { .. }), "{error}");
    // The first try is progress, and so begins the count.
    assert_eq!(server.gets(SHARD).len(), 3);
}

#[test]
fn a_server_without_ranges_sends_everything_again() {
    let cache = tempfile::tempdir().unwrap();
    let repository = Repository::model(900_000);
    let server = repository.serve({
        let repository = repository.clone();
        move |seen| {
            let mut plain = seen.clone();
            plain.headers.clear();
            let reply = repository.answer(&plain);
            seen.path.ends_with(SHARD).then(|| if seen.nth == 0 { reply.cut(1000) } else { reply })
        }
    });
    let folder = fetch_model("org/name", &options(&server, cache.path()), &Silent).unwrap();
    assert_eq!(server.gets(SHARD)[1].header("range"), Some("bytes=1000-"));
    assert!(fs::read(folder.join(SHARD)).unwrap() == repository.content(SHARD));
}

#[test]
fn wrong_ranges_begin_again() {
    for (status, range) in [(206, "bytes 0-9/60000"), (206, "bytes 0-9/*"), (206, "nonsense"), (416, "bytes */10")] {
        let cache = tempfile::tempdir().unwrap();
        let repository = Repository::model(90_000);
        let server = repository.serve({
            let repository = repository.clone();
            move |seen| {
                (seen.path.ends_with(SHARD) && seen.nth < 2).then(|| match seen.nth {
                    0 => repository.answer(seen).cut(1000),
                    _ => Reply::new(status, vec![0; 10]).with("Content-Range", range),
                })
            }
        });
        let folder = fetch_model("org/name", &options(&server, cache.path()), &Silent).unwrap();
        assert!(fs::read(folder.join(SHARD)).unwrap() == repository.content(SHARD), "{status} {range}");
        assert_eq!(server.gets(SHARD)[2].header("range"), None);
    }
}

#[test]
fn a_silent_server_and_a_trickle_time_out() {
    let repository = Repository::model(90_000);
    let ms = Duration::from_millis;
    for path in ["/revision/main?blobs=true", SHARD] {
        for (delay, drip) in [(ms(400), Duration::ZERO), (Duration::ZERO, ms(5))] {
            let cache = tempfile::tempdir().unwrap();
            let server = repository.serve({
                let repository = repository.clone();
                move |seen| {
                    let reply = Reply { delay, drip, ..repository.answer(seen) };
                    seen.path.ends_with(path).then_some(reply)
                }
            });
            let mut options = options(&server, cache.path());
            options.timeouts.stall = ms(50);
            let error = fetch_model("org/name", &options, &Silent).unwrap_err();
            assert!(matches!(&error, HubError::Network { tries: 3, .. }), "{path}: {error}");
        }
    }
}

#[test]
fn a_download_stops_on_request() {
    struct Stop(AtomicBool);
    impl HubProgress for Stop {
        fn advanced(&self, file: &str, _: u64) {
            if file == SHARD {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        fn cancelled(&self) -> bool {
            self.0.load(Ordering::SeqCst)
        }
    }
    let cache = tempfile::tempdir().unwrap();
    let repository = Repository::model(6 << 20);
    let server = repository.serve(|_| None);
    let mut options = options(&server, cache.path());
    options.parallel = 1;
    let error = fetch_model("org/name", &options, &Stop(AtomicBool::new(false))).unwrap_err();
    assert_eq!(error.kind(), HubErrorKind::Cancelled);
    let partial = format!("{}.incomplete", sha256(repository.content(SHARD)));
    let kept = fs::metadata(cache.path().join("models--org--name/blobs").join(partial)).unwrap().len();
    assert!(kept > 0 && kept < 4 << 20, "{kept}");
    // And the next run goes on there.
    fetch_model("org/name", &options, &Silent).unwrap();
    assert_eq!(server.gets(SHARD)[1].from() as u64, kept);
}

#[test]
fn an_error_stops_the_other_downloads() {
    let cache = tempfile::tempdir().unwrap();
    let repository = Repository::model(90_000);
    let server = repository.serve({
        let repository = repository.clone();
        move |seen| {
            let mut reply = repository.answer(seen);
            if seen.path.ends_with(SHARD) {
                reply.body[0] ^= 1;
            } else if seen.path.ends_with(".safetensors") {
                // Half a minute.
                reply.drip = Duration::from_millis(1);
            }
            Some(reply)
        }
    });
    let start = Instant::now();
    let error = fetch_model("org/name", &options(&server, cache.path()), &Silent).unwrap_err();
    assert!(matches!(error, HubError::WrongHash { .. }), "{error}");
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
}
