//! Reading maps of other tools: what is read, what is known to mean nothing here, and what nobody knows.

use std::cell::RefCell;

use crate::error::{Fault, Place, Problem, nearest};
use crate::node::{Node, Plain, Value, plain};

/// A map of which every key is accounted for.
pub(crate) struct Fields<'n> {
    node: &'n Node,
    /// Its name, for messages.
    name: String,
    asked: RefCell<Vec<&'static str>>,
}

/// Keys without meaning here, with their lines.
pub(crate) type Ignored = Vec<(Place, String)>;

impl<'n> Fields<'n> {
    /// # Errors
    /// `node` is no map.
    pub(crate) fn new(node: &'n Node, name: &str) -> Result<Self, Fault> {
        match node.value {
            Value::Map(_) => Ok(Self { node, name: name.to_owned(), asked: RefCell::default() }),
            _ => Err(Fault::value(node.at, format!("`{name}` is {}, wanted a map", node.words()))),
        }
    }

    pub(crate) fn at(&self) -> Place {
        self.node.at
    }

    /// The value of a key, if there is one.
    pub(crate) fn get(&self, key: &'static str) -> Option<&'n Node> {
        self.asked.borrow_mut().push(key);
        self.node.get(key).filter(|node| !node.is_null())
    }

    /// The value of a key that must be there.
    pub(crate) fn need(&self, key: &'static str) -> Result<&'n Node, Fault> {
        self.get(key).ok_or_else(|| Fault::value(self.node.at, format!("`{}.{key}` is missing", self.name)))
    }

    pub(crate) fn map(&self, key: &'static str) -> Result<Option<Fields<'n>>, Fault> {
        self.get(key).map(|node| Fields::new(node, format!("{}.{key}", self.name).trim_start_matches('.'))).transpose()
    }

    pub(crate) fn bool(&self, key: &'static str) -> Result<Option<bool>, Fault> {
        self.read(key, "true or false", |value| match value {
            Plain::Bool(value) => Some(value),
            _ => None,
        })
    }

    pub(crate) fn int(&self, key: &'static str) -> Result<Option<i64>, Fault> {
        self.read(key, "a whole number", |value| match value {
            Plain::Int(value) => Some(value),
            _ => None,
        })
    }

    pub(crate) fn float(&self, key: &'static str) -> Result<Option<f64>, Fault> {
        self.read(key, "a number", |value| match value {
            Plain::Int(value) => Some(value as f64),
            Plain::Float(value) => Some(value),
            _ => None,
        })
    }

    fn read<T>(
        &self,
        key: &'static str,
        wanted: &str,
        take: impl Fn(Plain<'_>) -> Option<T>,
    ) -> Result<Option<T>, Fault> {
        let Some(node) = self.get(key) else { return Ok(None) };
        let value = match &node.value {
            Value::Scalar { text, quoted: false } => take(plain(text)),
            _ => None,
        };
        let wrong = || Fault::value(node.at, format!("`{}.{key}` is {}, wanted {wanted}", self.name, node.words()));
        value.map(Some).ok_or_else(wrong)
    }

    /// Any scalar as text.
    pub(crate) fn text(&self, key: &'static str) -> Result<Option<&'n str>, Fault> {
        let Some(node) = self.get(key) else { return Ok(None) };
        match &node.value {
            Value::Scalar { text, .. } => Ok(Some(text)),
            _ => Err(Fault::value(node.at, format!("`{}.{key}` is {}, wanted a name", self.name, node.words()))),
        }
    }

    /// One text, or a list of them.
    pub(crate) fn texts(&self, key: &'static str) -> Result<Vec<(Place, &'n str)>, Fault> {
        let Some(node) = self.get(key) else { return Ok(Vec::new()) };
        let items = match &node.value {
            Value::List(items) => items.as_slice(),
            _ => std::slice::from_ref(node),
        };
        items
            .iter()
            .map(|item| match &item.value {
                Value::Scalar { text, .. } => Ok((item.at, text.as_str())),
                _ => Err(Fault::value(item.at, format!("`{}.{key}` holds {}, wanted names", self.name, item.words()))),
            })
            .collect()
    }

    /// The place of a key, or of the map.
    pub(crate) fn place(&self, key: &str) -> Place {
        self.node.entries().iter().find(|(k, _)| k.name == key).map_or(self.node.at, |(k, _)| k.at)
    }

    /// Lists what was not asked for. `meaningless` are keys that the other tool knows.
    ///
    /// # Errors
    /// A key that the other tool does not know and that is nearly one that is read here: a slip of the pen.
    pub(crate) fn finish(&self, meaningless: &[&str], ignored: &mut Ignored) -> Result<(), Fault> {
        let asked = self.asked.borrow();
        for (key, _) in self.node.entries() {
            if asked.contains(&key.name.as_str()) {
                continue;
            }
            let near = nearest(&key.name, asked.iter().copied().chain(meaningless.iter().copied()));
            if !meaningless.contains(&key.name.as_str()) && near.is_some_and(|near| asked.contains(&near)) {
                let known = asked.iter().map(|&name| name.to_owned()).collect();
                return Err(Fault { at: key.at, problem: Problem::UnknownKey { key: key.name.clone(), known } });
            }
            let name = lite_model::printable(&key.name);
            ignored.push((key.at, format!("{}.{name}", self.name).trim_start_matches('.').to_owned()));
        }
        Ok(())
    }
}

/// One sentence about all keys without meaning.
pub(crate) fn sentence(ignored: &Ignored) -> Option<(Place, String)> {
    let (at, _) = ignored.first()?;
    let keys: Vec<String> = ignored.iter().map(|(at, key)| format!("{key} (line {})", at.line)).collect();
    Some((*at, format!("keys that mean nothing here: {}", keys.join(", "))))
}
