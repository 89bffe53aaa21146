//! The model that a checkpoint was made from: configs and plain tensors side by side.

use std::collections::BTreeSet;
use std::path::Path;

use lite_decoder::{DecoderSpec, Producer, WeightSource};
use lite_model::{Checkpoint, Dtype, TensorView};
use rayon::prelude::*;

use super::Judged;
use super::findings::Findings;
use super::structure::is_float;
use crate::compare::CompareProgress;
use crate::eval::EvalModel;
use crate::{FloatSource, RuntimeError};

/// Values compared at a time.
const CHUNK: usize = 1 << 22;

/// Shape and values of a tensor.
type Loaded = (Vec<usize>, Vec<f32>);

/// The original.
pub(super) struct Original {
    checkpoint: Checkpoint,
    /// `None` for an architecture that is not known.
    model: Option<EvalModel>,
}

impl Original {
    /// Opens the original; as a decoder where the judged checkpoint is one.
    pub(super) fn open(dir: &Path, spec: Option<&DecoderSpec>) -> Result<Self, RuntimeError> {
        let checkpoint = Checkpoint::open(dir)?;
        let known = DecoderSpec::of(&checkpoint).is_ok();
        let model = (spec.is_some() || known).then(|| EvalModel::open(dir)).transpose()?;
        Ok(Self { checkpoint, model })
    }

    pub(super) fn dir(&self) -> &Path {
        self.checkpoint.root()
    }

    pub(super) fn model(&self) -> Option<&EvalModel> {
        self.model.as_ref()
    }

    /// Values of a tensor, decoded if they are coded; `None` if the original has no such tensor.
    pub(super) fn load(&self, name: &str) -> Result<Option<Loaded>, RuntimeError> {
        let load = |source: &dyn WeightSource| {
            if !source.contains(name) {
                return Ok(None);
            }
            let found = source.load(name)?;
            source.release(&[name.to_owned()]);
            Ok(Some(found))
        };
        match &self.model {
            Some(model) => load(&model.source()),
            None => load(&FloatSource::new(&self.checkpoint)),
        }
    }

    /// Whether both hold tensor `name`, byte for byte the same.
    pub(super) fn holds_same(&self, other: &Checkpoint, name: &str) -> bool {
        match (self.checkpoint.tensor(name), other.tensor(name)) {
            (Ok(a), Ok(b)) => a.dtype == b.dtype && a.shape == b.shape && a.data == b.data,
            _ => false,
        }
    }
}

/// The decoders that both configs describe.
pub(super) fn config(judged: &Judged<'_>, original: &Original, findings: &mut Findings) {
    let file = Some("config.json");
    for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        let (ours, theirs) = (judged.checkpoint.config().get(key), original.checkpoint.config().get(key));
        if let (Some(ours), Some(theirs)) = (ours, theirs)
            && ours != theirs
        {
            let message = format!("`{key}` is {ours}, the original's is {theirs}");
            findings.warning("config-value-differs", file, message);
        }
    }
    let (Some(ours), Some(theirs)) = (judged.spec, original.model.as_ref().map(EvalModel::spec)) else { return };
    let mut differs = |what: &str, ours: String, theirs: String| {
        let message = format!("{what} is {ours}, the original's is {theirs}: the same weights make another model");
        findings.error("decoder-differs", file, message);
    };
    if ours.arch != theirs.arch {
        return differs("the architecture", ours.arch.clone(), theirs.arch.clone());
    }
    for (what, ours, theirs) in [
        ("the number of blocks", ours.blocks.len(), theirs.blocks.len()),
        ("the hidden size", ours.hidden, theirs.hidden),
        ("the vocabulary", ours.vocab, theirs.vocab),
    ] {
        if ours != theirs {
            differs(what, ours.to_string(), theirs.to_string());
        }
    }
    for (ours, theirs) in
        [(Some(&ours.rope), Some(&theirs.rope)), (ours.local_rope.as_ref(), theirs.local_rope.as_ref())]
    {
        if ours != theirs {
            differs("the rotary embedding", format!("{ours:?}"), format!("{theirs:?}"));
        }
    }
    let head = |spec: &DecoderSpec| format!("{} and {:?}", spec.head.scale, spec.head.softcap);
    if head(ours) != head(theirs) {
        differs("the factor and the cap on logits", head(ours), head(theirs));
    }
    if ours.final_norm.eps != theirs.final_norm.eps {
        differs("the epsilon of norms", ours.final_norm.eps.to_string(), theirs.final_norm.eps.to_string());
    }
    for (a, b) in ours.blocks.iter().zip(&theirs.blocks) {
        if a.attn != b.attn {
            differs(&format!("the attention of block {}", a.index), format!("{:?}", a.attn), format!("{:?}", b.attn));
            break;
        }
        if a.residual_scale != b.residual_scale {
            let what = format!("the factor on what block {} adds", a.index);
            differs(&what, a.residual_scale.to_string(), b.residual_scale.to_string());
            break;
        }
        if a.mlp != b.mlp {
            differs(&format!("the feed-forward of block {}", a.index), format!("{:?}", a.mlp), format!("{:?}", b.mlp));
            break;
        }
    }
}

