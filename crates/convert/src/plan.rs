//! What becomes of every tensor, and in which scheme every linear is written.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use lite_decoder::DecoderSpec;
use lite_job::JobError;
use lite_model::{Checkpoint, Dtype, OutputTensor, printable};
use lite_pack::targets::{Severity, SiteFacts, Target, Verdict, check, engines_for};
use lite_pack::{ConfigFacts, Layout};
use lite_quant::LinearScheme;
use serde_json::Value;

use crate::adapt::Facts;
use crate::choose::{choose, most_frequent};
use crate::source::Source;
use crate::{ConvertError, PLAIN};

/// What to convert, and to what.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// A checkpoint folder, or a hub id.
    pub model: String,
    /// Branch, tag or commit of a hub model.
    pub revision: Option<String>,
    /// Where hub files are kept.
    pub download_dir: Option<PathBuf>,
    /// Where the result appears.
    pub work_dir: PathBuf,
    /// Replace a checkpoint that is already there.
    pub overwrite: bool,
    /// Name of the layout, or [`PLAIN`]; what `target` prefers if absent.
    pub layout: Option<String>,
    /// Engine that must load the result.
    pub target: Option<Target>,
    /// Tensor-parallel degree of that engine.
    pub tensor_parallel: usize,
    /// Round linears that the layout cannot hold as they are.
    pub requantize: bool,
    /// Type of dequantized weights; what the config names if absent.
    pub dtype: Option<Dtype>,
    /// Largest weight file.
    pub max_shard_bytes: u64,
}

/// What was found of one linear when it was read for the first time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Survey {
    /// Its scheme, with the type of scales that is in the file.
    pub(crate) scheme: LinearScheme,
    /// What its values allow.
    pub(crate) facts: Facts,
    /// Whether the file holds a scale of its inputs.
    pub(crate) input: bool,
}

/// How a linear is written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chosen {
    pub(crate) scheme: LinearScheme,
    /// Whether values change.
    pub(crate) rounded: bool,
}

/// What becomes of a tensor that is no part of a quantized linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Other {
    Copied,
    Dropped,
}

/// Everything that is known before the first byte is written.
pub(crate) struct Plan {
    /// `None` for a plain result.
    pub(crate) layout: Option<&'static dyn Layout>,
    /// Type of dequantized weights of a plain result.
    pub(crate) dtype: Dtype,
    /// One for every linear of the source; empty for a plain result.
    pub(crate) chosen: Vec<Chosen>,
    pub(crate) outputs: Vec<OutputTensor>,
    /// Tensors outside of quantized linears.
    pub(crate) others: Vec<(String, Other)>,
    /// `quantization_config`; `None` for a plain result.
    pub(crate) config: Option<Value>,
    pub(crate) layout_files: Vec<(&'static str, Value)>,
    pub(crate) engines: Vec<(Target, Verdict)>,
    pub(crate) notes: Vec<String>,
    pub(crate) warnings: Vec<String>,
}

/// The layout that the recipe names; `None` is a plain result.
pub(crate) fn layout_of(
    recipe: &Recipe,
    common: Option<&LinearScheme>,
) -> Result<Option<&'static dyn Layout>, ConvertError> {
    let name = match (&recipe.layout, recipe.target, common) {
        (Some(name), ..) if name == PLAIN => return Ok(None),
        (Some(name), ..) => name.as_str(),
        (None, Some(target), Some(common)) => target.default_layout(common),
        _ => return Err(ConvertError::Usage("give --layout NAME, or --target ENGINE for what it prefers".to_owned())),
    };
    lite_pack::layout(name).map(Some).ok_or_else(|| {
        let known: Vec<&str> = lite_pack::all().iter().map(|layout| layout.name()).collect();
        ConvertError::Usage(format!("layout `{}` is not known; use {} or {PLAIN}", printable(name), known.join(", ")))
    })
}

impl Plan {
    pub(crate) fn new(recipe: &Recipe, source: &Source, surveys: &[Survey]) -> Result<Self, ConvertError> {
        let frequent = most_frequent(surveys.iter().map(|survey| survey.scheme));
        match layout_of(recipe, frequent.as_ref())? {
            Some(layout) => Self::packed(recipe, source, surveys, layout),
            None => Self::plain(recipe, source),
        }
    }

    fn plain(recipe: &Recipe, source: &Source) -> Result<Self, ConvertError> {
        let dtype = recipe.dtype.unwrap_or_else(|| crate::plain::model_dtype(source.checkpoint()));
        let weights = |i: usize| {
            let linear = &source.linears[i];
            let shape = vec![linear.out_features, linear.in_features];
            Ok(vec![OutputTensor { name: format!("{}.weight", linear.module), dtype, shape }])
        };
        let (outputs, others) = outputs(source, false, &weights)?;
        Ok(Self {
            layout: None,
            dtype,
            chosen: Vec::new(),
            outputs,
            others,
            config: None,
            layout_files: Vec::new(),
            engines: Vec::new(),
            notes: Vec::new(),
            warnings: Vec::new(),
        })
    }

