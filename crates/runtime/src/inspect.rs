//! What a checkpoint is, from its config and headers alone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lite_model::{Checkpoint, Dtype, ModelError, printable};
use lite_pack::{ParsedConfig, detect};
use lite_quant::floats::{FloatFormat, Grain};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::ignored::Ignored;
use crate::stored::{Storage, StoredLinear, stored_linears};

/// What a checkpoint is. Names are as they are in the files: print them through [`printable`].
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// The folder.
    pub model: String,
    /// `architectures[0]`, if the config says.
    pub architecture: Option<String>,
    /// `model_type`, if the config says.
    pub model_type: Option<String>,
    /// The layout of the quantized linears, if it is one that is read.
    pub layout: Option<String>,
    /// `quant_method`, as the config has it.
    pub quant_method: Option<String>,
    /// Every scheme that is found, in words, and how many linears have it; most frequent first.
    pub schemes: Vec<(String, usize)>,
    /// Elements of all weights: codes count as the weights they stand for, scales and zero points not at all.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Bytes of all tensors, by parameter, in bits.
    pub bits_per_weight: f64,
    /// The same over the quantized linears with their scales and zero points.
    pub quantized_bits_per_weight: Option<f64>,
    /// Weight files.
    pub shards: usize,
    /// By dtype.
    pub dtypes: Vec<DtypeTotal>,
    /// Modules that the config leaves plain.
    pub ignored: Vec<String>,
    /// Whether the config ties the head to the embedding.
    pub tied_head: Option<bool>,
    /// Tensors that scale a key/value cache.
    pub kv_scales: Vec<String>,
    /// Files of other tools that describe a quantization.
    pub quantization_files: Vec<String>,
    /// What does not fit together.
    pub warnings: Vec<String>,
    /// Quantized linears, in the order of the files.
    pub linears: Vec<LinearFacts>,
    /// All tensors, in the order of the files.
    pub tensors: Vec<TensorFacts>,
}

/// One quantized linear.
#[derive(Debug, Clone, Serialize)]
pub struct LinearFacts {
    /// Module name.
    pub name: String,
    /// `[N, K]`.
    pub shape: [usize; 2],
    /// How the codes lie in the file.
    pub storage: Storage,
    /// Bits of one code.
    pub bits: u8,
    /// Input channels that share a scale, −1 for a whole row; `None` for tensors and blocks.
    pub group_size: Option<i64>,
    /// Whether zero points are fixed; `None` where only the values would tell.
    pub symmetric: Option<bool>,
    /// The scheme in words.
    pub scheme: String,
    /// Bytes of codes, scales and zero points.
    pub bytes: u64,
    /// The same in bits per weight.
    pub bits_per_weight: f64,
}

/// One tensor.
#[derive(Debug, Clone, Serialize)]
pub struct TensorFacts {
    /// Its name.
    pub name: String,
    /// Element type, as safetensors spells it.
    pub dtype: String,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Bytes of its data.
    pub bytes: u64,
}

/// Tensors of one dtype.
#[derive(Debug, Clone, Serialize)]
pub struct DtypeTotal {
    /// Element type.
    pub dtype: String,
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes of their data.
    pub bytes: u64,
}

/// Where wrapper models keep the config of their language model.
const INNER_CONFIGS: [&str; 3] = ["text_config", "llm_config", "language_config"];
/// Files of other tools beside `config.json`.
const QUANTIZATION_FILES: [&str; 3] = ["quantize_config.json", "quant_config.json", "hf_quant_config.json"];
/// Names that a warning lists at most.
const SHOWN: usize = 3;