/// Plain tensors: those of the original, or rounded to their type in the file. What a fold may change is left to the
/// comparison of weights.
pub(super) fn plain(
    judged: &Judged<'_>,
    original: &Original,
    progress: CompareProgress<'_>,
    findings: &mut Findings,
) -> Result<(), RuntimeError> {
    let skipped = foldable(judged);
    let names: Vec<&str> = judged.checkpoint.names().collect();
    for (done, name) in names.iter().enumerate() {
        if !progress("plain tensors", done, names.len()) {
            return Err(RuntimeError::Interrupted);
        }
        let view = judged.checkpoint.tensor(name)?;
        if !is_float(view.dtype) || skipped.contains(*name) || original.holds_same(judged.checkpoint, name) {
            continue;
        }
        let Some(info) = original.checkpoint.info(name) else { continue };
        if info.shape != view.shape {
            let message = format!("has shape {:?}, the original's has {:?}", view.shape, info.shape);
            findings.error("plain-differs", Some(name), message);
            continue;
        }
        if is_float(info.dtype) {
            let count = differing(judged.checkpoint, &original.checkpoint, name, view)?;
            if count > 0 {
                let message = format!(
                    "{count} of {} values differ from the original's, and no fold explains them: copy the original's",
                    info.elements()
                );
                findings.error("plain-differs", Some(name), message);
            }
        }
        judged.checkpoint.release([*name]);
        original.checkpoint.release([*name]);
    }
    absent(judged, original, findings);
    Ok(())
}

/// Tensors that a fold may change: norms before linears, routers, and weights and biases of linears.
fn foldable(judged: &Judged<'_>) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let Some(spec) = judged.spec else { return names };
    for block in &spec.blocks {
        for fold in &block.folds {
            if let Producer::Norm { weight, bias, .. } = &fold.producer {
                names.insert(weight.clone());
                names.extend(bias.clone());
            }
            names.extend(fold.plain_consumers.iter().cloned());
        }
        for site in &block.sites {
            names.insert(format!("{}.weight", site.module));
            names.insert(format!("{}.bias", site.module));
        }
    }
    names
}

/// Values that are not the original's rounded to the type in the file.
fn differing(ours: &Checkpoint, theirs: &Checkpoint, name: &str, view: TensorView<'_>) -> Result<usize, RuntimeError> {
    let all: usize = view.shape.iter().product();
    let (mut a, mut b, mut count, mut first) = (Vec::new(), Vec::new(), 0, 0);
    while first < all {
        let length = CHUNK.min(all - first);
        a.resize(length, 0f32);
        b.resize(length, 0f32);
        ours.tensor_f32_part(name, first, &mut a)?;
        theirs.tensor_f32_part(name, first, &mut b)?;
        let round = |value: f32| match view.dtype {
            Dtype::F16 => half::f16::from_f32(value).to_f32(),
            Dtype::BF16 => half::bf16::from_f32(value).to_f32(),
            _ => value,
        };
        count += a.par_iter().zip(&b).filter(|(a, b)| **a != round(**b)).count();
        first += length;
    }
    Ok(count)
}

/// What the original has and this checkpoint lacks, beyond what its decoder needs.
fn absent(judged: &Judged<'_>, original: &Original, findings: &mut Findings) {
    let needed: BTreeSet<String> =
        judged.spec.map(|spec| spec.tensors().into_iter().map(|need| need.name).collect()).unwrap_or_default();
    let head = judged.spec.map(|spec| format!("{}.weight", spec.head.module));
    let codes = FloatSource::new(&original.checkpoint);
    let packed = |name: &str| name.strip_suffix(".weight").is_some_and(|module| judged.is_packed(module));
    let lost: Vec<&str> = original
        .checkpoint
        .names()
        .filter(|name| !judged.has(name) && !packed(name) && !needed.contains(*name) && head.as_deref() != Some(name))
        .filter(|name| codes.dropped(name).is_none() && !name.contains("rotary_emb.inv_freq"))
        .collect();
    if let Some(first) = lost.first() {
        let message =
            format!("{} tensors of the original are not in the checkpoint; the decoder needs none", lost.len());
        findings.warning("tensor-missing", Some(first), message);
    }
}
