//! Chat templates: Jinja as transformers runs it, in a sandbox with limits.
//!
//! transformers renders with `ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)`, loop controls, a
//! `tojson` that is `json.dumps(ensure_ascii=False)`, `raise_exception`, `strftime_now`, and the variables `messages`,
//! `tools`, `documents`, `add_generation_prompt` and the special tokens. The same is set up here, on `minijinja`, which
//! gives templates no access to anything but these values.

use std::collections::BTreeMap;
use std::io::Write;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use crate::document::Message;
use crate::error::{CalibError, guard};
use crate::tojson::to_json;

/// The largest template source; the largest in the wild have 50 kB.
const MAX_SOURCE_BYTES: usize = 1 << 20;
/// The longest conversation text a template may produce.
const MAX_OUTPUT_BYTES: usize = 16 << 20;
/// Instructions per conversation: a bound on time. Real templates take some hundreds per turn.
const FUEL: u64 = 5_000_000;
/// Nested calls, macros and loops: well below what a thread's stack holds.
const RECURSION: usize = 120;

/// The date `strftime_now` gives, so that results do not depend on the day they are made: Friday, 26 July 2024, noon,
/// the date Llama 3.1's template itself falls back to.
const TODAY: [(char, &str); 18] = [
    ('Y', "2024"),
    ('y', "24"),
    ('m', "07"),
    ('d', "26"),
    ('B', "July"),
    ('b', "Jul"),
    ('A', "Friday"),
    ('a', "Fri"),
    ('H', "12"),
    ('I', "12"),
    ('M', "00"),
    ('S', "00"),
    ('p', "PM"),
    ('j', "208"),
    ('F', "2024-07-26"),
    ('T', "12:00:00"),
    ('e', "26"),
    ('%', "%"),
];

/// A compiled chat template with the tokenizer's special tokens.
///
/// Bounds per conversation: 5 million instructions, recursion 120, 16 MiB of output; 1 MiB of source. A template that
/// doubles a string in a variable over and over can still claim memory before it spends its instructions.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    variables: BTreeMap<String, String>,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles a template; `variables` are the special tokens by name (`bos_token`, …).
    ///
    /// # Errors
    /// A message: too long, or a syntax error with its line.
    pub(crate) fn new(source: String, variables: BTreeMap<String, String>) -> Result<Self, String> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(format!("its chat template has {} bytes (limit {MAX_SOURCE_BYTES})", source.len()));
        }
        let mut environment = Environment::new();
        let syntax =
            SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|e| e.to_string())?;
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.set_recursion_limit(RECURSION);
        environment.set_fuel(Some(FUEL));
        environment.add_filter("tojson", tojson);
        // As Jinja2 has them: strings count, none does not.
        environment.add_test("iterable", |value: &Value| {
            value.kind() == ValueKind::String || (!value.is_none() && value.try_iter().is_ok())
        });
        environment.add_test("sequence", |value: &Value| {
            matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map)
        });
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, format!("the template says: {message}")))
        });
        environment.add_function("strftime_now", |format: String| strftime(&format));
        let source = plain_blocks(&source);
        let compiled = guard(|| environment.add_template_owned(NAME, source));
        compiled
            .and_then(|r| r.map_err(|e| one_line(&e)))
            .map_err(|e| format!("its chat template does not compile ({e})"))?;
        Ok(Self { environment, variables })
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// The template refuses the conversation (`raise_exception`), fails, or runs into a limit.
    pub(crate) fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, CalibError> {
        let failed = |detail: String| CalibError::ChatTemplate { detail };
        let messages: Value = messages
            .iter()
            .map(|m| Value::from_pairs([("role", Value::from(&m.role)), ("content", Value::from(&m.content))]))
            .collect();
        let fixed = [
            ("messages".to_owned(), messages),
            ("tools".to_owned(), Value::from(())),
            ("documents".to_owned(), Value::from(())),
            ("add_generation_prompt".to_owned(), Value::from(add_generation_prompt)),
        ];
        let tokens = self.variables.iter().map(|(k, v)| (k.clone(), Value::from(v)));
        let context = Value::from_pairs(tokens.chain(fixed));
        let mut output = Capped(Vec::new());
        let rendered = guard(|| {
            let template = self.environment.get_template(NAME)?;
            template.render_captured_to(context, &mut output).map(drop)
        });
        match rendered {
            Err(panic) => return Err(failed(panic)),
            Ok(Err(_)) if output.0.len() >= MAX_OUTPUT_BYTES => {
                return Err(failed(format!("more than {} MiB of output for one conversation", MAX_OUTPUT_BYTES >> 20)));
            }
            Ok(Err(e)) if e.kind() == ErrorKind::OutOfFuel => {
                return Err(failed(format!(
                    "more than {FUEL} instructions for one conversation; is it an endless loop?"
                )));
            }
            Ok(Err(e)) => return Err(failed(one_line(&e))),
            Ok(Ok(())) => {}
        }
        String::from_utf8(output.0).map_err(|e| failed(e.to_string()))
    }
}

/// An output that refuses to grow beyond the limit.
struct Capped(Vec<u8>);

impl Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let room = MAX_OUTPUT_BYTES.saturating_sub(self.0.len());
        if room == 0 && !bytes.is_empty() {
            return Err(std::io::Error::other("output limit reached"));
        }
        let count = bytes.len().min(room);
        self.0.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// transformers marks the assistant's tokens with `{% generation %}…{% endgeneration %}`, which prints its
/// content unchanged: an `if true` with the same white space rules.
fn plain_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end + 2);
        let inner = tag[2..end].trim_matches(['-', '+']).trim();
        let statement = match inner {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        match statement {
            Some(statement) => out.push_str(&tag.replacen(inner, statement, 1)),
            None => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

fn strftime(format: &str) -> String {
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            // `%-d` and the like: without a leading zero.
            Some('-') => match chars.next().and_then(|c| lookup(c).map(|v| (c, v))) {
                Some((_, value)) => {
                    out.push_str(value.trim_start_matches('0').get(..).filter(|v| !v.is_empty()).unwrap_or("0"))
                }
                None => out.push_str("%-"),
            },
            Some(c) => match lookup(c) {
                Some(value) => out.push_str(value),
                None => out.extend(['%', c]),
            },
            None => out.push('%'),
        }
    }
    out
}

fn lookup(directive: char) -> Option<&'static str> {
    TODAY.iter().find(|(c, _)| *c == directive).map(|(_, value)| *value)
}

/// transformers' `tojson`: `json.dumps(x, ensure_ascii=False, indent=…, separators=…, sort_keys=…)`.
fn tojson(value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let sort: Option<bool> = kwargs.get("sort_keys")?;
    let _ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    kwargs.assert_all_used()?;
    let pair = separators.and_then(|s| <[String; 2]>::try_from(s).ok());
    to_json(value, indent, pair, sort.unwrap_or(false))
}

/// The error with its causes, on one line.
fn one_line(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