/// Looks at the checkpoint in `dir`; tensor data is not read (but for 16 bytes per packed linear).
///
/// # Errors
/// Files that are no checkpoint; a quantization that is not understood is a warning.
pub fn inspect(dir: &Path) -> Result<Inspection, ModelError> {
    let checkpoint = Checkpoint::open(dir)?;
    let config = checkpoint.config();
    let (stored, unknown) = stored_linears(&checkpoint);
    let mut warnings = checkpoint.warnings.clone();
    let declared = value(config, "quantization_config").and_then(Value::as_object);
    let (layout, parsed) = match detect(config) {
        Ok(Some((layout, parsed))) => (Some(layout.name().to_owned()), Some(parsed)),
        Ok(None) => (None, None),
        Err(error) => {
            warnings.push(format!("the quantization in config.json is not read here: {error}"));
            (None, None)
        }
    };
    let linears: Vec<LinearFacts> = stored.iter().map(|linear| facts(&checkpoint, linear, parsed.as_ref())).collect();
    let parts: BTreeSet<&str> = stored.iter().flat_map(|linear| &linear.tensors).map(String::as_str).collect();
    let kv_scales: Vec<String> = checkpoint.names().filter(|name| is_kv_scale(name)).map(str::to_owned).collect();
    let tensors: Vec<TensorFacts> = checkpoint
        .names()
        .filter_map(|name| checkpoint.info(name))
        .map(|info| TensorFacts {
            name: info.name.clone(),
            dtype: info.dtype.to_string(),
            shape: info.shape.clone(),
            bytes: info.bytes,
        })
        .collect();
    let weights = |linear: &LinearFacts| (linear.shape[0] as u64).saturating_mul(linear.shape[1] as u64);
    let quantized = linears.iter().map(weights).fold(0u64, u64::saturating_add);
    let plain = checkpoint
        .names()
        .filter(|name| !parts.contains(name) && !is_kv_scale(name))
        .filter_map(|name| checkpoint.info(name))
        .fold(0u64, |sum, info| sum.saturating_add(info.elements() as u64));
    let parameters = plain.saturating_add(quantized);
    let bits = |bytes: u64, weights: u64| bytes as f64 * 8.0 / weights.max(1) as f64;
    let coded_bytes: u64 = linears.iter().map(|linear| linear.bytes).sum();
    consistency(&checkpoint, declared, parsed.as_ref(), &stored, &unknown, &mut warnings);
    let text = |key: &str| config.get(key).and_then(Value::as_str).map(str::to_owned);
    Ok(Inspection {
        model: dir.display().to_string(),
        architecture: config.get("architectures").and_then(|a| a.get(0)?.as_str()).map(str::to_owned),
        model_type: text("model_type"),
        layout,
        quant_method: declared.and_then(|d| d.get("quant_method")?.as_str()).map(str::to_owned),
        schemes: schemes(&linears),
        parameters,
        bytes: checkpoint.total_bytes(),
        bits_per_weight: bits(checkpoint.total_bytes(), parameters),
        quantized_bits_per_weight: (quantized > 0).then(|| bits(coded_bytes, quantized)),
        shards: checkpoint.shards().len(),
        dtypes: checkpoint
            .dtype_census()
            .into_iter()
            .map(|(dtype, count)| DtypeTotal { dtype: dtype.to_string(), tensors: count.tensors, bytes: count.bytes })
            .collect(),
        ignored: parsed.map(|parsed| parsed.ignored).unwrap_or_default(),
        tied_head: value(config, "tie_word_embeddings").and_then(Value::as_bool),
        kv_scales,
        quantization_files: QUANTIZATION_FILES
            .into_iter()
            .filter(|name| dir.join(name).is_file())
            .map(str::to_owned)
            .collect(),
        warnings,
        linears,
        tensors,
    })
}

/// A key at the top, or in the language model's own config.
fn value<'c>(config: &'c Map<String, Value>, key: &str) -> Option<&'c Value> {
    let inner = INNER_CONFIGS.iter().filter_map(|inner| config.get(*inner)?.as_object());
    std::iter::once(config).chain(inner).find_map(|config| config.get(key).filter(|value| !value.is_null()))
}

/// Whether a tensor scales a key/value cache.
pub(crate) fn is_kv_scale(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, leaf)| matches!(leaf, "k_scale" | "v_scale" | "kv_scale" | "q_scale"))
}

fn facts(checkpoint: &Checkpoint, linear: &StoredLinear, config: Option<&ParsedConfig>) -> LinearFacts {
    let declared = config.map(|config| *config.scheme_of(&linear.module));
    let int = declared.and_then(|scheme| scheme.weights.int().copied());
    let has = |suffix: &str| linear.tensors.iter().any(|name| name.rsplit_once('.').is_some_and(|(_, s)| s == suffix));
    let symmetric = match linear.storage {
        Storage::PackedInt => Some(!has("weight_zero_point")),
        Storage::Int8 | Storage::Fp8 | Storage::PackedFp4 => Some(true),
        Storage::Awq | Storage::Gptq => int.map(|scheme| scheme.symmetric),
    };
    let kind = match linear.float_format(checkpoint) {
        Some(FloatFormat::E4M3) => "fp8 e4m3".to_owned(),
        Some(FloatFormat::E5M2) => "fp8 e5m2".to_owned(),
        Some(FloatFormat::E2M1) => "fp4 e2m1".to_owned(),
        None => format!("int{}", linear.bits),
    };
    let grain = match linear.grain {
        Some(Grain::Tensor) => ", one scale".to_owned(),
        Some(Grain::Channel) => " per channel".to_owned(),
        Some(Grain::Group(width)) => format!(" group {width}"),
        Some(Grain::Block { rows, columns }) => format!(" block {rows}×{columns}"),
        None => ", scales unknown".to_owned(),
    };
    let zeros = match symmetric {
        Some(true) if linear.float_format(checkpoint).is_none() => " symmetric",
        Some(false) => " asymmetric",
        _ => "",
    };
    let inputs = declared.and_then(|scheme| scheme.activations).map_or("", |_| ", activations quantized");
    let weights = linear.out_features as f64 * linear.in_features as f64;
    LinearFacts {
        name: linear.module.clone(),
        shape: [linear.out_features, linear.in_features],
        storage: linear.storage,
        bits: linear.bits,
        group_size: match linear.grain {
            Some(Grain::Channel) => Some(-1),
            Some(Grain::Group(width)) => i64::try_from(width).ok(),
            _ => None,
        },
        symmetric,
        scheme: format!("{kind}{grain}{zeros}{inputs}"),
        bytes: linear.bytes,
        bits_per_weight: linear.bytes as f64 * 8.0 / weights.max(1.0),
    }
}

