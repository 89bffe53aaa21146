//! The fate of every tensor, and what the layout and the engines are told of it.

use std::collections::{BTreeMap, BTreeSet};

use lite_decoder::{DecoderSpec, Fold, Producer, WrapperInfo};
use lite_model::{Checkpoint, Dtype, OutputTensor, printable};
use lite_pack::Layout;
use lite_pack::targets::SiteFacts;
use lite_quant::{LinearScheme, ScaleDtype};
use lite_runtime::FloatSource;

use crate::source::stored_embedding;
use crate::{Action, DtypeChoice, JobError, Method, QuantSite, Recipe, TensorPlan};

pub(crate) fn architecture(config: &serde_json::Map<String, serde_json::Value>) -> String {
    let first = config.get("architectures").and_then(|a| a.get(0)).and_then(|a| a.as_str());
    first.unwrap_or("unknown").to_owned()
}

/// The same with the digest of the file that describes the architecture, where one does.
pub(crate) fn described_architecture(
    config: &serde_json::Map<String, serde_json::Value>,
    spec: Option<&DecoderSpec>,
) -> String {
    let name = architecture(config);
    match spec.and_then(|spec| spec.definition.as_deref()) {
        Some(digest) => format!("{name} as described by the file of SHA-256 {digest}"),
        None => name,
    }
}

/// Refuses a decoder that only another job of this process describes.
pub(crate) fn check_described(recipe: &Recipe, spec: &DecoderSpec) -> Result<(), JobError> {
    if spec.definition.is_none() || recipe.arch.is_some() {
        return Ok(());
    }
    Err(JobError::Usage(format!(
        "{} is described by a file that another job names, and this one does not: give it `arch:` too",
        printable(&spec.arch)
    )))
}

/// The float type that most of the checkpoint's bytes have, without codes and what serves them.
pub(crate) fn plain_dtype(checkpoint: &Checkpoint) -> Dtype {
    let codes = FloatSource::new(checkpoint);
    let mut bytes = [(Dtype::BF16, 0u64), (Dtype::F16, 0), (Dtype::F32, 0)];
    for info in checkpoint.names().filter_map(|name| checkpoint.info(name)) {
        if codes.dropped(&info.name).is_some() {
            continue;
        }
        if let Some(entry) = bytes.iter_mut().find(|(dtype, _)| *dtype == info.dtype) {
            entry.1 += info.bytes;
        }
    }
    bytes.into_iter().max_by_key(|(_, bytes)| *bytes).map_or(Dtype::BF16, |(dtype, _)| dtype)
}

/// Type of scales, and the type plain tensors are converted to (`None`: left as they are).
///
/// `auto` follows LMDeploy: bfloat16 stays bfloat16, float16 and float32 become float16.
pub(crate) fn output_dtype(choice: DtypeChoice, plain: Dtype) -> (ScaleDtype, Option<(Dtype, &'static str)>) {
    match (choice, plain) {
        (DtypeChoice::Auto, Dtype::BF16) => (ScaleDtype::BF16, None),
        (DtypeChoice::Auto, Dtype::F16) => (ScaleDtype::F16, None),
        (DtypeChoice::Auto | DtypeChoice::Float16, _) => (ScaleDtype::F16, Some((Dtype::F16, "float16"))),
        (DtypeChoice::Bfloat16, _) => (ScaleDtype::BF16, Some((Dtype::BF16, "bfloat16"))),
    }
}

/// Per block, the folds whose every linear is quantized: a plain one could not absorb scales exactly.
pub(crate) fn exact_folds(
    spec: Option<&DecoderSpec>,
    sites: &[QuantSite],
    method: Method,
    data_free: bool,
) -> Vec<Vec<Fold>> {
    let Some(spec) = spec else { return Vec::new() };
    let quantized: BTreeSet<_> = sites.iter().filter_map(|s| s.site).collect();
    let exact = |fold: &&Fold| {
        let producer = match &fold.producer {
            Producer::Norm { .. } => true,
            Producer::Rows { site, .. } => quantized.contains(site),
        };
        producer && fold.consumers.iter().all(|id| quantized.contains(id))
    };
    let none = data_free || method == Method::Plain;
    spec.blocks
        .iter()
        .map(|block| if none { Vec::new() } else { block.folds.iter().filter(exact).cloned().collect() })
        .collect()
}

pub(crate) fn choose_layout(recipe: &Recipe, scheme: &LinearScheme) -> Result<&'static dyn Layout, JobError> {
    let name = match (&recipe.layout, recipe.target) {
        (Some(name), _) => name.as_str(),
        (None, Some(target)) => target.default_layout(scheme),
        (None, None) => lite_pack::default_layout(scheme),
    };
    lite_pack::layout(name).ok_or_else(|| {
        let known: Vec<&str> = lite_pack::all().iter().map(|l| l.name()).collect();
        JobError::Usage(format!("layout `{}` is not known; use {}", printable(name), known.join(" or ")))
    })
}

