//! Settings of the hub: the only place of this crate that reads environment variables.
//!
//! | variable | meaning | default |
//! |---|---|---|
//! | `HF_ENDPOINT` | address of the hub or of a mirror | `https://huggingface.co` |
//! | `HF_TOKEN`, then `HUGGING_FACE_HUB_TOKEN` | access token | the token file |
//! | `HF_TOKEN_PATH` | token file | `$HF_HOME/token` |
//! | `HF_HUB_DISABLE_IMPLICIT_TOKEN` | do not read the token file | off |
//! | `HF_HUB_OFFLINE`, then `TRANSFORMERS_OFFLINE` | use the cache only | off |
//! | `HF_HOME` | folder of the token and the cache | `$XDG_CACHE_HOME/huggingface`, else `~/.cache/huggingface` |
//! | `HF_HUB_CACHE`, then `HUGGINGFACE_HUB_CACHE` | cache | `$HF_HOME/hub` |
//! | `SSL_CERT_FILE`, then `REQUESTS_CA_BUNDLE` | certificates (PEM) to trust instead of the built-in ones | none |
//! | `ALL_PROXY`, `HTTPS_PROXY`, `HTTP_PROXY`, `NO_PROXY` | proxy, read by `ureq` | none |
//!
//! Switches are on for `1`, `true`, `yes` and `on` in any case. Names, order and defaults are those of
//! `huggingface_hub.constants`.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::HubError;
use super::token::Token;

/// The public hub.
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// How often a request is tried, and how long to wait in between.
///
/// The wait before try n + 1 is `base_delay` · 2ⁿ⁻¹, at most `max_delay`; where the server says how long
/// (`Retry-After` in seconds, or `t` of `RateLimit`), that long, at most `max_server_delay`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Most tries in a row without progress, the first included; 0 counts as 1. A try of a download makes progress if
    /// it brings at least 1 MiB that no earlier try had brought.
    pub tries: u32,
    /// Wait after the first failure.
    pub base_delay: Duration,
    /// Longest wait of our own choice.
    pub max_delay: Duration,
    /// Longest wait on a server's word. The hub counts requests in windows of 300 s.
    pub max_server_delay: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            tries: 5,
            base_delay: Duration::from_secs(1),
            max_delay: Duration::from_secs(8),
            max_server_delay: Duration::from_secs(310),
        }
    }
}

/// When a server counts as dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// To connect, TLS included.
    pub connect: Duration,
    /// From the request to the end of the answer's headers.
    pub response: Duration,
    /// Longest silence inside a body; also the time in which a body must bring at least 1 KiB.
    pub stall: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { connect: Duration::from_secs(10), response: Duration::from_secs(30), stall: Duration::from_secs(30) }
    }
}

/// Where the hub is, who asks, and where files go. `Debug` shows no secret.
#[derive(Debug, Clone)]
pub struct HubOptions {
    /// `http(s)://host[:port][/path]` of the hub, without a slash at the end.
    pub endpoint: String,
    /// Access token; sent to the scheme, host and port of `endpoint` only.
    pub token: Option<Token>,
    /// Cache in the layout of `huggingface_hub`, shared with it.
    pub cache_dir: PathBuf,
    /// Replaces `cache_dir` (`--download-dir`, as in LMDeploy).
    pub download_dir: Option<PathBuf>,
    /// Never use the network.
    pub offline: bool,
    /// Branch, tag or commit of a model; `None` is `main`.
    pub revision: Option<String>,
    /// Certificates (PEM) to trust instead of the built-in ones.
    pub ca_bundle: Option<PathBuf>,
    /// Take the proxy from the environment; else connect directly.
    pub proxy_from_env: bool,
    /// Tries and waits.
    pub retry: RetryPolicy,
    /// Time limits.
    pub timeouts: Timeouts,
    /// Files of one model downloaded at the same time, at least 1.
    pub parallel: usize,
}

