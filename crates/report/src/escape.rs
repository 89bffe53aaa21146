//! Untrusted text into HTML, Markdown and YAML.

use lite_model::printable;

/// Makes visible what could hide or reorder its neighbours, one character at a time.
fn visible(c: char, out: &mut String, plain: impl FnOnce(char, &mut String)) {
    if c.is_ascii_graphic() || c == ' ' || c.is_alphanumeric() {
        return plain(c, out);
    }
    let text = printable(c.encode_utf8(&mut [0; 4]));
    if text.chars().eq([c]) {
        plain(c, out);
    } else {
        text.chars().for_each(|c| match c {
            '\\' => out.push('\u{FF3C}'),
            '{' | '}' => {}
            c => out.push(c),
        });
    }
}

/// Text for an HTML element or an attribute in either kind of quotes.
#[must_use]
pub fn html(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        visible(c, &mut out, |c, out| match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        });
    }
    out
}

/// Text for a line of Markdown, a cell of a table among them. Everything with a meaning in CommonMark, its tables or
/// GitHub's links is escaped where it has one: `_` not within words, `-`, `+`, `.` and `)` only where they could begin an
/// item of a list, `:` only where it could end the scheme of an address.
#[must_use]
pub fn markdown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut word, mut digits) = (false, true);
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        let next = rest.peek().copied();
        let first = out.is_empty();
        visible(c, &mut out, |c, out| match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '@' => out.push_str("&#64;"),
            ':' if next.is_some_and(|next| next != ' ') => out.push_str("&#58;"),
            c => {
                let escaped = match c {
                    '\\' | '`' | '*' | '[' | ']' | '#' | '|' | '~' | '$' | '!' => true,
                    '_' => !(word && next.is_some_and(char::is_alphanumeric)),
                    '-' | '+' => first,
                    '.' | ')' => digits && !first && next.is_none_or(|next| next == ' '),
                    _ => false,
                };
                out.extend(escaped.then_some('\\'));
                out.push(c);
            }
        });
        word = c.is_alphanumeric();
        digits &= c.is_ascii_digit();
    }
    out
}

/// A code span of Markdown; plain text where what it holds could end it, or the cell of a table around it.
#[must_use]
pub fn code(text: &str) -> String {
    let harmless =
        |c: char| c == ' ' || c.is_alphanumeric() || (c.is_ascii_graphic() && !matches!(c, '`' | '|' | '<' | '&'));
    if !text.is_empty() && text.chars().all(harmless) { format!("`{text}`") } else { markdown(text) }
}

/// A sentence in which names stand between backticks, with `escape` for what is around them and `code` for the names.
fn sentence(text: &str, escape: fn(&str) -> String, code: &dyn Fn(&str) -> String) -> String {
    let parts: Vec<&str> = text.split('`').collect();
    if parts.len().is_multiple_of(2) {
        return escape(text);
    }
    parts.iter().enumerate().map(|(i, part)| if i % 2 == 0 { escape(part) } else { code(part) }).collect()
}

/// A sentence of lite's own, with names between backticks, for an HTML element.
#[must_use]
pub fn html_sentence(text: &str) -> String {
    sentence(text, html, &|name| format!("<code>{}</code>", html(name)))
}

/// A sentence of lite's own, with names between backticks, for a line of Markdown.
#[must_use]
pub fn markdown_sentence(text: &str) -> String {
    sentence(text, markdown, &code)
}

/// A double-quoted scalar of YAML.
#[must_use]
pub fn yaml(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => {
                out.push('\\');
                out.push(c);
            }
            ' ' => out.push(c),
            // Angle brackets mean nothing to YAML, but a careless reader may take the front matter for HTML.
            c if (c.is_ascii_graphic() && !matches!(c, '<' | '>' | '&')) || c.is_alphanumeric() => out.push(c),
            c if u32::from(c) <= 0xFFFF => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push_str(&format!("\\U{:08x}", u32::from(c))),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOSTILE: &str = "a</script><b onload='x'>&amp;\"|`\n# [x](javascript:y)\u{202e}\u{0}";

    #[test]
    fn html_has_no_markup_left() {
        let safe = html(HOSTILE);
        assert!(!safe.contains(['<', '>', '"', '\'', '\n', '\u{202e}', '\u{0}']), "{safe}");
        assert!(safe.starts_with("a&lt;/script&gt;&lt;b onload=&#39;x&#39;&gt;&amp;amp;&quot;"), "{safe}");
        assert!(safe.contains("＼u202e"), "{safe}");
    }

    #[test]
    fn markdown_has_no_markup_left() {
        let safe = markdown(HOSTILE);
        assert!(!safe.contains(['<', '>', '\n', '\u{202e}']), "{safe}");
        for wanted in ["\\|", "\\`", "\\#", "\\[x\\](javascript&#58;y)"] {
            assert!(safe.contains(wanted), "{wanted} in {safe}");
        }
        assert_eq!(markdown("Qwen3-8B, 4 bits, group_size 128."), "Qwen3-8B, 4 bits, group_size 128.");
        assert_eq!(markdown("- _a_ b_c"), "\\- \\_a\\_ b_c");
        assert_eq!(markdown("12. a: b -1.5 https://x"), "12\\. a: b -1.5 https&#58;//x");
    }

    #[test]
    fn code_spans_cannot_be_left() {
        assert_eq!(code("q_proj"), "`q_proj`");
        assert_eq!(code("a`b"), "a\\`b");
        assert_eq!(code("a|<b>\nc"), "a\\|&lt;b&gt;＼uac");
        assert_eq!(html_sentence("`a` is <b>"), "<code>a</code> is &lt;b&gt;");
        assert_eq!(html_sentence("`a` is ` odd"), "`a` is ` odd");
        assert_eq!(markdown_sentence("`a_b` is `<x>`"), "`a_b` is &lt;x&gt;");
    }

    proptest! {
        #[test]
        fn yaml_reads_back(text in any::<String>()) {
            let read: String = serde_yaml::from_str(&yaml(&text)).unwrap();
            prop_assert_eq!(read, text);
        }

        #[test]
        fn html_of_anything_is_inert(text in any::<String>()) {
            let safe = html(&text);
            prop_assert!(!safe.contains(['<', '>', '"', '\'']));
            for part in safe.split('&').skip(1) {
                prop_assert!(["amp;", "lt;", "gt;", "quot;", "#39;"].iter().any(|e| part.starts_with(e)));
            }
        }
    }
}
