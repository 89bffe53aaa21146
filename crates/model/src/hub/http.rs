//! Requests: redirects without the token, statuses turned into errors, tries and waits.

use std::fs;
use std::io::Read;
use std::time::{Duration, Instant};

use ureq::http::{HeaderMap, HeaderValue, Response, header};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body, Proxy};

use super::error::HubError;
use super::options::HubOptions;
use super::progress::{Cancelled, Events};
use super::url::{Origin, check_endpoint, join};

/// Largest JSON answer: 50,000 files at 1 KiB each fit.
const MAX_JSON: u64 = 64 << 20;
/// Most redirects of one request.
const MAX_REDIRECTS: usize = 10;

/// The commit that an answer of the hub is about; anything that does not send it for a file is not a hub.
pub(super) const X_REPO_COMMIT: &str = "x-repo-commit";

/// What a request is about, for messages.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target<'a> {
    pub(super) repo: &'a str,
    pub(super) revision: &'a str,
    pub(super) file: Option<&'a str>,
}

/// The two requests there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// Headers only; a redirect to another origin that is about a commit is the answer.
    Head,
    /// The body, from a byte on.
    Get {
        /// First byte wanted; 0 asks for no range.
        from: u64,
    },
}

/// An answer that is neither a redirect nor an error (416 is left to whoever asked for a range).
pub(super) struct Answer {
    pub(super) response: Response<Body>,
    pub(super) url: String,
}

/// Why a try failed.
pub(super) enum Failure {
    /// Trying again changes nothing.
    Fatal(HubError),
    /// The network's fault.
    Try { url: String, reason: String, wait: Option<Duration>, progress: bool, again: bool },
}

impl Failure {
    /// A failed try after which another makes sense.
    pub(super) fn again(url: &str, reason: impl Into<String>) -> Self {
        Self::Try { url: url.to_owned(), reason: reason.into(), wait: None, progress: false, again: true }
    }
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        Self::Fatal(error)
    }
}

impl From<Cancelled> for Failure {
    fn from(cancelled: Cancelled) -> Self {
        Self::Fatal(cancelled.into())
    }
}

/// Connections to one hub.
pub(super) struct Client<'a> {
    agent: Agent,
    hub: Origin,
    pub(super) options: &'a HubOptions,
    pub(super) events: &'a Events<'a>,
}

impl<'a> Client<'a> {
    pub(super) fn new(options: &'a HubOptions, events: &'a Events<'a>) -> Result<Self, HubError> {
        let hub = check_endpoint(&options.endpoint)?;
        let config = Agent::config_builder()
            // Redirects are followed here, so that the token stays with the hub and statuses keep their headers.
            .max_redirects(0)
            .http_status_as_error(false)
            // Sizes and ranges must be those of the file, not of a compressed form.
            .accept_encoding("identity")
            .user_agent(concat!("lite/", env!("CARGO_PKG_VERSION")))
            .proxy(if options.proxy_from_env { Proxy::try_from_env() } else { None })
            .tls_config(tls(options)?)
            .timeout_connect(Some(options.timeouts.connect))
            .timeout_recv_response(Some(options.timeouts.response))
            .timeout_per_read(Some(options.timeouts.stall))
            .build();
        Ok(Self { agent: Agent::new_with_config(config), hub, options, events })
    }