    fn packed(
        recipe: &Recipe,
        source: &Source,
        surveys: &[Survey],
        layout: &'static dyn Layout,
    ) -> Result<Self, ConvertError> {
        let (chosen, common) = choose(recipe, source, surveys, layout)?;
        let mut notes = Vec::new();
        let spec = DecoderSpec::of(source.checkpoint()).ok();
        let ignored = ignored(source, spec.as_ref());
        let sites = site_facts(source, &chosen, &ignored);
        let config = source.checkpoint().config();
        let names = config.get("architectures").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let architectures: Vec<String> = names.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect();
        let mut warnings = source.checkpoint().warnings.clone();
        if let Some(target) = recipe.target {
            let found = check(target, layout, &common, &sites, &architectures, recipe.tensor_parallel);
            let (violations, soft): (Vec<_>, Vec<_>) = found.into_iter().partition(|v| v.severity == Severity::Refused);
            if !violations.is_empty() {
                return Err(JobError::Target { target: target.name().to_owned(), violations }.into());
            }
            warnings.extend(soft.into_iter().map(|v| format!("{}: {} [{}]", target.name(), v.message, v.rule)));
        }
        let head = spec.as_ref().map_or("lm_head", |spec| spec.head.module.as_str());
        let linears = || source.linears.iter().zip(&chosen);
        let mut facts = ConfigFacts {
            ignored,
            lm_head: linears().any(|(linear, _)| linear.module == head).then(|| head.to_owned()),
            overrides: linears()
                .filter(|(_, chosen)| chosen.scheme != common)
                .map(|(linear, chosen)| (linear.module.clone(), chosen.scheme))
                .collect(),
            act_order: source.quantized().is_some() && act_order(config.get("quantization_config")),
            kv_cache: source.quantized().and_then(|quantized| quantized.config().kv_cache),
            ..ConfigFacts::new(common)
        };
        let without = ConfigFacts { kv_cache: None, ..facts.clone() };
        let value = match layout.quantization_config(&facts) {
            Ok(value) => value,
            // Only if it is the cache that is in the way.
            Err(error) if facts.kv_cache.is_some() => match layout.quantization_config(&without) {
                Ok(value) if recipe.requantize => value,
                Ok(_) => {
                    return Err(ConvertError::Unsupported(format!(
                        "the source quantizes the key/value cache: {error}; --requantize leaves the cache in 16 bits"
                    )));
                }
                Err(_) => return Err(error.into()),
            },
            Err(error) => return Err(error.into()),
        };
        let said = value.as_object().map(|value| layout.parse_config(value)).transpose()?;
        if facts.kv_cache.is_some() && said.is_none_or(|said| said.kv_cache != facts.kv_cache) {
            facts = without;
            notes.push(format!(
                "the config of layout `{}` cannot say that the key/value cache is quantized: its scales are left out",
                layout.name()
            ));
        }
        let packed = |i: usize| {
            let (linear, scheme) = (&source.linears[i], &chosen[i].scheme);
            let specs = layout
                .describe(scheme, linear.out_features, linear.in_features)
                .map_err(|source| ConvertError::Pack { module: linear.module.clone(), source })?;
            let name = |suffix: &str| format!("{}.{suffix}", linear.module);
            Ok(specs
                .into_iter()
                .map(|s| OutputTensor { name: name(s.suffix), dtype: s.dtype, shape: s.shape })
                .collect())
        };
        let (outputs, others) = outputs(source, facts.kv_cache.is_some(), &packed)?;
        Ok(Self {
            layout: Some(layout),
            dtype: Dtype::BF16,
            outputs,
            others,
            layout_files: layout.side_files(&facts)?,
            engines: engines_for(layout, &common, &sites, &architectures),
            config: Some(value),
            chosen,
            notes,
            warnings,
        })
    }
}

/// Tensors to write, and the fate of those outside of quantized linears.
type Outputs = (Vec<OutputTensor>, Vec<(String, Other)>);

