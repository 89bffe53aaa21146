//! A YAML tree that knows where each of its parts was written.

use crate::error::{Fault, Place, Problem};

/// Most nodes of a recipe, aliases expanded.
pub(crate) const MOST_NODES: usize = 20_000;

/// Deepest nesting.
pub(crate) const DEEPEST: usize = 32;

/// What becomes of a scalar; `None` leaves it.
pub(crate) type Change<'c> = dyn Fn(Place, &str) -> Result<Option<String>, Fault> + 'c;

/// One node.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) at: Place,
    pub(crate) value: Value,
}

/// What a node is.
#[derive(Debug, Clone)]
pub(crate) enum Value {
    /// Text as written; what it means depends on who asks, unless it was quoted.
    Scalar {
        text: String,
        quoted: bool,
    },
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

/// A key of a map.
#[derive(Debug, Clone)]
pub(crate) struct Key {
    pub(crate) at: Place,
    pub(crate) name: String,
}

/// A scalar without quotes, by YAML 1.2's core schema.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Plain<'t> {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(&'t str),
}

impl Node {
    pub(crate) fn scalar(at: Place, text: impl ToString) -> Self {
        Self { at, value: Value::Scalar { text: text.to_string(), quoted: false } }
    }

    /// A text that is never read as anything else.
    pub(crate) fn text(at: Place, text: impl ToString) -> Self {
        Self { at, value: Value::Scalar { text: text.to_string(), quoted: true } }
    }

    pub(crate) fn list(at: Place, items: Vec<Self>) -> Self {
        Self { at, value: Value::List(items) }
    }

    pub(crate) fn map(at: Place) -> Self {
        Self { at, value: Value::Map(Vec::new()) }
    }

    /// A map of one key.
    pub(crate) fn single(at: Place, key: &str, value: Self) -> Self {
        Self::map(at).with(key, value)
    }

    /// This map with one more key.
    pub(crate) fn with(mut self, key: &str, value: Self) -> Self {
        self.put(Key { at: value.at, name: key.to_owned() }, value);
        self
    }

    /// Puts a key into this map, in the place of one of the same name.
    pub(crate) fn put(&mut self, key: Key, value: Self) {
        if let Value::Map(entries) = &mut self.value {
            match entries.iter_mut().find(|(k, _)| k.name == key.name) {
                Some(entry) => *entry = (key, value),
                None => entries.push((key, value)),
            }
        }
    }

    /// Takes a key out of this map.
    pub(crate) fn remove(&mut self, key: &str) -> Option<(Key, Self)> {
        let Value::Map(entries) = &mut self.value else { return None };
        let found = entries.iter().position(|(k, _)| k.name == key)?;
        Some(entries.remove(found))
    }

    pub(crate) fn entries(&self) -> &[(Key, Self)] {
        match &self.value {
            Value::Map(entries) => entries,
            _ => &[],
        }
    }

