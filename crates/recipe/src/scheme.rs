//! `scheme`: a preset's name, or numbers.

use std::borrow::Cow;

use lite_pack::{PRESETS, preset};
use lite_quant::floats::{FloatFormat, FloatScheme, Grain, ScaleKind};
use lite_quant::{
    ActivationFormat, ActivationScale, ActivationScheme, GroupSize, LinearScheme, ScaleDtype, Scheme, WeightScheme,
};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::words::unknown;

/// How linears are quantized.
#[derive(Debug, Clone)]
pub(crate) enum SchemeChoice {
    /// One of [`PRESETS`], as written.
    Preset(String),
    /// In numbers.
    Numbers(Box<Numbers>),
}

/// Integers in short, or weights and activations in full.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Numbers {
    /// Bits per weight, 2 to 8; in short, without `weights`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bits: Option<i64>,
    /// Input channels that share a scale: 16, 32, 64, 128, 256, or -1 for a whole row
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) group_size: Option<i64>,
    /// No zero points
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) symmetric: Option<bool>,
    /// Weights in full
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) weights: Option<WeightNumbers>,
    /// What the engine does to activations [default: nothing]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) activations: Option<ActivationNumbers>,
}

/// Weights.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct WeightNumbers {
    /// Type of the codes
    #[serde(rename = "type")]
    pub(crate) codes: CodeName,
    /// Bits of integers, 2 to 8 [default: 8]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bits: Option<i64>,
    /// Integers without zero points [default: true]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) symmetric: Option<bool>,
    /// Input channels that share a scale; -1 for a whole row [default: -1]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) group_size: Option<i64>,
    /// Rows and columns that share a scale, for small floats
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) block: Option<[usize; 2]>,
    /// One scale for the whole tensor, for small floats [default: false]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) per_tensor: Option<bool>,
    /// Type of the scales of small floats [default: float]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) scales: Option<ScaleName>,
}

/// Types of codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum CodeName {
    /// Integers
    Int,
    /// fp8 with 3 bits of mantissa
    E4m3,
    /// fp8 with 2 bits of mantissa
    E5m2,
    /// fp4
    E2m1,
}

/// Types of scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ScaleName {
    /// What the layout has
    Float,
    /// Powers of two (MX)
    PowerOfTwo,
    /// e4m3 under one scale for the tensor (NVFP4)
    E4m3,
}

/// Activations.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ActivationNumbers {
    /// Type of the codes
    #[serde(rename = "type")]
    pub(crate) codes: CodeName,
    /// Bits of integers [default: 8]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bits: Option<u8>,
    /// Integers without zero points [default: true]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) symmetric: Option<bool>,
    /// Who finds the scales
    pub(crate) scale: ActivationScaleName,
    /// Channels that share a scale, for `group`, `power_of_two` and `local`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) group_size: Option<usize>,
}

/// Scales of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ActivationScaleName {
    /// The engine, for every token
    Token,
    /// The engine, for every token and group of channels
    Group,
    /// The same, rounded to powers of two
    PowerOfTwo,
    /// Calibration, one for all tokens
    Static,
    /// The engine for every group, under one that calibration found
    Local,
}

impl Numbers {
    /// Whether it says no more than bits, groups and symmetry.
    pub(crate) fn short(&self) -> bool {
        self.weights.is_none() && self.activations.is_none()
    }

    /// The scheme it stands for. Numbers that are missing are those of `usual`: bits, group size, symmetry.
    fn scheme(&self, usual: (i64, i64, bool)) -> Result<LinearScheme, String> {
        let int = |bits, group_size, symmetric| {
            Scheme::new(bits, group_size, symmetric, ScaleDtype::F32).map(WeightScheme::Int).map_err(|e| e.to_string())
        };
        let weights = match &self.weights {
            None => int(
                self.bits.unwrap_or(usual.0),
                self.group_size.unwrap_or(usual.1),
                self.symmetric.unwrap_or(usual.2),
            )?,
            Some(_) if self.bits.is_some() || self.group_size.is_some() || self.symmetric.is_some() => {
                return Err("`bits`, `group_size` and `symmetric` are the short way to say what `weights` says in full; put them there".to_owned());
            }
            Some(weights) => match weights.format() {
                None if weights.block.is_some() || weights.scales.is_some() || weights.per_tensor.is_some() => {
                    return Err("`block`, `per_tensor` and `scales` are for small floats (e4m3, e5m2, e2m1); integers take `group_size`".to_owned());
                }
                None => {
                    int(weights.bits.unwrap_or(8), weights.group_size.unwrap_or(-1), weights.symmetric.unwrap_or(true))?
                }
                Some(format) => weights.float(format)?,
            },
        };
        Ok(LinearScheme { weights, activations: self.activations.as_ref().map(ActivationNumbers::scheme).transpose()? })
    }
}