/// Every linear, quantized or not, as the engines' rules see it.
pub(crate) fn site_facts(checkpoint: &Checkpoint, sites: &[QuantSite], ignored: &[String]) -> Vec<SiteFacts> {
    let quantized = sites.iter().map(|s| SiteFacts {
        name: s.module.clone(),
        fused_group: Some(s.fused_group.clone()),
        n: s.out_features,
        k: s.in_features,
        quantized: true,
        scheme: Some(s.scheme),
    });
    let plain = ignored.iter().filter_map(|module| {
        let [n, k] = checkpoint.info(&format!("{module}.weight"))?.shape[..] else { return None };
        Some(SiteFacts { name: module.clone(), fused_group: None, n, k, quantized: false, scheme: None })
    });
    quantized.chain(plain).collect()
}

/// Every linear that stays plain: the head, and two-dimensional weights that are neither embeddings nor
/// quantized.
pub(crate) fn ignored_linears(checkpoint: &Checkpoint, spec: Option<&DecoderSpec>, sites: &[QuantSite]) -> Vec<String> {
    let quantized: BTreeSet<&str> = sites.iter().map(|s| s.module.as_str()).collect();
    let mut ignored: BTreeSet<String> = BTreeSet::new();
    if let Some(spec) = spec {
        // A tied head is a linear too, even though it has no tensor of its own.
        ignored.insert(spec.head.module.clone());
    }
    for info in checkpoint.names().filter_map(|name| checkpoint.info(name)) {
        let Some(module) = info.name.strip_suffix(".weight") else { continue };
        let is_embedding = match spec {
            Some(spec) => info.name == spec.embed.weight,
            None => module.contains("embed") || module.ends_with("wte") || module.ends_with("wpe"),
        };
        if info.shape.len() == 2 && !quantized.contains(module) && !is_embedding {
            ignored.insert(module.to_owned());
        }
    }
    // transformers asks for these by the names that models around decoders have in memory.
    if let Some(wrapper) = WrapperInfo::of(checkpoint.config()) {
        let renamed: Vec<String> = ignored.iter().filter_map(|module| wrapper.in_memory(module)).collect();
        ignored.extend(renamed);
    }
    ignored.into_iter().collect()
}

/// A model around a decoder must hold more than the decoder where its config.json says so.
///
/// # Errors
/// [`JobError::Input`] for a vision tower that is declared and absent: engines would load the result and see nothing.
pub(crate) fn check_towers(checkpoint: &Checkpoint, spec: &DecoderSpec) -> Result<(), JobError> {
    let declared = WrapperInfo::of(checkpoint.config()).is_some()
        && checkpoint.config().get("vision_config").is_some_and(serde_json::Value::is_object);
    if !declared {
        return Ok(());
    }
    let of_decoder: BTreeSet<String> = spec.tensors().into_iter().map(|tensor| tensor.name).collect();
    let head = format!("{}.weight", spec.head.module);
    if checkpoint.names().any(|name| !of_decoder.contains(name) && name != head) {
        return Ok(());
    }
    Err(JobError::Input(
        "config.json declares a vision tower (`vision_config`), and the checkpoint holds no tensor besides the decoder's; get the missing files, or take `vision_config` out of config.json and name the decoder's own architecture"
            .to_owned(),
    ))
}