impl HubOptions {
    /// Defaults for a cache folder: the public hub, no token, no proxy. Reads no environment variable.
    #[must_use]
    pub fn new(cache_dir: impl Into<PathBuf>) -> Self {
        Self {
            endpoint: DEFAULT_ENDPOINT.to_owned(),
            token: None,
            cache_dir: cache_dir.into(),
            download_dir: None,
            offline: false,
            revision: None,
            ca_bundle: None,
            proxy_from_env: false,
            retry: RetryPolicy::default(),
            timeouts: Timeouts::default(),
            parallel: 4,
        }
    }

    /// Settings from the environment variables listed at the head of this module.
    ///
    /// # Errors
    /// [`HubError::BadSetting`] if the token cannot be one, if a variable that must be text is not, or if no folder
    /// for the cache can be named (no `HF_HOME`, no `HOME`); [`HubError::Io`] if the token file exists but cannot be
    /// read.
    pub fn from_env() -> Result<Self, HubError> {
        Self::from_vars(|name| std::env::var_os(name))
    }

    fn from_vars(var: impl Fn(&str) -> Option<OsString>) -> Result<Self, HubError> {
        let path = |name: &str| var(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let text = |name: &'static str| match var(name) {
            None => Ok(None),
            Some(value) => match value.into_string() {
                Ok(value) => Ok(Some(value.trim().to_owned()).filter(|value| !value.is_empty())),
                Err(_) => {
                    Err(HubError::BadSetting { name, reason: "it is not UTF-8; set it again or unset it".to_owned() })
                }
            },
        };
        let switch = |name| text(name).map(|value| value.map(|value| is_true(&value)));
        let home = path("HOME").or_else(|| path("USERPROFILE"));
        let expand = |path: PathBuf| match (path.strip_prefix("~"), &home) {
            (Ok(rest), Some(home)) => home.join(rest),
            _ => path,
        };

        let hf_home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|folder| folder.join("huggingface")))
            .or_else(|| home.as_ref().map(|home| home.join(".cache").join("huggingface")))
            .map(expand);
        let cache_dir = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .map(expand)
            .or_else(|| hf_home.as_ref().map(|folder| folder.join("hub")))
            .ok_or_else(|| HubError::BadSetting {
                name: "HF_HUB_CACHE",
                reason: "it is not set, and neither are `HF_HOME` and `HOME`; set it to a folder for downloads"
                    .to_owned(),
            })?;

        let mut options = Self::new(cache_dir);
        if let Some(endpoint) = text("HF_ENDPOINT")? {
            options.endpoint = endpoint.trim_end_matches('/').to_owned();
        }
        options.offline = match switch("HF_HUB_OFFLINE")? {
            Some(offline) => offline,
            None => switch("TRANSFORMERS_OFFLINE")?.unwrap_or(false),
        };
        options.token = match (text("HF_TOKEN")?, text("HUGGING_FACE_HUB_TOKEN")?) {
            (Some(token), _) | (None, Some(token)) => Token::new(&token)?,
            (None, None) if switch("HF_HUB_DISABLE_IMPLICIT_TOKEN")?.unwrap_or(false) => None,
            (None, None) => {
                match path("HF_TOKEN_PATH").map(expand).or_else(|| hf_home.map(|home| home.join("token"))) {
                    Some(file) => token_of_file(&file)?,
                    None => None,
                }
            }
        };
        options.ca_bundle = path("SSL_CERT_FILE").or_else(|| path("REQUESTS_CA_BUNDLE")).map(expand);
        options.proxy_from_env = true;
        Ok(options)
    }

    /// The cache in use.
    pub(super) fn cache(&self) -> &Path {
        self.download_dir.as_deref().unwrap_or(&self.cache_dir)
    }

    /// The revision of models.
    pub(super) fn model_revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

/// `1`, `true`, `yes`, `on`, as `huggingface_hub` reads switches.
fn is_true(text: &str) -> bool {
    ["1", "true", "yes", "on"].iter().any(|on| text.eq_ignore_ascii_case(on))
}