    pub(crate) fn items(&self) -> &[Self] {
        match &self.value {
            Value::List(items) => items,
            _ => &[],
        }
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Self> {
        self.entries().iter().find(|(k, _)| k.name == key).map(|(_, value)| value)
    }

    /// The place of the deepest part of a dotted path that is there.
    pub(crate) fn place(&self, path: &str) -> Place {
        let mut node = self;
        for key in path.split('.') {
            match node.get(key) {
                Some(next) => node = next,
                None => break,
            }
        }
        node.at
    }

    pub(crate) fn is_null(&self) -> bool {
        matches!(&self.value, Value::Scalar { text, quoted: false } if plain(text) == Plain::Null)
    }

    /// What it is, in words.
    pub(crate) fn words(&self) -> String {
        match &self.value {
            Value::Scalar { .. } if self.is_null() => "nothing".to_owned(),
            Value::Scalar { text, .. } => format!("`{}`", lite_model::printable(text)),
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "a map".to_owned(),
        }
    }

    /// Itself and everything below it.
    pub(crate) fn count(&self) -> usize {
        1 + match &self.value {
            Value::Scalar { .. } => 0,
            Value::List(items) => items.iter().map(Self::count).sum(),
            Value::Map(entries) => entries.iter().map(|(_, value)| value.count()).sum(),
        }
    }

    /// Levels below and with this one.
    pub(crate) fn depth(&self) -> usize {
        1 + match &self.value {
            Value::Scalar { .. } => 0,
            Value::List(items) => items.iter().map(Self::depth).max().unwrap_or(0),
            Value::Map(entries) => entries.iter().map(|(_, value)| value.depth()).max().unwrap_or(0),
        }
    }

    /// `other` on top of this: maps key by key, everything else as a whole.
    pub(crate) fn merge(&mut self, other: &Self) {
        match (&mut self.value, &other.value) {
            (Value::Map(_), Value::Map(theirs)) => {
                for (key, value) in theirs {
                    match &mut self.value {
                        Value::Map(ours) => match ours.iter_mut().find(|(k, _)| k.name == key.name) {
                            Some((_, old)) => old.merge(value),
                            None => ours.push((key.clone(), value.clone())),
                        },
                        _ => return,
                    }
                }
            }
            _ => *self = other.clone(),
        }
    }

    /// Puts `value` at a dotted path. Numbers choose from lists; in a list of single-key maps, so do the keys.
    pub(crate) fn set(&mut self, path: &str, value: Self) -> Result<(), Fault> {
        let at = value.at;
        let (first, rest) = path.split_once('.').map_or((path, None), |(first, rest)| (first, Some(rest)));
        let bad = |message: String| Err(Fault { at, problem: Problem::Value(message) });
        if first.is_empty() {
            return bad("an empty name; write it like calibration.samples=64".to_owned());
        }
        if self.is_null() {
            self.value = Value::Map(Vec::new());
        }
        let words = self.words();
        let slot = match &mut self.value {
            Value::List(items) => {
                let count = items.len();
                let named = |item: &Self| matches!(item.entries(), [(key, _)] if key.name == first);
                match first.parse::<usize>() {
                    Ok(index) => match items.get_mut(index) {
                        Some(item) => item,
                        None => return bad(format!("`{first}` is beyond the {count} entries of the list")),
                    },
                    Err(_) => match items.iter_mut().find(|item| named(item)).map(|item| &mut item.value) {
                        Some(Value::Map(entries)) if !entries.is_empty() => &mut entries[0].1,
                        _ => {
                            return bad(format!(
                                "`{}` is no entry of the list; give its number, from 0",
                                lite_model::printable(first)
                            ));
                        }
                    },
                }
            }
            Value::Scalar { .. } => {
                return bad(format!("`{}` is below {words}, which has no parts", lite_model::printable(first)));
            }
            Value::Map(entries) => {
                let found = match entries.iter().position(|(key, _)| key.name == first) {
                    Some(found) => found,
                    None => {
                        entries.push((Key { at, name: first.to_owned() }, Self::map(at)));
                        entries.len() - 1
                    }
                };
                &mut entries[found].1
            }
        };
        match rest {
            Some(rest) => slot.set(rest, value),
            None => {
                *slot = value;
                Ok(())
            }
        }
    }

    /// Replaces each scalar that `change` answers for.
    pub(crate) fn rewrite(&mut self, change: &Change<'_>) -> Result<(), Fault> {
        let at = self.at;
        match &mut self.value {
            Value::Scalar { text, .. } => {
                if let Some(new) = change(at, text)? {
                    *text = new;
                }
                Ok(())
            }
            Value::List(items) => items.iter_mut().try_for_each(|item| item.rewrite(change)),
            Value::Map(entries) => entries.iter_mut().try_for_each(|(_, value)| value.rewrite(change)),
        }
    }
}

/// What an unquoted scalar is. `True` and `TRUE` are booleans as well: Python writes them.
pub(crate) fn plain(text: &str) -> Plain<'_> {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Plain::Null,
        "true" | "True" | "TRUE" => return Plain::Bool(true),
        "false" | "False" | "FALSE" => return Plain::Bool(false),
        ".inf" | "+.inf" | ".Inf" => return Plain::Float(f64::INFINITY),
        "-.inf" | "-.Inf" => return Plain::Float(f64::NEG_INFINITY),
        ".nan" | ".NaN" => return Plain::Float(f64::NAN),
        _ => {}
    }
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if let Some(hex) = digits.strip_prefix("0x") {
        if let Ok(value) = i64::from_str_radix(hex, 16) {
            return Plain::Int(if text.starts_with('-') { -value } else { value });
        }
    } else if digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        if let Ok(value) = text.parse() {
            return Plain::Int(value);
        }
        let number = |c: char| c.is_ascii_digit() || matches!(c, '.' | 'e' | 'E' | '+' | '-');
        if digits.chars().all(number)
            && let Ok(value) = text.parse()
        {
            return Plain::Float(value);
        }
    }
    Plain::Text(text)
}