fn schemes(linears: &[LinearFacts]) -> Vec<(String, usize)> {
    let mut counts = BTreeMap::<&str, usize>::new();
    for linear in linears {
        *counts.entry(&linear.scheme).or_default() += 1;
    }
    let mut counts: Vec<(String, usize)> =
        counts.into_iter().map(|(scheme, count)| (scheme.to_owned(), count)).collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    counts
}

/// Compares what the config declares with what is there.
fn consistency(
    checkpoint: &Checkpoint,
    declared: Option<&Map<String, Value>>,
    parsed: Option<&ParsedConfig>,
    stored: &[StoredLinear],
    unknown: &[String],
    warnings: &mut Vec<String>,
) {
    match (declared.is_some(), stored.is_empty()) {
        (true, true) => {
            warnings.push("config.json declares a quantization, but no linear is stored quantized".to_owned())
        }
        (false, false) => warnings.push(format!(
            "{} linears are stored quantized, but config.json declares no quantization: engines will not load them",
            stored.len()
        )),
        _ => {}
    }
    let mut list = |what: &str, names: &[&str]| {
        if !names.is_empty() {
            let shown: Vec<String> = names.iter().take(SHOWN).map(|name| format!("`{}`", printable(name))).collect();
            let more = if names.len() > SHOWN { format!(" and {} more", names.len() - SHOWN) } else { String::new() };
            warnings.push(format!("{what}: {}{more}", shown.join(", ")));
        }
    };
    let names = |keep: &dyn Fn(&StoredLinear) -> bool| -> Vec<&str> {
        stored.iter().filter(|linear| keep(linear)).map(|linear| linear.module.as_str()).collect()
    };
    list("a float weight lies beside the codes, and readers differ in which they use", &names(&|l| l.twin));
    list("codes without scales that fit", &names(&|linear| linear.grain.is_none()));
    list("tensors of codes that are not understood", &unknown.iter().map(String::as_str).collect::<Vec<_>>());
    let modules: BTreeSet<&str> = stored.iter().map(|linear| linear.module.as_str()).collect();
    let Some(parsed) = parsed else { return };
    let absent: Vec<&str> =
        parsed.overrides.iter().map(|(name, _)| name.as_str()).filter(|name| !modules.contains(name)).collect();
    list("config.json gives a scheme to modules that are not stored quantized", &absent);
    if !stored.is_empty() {
        let ignored = Ignored::new(&parsed.ignored);
        let plain: Vec<&str> = checkpoint
            .names()
            .filter(|name| undeclared(checkpoint, name, &ignored))
            .filter_map(|name| name.strip_suffix(".weight"))
            .collect();
        list("declared quantized (not in the list of ignored modules), but stored plain", &plain);
    }
    let differ = names(&|linear| {
        let scheme = parsed.scheme_of(&linear.module);
        scheme.weights.int().is_some_and(|scheme| scheme.bits != linear.bits)
    });
    list("the config gives other bits than the tensors have", &differ);
}

/// Whether `name` is a plain matrix inside a numbered block that no entry of the ignore list covers.
fn undeclared(checkpoint: &Checkpoint, name: &str, ignored: &Ignored<'_>) -> bool {
    /// What is never quantized, listed or not.
    const PLAIN: [&str; 5] = ["norm", "embed", "router", "rotary", "conv"];
    let Some(module) = name.strip_suffix(".weight") else { return false };
    let Some(info) = checkpoint.info(name) else { return false };
    let leaf = module.rsplit('.').next().unwrap_or(module);
    let float = matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
    let numbered = module.split('.').any(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
    let exempt = PLAIN.iter().any(|word| module.contains(word)) || leaf == "gate";
    info.shape.len() == 2 && float && numbered && !exempt && !ignored.holds(module)
}

#[cfg(test)]
#[path = "inspect_tests.rs"]
mod tests;