/// One row per source tensor, in the order of the source.
pub(crate) fn plan_tensors(
    checkpoint: &Checkpoint,
    spec: Option<&DecoderSpec>,
    sites: &[QuantSite],
    layout: &dyn Layout,
    dtype: Option<(Dtype, &'static str)>,
    rescaled: &BTreeSet<String>,
    notes: &mut Vec<String>,
) -> Result<Vec<TensorPlan>, JobError> {
    let by_weight: BTreeMap<String, usize> =
        sites.iter().enumerate().map(|(i, s)| (format!("{}.weight", s.module), i)).collect();
    let rename = spec.and_then(|spec| stored_embedding(checkpoint, spec));
    let codes = FloatSource::new(checkpoint);
    // fp8 and MXFP4 codes that are not quantized again are written as values.
    let decoded = dtype.map_or_else(|| plain_dtype(checkpoint), |(dtype, _)| dtype);
    let mut rows = Vec::new();
    for name in checkpoint.names() {
        let Some(info) = checkpoint.info(name) else { continue };
        let plain = |target: &str| {
            let is_float = matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
            let dtype = match dtype {
                Some((dtype, _)) if is_float => dtype,
                _ if codes.is_coded(name) => decoded,
                _ => info.dtype,
            };
            OutputTensor { name: target.to_owned(), dtype, shape: info.shape.clone() }
        };
        let row = |action, outputs| TensorPlan { source: name.to_owned(), action, outputs };
        if let Some(reason) = codes.dropped(name) {
            rows.push(row(Action::Drop { reason }, vec![]));
            continue;
        }
        if let Some(&site) = by_weight.get(name) {
            let site_plan = &sites[site];
            let outputs = layout
                .describe(&site_plan.scheme, site_plan.out_features, site_plan.in_features)?
                .into_iter()
                .map(|t| OutputTensor {
                    name: format!("{}.{}", site_plan.module, t.suffix),
                    dtype: t.dtype,
                    shape: t.shape,
                })
                .collect();
            rows.push(row(Action::Quantize { site }, outputs));
            continue;
        }
        if let Some((embed, head)) = &rename
            && head == name
        {
            notes.push(format!("`{head}` is written as `{embed}`, where loaders of tied embeddings look for it"));
            let output = plain(embed);
            let action = if output.dtype == info.dtype { Action::Copy } else { Action::Convert };
            rows.push(row(action, vec![output]));
            continue;
        }
        if let Some(spec) = spec
            && spec.head.tied
            && name == format!("{}.weight", spec.head.module)
        {
            if is_copy_of_embedding(checkpoint, spec, name)? {
                rows.push(row(
                    Action::Drop { reason: "the head is tied to the embedding and holds the same values" },
                    vec![],
                ));
                continue;
            }
            notes.push(format!(
                "config.json ties `{name}` to the embedding, but their values differ; both are kept, engines use the embedding"
            ));
        }
        let output = plain(name);
        let action = if rescaled.contains(name) {
            Action::Rescale
        } else if output.dtype == info.dtype {
            Action::Copy
        } else {
            Action::Convert
        };
        rows.push(row(action, vec![output]));
    }
    Ok(rows)
}

pub(crate) fn is_copy_of_embedding(checkpoint: &Checkpoint, spec: &DecoderSpec, head: &str) -> Result<bool, JobError> {
    if checkpoint.info(&spec.embed.weight).is_none() {
        return Ok(false);
    }
    let (embed, head) = (checkpoint.tensor(&spec.embed.weight)?, checkpoint.tensor(head)?);
    Ok(embed.dtype == head.dtype && embed.data == head.data)
}

/// Norm weights, biases and routers that absorb scales.
pub(crate) fn rescaled_tensors(spec: Option<&DecoderSpec>, folds: &[Vec<Fold>]) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for fold in folds.iter().flatten() {
        names.extend(fold.plain_consumers.iter().cloned());
        match &fold.producer {
            Producer::Norm { weight, bias, .. } => {
                names.insert(weight.clone());
                names.extend(bias.clone());
            }
            Producer::Rows { site, .. } => {
                let producer = spec.and_then(|spec| spec.site(*site)).filter(|s| s.bias);
                names.extend(producer.map(|s| format!("{}.bias", s.module)));
            }
        }
    }
    names
}
