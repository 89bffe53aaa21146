//! `quantization_config` in `config.json`: what a layout is told to write, and reading it back.

use lite_quant::{LinearScheme, ScaleDtype};
use serde_json::{Map, Value};

use crate::schemes::{same_codes, scale_dtype, with_scale_dtype};
use crate::{Layout, PackError, all};

/// What a layout needs to know to write its `quantization_config`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigFacts {
    /// The scheme of every quantized linear without an override.
    pub scheme: LinearScheme,
    /// Full module name of **every** linear that is not quantized: the head, routers, vision towers.
    /// Engines match a class name by substring and would take an unlisted one for quantized.
    pub ignored: Vec<String>,
    /// Full module name of the output head if it is quantized, which vLLM has to be told.
    pub lm_head: Option<String>,
    /// Full module names of quantized linears with another scheme than [`scheme`](Self::scheme), and
    /// that scheme. One that differs in the type of its scales only needs no entry.
    pub overrides: Vec<(String, LinearScheme)>,
    /// Whether columns were solved in the order of their activations. They are stored in their own
    /// order all the same, so readers need not know.
    pub act_order: bool,
    /// How the key/value cache is quantized by the engine, if at all.
    pub kv_cache: Option<KvCacheScheme>,
}

/// How an engine quantizes the key/value cache. The scales are tensors of the attention module,
/// `<attention>.k_scale` and `<attention>.v_scale`, which layouts do not write: `x ≈ code · scale`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvCacheScheme {
    /// fp8 e4m3, one scale for all heads, shape `[1]`.
    Fp8Tensor,
    /// fp8 e4m3, one scale per key/value head, shape `[heads, 1, 1]`.
    Fp8Head,
}

impl ConfigFacts {
    /// Every linear quantized with this scheme, in the order of its columns.
    pub fn new(scheme: LinearScheme) -> Self {
        Self { scheme, ignored: Vec::new(), lm_head: None, overrides: Vec::new(), act_order: false, kv_cache: None }
    }
}

/// What a `quantization_config` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParsedConfig {
    /// Bits, group size and symmetry. The config does not tell the type of the scales:
    /// it is [`ParsedConfig::UNKNOWN_SCALE_DTYPE`] until a layer is unpacked.
    pub scheme: LinearScheme,
    /// Module names, or patterns of foreign tools, that are not quantized.
    pub ignored: Vec<String>,
    /// Full module names with another scheme, and that scheme.
    pub overrides: Vec<(String, LinearScheme)>,
    /// How the key/value cache is quantized, if at all.
    pub kv_cache: Option<KvCacheScheme>,
}

impl ParsedConfig {
    /// One scheme for everything.
    pub fn new(scheme: LinearScheme) -> Self {
        Self { scheme, ignored: Vec::new(), overrides: Vec::new(), kv_cache: None }
    }

    /// The scheme of a quantized module.
    pub fn scheme_of(&self, module: &str) -> &LinearScheme {
        self.overrides.iter().find(|(name, _)| name == module).map_or(&self.scheme, |(_, scheme)| scheme)
    }

    /// Stands in [`ParsedConfig::scheme`] for the type that only the tensors know.
    pub const UNKNOWN_SCALE_DTYPE: ScaleDtype = ScaleDtype::F16;
}

/// Where wrapper models keep the config of their language model.
const INNER_CONFIGS: [&str; 3] = ["text_config", "llm_config", "language_config"];

/// Finds the layout of a checkpoint from its whole `config.json`; `None` if it is not quantized.
///
/// `quantization_config` is looked for at the top, then in the language model's own config
/// (`text_config`, `llm_config`, `language_config`), as engines do.
///
/// # Errors
/// [`PackError::UnsupportedConfig`] for an unknown `quant_method` or an option that is not read,
/// [`PackError::Config`] for a key that is missing or has the wrong type.
///
/// Unpack with the layout that is returned, not with another of the same name: it knows what the config
/// says of the tensors.
pub fn detect(config: &Map<String, Value>) -> Result<Option<(&'static dyn Layout, ParsedConfig)>, PackError> {
    let inner = INNER_CONFIGS.iter().filter_map(|key| config.get(*key)?.as_object());
    let found = std::iter::once(config)
        .chain(inner)
        .find_map(|config| config.get("quantization_config").filter(|value| !value.is_null()));
    let Some(value) = found else { return Ok(None) };
    let Value::Object(quantization) = value else {
        return Err(wrong("quantization_config", value, "an object"));
    };
    let wanted = || all().iter().map(|layout| format!("{:?}", layout.quant_method())).collect::<Vec<_>>().join(" or ");
    match quantization.get("quant_method") {
        Some(Value::String(method)) => match all().iter().find(|layout| layout.quant_method() == method) {
            Some(layout) => {
                let parsed = layout.parse_config(quantization)?;
                Ok(Some((layout.reader(quantization)?.unwrap_or(*layout), parsed)))
            }
            None => Err(unsupported("quant_method", &Value::String(method.clone()), &wanted())),
        },
        Some(other) => Err(wrong("quant_method", other, &wanted())),
        None => Err(missing("quant_method", &wanted())),
    }
}

