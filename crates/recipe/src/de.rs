//! serde over a tree, so that each error has the place of the node it is about.

use std::fmt;

use serde::de::{self, DeserializeSeed, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use serde::forward_to_deserialize_any;

use crate::error::{Fault, Place, Problem};
use crate::node::{Key, Node, Plain, Value, plain};

/// Reads `node` as a `T`.
pub(crate) fn read<'n, T: de::Deserialize<'n>>(node: &'n Node) -> Result<T, Fault> {
    T::deserialize(Reader(node)).map_err(|error| Fault { at: error.at.unwrap_or(node.at), problem: error.problem })
}

#[derive(Debug)]
pub(crate) struct Error {
    at: Option<Place>,
    problem: Problem,
}

impl Error {
    /// The place, if a deeper reader has not told a better one.
    fn or_at(self, at: Place) -> Self {
        Self { at: self.at.or(Some(at)), ..self }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.problem)
    }
}

impl std::error::Error for Error {}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

impl de::Error for Error {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self { at: None, problem: Problem::Value(message.to_string()) }
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self { at: None, problem: Problem::UnknownKey { key: field.to_owned(), known: owned(expected) } }
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        let shown = lite_model::printable(variant);
        let hint = match crate::error::nearest(variant, expected.iter().copied()) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("known are {}", expected.join(", ")),
        };
        Self { at: None, problem: Problem::Value(format!("`{shown}` is none of the choices here; {hint}")) }
    }

    fn missing_field(field: &'static str) -> Self {
        Self { at: None, problem: Problem::Value(format!("`{field}` is missing here")) }
    }

    fn invalid_type(found: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        // Rust's names of types mean nothing to whoever writes a recipe.
        let expected = match expected.to_string().as_str() {
            "i8" | "i16" | "i32" | "i64" => "a whole number".to_owned(),
            "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more".to_owned(),
            "f32" | "f64" => "a number".to_owned(),
            "a boolean" => "true or false".to_owned(),
            other => other.to_owned(),
        };
        Self { at: None, problem: Problem::Value(format!("found {}, wanted {expected}", words(found))) }
    }

    fn invalid_value(found: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::invalid_type(found, expected)
    }
}

fn words(found: de::Unexpected<'_>) -> String {
    match found {
        de::Unexpected::Str(text) => format!("`{}`", lite_model::printable(text)),
        de::Unexpected::Unit => "nothing".to_owned(),
        de::Unexpected::Map => "a map".to_owned(),
        de::Unexpected::Seq => "a list".to_owned(),
        other => other.to_string(),
    }
}

#[derive(Clone, Copy)]
struct Reader<'n>(&'n Node);

impl<'n> Reader<'n> {
    fn at<T>(self, result: Result<T, Error>) -> Result<T, Error> {
        result.map_err(|error| error.or_at(self.0.at))
    }
}