    /// Runs `attempt` until it succeeds, fails for good, or has failed often enough.
    pub(super) fn retry<T>(&self, mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T, HubError> {
        let policy = &self.options.retry;
        let (mut tries, mut in_a_row) = (0u32, 0u32);
        loop {
            self.events.check()?;
            tries = tries.saturating_add(1);
            let (url, reason, wait) = match attempt() {
                Ok(done) => return Ok(done),
                Err(Failure::Fatal(error)) => return Err(error),
                Err(Failure::Try { url, reason, wait, progress, again }) => {
                    in_a_row = if progress { 1 } else { in_a_row.saturating_add(1) };
                    if !again || in_a_row >= policy.tries.max(1) {
                        return Err(HubError::Network { url, tries, reason });
                    }
                    (url, reason, wait)
                }
            };
            let delay = match wait {
                Some(wait) => wait.min(policy.max_server_delay),
                None => policy.base_delay.saturating_mul(1 << (in_a_row - 1).min(20)).min(policy.max_delay),
            };
            let place = url.split('?').next().unwrap_or_default();
            self.events.to.retrying(&format!("`{place}`: {reason}"), delay);
            self.events.sleep(delay)?;
        }
    }

    /// One request, redirects followed.
    pub(super) fn send(&self, method: Method, url: &str, target: Target<'_>) -> Result<Answer, Failure> {
        let mut url = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            self.events.check()?;
            let not_a_hub =
                |reason: &str| Failure::Fatal(HubError::NotAHub { url: url.clone(), reason: reason.to_owned() });
            let origin = Origin::of(&url).ok_or_else(|| not_a_hub("the URL is not one of http or https"))?;
            let token = self.options.token.as_ref().filter(|_| origin == self.hub);

            let mut request = match method {
                Method::Head => self.agent.head(&url),
                Method::Get { .. } => self.agent.get(&url),
            };
            if let Method::Get { from: from @ 1.. } = method {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            if let Some(token) = token {
                let mut value = HeaderValue::from_str(&token.header()).map_err(|_| HubError::BadSetting {
                    name: "HF_TOKEN",
                    reason: "the token does not fit in a header".to_owned(),
                })?;
                value.set_sensitive(true);
                request = request.header(header::AUTHORIZATION, value);
            }
            let response = request.call().map_err(|error| transport(&url, error))?;

            let status = response.status().as_u16();
            if !matches!(status, 301 | 302 | 303 | 307 | 308) {
                return self.judge(Answer { response, url }, target, token.is_some());
            }
            let next = text(response.headers(), header::LOCATION.as_str())
                .and_then(|location| join(&url, location))
                .ok_or_else(|| not_a_hub("a redirect to nowhere"))?;
            let to = Origin::of(&next).ok_or_else(|| not_a_hub("a redirect to nowhere"))?;
            if method == Method::Head && to != origin && response.headers().contains_key(X_REPO_COMMIT) {
                return Ok(Answer { response, url });
            }
            if origin.is_downgrade_to(&to) {
                return Err(not_a_hub("a redirect from https to http"));
            }
            url = next;
        }
        Err(HubError::NotAHub { url, reason: format!("more than {MAX_REDIRECTS} redirects") }.into())
    }

    /// What a status means.
    fn judge(&self, answer: Answer, target: Target<'_>, token_sent: bool) -> Result<Answer, Failure> {
        let headers = answer.response.headers();
        let status = answer.response.status().as_u16();
        let code = text(headers, "x-error-code");
        // A server may repeat what it was sent.
        let message = text(headers, "x-error-message").unwrap_or_default();
        let message = self.options.token.as_ref().map_or_else(|| message.to_owned(), |token| token.redact(message));
        let (repo, revision) = (target.repo.to_owned(), target.revision.to_owned());
        let at_hub = Origin::of(&answer.url).as_ref() == Some(&self.hub);
        match status {
            200..=299 | 416 => Ok(answer),
            // Signed links of a storage host expire; the next try gets a new one from the hub.
            403 if !at_hub && code.is_none() => {
                Err(Failure::again(&answer.url, "HTTP 403 from the storage host of the hub"))
            }
            401 | 403 => {
                Err(HubError::Denied { repo, revision, status, token_sent, gated: code == Some("GatedRepo"), message }
                    .into())
            }
            404 | 410 => {
                let what = match code {
                    Some("RepoNotFound") => "repository",
                    Some("RevisionNotFound") => "revision",
                    _ if target.file.is_some() => "file",
                    _ => "repository or revision",
                };
                let file = target.file.map(str::to_owned);
                Err(HubError::NotFound { what, repo, revision, file, token_sent, message }.into())
            }
            408 | 429 | 500..=599 => {
                let reason = match status {
                    429 => "HTTP 429 (too many requests; with a token in `HF_TOKEN` the hub allows more)".to_owned(),
                    _ if message.is_empty() => format!("HTTP {status}"),
                    _ => format!("HTTP {status}, \"{message}\""),
                };
                let wait = server_wait(headers);
                Err(Failure::Try { url: answer.url, reason, wait, progress: false, again: true })
            }
            _ => Err(HubError::Status { url: answer.url, status, message }.into()),
        }
    }

    /// Hands the body to `sink` piece by piece; fails on silence, on a trickle, and when asked to stop.
    pub(super) fn read(
        &self,
        answer: Answer,
        mut sink: impl FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        const TRICKLE: u64 = 1024;
        let url = answer.url;
        let mut body = answer.response.into_body().into_reader();
        let mut buffer = vec![0; 128 << 10];
        let stall = self.options.timeouts.stall;
        let (mut since, mut bytes) = (Instant::now(), 0u64);
        loop {
            self.events.check()?;
            let count = match body.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Failure::again(&url, error.to_string())),
            };
            sink(&buffer[..count])?;
            bytes = bytes.saturating_add(count as u64);
            if since.elapsed() >= stall {
                if bytes < TRICKLE {
                    return Err(Failure::again(&url, format!("only {bytes} bytes in {stall:?}")));
                }
                (since, bytes) = (Instant::now(), 0);
            }
        }
    }

    /// A JSON answer of the hub's API.
    pub(super) fn json<T: serde::de::DeserializeOwned>(&self, url: &str, target: Target<'_>) -> Result<T, HubError> {
        self.retry(|| {
            let answer = self.send(Method::Get { from: 0 }, url, target)?;
            let url = answer.url.clone();
            let not_a_hub = |reason: String| HubError::NotAHub { url: url.clone(), reason };
            if is_html(answer.response.headers()) {
                return Err(not_a_hub("found an HTML page, wanted JSON".to_owned()).into());
            }
            let mut bytes = Vec::new();
            self.read(answer, |piece| {
                bytes.extend_from_slice(piece);
                if bytes.len() as u64 > MAX_JSON {
                    return Err(not_a_hub(format!("the answer is larger than {MAX_JSON} bytes")).into());
                }
                Ok(())
            })?;
            if bytes.trim_ascii_start().first() == Some(&b'<') {
                return Err(not_a_hub("found an HTML page, wanted JSON".to_owned()).into());
            }
            serde_json::from_slice(&bytes)
                .map_err(|error| not_a_hub(format!("wanted JSON about a repository: {error}")).into())
        })
    }
}

