//! What datasets are made of: texts and conversations; and how a row becomes one.

use serde_json::{Map, Value};

use crate::registry::Content;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant` or whatever the data says.
    pub role: String,
    /// The text of the turn.
    pub content: String,
}

impl Message {
    /// A turn of `role` saying `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// One row of a dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Document {
    /// Plain text.
    Text(String),
    /// A conversation, for the chat template.
    Chat(Vec<Message>),
    /// A conversation that may also be read as plain text, its turns joined by newlines.
    Exchange(Vec<Message>),
}

impl Document {
    /// Bytes of text held, for size limits.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::Text(text) => text.len() as u64,
            Self::Chat(messages) | Self::Exchange(messages) => {
                messages.iter().map(|m| (m.role.len() + m.content.len()) as u64).sum()
            }
        }
    }
}

/// Which fields of a row make a document.
#[derive(Debug, Clone)]
pub(crate) enum Fields {
    /// Whatever is there, of `text`, `messages`, `prompt`.
    Any,
    /// One text column.
    Text(String),
    /// A conversation column, kept to these roles (all if empty).
    Messages(String, Vec<String>),
    /// Alpaca's `instruction`, `input`, `output`.
    Instruction,
}

const ANSWERS: [&str; 3] = ["completion", "response", "output"];
const KNOWN: &str = "`text`, `messages` or `prompt` (with `completion`, `response` or `output`)";

impl Fields {
    /// The fields of a registered dataset.
    pub(crate) fn of(content: Content, column: Option<&str>, roles: &[String]) -> Self {
        let column = column.unwrap_or("text").to_owned();
        match content {
            Content::Text => Self::Text(column),
            Content::Messages => Self::Messages(column, roles.to_vec()),
            Content::Instruction => Self::Instruction,
        }
    }

    /// Whether a column of this name is read.
    pub(crate) fn wants(&self, column: &str) -> bool {
        match self {
            Self::Any => ["text", "messages", "prompt"].contains(&column) || ANSWERS.contains(&column),
            Self::Text(name) | Self::Messages(name, _) => name == column,
            Self::Instruction => ["instruction", "input", "output"].contains(&column),
        }
    }

    /// What is looked for, for messages.
    pub(crate) fn wanted(&self) -> String {
        match self {
            Self::Any => KNOWN.to_owned(),
            Self::Text(name) | Self::Messages(name, _) => format!("`{name}`"),
            Self::Instruction => "`instruction`, `input` and `output`".to_owned(),
        }
    }

    /// Turns a row into a document; the error says what is wrong with the row.
    pub(crate) fn document(&self, mut row: Map<String, Value>) -> Result<Document, String> {
        match self {
            Self::Any => local_row(row),
            Self::Text(name) => Ok(Document::Text(text(&mut row, name)?)),
            Self::Messages(name, roles) => {
                let value = row.get_mut(name).map(Value::take).ok_or_else(|| missing(&row, &self.wanted()))?;
                let mut turns = messages(value, name)?;
                turns.retain(|m| roles.is_empty() || roles.contains(&m.role));
                Ok(Document::Chat(turns))
            }
            Self::Instruction => {
                let user = format!("{} {}", text(&mut row, "instruction")?, text(&mut row, "input")?);
                let answer = text(&mut row, "output")?;
                Ok(Document::Chat(vec![Message::new("user", user), Message::new("assistant", answer)]))
            }
        }
    }
}

/// A row of a local file. A field that is null counts as absent.
fn local_row(mut row: Map<String, Value>) -> Result<Document, String> {
    let present = |row: &Map<String, Value>, name: &str| row.get(name).is_some_and(|v| !v.is_null());
    if present(&row, "text") {
        return Ok(Document::Text(text(&mut row, "text")?));
    }
    if present(&row, "messages") {
        return Ok(Document::Chat(messages(row.get_mut("messages").map(Value::take).unwrap_or_default(), "messages")?));
    }
    if !present(&row, "prompt") {
        return Err(missing(&row, KNOWN));
    }
    let mut turns = match row.get_mut("prompt").map(Value::take) {
        Some(list @ Value::Array(_)) => messages(list, "prompt")?,
        Some(Value::String(prompt)) => vec![Message::new("user", prompt)],
        other => return Err(format!("`prompt` is {}, wanted a string", type_name(other.as_ref()))),
    };
    if let Some(name) = ANSWERS.into_iter().find(|name| present(&row, name)) {
        match row.get_mut(name).map(Value::take) {
            Some(list @ Value::Array(_)) => turns.extend(messages(list, name)?),
            Some(Value::String(answer)) => turns.push(Message::new("assistant", answer)),
            other => return Err(format!("`{name}` is {}, wanted a string", type_name(other.as_ref()))),
        }
    }
    Ok(Document::Exchange(turns))
}

fn missing(row: &Map<String, Value>, wanted: &str) -> String {
    let mut found: Vec<_> =
        row.iter().map(|(k, v)| format!("`{k}`{}", if v.is_null() { " (null)" } else { "" })).collect();
    let more = found.len().saturating_sub(12);
    found.truncate(12);
    let found = if found.is_empty() { "no field at all".to_owned() } else { found.join(", ") };
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("the row has {found}{more}; wanted {wanted}")
}

