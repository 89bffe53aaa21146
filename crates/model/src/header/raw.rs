//! The JSON of a header, with limits on everything that a hostile file could make large.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::{MAX_ENTRIES, MAX_NAME, MAX_RANK, METADATA};
use crate::text::printable;

/// The header JSON as it stands.
pub(super) struct RawHeader {
    pub(super) tensors: Vec<(String, RawTensor)>,
    pub(super) metadata: BTreeMap<String, String>,
}

/// A key beyond these is refused: it may change what the bytes mean, and a reader that does not know it cannot tell.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawTensor {
    pub(super) dtype: String,
    pub(super) shape: Shape,
    pub(super) data_offsets: [u64; 2],
}

/// Dimensions, at most [`MAX_RANK`] of them.
pub(super) struct Shape(pub(super) Vec<u64>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Dimensions;
        impl<'de> Visitor<'de> for Dimensions {
            type Value = Shape;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of dimensions")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(dimension) = seq.next_element()? {
                    if shape.len() == MAX_RANK {
                        return Err(A::Error::custom(format!("more than {MAX_RANK} dimensions")));
                    }
                    shape.push(dimension);
                }
                Ok(Shape(shape))
            }
        }
        deserializer.deserialize_seq(Dimensions)
    }
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of tensor names")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut tensors = Vec::new();
                let mut metadata = None;
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        let Metadata(map) = map.next_value().map_err(|e| in_entry(METADATA, &e))?;
                        if metadata.replace(map).is_some() {
                            return Err(A::Error::custom(format!("`{METADATA}` appears twice")));
                        }
                        continue;
                    }
                    if name.len() > MAX_NAME {
                        let (len, name) = (name.len(), printable(&name));
                        return Err(A::Error::custom(format!("tensor name `{name}` of {len} bytes, limit {MAX_NAME}")));
                    }
                    if tensors.len() == MAX_ENTRIES {
                        return Err(A::Error::custom(format!("more than {MAX_ENTRIES} tensors")));
                    }
                    let tensor = map.next_value().map_err(|e| in_entry(&name, &e))?;
                    tensors.push((name, tensor));
                }
                Ok(RawHeader { tensors, metadata: metadata.unwrap_or_default() })
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// The metadata map: strings only, no equal keys.
struct Metadata(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Strings;
        impl<'de> Visitor<'de> for Strings {
            type Value = Metadata;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                let mut out = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if out.len() == MAX_ENTRIES {
                        return Err(A::Error::custom(format!("more than {MAX_ENTRIES} entries")));
                    }
                    if out.contains_key(&key) {
                        return Err(A::Error::custom(format!("key `{}` appears twice", printable(&key))));
                    }
                    out.insert(key, value);
                }
                Ok(Metadata(out))
            }
        }
        deserializer.deserialize_map(Strings)
    }
}

/// Puts the entry's name in front of what is wrong with it.
fn in_entry<E: serde::de::Error>(name: &str, error: &E) -> E {
    E::custom(format!("entry `{}`: {error}", printable(name)))
}