impl WeightNumbers {
    fn format(&self) -> Option<FloatFormat> {
        match self.codes {
            CodeName::Int => None,
            CodeName::E4m3 => Some(FloatFormat::E4M3),
            CodeName::E5m2 => Some(FloatFormat::E5M2),
            CodeName::E2m1 => Some(FloatFormat::E2M1),
        }
    }

    fn float(&self, format: FloatFormat) -> Result<WeightScheme, String> {
        if self.bits.is_some() || self.symmetric == Some(false) {
            return Err(
                "small floats have neither `bits` nor zero points; leave them out, or use `type: int`".to_owned()
            );
        }
        let grain = match (self.per_tensor.unwrap_or(false), self.block, self.group_size) {
            (true, None, None) => Grain::Tensor,
            (false, Some([rows, columns]), None) if rows > 0 && columns > 0 => Grain::Block { rows, columns },
            (false, None, None | Some(-1)) => Grain::Channel,
            (false, None, Some(width)) if width > 0 => Grain::Group(width as usize),
            _ => {
                return Err(
                    "give one of `per_tensor: true`, `group_size` and `block: [rows, columns]`, above 0".to_owned()
                );
            }
        };
        let scale = match self.scales.unwrap_or(ScaleName::Float) {
            ScaleName::Float => ScaleKind::Float(ScaleDtype::F32),
            ScaleName::PowerOfTwo => ScaleKind::E8M0,
            ScaleName::E4m3 => ScaleKind::E4M3WithGlobal,
        };
        Ok(FloatScheme { format, grain, scale }.into())
    }
}

impl ActivationNumbers {
    fn scheme(&self) -> Result<ActivationScheme, String> {
        let float = |format| {
            if self.bits.is_some() || self.symmetric == Some(false) {
                return Err(
                    "small floats have neither `bits` nor zero points; leave them out, or use `type: int`".to_owned()
                );
            }
            Ok(ActivationFormat::Float(format))
        };
        let format = match self.codes {
            CodeName::Int => {
                ActivationFormat::Int { bits: self.bits.unwrap_or(8), symmetric: self.symmetric.unwrap_or(true) }
            }
            CodeName::E4m3 => float(FloatFormat::E4M3)?,
            CodeName::E5m2 => float(FloatFormat::E5M2)?,
            CodeName::E2m1 => float(FloatFormat::E2M1)?,
        };
        let width = || match self.group_size {
            Some(width) if width > 0 => Ok(width),
            _ => Err("activations with a scale per group need `group_size`, such as 128".to_owned()),
        };
        let scale = match self.scale {
            ActivationScaleName::Token | ActivationScaleName::Static if self.group_size.is_some() => {
                return Err(
                    "`group_size` is for the scales `group`, `power_of_two` and `local`; leave it out".to_owned()
                );
            }
            ActivationScaleName::Token => ActivationScale::DynamicToken,
            ActivationScaleName::Static => ActivationScale::StaticTensor,
            ActivationScaleName::Group => ActivationScale::DynamicGroup(width()?),
            ActivationScaleName::PowerOfTwo => ActivationScale::DynamicMx(width()?),
            ActivationScaleName::Local => ActivationScale::StaticTensorLocal(width()?),
        };
        Ok(ActivationScheme { format, scale })
    }
}

impl SchemeChoice {
    /// The scheme it stands for, scales in f32: their type is the layout's business.
    pub(crate) fn scheme(&self, usual: (i64, i64, bool)) -> Result<LinearScheme, String> {
        match self {
            Self::Preset(name) => preset(name, ScaleDtype::F32).ok_or_else(|| unknown("scheme", name, &PRESETS)),
            Self::Numbers(numbers) => numbers.scheme(usual),
        }
    }

