//! The hub client against a hub on the loopback interface.

mod access;
mod offline;
mod resume;
mod server;
mod transfer;

use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use lite_model::hub::{HubOptions, HubProgress, RetryPolicy, Timeouts, Token};

use crate::server::Server;

/// Options that try three times without noticeable waits.
fn options(server: &Server, cache: &Path) -> HubOptions {
    let mut options = HubOptions::new(cache);
    options.endpoint = server.url();
    options.retry = RetryPolicy {
        tries: 3,
        base_delay: Duration::from_millis(1),
        max_delay: Duration::from_millis(2),
        max_server_delay: Duration::from_millis(20),
    };
    options.timeouts =
        Timeouts { connect: Duration::from_secs(5), response: Duration::from_secs(5), stall: Duration::from_secs(5) };
    options
}

fn token(text: &str) -> Option<Token> {
    Token::new(text).unwrap()
}

/// Remembers what it is told.
#[derive(Default)]
struct Recorder {
    retries: Mutex<Vec<(String, Duration)>>,
    warnings: Mutex<Vec<String>>,
    cached: Mutex<Vec<String>>,
    bytes: Mutex<u64>,
}

impl HubProgress for Recorder {
    fn cached(&self, file: &str, _: u64) {
        self.cached.lock().unwrap().push(file.to_owned());
    }
    fn advanced(&self, _: &str, bytes: u64) {
        *self.bytes.lock().unwrap() += bytes;
    }
    fn retrying(&self, reason: &str, delay: Duration) {
        self.retries.lock().unwrap().push((reason.to_owned(), delay));
    }
    fn warning(&self, message: &str) {
        self.warnings.lock().unwrap().push(message.to_owned());
    }
}

/// Every file below `folder`, as relative names, sorted.
fn files_below(folder: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                names.push(path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    names.sort();
    names
}