fn text(row: &mut Map<String, Value>, name: &str) -> Result<String, String> {
    match row.get_mut(name) {
        Some(Value::String(text)) => Ok(std::mem::take(text)),
        Some(other) => Err(format!("`{name}` is {}, wanted a string", type_name(Some(other)))),
        None => Err(missing(row, &format!("`{name}`"))),
    }
}

fn messages(value: Value, name: &str) -> Result<Vec<Message>, String> {
    let Value::Array(turns) = value else {
        return Err(format!("`{name}` is {}, wanted a list of {{role, content}}", type_name(Some(&value))));
    };
    if turns.is_empty() {
        return Err(format!("`{name}` is an empty list"));
    }
    let one = |(i, turn): (usize, Value)| {
        let Value::Object(mut turn) = turn else {
            return Err(format!("`{name}`[{i}] is {}, wanted {{role, content}}", type_name(Some(&turn))));
        };
        let Some(Value::String(role)) = turn.get_mut("role").map(Value::take) else {
            return Err(format!("`{name}`[{i}] has no `role` that is a string"));
        };
        let content = content(turn.get_mut("content").map(Value::take)).map_err(|e| format!("`{name}`[{i}]: {e}"))?;
        Ok(Message { role, content })
    };
    turns.into_iter().enumerate().map(one).collect()
}

/// A turn's content: a string, or a list of text parts. A turn that only calls a tool has null: no text.
fn content(value: Option<Value>) -> Result<String, String> {
    match value {
        Some(Value::String(text)) => Ok(text),
        Some(Value::Null) => Ok(String::new()),
        Some(Value::Array(parts)) => {
            let mut text = String::new();
            for part in &parts {
                match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
                    (Some("text") | None, Some(t)) => text.push_str(t),
                    (kind, _) => {
                        let kind = kind.unwrap_or("unknown");
                        return Err(format!("`content` has a part of type `{kind}`; only text parts can be used"));
                    }
                }
            }
            Ok(text)
        }
        None => Err("`content` is missing".to_owned()),
        other => Err(format!("`content` is {}, wanted a string", type_name(other.as_ref()))),
    }
}

fn type_name(value: Option<&Value>) -> &'static str {
    match value {
        None => "absent",
        Some(Value::Null) => "null",
        Some(Value::Bool(_)) => "a boolean",
        Some(Value::Number(_)) => "a number",
        Some(Value::String(_)) => "a string",
        Some(Value::Array(_)) => "a list",
        Some(Value::Object(_)) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn row(json: &str) -> Map<String, Value> {
        serde_json::from_str(json).expect("test rows are JSON objects")
    }

    #[test]
    fn rows_become_documents() {
        let local = |json| Fields::Any.document(row(json));
        assert_eq!(local(r#"{"text":"a","url":"b"}"#), Ok(Document::Text("a".into())));
        assert_eq!(
            local(
                r#"{"messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}]}"#
            ),
            Ok(Document::Chat(vec![Message::new("user", "ab")]))
        );
        assert_eq!(
            local(r#"{"prompt":"a","output":"b","text":null}"#),
            Ok(Document::Exchange(vec![Message::new("user", "a"), Message::new("assistant", "b")]))
        );
        assert_eq!(local(r#"{"prompt":"a"}"#), Ok(Document::Exchange(vec![Message::new("user", "a")])));
    }

    #[test]
    fn registered_rows_become_documents() {
        let chat = Fields::of(Content::Messages, Some("messages"), &["user".into(), "assistant".into()]);
        let json = r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"u"}]}"#;
        assert_eq!(chat.document(row(json)), Ok(Document::Chat(vec![Message::new("user", "u")])));
        let alpaca = r#"{"instruction":"i","input":"","output":"o"}"#;
        assert_eq!(
            Fields::Instruction.document(row(alpaca)),
            Ok(Document::Chat(vec![Message::new("user", "i "), Message::new("assistant", "o")]))
        );
    }

    #[test]
    fn bad_rows_say_what_was_found() {
        for (json, wanted) in [
            (r#"{"question":"a","answer":"b"}"#, "the row has `question`, `answer`; wanted `text`, `messages`"),
            (r#"{}"#, "no field at all"),
            (r#"{"text":null}"#, "`text` (null)"),
            (r#"{"text":5}"#, "`text` is a number, wanted a string"),
            (r#"{"messages":{}}"#, "`messages` is an object"),
            (r#"{"messages":[]}"#, "empty list"),
            (r#"{"messages":[{"content":"a"}]}"#, "`messages`[0] has no `role`"),
            (r#"{"messages":[{"role":"user","content":[{"type":"image"}]}]}"#, "part of type `image`"),
            (r#"{"prompt":true}"#, "`prompt` is a boolean"),
        ] {
            let error = Fields::Any.document(row(json)).expect_err(json);
            assert!(error.contains(wanted), "{json}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_row_panics(
            key in "text|messages|prompt|output|role|content",
            inner in "[a-z\\[\\]{}\":,0-9]{0,40}",
        ) {
            let json = format!("{{\"{key}\":{inner}}}");
            if let Ok(row) = serde_json::from_str(&json) {
                let _ = Fields::Any.document(row);
            }
        }
    }
}