    /// The shortest way to write `scheme`.
    pub(crate) fn of(scheme: &LinearScheme) -> Self {
        let plain = f32_scales(*scheme);
        if let Some(name) = PRESETS.into_iter().find(|name| preset(name, ScaleDtype::F32) == Some(plain)) {
            return Self::Preset(name.to_owned());
        }
        let code = |format| match format {
            FloatFormat::E4M3 => CodeName::E4m3,
            FloatFormat::E5M2 => CodeName::E5m2,
            FloatFormat::E2M1 => CodeName::E2m1,
        };
        let none = WeightNumbers {
            codes: CodeName::Int,
            bits: None,
            symmetric: None,
            group_size: None,
            block: None,
            per_tensor: None,
            scales: None,
        };
        let weights = match scheme.weights {
            WeightScheme::Int(int) => WeightNumbers {
                bits: Some(int.bits.into()),
                symmetric: Some(int.symmetric),
                group_size: Some(int.group_size.to_flag()),
                ..none
            },
            WeightScheme::Float(float) => {
                let scales = match float.scale {
                    ScaleKind::Float(_) => None,
                    ScaleKind::E8M0 => Some(ScaleName::PowerOfTwo),
                    ScaleKind::E4M3WithGlobal => Some(ScaleName::E4m3),
                };
                let none = WeightNumbers { codes: code(float.format), scales, ..none };
                match float.grain {
                    Grain::Tensor => WeightNumbers { per_tensor: Some(true), ..none },
                    Grain::Channel => WeightNumbers { group_size: Some(-1), ..none },
                    Grain::Group(width) => WeightNumbers { group_size: i64::try_from(width).ok(), ..none },
                    Grain::Block { rows, columns } => WeightNumbers { block: Some([rows, columns]), ..none },
                }
            }
        };
        let activations = scheme.activations.map(|inputs| {
            let (codes, bits, symmetric) = match inputs.format {
                ActivationFormat::Int { bits, symmetric } => (CodeName::Int, Some(bits), Some(symmetric)),
                ActivationFormat::Float(format) => (code(format), None, None),
            };
            let (scale, group_size) = match inputs.scale {
                ActivationScale::DynamicToken => (ActivationScaleName::Token, None),
                ActivationScale::StaticTensor => (ActivationScaleName::Static, None),
                ActivationScale::DynamicGroup(width) => (ActivationScaleName::Group, Some(width)),
                ActivationScale::DynamicMx(width) => (ActivationScaleName::PowerOfTwo, Some(width)),
                ActivationScale::StaticTensorLocal(width) => (ActivationScaleName::Local, Some(width)),
            };
            ActivationNumbers { codes, bits, symmetric, scale, group_size }
        });
        Self::Numbers(Box::new(Numbers { weights: Some(weights), activations, ..Numbers::default() }))
    }

    /// A short name for it in paths and summaries.
    pub(crate) fn label(&self) -> String {
        match self {
            Self::Preset(name) => name.clone(),
            Self::Numbers(numbers) if numbers.short() => {
                let part = |key: &str, value: Option<i64>| value.map_or(String::new(), |value| format!("{key}{value}"));
                let bits = part("w", numbers.bits);
                let group = match numbers.group_size {
                    Some(-1) => "channel".to_owned(),
                    other => part("g", other),
                };
                let symmetric = numbers.symmetric.map_or("", |s| if s { "sym" } else { "asym" });
                [bits.as_str(), &group, symmetric]
                    .into_iter()
                    .filter(|part| !part.is_empty())
                    .collect::<Vec<_>>()
                    .join("-")
            }
            Self::Numbers(_) => "scheme".to_owned(),
        }
    }
}

fn f32_scales(scheme: LinearScheme) -> LinearScheme {
    let weights = match scheme.weights {
        WeightScheme::Int(int) => Scheme { scale_dtype: ScaleDtype::F32, ..int }.into(),
        WeightScheme::Float(float) if matches!(float.scale, ScaleKind::Float(_)) => {
            FloatScheme { scale: ScaleKind::Float(ScaleDtype::F32), ..float }.into()
        }
        other => other,
    };
    LinearScheme { weights, ..scheme }
}

/// The integers that a method quantizes to where nothing is said.
pub(crate) const fn usual(symmetric: bool) -> (i64, i64, bool) {
    (4, 128, symmetric)
}

/// W8A8 with these activations: what SmoothQuant quantizes to where nothing is said.
pub(crate) fn w8a8() -> LinearScheme {
    LinearScheme {
        weights: Scheme { bits: 8, group_size: GroupSize::Channel, symmetric: true, scale_dtype: ScaleDtype::F32 }
            .into(),
        activations: Some(ActivationScheme {
            format: ActivationFormat::Int { bits: 8, symmetric: true },
            scale: ActivationScale::DynamicToken,
        }),
    }
}

impl<'de> Deserialize<'de> for SchemeChoice {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = SchemeChoice;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("the name of a scheme such as W4A16, or a map such as {bits: 4, group_size: 128}")
            }

            fn visit_str<E: Error>(self, name: &str) -> Result<SchemeChoice, E> {
                let choice = SchemeChoice::Preset(name.to_owned());
                choice.scheme(usual(true)).map_err(E::custom)?;
                Ok(choice)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<SchemeChoice, A::Error> {
                let numbers = Numbers::deserialize(MapAccessDeserializer::new(map))?;
                numbers.scheme(usual(true)).map_err(A::Error::custom)?;
                Ok(SchemeChoice::Numbers(Box::new(numbers)))
            }
        }
        from.deserialize_any(Reader)
    }
}

impl Serialize for SchemeChoice {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Preset(name) => to.serialize_str(name),
            Self::Numbers(numbers) => numbers.serialize(to),
        }
    }
}

impl JsonSchema for SchemeChoice {
    fn schema_name() -> Cow<'static, str> {
        "SchemeChoice".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let numbers = generator.subschema_for::<Numbers>();
        let names = PRESETS.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let lower = PRESETS.iter().map(|name| name.to_lowercase());
        let names: Vec<String> = names.into_iter().chain(lower).collect();
        json_schema!({"anyOf": [{"type": "string", "enum": names}, numbers]})
    }
}

#[cfg(test)]
#[path = "scheme_tests.rs"]
mod tests;
