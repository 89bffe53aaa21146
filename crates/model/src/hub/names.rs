//! Names: repository ids, revisions, file names, ETags. Everything that becomes part of a path or a URL passes here.

use super::error::HubError;

/// Whether `text` has the form of a hub id, `org/name`: exactly one slash, and on both sides 1 to 96 ASCII letters,
/// digits, `-`, `_` or `.` under the rules of the hub (no `-` or `.` at either end, no `--` or `..`, no final `.git`).
///
/// Says nothing about whether such a repository exists, and an existing local path of that name goes first: see
/// [`model_source`](super::model_source).
#[must_use]
pub fn looks_like_hub_id(text: &str) -> bool {
    text.contains('/') && check_repo_id(text).is_ok()
}

/// Checks a repository id by the rules of `huggingface_hub.utils.validate_repo_id`. Ids without an organisation
/// (`gpt2`) are legacy but valid.
pub(super) fn check_repo_id(id: &str) -> Result<(), HubError> {
    let bad = |reason| Err(HubError::BadId { id: id.to_owned(), reason });
    if id.matches('/').count() > 1 {
        return bad("more than one `/`");
    }
    for part in id.split('/') {
        if part.is_empty() {
            return bad("an empty part");
        }
        if part.len() > 96 {
            return bad("a part longer than 96 characters");
        }
        if !part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.')) {
            return bad("a character that ids do not have");
        }
        if part.starts_with(['-', '.']) || part.ends_with(['-', '.']) {
            return bad("`-` or `.` at an end of a part");
        }
        // `--` separates the parts in names of cache folders: two ids must not share one.
        if part.contains("--") || part.contains("..") {
            return bad("`--` or `..`");
        }
    }
    if id.ends_with(".git") { bad("it ends with `.git`") } else { Ok(()) }
}

/// Checks a revision: what git allows as the name of a branch or tag (`git check-ref-format`), as far as it matters
/// for a path below `refs/` and for a URL.
pub(super) fn check_revision(revision: &str) -> Result<(), HubError> {
    match path_fault(revision) {
        Some(reason) => Err(HubError::BadRevision { revision: revision.to_owned(), reason }),
        None if revision.len() > 250 => {
            Err(HubError::BadRevision { revision: revision.to_owned(), reason: "longer than 250 bytes" })
        }
        None => Ok(()),
    }
}

/// Checks the name of a file inside `repo`, given by the hub or by an index file: relative, `/` between parts, nothing
/// that leaves the folder on any system.
pub(super) fn check_file_name(repo: &str, name: &str) -> Result<(), HubError> {
    match path_fault(name) {
        Some(reason) => Err(HubError::BadName { repo: repo.to_owned(), name: name.to_owned(), reason }),
        None => Ok(()),
    }
}

/// Why `name` must not become a path below some folder.
fn path_fault(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        return Some("it is empty");
    }
    if name.len() > 1024 {
        return Some("longer than 1024 bytes");
    }
    if name.contains('\\') {
        return Some("it holds a backslash");
    }
    if name.chars().any(char::is_control) {
        return Some("it holds a control character");
    }
    if name.starts_with('/') {
        return Some("it is absolute");
    }
    // `C:x` and `file:stream` mean something else on Windows.
    if name.contains(':') {
        return Some("it holds a colon");
    }
    for part in name.split('/') {
        match part {
            "" => return Some("it has an empty part"),
            "." | ".." => return Some("it has a part `.` or `..`"),
            _ if part.len() > 255 => return Some("a part is longer than 255 bytes"),
            _ => {}
        }
    }
    None
}

/// Whether `text` is a full git commit hash in lower-case hex (SHA-1 or SHA-256).
pub(super) fn is_commit(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && is_lower_hex(text)
}

/// Whether `text` is a SHA-256 in lower-case hex.
pub(super) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && is_lower_hex(text)
}

fn is_lower_hex(text: &str) -> bool {
    text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// The opaque part of an ETag header (RFC 9110, 8.8.3), which names the blob in the cache as `huggingface_hub` does;
/// `None` where it cannot be a file name.
pub(super) fn blob_name(etag: &str) -> Option<&str> {
    let etag = etag.trim();
    let etag = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"');
    let plain = etag.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    (plain && (1..=128).contains(&etag.len()) && !etag.starts_with('.') && !etag.ends_with(".incomplete"))
        .then_some(etag)
}

/// Percent-encodes all but the unreserved characters of RFC 3986 and those in `keep`.
pub(super) fn percent_encode(text: &str, keep: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        let c = char::from(byte);
        if c.is_ascii_alphanumeric() || "-._~".contains(c) || keep.contains(c) {
            out.push(c);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hub_ids() {
        for id in ["meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-0.5B", "a/b", "x_y/z.1"] {
            assert!(looks_like_hub_id(id), "{id}");
        }
        for id in [
            "gpt2", "", "/", "a/", "/b", "a/b/c", "./model", "../model", "a/..", "a b/c", "a/b.git", "a--b/c", "a/-b",
            "a/b.", "a\\b/c", "é/b", "a/b\n", "~/model", "C:/m",
        ] {
            assert!(!looks_like_hub_id(id), "{id}");
        }
        assert!(!looks_like_hub_id(&format!("a/{}", "b".repeat(97))));
        assert!(check_repo_id("gpt2").is_ok());
    }

    #[test]
    fn revisions() {
        for revision in ["main", "refs/pr/1", "v1.0", "feature/a-b", "0123456789abcdef0123456789abcdef01234567"] {
            assert!(check_revision(revision).is_ok(), "{revision}");
        }
        for revision in ["", "..", "a/../b", "/etc", "a//b", "a\\b", "a\0", "a/", "x:y"] {
            assert!(check_revision(revision).is_err(), "{revision}");
        }
    }

    #[test]
    fn hostile_file_names() {
        for name in [
            "../x",
            "a/../../x",
            "/etc/passwd",
            "a\\..\\x",
            "a\0b",
            "",
            ".",
            "a//b",
            "a/",
            "C:\\x",
            "c:x",
            "a\nb",
            "./a",
        ] {
            assert!(matches!(check_file_name("o/r", name), Err(HubError::BadName { .. })), "{name:?}");
        }
        for name in ["config.json", "sub/dir/x.py", "..hidden", "a..b", "模型.txt", "with space.txt"] {
            assert!(check_file_name("o/r", name).is_ok(), "{name:?}");
        }
    }

    #[test]
    fn etags() {
        assert_eq!(blob_name("\"abc123\""), Some("abc123"));
        assert_eq!(blob_name("W/\"abc-2\""), Some("abc-2"));
        for etag in ["", "\"\"", "\"../x\"", "\"a/b\"", "\"..\"", "\"a\\b\"", "\"x.incomplete\""] {
            assert_eq!(blob_name(etag), None, "{etag}");
        }
    }

    #[test]
    fn percent_encoding() {
        assert_eq!(percent_encode("a b#c?d%e/é", "/"), "a%20b%23c%3Fd%25e/%C3%A9");
        assert_eq!(percent_encode("refs/pr/1", ""), "refs%2Fpr%2F1");
    }

    proptest! {
        #[test]
        fn accepted_names_stay_inside(name in "[a./\\\\:\0 -]{0,12}") {
            if check_file_name("o/r", &name).is_ok() {
                let path = std::path::Path::new(&name);
                prop_assert!(path.components().all(|c| matches!(c, std::path::Component::Normal(_))));
                prop_assert!(path.is_relative());
            }
        }
    }
}