/// The token file that `hf auth login` writes; one that does not exist is no token.
fn token_of_file(path: &Path) -> Result<Option<Token>, HubError> {
    match fs::read_to_string(path) {
        Ok(text) => Token::new(&text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(HubError::io("read the token file", path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn from(vars: &[(&str, &str)]) -> Result<HubOptions, HubError> {
        let vars: BTreeMap<String, OsString> = vars.iter().map(|(k, v)| ((*k).to_owned(), OsString::from(v))).collect();
        HubOptions::from_vars(|name| vars.get(name).cloned())
    }

    #[test]
    fn defaults() {
        let options = from(&[("HOME", "/home/u")]).unwrap();
        assert_eq!(options.endpoint, "https://huggingface.co");
        assert_eq!(options.cache_dir, Path::new("/home/u/.cache/huggingface/hub"));
        assert!(options.token.is_none() && !options.offline && options.revision.is_none());
        assert_eq!(options.model_revision(), "main");
    }

    #[test]
    fn order_of_cache_folders() {
        let cache = |vars: &[(&str, &str)]| from(vars).unwrap().cache_dir;
        assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/hf")]), Path::new("/hf/hub"));
        assert_eq!(cache(&[("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old")]), Path::new("/old"));
        assert_eq!(cache(&[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/new")]), Path::new("/new"));
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HUB_CACHE", "~/c")]), Path::new("/h/c"));
        let mut options = from(&[("HF_HOME", "/hf")]).unwrap();
        options.download_dir = Some("/d".into());
        assert_eq!(options.cache(), Path::new("/d"));
        assert_eq!(from(&[]).unwrap_err().to_string().split(':').next(), Some("`HF_HUB_CACHE` cannot be used"));
    }

    #[test]
    fn switches_and_endpoint() {
        for on in ["1", "true", "YES", "On"] {
            assert!(from(&[("HOME", "/h"), ("HF_HUB_OFFLINE", on)]).unwrap().offline, "{on}");
        }
        for off in ["0", "false", "", "no", "off"] {
            assert!(!from(&[("HOME", "/h"), ("HF_HUB_OFFLINE", off)]).unwrap().offline, "{off}");
        }
        assert!(from(&[("HOME", "/h"), ("TRANSFORMERS_OFFLINE", "1")]).unwrap().offline);
        let options = from(&[("HOME", "/h"), ("HF_ENDPOINT", "https://mirror.example/")]).unwrap();
        assert_eq!(options.endpoint, "https://mirror.example");
    }

    #[test]
    fn token_from_variable_then_file() {
        let home = tempfile::tempdir().unwrap();
        let hf_home = home.path().to_str().unwrap();
        let token = |vars: &[(&str, &str)]| {
            let mut all = vec![("HF_HOME", hf_home)];
            all.extend_from_slice(vars);
            from(&all).unwrap().token.map(|token| token.header())
        };
        assert_eq!(token(&[]), None);
        fs::write(home.path().join("token"), "hf_file\n").unwrap();
        assert_eq!(token(&[]).as_deref(), Some("Bearer hf_file"));
        assert_eq!(token(&[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
        assert_eq!(token(&[("HF_TOKEN", "")]).as_deref(), Some("Bearer hf_file"));
        assert_eq!(token(&[("HUGGING_FACE_HUB_TOKEN", "hf_old")]).as_deref(), Some("Bearer hf_old"));
        assert_eq!(
            token(&[("HUGGING_FACE_HUB_TOKEN", "hf_old"), ("HF_TOKEN", "hf_new")]).as_deref(),
            Some("Bearer hf_new")
        );
    }

    #[test]
    fn debug_shows_no_token() {
        let options = from(&[("HOME", "/h"), ("HF_TOKEN", "hf_secret")]).unwrap();
        let shown = format!("{options:?}");
        assert!(!shown.contains("hf_secret") && shown.contains("Token(***)"), "{shown}");
    }
}