/// The certificates to trust.
fn tls(options: &HubOptions) -> Result<TlsConfig, HubError> {
    let Some(path) = &options.ca_bundle else { return Ok(TlsConfig::default()) };
    let bad = |reason: String| HubError::BadSetting { name: "SSL_CERT_FILE", reason };
    let pem = fs::read(path).map_err(HubError::io("read the certificates of", path))?;
    let mut certificates: Vec<Certificate<'static>> = Vec::new();
    for item in parse_pem(&pem) {
        match item {
            Ok(PemItem::Certificate(certificate)) => certificates.push(certificate),
            Ok(_) => {}
            Err(_) => return Err(bad("the file is not PEM; give a file of PEM certificates".to_owned())),
        }
    }
    if certificates.is_empty() {
        return Err(bad("the file holds no certificate; give a file of PEM certificates".to_owned()));
    }
    Ok(TlsConfig::builder().root_certs(RootCerts::new_with_certs(&certificates)).build())
}

/// A failure below HTTP.
fn transport(url: &str, error: ureq::Error) -> Failure {
    let fail = |reason: String, again| Failure::Try { url: url.to_owned(), reason, wait: None, progress: false, again };
    let tls = |error: &dyn std::fmt::Display| {
        fail(format!("TLS: {error} (if a proxy has its own certificate, name its CA file in `SSL_CERT_FILE`)"), false)
    };
    match error {
        ureq::Error::Io(error) if error.kind() == std::io::ErrorKind::InvalidData => tls(&error),
        ureq::Error::Tls(_) | ureq::Error::Rustls(_) => tls(&error),
        ureq::Error::Io(_)
        | ureq::Error::Timeout(_)
        | ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::Protocol(_) => fail(error.to_string(), true),
        // Its text may repeat the URL with its query.
        ureq::Error::BadUri(_) => fail("the URL is malformed".to_owned(), false),
        _ => fail(error.to_string(), false),
    }
}

/// How long the server asks to wait: `Retry-After` in seconds (RFC 9110, 10.2.3), else `t` of the hub's `RateLimit`
/// header (draft-ietf-httpapi-ratelimit-headers), `"api";r=0;t=55`.
fn server_wait(headers: &HeaderMap) -> Option<Duration> {
    let seconds = |text: &str| text.trim().parse().ok().map(Duration::from_secs);
    text(headers, "retry-after").and_then(seconds).or_else(|| {
        text(headers, "ratelimit")?.split(';').find_map(|part| part.trim().strip_prefix("t=")).and_then(seconds)
    })
}

/// The text of a header.
pub(super) fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// Whether the answer is a web page, which no API answer and no file of a model is.
pub(super) fn is_html(headers: &HeaderMap) -> bool {
    text(headers, header::CONTENT_TYPE.as_str())
        .is_some_and(|kind| kind.trim_start().to_ascii_lowercase().starts_with("text/html"))
}
