//! The few things about URLs that redirects and tokens need.

use ureq::http::Uri;

use super::error::HubError;

/// Scheme, host and port: what a token belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Origin {
    https: bool,
    host: String,
    port: u16,
}

impl Origin {
    /// The origin of an absolute `http` or `https` URL; `None` for anything else, and for URLs with a user name.
    pub(super) fn of(url: &str) -> Option<Self> {
        let uri: Uri = url.parse().ok()?;
        let https = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let authority = uri.authority()?;
        if authority.as_str().contains('@') || authority.host().is_empty() {
            return None;
        }
        let port = authority.port_u16().unwrap_or(if https { 443 } else { 80 });
        Some(Self { https, host: authority.host().to_ascii_lowercase(), port })
    }

    /// Whether a redirect from here to `next` gives up encryption.
    pub(super) fn is_downgrade_to(&self, next: &Self) -> bool {
        self.https && !next.https
    }
}

/// Checks the address of the hub: `http(s)://host[:port][/path]`, nothing more. Its value stays out of the message,
/// since people put passwords there.
pub(super) fn check_endpoint(endpoint: &str) -> Result<Origin, HubError> {
    match Origin::of(endpoint) {
        Some(origin) if !endpoint.contains(['?', '#']) => Ok(origin),
        _ => Err(HubError::BadSetting {
            name: "HF_ENDPOINT",
            reason: "wanted `https://host[:port][/path]` without user name, query or fragment".to_owned(),
        }),
    }
}

/// Resolves the `Location` of a redirect against the absolute URL `base` (RFC 3986, 5.2, without dot segments, which
/// servers resolve themselves). `None` where that gives no URL.
pub(super) fn join(base: &str, location: &str) -> Option<String> {
    let location = location.split('#').next()?.trim();
    let uri: Uri = base.parse().ok()?;
    let (scheme, authority) = (uri.scheme_str()?, uri.authority()?);
    let next = if location.is_empty() {
        return None;
    } else if location.split(['/', '?']).next()?.contains(':') {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        let folder = uri.path().rfind('/').map_or("/", |end| &uri.path()[..=end]);
        format!("{scheme}://{authority}{folder}{location}")
    };
    Origin::of(&next).map(|_| next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins() {
        let hub = Origin::of("https://Hub.example/a/b").unwrap();
        assert_eq!(Some(&hub), Origin::of("https://hub.example:443/c").as_ref());
        for other in
            ["http://hub.example/", "https://hub.example:8443/", "https://cdn.hub.example/", "https://hub.exampl/"]
        {
            assert_ne!(Some(&hub), Origin::of(other).as_ref(), "{other}");
        }
        for bad in ["file:///etc/passwd", "/relative", "https://user:pw@hub.example/", "https://hub.example@evil/", ""]
        {
            assert_eq!(Origin::of(bad), None, "{bad}");
        }
        assert!(hub.is_downgrade_to(&Origin::of("http://hub.example").unwrap()));
        assert!(!hub.is_downgrade_to(&Origin::of("https://cdn.example").unwrap()));
    }

    #[test]
    fn endpoints() {
        assert!(check_endpoint("https://mirror.example/api/hf").is_ok());
        for bad in ["mirror.example", "ftp://x", "https://me:hunter2@mirror.example", "https://x?y", "https://x#y", ""]
        {
            let error = check_endpoint(bad).unwrap_err().to_string();
            assert!(error.contains("HF_ENDPOINT") && !error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn redirects() {
        let base = "https://h.example/a/b?c=d";
        let cases = [
            ("https://cdn.example/x?sig=1", "https://cdn.example/x?sig=1"),
            ("//cdn.example/x", "https://cdn.example/x"),
            ("/x/y?z#f", "https://h.example/x/y?z"),
            ("x", "https://h.example/a/x"),
            ("x/y:z", "https://h.example/a/x/y:z"),
        ];
        for (location, wanted) in cases {
            assert_eq!(join(base, location).as_deref(), Some(wanted), "{location}");
        }
        for location in ["", "file:///etc/passwd", "https://", "javascript:alert(1)", "https://a@b/"] {
            assert_eq!(join(base, location), None, "{location}");
        }
    }
}