/// Output tensors in the order of the source, and what becomes of those outside of quantized linears.
fn outputs(
    source: &Source,
    cache: bool,
    of_linear: &dyn Fn(usize) -> Result<Vec<OutputTensor>, ConvertError>,
) -> Result<Outputs, ConvertError> {
    let checkpoint = source.checkpoint();
    let mut owners = BTreeMap::<&str, (usize, bool)>::new();
    for (i, linear) in source.linears.iter().enumerate() {
        owners.extend(linear.tensors.iter().enumerate().map(|(part, name)| (name.as_str(), (i, part == 0))));
    }
    let (mut outputs, mut others) = (Vec::new(), Vec::new());
    for info in checkpoint.names().filter_map(|name| checkpoint.info(name)) {
        match owners.get(info.name.as_str()) {
            Some((i, true)) => outputs.extend(of_linear(*i)?),
            Some((_, false)) => {}
            None if !cache && is_cache_scale(&info.name) => others.push((info.name.clone(), Other::Dropped)),
            None => {
                let (name, dtype, shape) = (info.name.clone(), info.dtype, info.shape.clone());
                outputs.push(OutputTensor { name, dtype, shape });
                others.push((info.name.clone(), Other::Copied));
            }
        }
    }
    Ok((outputs, others))
}

/// Whether a tensor scales a key/value cache.
fn is_cache_scale(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, leaf)| matches!(leaf, "k_scale" | "v_scale" | "kv_scale" | "q_scale"))
}

/// Full names of all linears that are plain in the result: the head, and matrices that are neither embeddings nor
/// quantized; besides, what the source lists by a full name.
fn ignored(source: &Source, spec: Option<&DecoderSpec>) -> Vec<String> {
    let checkpoint = source.checkpoint();
    let quantized: BTreeSet<&str> = source.linears.iter().map(|linear| linear.module.as_str()).collect();
    let mut ignored = BTreeSet::new();
    match spec {
        // A tied head is a linear too, even though it has no tensor of its own.
        Some(spec) => ignored.insert(spec.head.module.clone()),
        None => tied(checkpoint) && ignored.insert("lm_head".to_owned()),
    };
    for info in checkpoint.names().filter_map(|name| checkpoint.info(name)) {
        let Some(module) = info.name.strip_suffix(".weight") else { continue };
        let embedding = match spec {
            Some(spec) => info.name == spec.embed.weight,
            None => module.contains("embed") || module.ends_with("wte") || module.ends_with("wpe"),
        };
        if info.shape.len() == 2 && !embedding {
            ignored.insert(module.to_owned());
        }
    }
    let listed = source.quantized().map_or(&[][..], |quantized| quantized.config().ignored.as_slice());
    let modules = listed.iter().filter(|name| checkpoint.info(&format!("{name}.weight")).is_some());
    ignored.extend(modules.cloned());
    ignored.into_iter().filter(|module| !quantized.contains(module.as_str())).collect()
}

fn tied(checkpoint: &Checkpoint) -> bool {
    let config = checkpoint.config();
    let inner = ["text_config", "llm_config", "language_config"].into_iter().filter_map(|key| config.get(key));
    let says = |value: &Value| value.get("tie_word_embeddings").and_then(Value::as_bool);
    std::iter::once(&Value::Object(config.clone())).chain(inner).find_map(says).unwrap_or(false)
}

fn site_facts(source: &Source, chosen: &[Chosen], ignored: &[String]) -> Vec<SiteFacts> {
    let quantized = source.linears.iter().zip(chosen).map(|(linear, chosen)| SiteFacts {
        name: linear.module.clone(),
        fused_group: Some(fused_group(&linear.module)),
        n: linear.out_features,
        k: linear.in_features,
        quantized: true,
        scheme: Some(chosen.scheme),
    });
    let plain = ignored.iter().filter_map(|module| {
        let [n, k] = source.checkpoint().info(&format!("{module}.weight"))?.shape[..] else { return None };
        Some(SiteFacts { name: module.clone(), fused_group: None, n, k, quantized: false, scheme: None })
    });
    quantized.chain(plain).collect()
}

/// Engines fuse q, k, v and gate, up; siblings must agree.
fn fused_group(module: &str) -> String {
    let Some((parent, leaf)) = module.rsplit_once('.') else { return module.to_owned() };
    match leaf {
        "q_proj" | "k_proj" | "v_proj" => format!("{parent}.qkv"),
        "gate_proj" | "up_proj" | "w1" | "w3" => format!("{parent}.gate_up"),
        _ => module.to_owned(),
    }
}

/// Whether a config says that columns were solved in the order of their activations.
fn act_order(config: Option<&Value>) -> bool {
    let Some(config) = config else { return false };
    let set = |value: &Value| !matches!(value, Value::Null | Value::Bool(false));
    let groups = config.get("config_groups").and_then(Value::as_object);
    let by_group = groups.is_some_and(|groups| {
        groups.values().any(|group| group.get("weights").and_then(|w| w.get("actorder")).is_some_and(set))
    });
    by_group || config.get("desc_act").is_some_and(set)
}
