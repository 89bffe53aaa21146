//! Text from untrusted files, made safe to print.

use std::path::Path;

/// Most characters of a name that a message repeats.
const NAME_CHARS: usize = 120;
/// Most characters of a path that a message repeats; longer than a name, since its end matters most.
const PATH_CHARS: usize = 1024;

/// Escapes what could act on a terminal or change how a message reads, and cuts after about 120 characters.
///
/// Control characters (ESC, NUL, newline, C1), bidirectional marks, zero-width characters and line separators become
/// `\u{…}`; everything else, letters of every script included, stays as it is.
#[must_use]
pub fn printable(text: &str) -> String {
    escape(text, NAME_CHARS)
}

/// A path for a message: escaped like [`printable`], cut after about 1,000 characters, bytes that are not UTF-8 shown
/// as `�`.
#[must_use]
pub fn printable_path(path: &Path) -> String {
    escape(&path.to_string_lossy(), PATH_CHARS)
}

/// Escapes `text` and keeps at most `limit` characters of it, plus `…` where some were left out.
pub(crate) fn escape(text: &str, limit: usize) -> String {
    let mut out = String::with_capacity(text.len().min(limit));
    for (position, c) in text.chars().enumerate() {
        if position == limit {
            out.push('…');
            break;
        }
        if is_unsafe(c) { out.extend(c.escape_unicode()) } else { out.push(c) }
    }
    out
}

/// Characters that a terminal acts on or that hide or reorder their neighbours (Unicode general categories Cc, Zl, Zp
/// and the Bidi_Control and zero-width members of Cf).
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{00AD}' | '\u{061C}' | '\u{180E}' | '\u{200B}'..='\u{200F}' | '\u{2028}'..='\u{202E}'
            | '\u{2060}'..='\u{206F}' | '\u{FEFF}' | '\u{FFF9}'..='\u{FFFB}' | '\u{E0000}'..='\u{E007F}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn escapes_what_a_terminal_acts_on() {
        assert_eq!(printable("a\u{1b}[31mb\nc\0"), "a\\u{1b}[31mb\\u{a}c\\u{0}");
        assert_eq!(printable("x\u{202e}gpj.exe"), "x\\u{202e}gpj.exe");
        assert_eq!(printable("a\u{2066}b\u{200d}c\u{feff}\u{e0041}"), "a\\u{2066}b\\u{200d}c\\u{feff}\\u{e0041}");
        assert_eq!(printable("\u{9b}31m"), "\\u{9b}31m");
    }

    #[test]
    fn leaves_ordinary_text_alone() {
        assert_eq!(printable("model.layers.0.权重 é"), "model.layers.0.权重 é");
    }

    #[test]
    fn cuts_long_names() {
        let cut = printable(&"n".repeat(5000));
        assert_eq!(cut.chars().count(), NAME_CHARS + 1);
        assert!(cut.ends_with('…'));
        assert_eq!(printable(&"n".repeat(NAME_CHARS)), "n".repeat(NAME_CHARS));
    }

    #[test]
    fn paths_that_are_not_utf8_are_shown() {
        assert_eq!(printable_path(Path::new(OsStr::from_bytes(b"a\xffb\x07"))), "a\u{fffd}b\\u{7}");
    }
}
