//! A hub on the loopback interface: one repository, one commit, and a hook through which a test misbehaves.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use sha2::{Digest, Sha256};

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A request as the server saw it.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: Vec<(String, String)>,
    /// How many requests with this method and path came before.
    pub(crate) nth: usize,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// First byte of `Range: bytes=N-`.
    pub(crate) fn from(&self) -> usize {
        self.header("range")
            .map_or(0, |range| range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse().unwrap())
    }
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// Close the connection after this many bytes of the body.
    pub(crate) cut: Option<usize>,
    /// Wait before the body.
    pub(crate) delay: Duration,
    /// Wait after each byte of the body.
    pub(crate) drip: Duration,
    /// Announce no length: the body ends where the connection does.
    pub(crate) no_length: bool,
}

impl Reply {
    pub(crate) fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, body: body.into(), ..Self::default() }
    }

    pub(crate) fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.retain(|(key, _)| !key.eq_ignore_ascii_case(name));
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub(crate) fn cut(mut self, bytes: usize) -> Self {
        self.cut = Some(bytes);
        self
    }
}

type Handler = dyn Fn(&Seen) -> Reply + Send + Sync;

pub(crate) struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let handler: Arc<Handler> = Arc::new(handler);
        let thread = thread::spawn({
            let (seen, stop) = (Arc::clone(&seen), Arc::clone(&stop));
            move || {
                for stream in listener.incoming() {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let (seen, handler) = (Arc::clone(&seen), Arc::clone(&handler));
                    thread::spawn(move || serve(stream.unwrap(), &seen, &*handler));
                }
            }
        });
        Self { address, seen, stop, thread: Some(thread) }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// Requests for the content of files, with this end of the path.
    pub(crate) fn gets(&self, end: &str) -> Vec<Seen> {
        let wanted = |seen: &Seen| seen.method == "GET" && seen.path.contains("/resolve/") && seen.path.ends_with(end);
        self.seen().into_iter().filter(wanted).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread from `accept`.
        drop(TcpStream::connect(self.address));
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn serve(stream: TcpStream, log: &Mutex<Vec<Seen>>, handler: &Handler) {
    let mut reader = BufReader::new(&stream);
    let mut line = String::new();
    if reader.read_line(&mut line).unwrap_or(0) == 0 {
        return;
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next().unwrap(), words.next().unwrap());
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line.trim().is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').unwrap();
        headers.push((name.trim().to_owned(), value.trim().to_owned()));
    }
    let seen = {
        let mut log = log.lock().unwrap();
        let nth = log.iter().filter(|seen| seen.method == method && seen.path == path).count();
        log.push(Seen { method: method.clone(), path, headers, nth });
        log.last().unwrap().clone()
    };
    let reply = handler(&seen);
    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", reply.status);
    if !reply.no_length {
        let _ = write!(head, "Content-Length: {}\r\n", reply.body.len());
    }
    for (name, value) in &reply.headers {
        let _ = write!(head, "{name}: {value}\r\n");
    }
    head.push_str("\r\n");
    let body = if method == "HEAD" { &[][..] } else { &reply.body[..reply.cut.unwrap_or(reply.body.len())] };
    let mut stream = &stream;
    // The client may hang up at any time.
    if stream.write_all(head.as_bytes()).is_ok() {
        thread::sleep(reply.delay);
        if reply.drip.is_zero() {
            let _ = stream.write_all(body);
            return;
        }
        for byte in body {
            if stream.write_all(&[*byte]).is_err() {
                return;
            }
            thread::sleep(reply.drip);
        }
    }
}

/// What a repository holds: name, content, whether it is in large file storage.
#[derive(Debug, Clone, Default)]
pub(crate) struct Repository {
    pub(crate) files: BTreeMap<String, (Vec<u8>, bool)>,
}

impl Repository {
    /// A small model with two shards of `size` bytes together, and files that are not wanted.
    pub(crate) fn model(size: usize) -> Self {
        let weights: Vec<u8> = (0..size as u64).map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect();
        let (first, second) = weights.split_at(size / 3);
        let index = r#"{"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}"#;
        Self::default()
            .add("README.md", "# model")
            .add("config.json", r#"{"model_type":"llama"}"#)
            .add("tokenizer.json", r#"{"version":"1.0"}"#)
            .add("model.safetensors.index.json", index)
            .add_large("model-00001-of-00002.safetensors", first)
            .add_large("model-00002-of-00002.safetensors", second)
            .add("pytorch_model.bin.index.json", "{}")
            .add_large("pytorch_model.bin", b"pickle")
            .add("original/params.json", "{}")
    }

    pub(crate) fn add(mut self, name: &str, content: impl Into<Vec<u8>>) -> Self {
        self.files.insert(name.to_owned(), (content.into(), false));
        self
    }

    pub(crate) fn add_large(mut self, name: &str, content: &[u8]) -> Self {
        self.files.insert(name.to_owned(), (content.to_vec(), true));
        self
    }

    pub(crate) fn content(&self, name: &str) -> &[u8] {
        &self.files[name].0
    }

    /// The answer of the API.
    pub(crate) fn info(&self) -> serde_json::Value {
        let siblings: Vec<_> = self
            .files
            .iter()
            .map(|(name, (content, large))| {
                let mut file =
                    serde_json::json!({"rfilename": name, "size": content.len(), "blobId": blob_id(content)});
                if *large {
                    file["lfs"] =
                        serde_json::json!({"sha256": sha256(content), "size": content.len(), "pointerSize": 134});
                }
                file
            })
            .collect();
        serde_json::json!({"id": "org/name", "sha": COMMIT, "private": false, "siblings": siblings})
    }

    /// The answer of a hub that works.
    pub(crate) fn answer(&self, seen: &Seen) -> Reply {
        let path = seen.path.split('?').next().unwrap();
        if path.starts_with("/api/") {
            return Reply::new(200, self.info().to_string()).with("Content-Type", "application/json; charset=utf-8");
        }
        let name = path.split_once("/resolve/").and_then(|(_, rest)| rest.split_once('/')).map(|(_, name)| name);
        let Some((content, large)) = name.and_then(|name| self.files.get(name)) else {
            return Reply::new(404, "").with("X-Error-Code", "EntryNotFound");
        };
        let from = seen.from();
        let mut reply = Reply::new(if from > 0 { 206 } else { 200 }, &content[from..])
            .with("X-Repo-Commit", COMMIT)
            .with("ETag", format!("\"{}\"", if *large { sha256(content) } else { blob_id(content) }));
        if from > 0 {
            reply = reply.with("Content-Range", format!("bytes {from}-{}/{}", content.len() - 1, content.len()));
        }
        reply
    }

    /// A hub that works, except where `hook` answers first.
    pub(crate) fn serve(&self, hook: impl Fn(&Seen) -> Option<Reply> + Send + Sync + 'static) -> Server {
        let repository = self.clone();
        Server::start(move |seen| hook(seen).unwrap_or_else(|| repository.answer(seen)))
    }
}

pub(crate) fn sha256(content: &[u8]) -> String {
    Sha256::digest(content).iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
}

/// 40 hex digits that depend on the content; the client takes them as they are.
pub(crate) fn blob_id(content: &[u8]) -> String {
    sha256(content)[..40].to_owned()
}