/// The overrides that say something, with the common type of scales, if the layout can hold them.
pub(crate) fn distinct_overrides<'f>(
    layout: &dyn Layout,
    facts: &'f ConfigFacts,
) -> Result<Vec<(&'f str, LinearScheme)>, PackError> {
    let common = &facts.scheme;
    let unified = |scheme: &LinearScheme| scale_dtype(common).map_or(*scheme, |dtype| with_scale_dtype(scheme, dtype));
    let distinct = facts.overrides.iter().filter(|(_, scheme)| !same_codes(scheme, common));
    distinct
        .map(|(name, scheme)| match layout.mixes(common, scheme) {
            Ok(()) => Ok((name.as_str(), unified(scheme))),
            Err(why) => Err(PackError::Override { layout: layout.name(), module: name.clone(), why }),
        })
        .collect()
}

/// Refuses a quantized key/value cache, which the config of this layout cannot describe.
pub(crate) fn no_kv_cache(layout: &'static str, facts: &ConfigFacts) -> Result<(), PackError> {
    match facts.kv_cache {
        None => Ok(()),
        Some(_) => Err(PackError::Scheme {
            layout,
            what: "the scales of a quantized key/value cache",
            wanted: "none; `compressed-tensors` and `modelopt` have a place for them",
        }),
    }
}

/// `path.key`, or `key` at the top.
pub(crate) fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// A value as a message shows it: at most 80 characters.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

pub(crate) fn missing(key: &str, wanted: &str) -> PackError {
    PackError::Config { key: key.to_owned(), found: "missing".to_owned(), wanted: wanted.to_owned() }
}

pub(crate) fn wrong(key: &str, found: &Value, wanted: &str) -> PackError {
    PackError::Config { key: key.to_owned(), found: shown(found), wanted: wanted.to_owned() }
}

pub(crate) fn unsupported(key: &str, found: &Value, wanted: &str) -> PackError {
    PackError::UnsupportedConfig { key: key.to_owned(), found: shown(found), wanted: wanted.to_owned() }
}

/// The integer under the first of `keys` that is present.
pub(crate) fn integer(config: &Map<String, Value>, path: &str, keys: &[&str]) -> Result<i64, PackError> {
    for key in keys {
        if let Some(value) = config.get(*key) {
            return value.as_i64().ok_or_else(|| wrong(&join(path, key), value, "an integer"));
        }
    }
    Err(missing(&join(path, keys.first().copied().unwrap_or_default()), "an integer"))
}

/// A boolean, or `default` if the key is absent.
pub(crate) fn boolean(
    config: &Map<String, Value>,
    path: &str,
    key: &str,
    default: Option<bool>,
) -> Result<bool, PackError> {
    match (config.get(key), default) {
        (Some(value), _) => value.as_bool().ok_or_else(|| wrong(&join(path, key), value, "true or false")),
        (None, Some(default)) => Ok(default),
        (None, None) => Err(missing(&join(path, key), "true or false")),
    }
}

pub(crate) fn object<'c>(
    config: &'c Map<String, Value>,
    path: &str,
    key: &str,
) -> Result<&'c Map<String, Value>, PackError> {
    match config.get(key) {
        Some(Value::Object(object)) => Ok(object),
        Some(other) => Err(wrong(&join(path, key), other, "an object")),
        None => Err(missing(&join(path, key), "an object")),
    }
}

/// A list of strings; absent and null are empty.
pub(crate) fn names(config: &Map<String, Value>, path: &str, key: &str) -> Result<Vec<String>, PackError> {
    let wrong = |value| wrong(&join(path, key), value, "a list of strings");
    match config.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(list)) => {
            list.iter().map(|name| name.as_str().map(str::to_owned).ok_or_else(|| wrong(name))).collect()
        }
        Some(other) => Err(wrong(other)),
    }
}