impl<'n> de::Deserializer<'n> for Reader<'n> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, Error> {
        self.at(match &self.0.value {
            Value::Scalar { text, quoted: true } => visitor.visit_borrowed_str(text),
            Value::Scalar { text, quoted: false } => match plain(text) {
                Plain::Null => visitor.visit_unit(),
                Plain::Bool(value) => visitor.visit_bool(value),
                Plain::Int(value) => visitor.visit_i64(value),
                Plain::Float(value) => visitor.visit_f64(value),
                Plain::Text(text) => visitor.visit_borrowed_str(text),
            },
            Value::List(items) => visitor.visit_seq(Items(items.iter())),
            Value::Map(entries) => visitor.visit_map(Entries { entries: entries.iter(), value: None }),
        })
    }

    /// A name may look like a number: a commit, a version.
    fn deserialize_str<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.0.value {
            Value::Scalar { text, .. } if !self.0.is_null() => self.at(visitor.visit_borrowed_str(text)),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_string<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, Error> {
        self.at(if self.0.is_null() { visitor.visit_none() } else { visitor.visit_some(self) })
    }

    fn deserialize_newtype_struct<V: Visitor<'n>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        self.at(visitor.visit_newtype_struct(self))
    }

    /// `- gptq:` with nothing after it has no settings; that is a map without keys.
    fn deserialize_struct<V: Visitor<'n>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        if self.0.is_null() {
            return self.at(visitor.visit_map(Entries { entries: [].iter(), value: None }));
        }
        self.deserialize_any(visitor)
    }

    fn deserialize_enum<V: Visitor<'n>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.at(match &self.0.value {
            Value::Scalar { text, .. } => visitor.visit_enum(Choice { name: text, at: self.0.at, value: None }),
            Value::Map(entries) if entries.len() == 1 => {
                let (key, value) = &entries[0];
                visitor.visit_enum(Choice { name: &key.name, at: key.at, value: Some(value) })
            }
            _ => Err(de::Error::custom(format!("found {}, wanted a map of one key, like `awq: {{}}`", self.0.words()))),
        })
    }

    forward_to_deserialize_any! {
        <V: Visitor<'n>>
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char bytes byte_buf unit unit_struct seq tuple tuple_struct
        map identifier ignored_any
    }
}

struct Items<'n>(std::slice::Iter<'n, Node>);

impl<'n> SeqAccess<'n> for Items<'n> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'n>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        self.0.next().map(|item| Reader(item).at(seed.deserialize(Reader(item)))).transpose()
    }
}

struct Entries<'n> {
    entries: std::slice::Iter<'n, (Key, Node)>,
    value: Option<&'n Node>,
}

impl<'n> MapAccess<'n> for Entries<'n> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'n>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let Some((key, value)) = self.entries.next() else { return Ok(None) };
        self.value = Some(value);
        seed.deserialize(key.name.as_str().into_deserializer()).map(Some).map_err(|error: Error| error.or_at(key.at))
    }

    fn next_value_seed<V: DeserializeSeed<'n>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let value = self.value.take().ok_or_else(|| de::Error::custom("a value without its key"))?;
        Reader(value).at(seed.deserialize(Reader(value)))
    }
}

struct Choice<'n> {
    name: &'n str,
    at: Place,
    value: Option<&'n Node>,
}

impl<'n> de::EnumAccess<'n> for Choice<'n> {
    type Error = Error;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'n>>(self, seed: V) -> Result<(V::Value, Self), Error> {
        let variant = seed.deserialize(self.name.into_deserializer()).map_err(|error: Error| error.or_at(self.at))?;
        Ok((variant, self))
    }
}

impl<'n> de::VariantAccess<'n> for Choice<'n> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        match self.value.filter(|value| !value.is_null()) {
            None => Ok(()),
            Some(value) => {
                let message = format!("found {}, wanted nothing after `{}`", value.words(), self.name);
                Err(Error { at: Some(value.at), problem: Problem::Value(message) })
            }
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'n>>(self, seed: T) -> Result<T::Value, Error> {
        match self.value {
            Some(value) => Reader(value).at(seed.deserialize(Reader(value))),
            None => {
                let nothing = Nothing;
                seed.deserialize(nothing).map_err(|error: Error| error.or_at(self.at))
            }
        }
    }

    fn tuple_variant<V: Visitor<'n>>(self, _: usize, _: V) -> Result<V::Value, Error> {
        Err(de::Error::custom("no choice here is a tuple"))
    }

    fn struct_variant<V: Visitor<'n>>(self, _: &'static [&'static str], _: V) -> Result<V::Value, Error> {
        Err(de::Error::custom("no choice here is a struct"))
    }
}

/// A stage named without settings.
struct Nothing;

impl<'n> de::Deserializer<'n> for Nothing {
    type Error = Error;

    fn deserialize_any<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(Entries { entries: [].iter(), value: None })
    }

    forward_to_deserialize_any! {
        <V: Visitor<'n>>
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}
