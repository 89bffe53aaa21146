//! What a file that is not safetensors (or not JSON) probably is.

/// Bytes from the start of a file that [`recognise`] needs at most.
pub(crate) const PREFIX: usize = 512;

/// What the file is, and what to do about it; `None` where nothing is recognised.
///
/// Only asked after the proper parse has failed, so that no valid file is ever misjudged by its first bytes.
pub(crate) fn recognise(prefix: &[u8]) -> Option<(&'static str, &'static str)> {
    const CONVERT: &str = "load it in Python and save it with `save_pretrained(safe_serialization=True)`";
    const AGAIN: &str = "download it again";
    if prefix.starts_with(b"version https://git-lfs.github.com/spec/") {
        return Some(("a Git LFS pointer, the text that stands in for the file", "run `git lfs pull` in the folder"));
    }
    if prefix.starts_with(b"PK\x03\x04") {
        return Some(("a zip archive, as PyTorch writes for .bin and .pt files", CONVERT));
    }
    // Protocol 2 to 5 and opcodes; as the length field of a safetensors header this would be more than 16 MB.
    if matches!(prefix, [0x80, 2..=5, op, more @ ..] if *op != 0 && more.iter().take(5).any(|b| *b != 0)) {
        return Some(("a Python pickle, which can run code when loaded", CONVERT));
    }
    if prefix.starts_with(b"GGUF") {
        return Some(("a GGUF file", "use the safetensors checkpoint that it was made from"));
    }
    if prefix.starts_with(b"\x1f\x8b") {
        return Some(("a gzip archive", "unpack it first"));
    }
    if prefix.starts_with(b"\x89HDF") {
        return Some(("an HDF5 file", "use the safetensors files of the model"));
    }
    if prefix.len() >= 16 && prefix.iter().all(|b| *b == 0) {
        return Some(("a file that starts with zeros, as an unfinished download does", AGAIN));
    }
    let text = prefix.strip_prefix(b"\xef\xbb\xbf").unwrap_or(prefix).trim_ascii_start();
    let begins = |word: &[u8]| text.get(..word.len()).is_some_and(|t| t.eq_ignore_ascii_case(word));
    if begins(b"<!doctype") || begins(b"<html") || begins(b"<head") {
        return Some((
            "an HTML page, perhaps a login or error page",
            "log in or accept the model's terms, then download it again",
        ));
    }
    if begins(b"<?xml") {
        return Some(("an XML page, perhaps the error of a file server", AGAIN));
    }
    if text.starts_with(b"{") {
        return Some(("JSON text, perhaps the error of a server", AGAIN));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recognises_what_is_found_under_a_wrong_name() {
        for (bytes, word) in [
            (&b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"[..], "Git LFS"),
            (b"PK\x03\x04rest", "zip"),
            (b"\x80\x02}q\x00", "pickle"),
            (b"\x80\x04\x95\x10\0\0\0\0\0\0\0", "pickle"),
            (b"GGUF\x03\0\0\0", "GGUF"),
            (b"\n <!DOCTYPE html>", "HTML"),
            (b"<HTML><body>", "HTML"),
            (b"<?xml version", "XML"),
            (b"{\"error\": \"Not found\"}", "JSON"),
            (&[0; 64], "zeros"),
        ] {
            let (found, next) = recognise(bytes).unwrap();
            assert!(found.contains(word), "{found}");
            assert!(!next.is_empty());
        }
    }

    #[test]
    fn an_honest_header_is_none_of_them() {
        // 0x80 0x02 as a length: a header of 640 bytes.
        assert_eq!(recognise(b"\x80\x02\0\0\0\0\0\0{\"__metadata__\""), None);
        assert_eq!(recognise(b""), None);
        assert_eq!(recognise(b"\0\0"), None);
    }
}
