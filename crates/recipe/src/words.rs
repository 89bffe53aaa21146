//! Values of recipes that are a name or a number.

use std::borrow::Cow;

use lite_job::DeviceChoice;
use lite_pack::targets::Target;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::nearest;

/// `what` is none of `known`, with the nearest of them.
pub(crate) fn unknown(what: &str, name: &str, known: &[&str]) -> String {
    let shown = lite_model::printable(name);
    match nearest(name, known.iter().copied()) {
        Some(near) => format!("`{shown}` is no {what}; did you mean `{near}`?"),
        None => format!("`{shown}` is no {what}; known are {}", known.join(", ")),
    }
}

/// An engine, by [`Target::name`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EngineName(pub(crate) Target);

impl<'de> Deserialize<'de> for EngineName {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let name = String::deserialize(from)?;
        let known: Vec<&str> = Target::ALL.iter().map(|target| target.name()).collect();
        Target::from_name(&name).map(Self).ok_or_else(|| D::Error::custom(unknown("engine", &name, &known)))
    }
}

impl Serialize for EngineName {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.0.name())
    }
}

impl JsonSchema for EngineName {
    fn schema_name() -> Cow<'static, str> {
        "EngineName".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "enum": Target::ALL.map(Target::name)})
    }
}

/// A layout, by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LayoutName(pub(crate) String);

fn layouts() -> Vec<&'static str> {
    lite_pack::all().iter().map(|layout| layout.name()).collect()
}

impl<'de> Deserialize<'de> for LayoutName {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let name = String::deserialize(from)?;
        let known = layouts();
        if known.contains(&name.as_str()) {
            Ok(Self(name))
        } else {
            Err(D::Error::custom(unknown("layout", &name, &known)))
        }
    }
}

impl Serialize for LayoutName {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.0)
    }
}

impl JsonSchema for LayoutName {
    fn schema_name() -> Cow<'static, str> {
        "LayoutName".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "enum": layouts()})
    }
}

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DeviceName(pub(crate) DeviceChoice);

impl<'de> Deserialize<'de> for DeviceName {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let name = String::deserialize(from)?;
        let choice = match name.as_str() {
            "auto" => Some(DeviceChoice::Auto),
            "cpu" => Some(DeviceChoice::Cpu),
            "cuda" => Some(DeviceChoice::Cuda(0)),
            other => other.strip_prefix("cuda:").and_then(|index| index.parse().ok()).map(DeviceChoice::Cuda),
        };
        choice.map(Self).ok_or_else(|| D::Error::custom(unknown("device", &name, &["cpu", "cuda", "cuda:N", "auto"])))
    }
}

impl Serialize for DeviceName {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            DeviceChoice::Auto => to.serialize_str("auto"),
            DeviceChoice::Cpu => to.serialize_str("cpu"),
            DeviceChoice::Cuda(index) => to.serialize_str(&format!("cuda:{index}")),
        }
    }
}

impl JsonSchema for DeviceName {
    fn schema_name() -> Cow<'static, str> {
        "DeviceName".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "pattern": "^(auto|cpu|cuda(:[0-9]+)?)$"})
    }
}

/// α of SmoothQuant.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Alpha {
    /// By the least error.
    Auto,
    /// This one, in `[0, 1]`.
    Fixed(f64),
}

impl<'de> Deserialize<'de> for Alpha {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;
        impl Visitor<'_> for Reader {
            type Value = Alpha;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a number from 0 to 1, or `auto`")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Alpha, E> {
                if text == "auto" { Ok(Alpha::Auto) } else { Err(E::invalid_value(Unexpected::Str(text), &self)) }
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Alpha, E> {
                self.visit_f64(value as f64)
            }

            fn visit_f64<E: Error>(self, value: f64) -> Result<Alpha, E> {
                if (0.0..=1.0).contains(&value) {
                    Ok(Alpha::Fixed(value))
                } else {
                    Err(E::invalid_value(Unexpected::Float(value), &self))
                }
            }
        }
        from.deserialize_any(Reader)
    }
}

impl Serialize for Alpha {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => to.serialize_str("auto"),
            Self::Fixed(value) => to.serialize_f64(*value),
        }
    }
}

impl JsonSchema for Alpha {
    fn schema_name() -> Cow<'static, str> {
        "Alpha".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"const": "auto"}]})
    }
}

/// A number of bytes: `5GB`, `2GiB`, `1000000`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

/// Units, largest first within a family.
const UNITS: [(&str, u64); 12] = [
    ("", 1),
    ("B", 1),
    ("K", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("KIB", 1 << 10),
    ("MIB", 1 << 20),
    ("GIB", 1 << 30),
];

impl Size {
    fn read(text: &str) -> Option<Self> {
        let text = text.trim();
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let unit = unit.trim().to_ascii_uppercase();
        let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit)?;
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(*factor).filter(|&bytes| bytes > 0).map(Self);
        }
        let value = number.parse::<f64>().ok()? * *factor as f64;
        (value >= 1.0 && value < u64::MAX as f64 / 2.0).then_some(Self(value as u64))
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        Self::read(&text).ok_or_else(|| {
            let shown = lite_model::printable(&text);
            D::Error::custom(format!("`{shown}` is no size; write it like 5GB, 500MB or 2GiB"))
        })
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let whole =
            ["GB", "MB", "KB"].iter().zip([1_000_000_000, 1_000_000, 1_000]).find(|(_, f)| self.0.is_multiple_of(*f));
        match whole {
            Some((unit, factor)) => to.serialize_str(&format!("{}{unit}", self.0 / factor)),
            None => to.serialize_u64(self.0),
        }
    }
}

impl JsonSchema for Size {
    fn schema_name() -> Cow<'static, str> {
        "Size".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"anyOf": [
            {"type": "integer", "minimum": 1},
            {"type": "string", "pattern": "^ *[0-9.]+ *([KkMmGgTt]?[Bb]?|[KkMmGg][Ii][Bb]) *$"}
        ]})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_printed() {
        for (text, wanted) in
            [("5GB", 5_000_000_000), ("500 MB", 500_000_000), ("2GiB", 2 << 30), ("123", 123), ("1.5k", 1500)]
        {
            assert_eq!(Size::read(text), Some(Size(wanted)), "{text}");
        }
        for bad in ["", "GB", "-5GB", "5XB", "0", "1e30TB", "99999999999TB"] {
            assert_eq!(Size::read(bad), None, "{bad}");
        }
        for size in [1, 1000, 1500, 5_000_000_000, 2 << 30, 123_000_000] {
            let shown = serde_json::to_value(Size(size)).unwrap();
            let text = shown.as_str().map_or_else(|| shown.to_string(), str::to_owned);
            assert_eq!(Size::read(&text), Some(Size(size)), "{text}");
        }
    }

    #[test]
    fn the_nearest_name_is_told() {
        assert_eq!(unknown("engine", "vlm", &["vllm", "turbomind"]), "`vlm` is no engine; did you mean `vllm`?");
        assert_eq!(unknown("engine", "x", &["vllm", "turbomind"]), "`x` is no engine; known are vllm, turbomind");
    }
}
