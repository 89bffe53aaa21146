//! Reopening what was written, before it is published.

use std::collections::BTreeMap;

use lite_calib::Windows;
use lite_decoder::DecoderSpec;
use lite_model::{Checkpoint, printable};
use lite_quant::{InputQuantization, Weights};
use lite_runtime::{Comparison, Engine, QuantizedCheckpoint, QuantizedSource, Subject, compare_subjects};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::passthrough::encode;
use crate::run::PART;
use crate::source::ModelSource;
use crate::{Action, JobError, Plan, QuantSite};

/// The quality of one quantized linear.
#[derive(Debug, Clone)]
pub struct SiteReport {
    /// Module name.
    pub module: String,
    /// Decoder block.
    pub block: usize,
    /// Relative error of its output on the calibration tokens; `None` without calibration.
    pub error: Option<f64>,
    /// What the solver had to do instead of what was asked, in words.
    pub fallback: Option<String>,
    /// Calibration tokens that reached it, where a router decides that.
    pub tokens: Option<u64>,
}

/// How the quantization of a linear went.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) error: Option<f64>,
    pub(crate) fallback: Option<String>,
    pub(crate) tokens: Option<u64>,
}

impl SiteReport {
    pub(crate) fn new(site: &QuantSite, outcome: Outcome) -> Self {
        let Outcome { error, fallback, tokens } = outcome;
        Self { module: site.module.clone(), block: site.block, error, fallback, tokens }
    }
}

/// What the check found.
#[derive(Debug, Clone)]
pub struct CheckReport {
    /// Packed linears read back and found equal to what was solved.
    pub linears: usize,
    /// Other tensors read back and found equal.
    pub plain: usize,
    /// Both models on held-out text; `None` where no decoder is known or no window was asked for.
    pub comparison: Option<Comparison>,
}

/// A fingerprint of codes, scales and zero points, and of the input's scale.
pub(crate) fn fingerprint(weights: &Weights, input: Option<&InputQuantization>) -> [u8; 32] {
    let mut hash = Sha256::new();
    let (n, k) = weights.shape();
    hash.update((n as u64).to_le_bytes());
    hash.update((k as u64).to_le_bytes());
    let floats = |values: &[f32]| digest(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
    match weights {
        Weights::Int(linear) => {
            // Not the symmetry: a layout that stores zero points reads a symmetric weight back as what it is, one
            // whose zero points all happen to be in the middle.
            hash.update([0, linear.scheme.bits]);
            hash.update(linear.scheme.group_size.to_flag().to_le_bytes());
            hash.update(digest(&linear.codes));
            hash.update(floats(&linear.scales));
            hash.update(digest(&linear.zeros));
        }
        Weights::Float(linear) => {
            hash.update([1, linear.scheme.format.bits()]);
            hash.update(digest(&linear.codes));
            hash.update(floats(&linear.scales));
            // One layout stores the factor, another its inverse; f32 is what both keep of it.
            hash.update((linear.global_scale as f32).to_le_bytes());
        }
    }
    if let Some(input) = input {
        hash.update(input.scale.to_le_bytes());
        hash.update(input.zero_point.to_le_bytes());
    }
    hash.finalize().into()
}

/// SHA-256 over the SHA-256 of each MiB, all cores at work.
fn digest(bytes: &[u8]) -> [u8; 32] {
    let parts: Vec<[u8; 32]> = bytes.par_chunks(1 << 20).map(|part| Sha256::digest(part).into()).collect();
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update(part));
    hash.finalize().into()
}

/// What must be found on disk.
#[derive(Debug, Default)]
pub(crate) struct Expected {
    /// By module: [`fingerprint`] of what was solved.
    pub(crate) linears: BTreeMap<String, [u8; 32]>,
    /// By tensor: SHA-256 of rescaled or converted bytes.
    pub(crate) tensors: BTreeMap<String, [u8; 32]>,
}

impl Expected {
    pub(crate) fn tensor(&mut self, name: &str, data: &[u8]) {
        self.tensors.insert(name.to_owned(), digest(data));
    }
}

/// Compares every tensor in the staged folder with what was solved, rescaled or copied.
pub(crate) fn check_tensors(
    plan: &Plan,
    source: &Checkpoint,
    written: &QuantizedCheckpoint,
    expected: &Expected,
    progress: &dyn Fn(usize, usize) -> Result<(), JobError>,
) -> Result<(usize, usize), JobError> {
    let differs = |name: &str, what: &str| {
        JobError::Verification(format!(
            "`{}`: {what} read back from the output differ from what was written; the disk may be faulty: nothing was published",
            printable(name)
        ))
    };
    let out = written.checkpoint();
    let mut plain = 0;
    let mut wanted = 0usize;
    for (done, row) in plan.tensors.iter().enumerate() {
        progress(done, plan.tensors.len())?;
        wanted += row.outputs.len();
        match &row.action {
            Action::Quantize { site } => {
                let site = &plan.sites[*site];
                let found = written.linear(&site.module, site.out_features, site.in_features)?;
                if expected.linears.get(&site.module) != Some(&fingerprint(&found.weights, found.input.as_ref())) {
                    return Err(differs(&site.module, "codes, scales or zero points"));
                }
                let names: Vec<String> = row.outputs.iter().map(|o| o.name.clone()).collect();
                out.release(names.iter().map(String::as_str));
            }
            Action::Copy | Action::Convert | Action::Rescale => {
                for output in &row.outputs {
                    let view = out.tensor(&output.name)?;
                    let same = match expected.tensors.get(&output.name) {
                        Some(hash) => *hash == digest(&view.data),
                        None => {
                            let original = source.tensor(&row.source)?.data;
                            let mut parts = original.chunks(PART).zip(view.data.chunks(PART)).enumerate();
                            // Pages are let go once they are compared.
                            let equal = |(i, (a, b)): (usize, (&[u8], &[u8]))| {
                                out.release_part(&output.name, 0..i * PART);
                                source.release_part(&row.source, 0..i * PART);
                                a == b
                            };
                            original.len() == view.data.len() && parts.all(equal)
                        }
                    };
                    if !same || view.dtype != output.dtype || view.shape != output.shape {
                        return Err(differs(&output.name, "values"));
                    }
                    plain += 1;
                    out.release([output.name.as_str()]);
                    source.release([row.source.as_str()]);
                }
            }
            Action::Drop { .. } => {}
        }
    }
    for output in &plan.added {
        let view = out.tensor(&output.name)?;
        let same = expected.tensors.get(&output.name) == Some(&digest(&view.data));
        if !same || view.dtype != output.dtype || view.shape != output.shape {
            return Err(differs(&output.name, "values"));
        }
        plain += 1;
    }
    wanted += plan.added.len();
    let found = out.names().count();
    if found != wanted {
        return Err(JobError::Verification(format!("the output holds {found} tensors, {wanted} were planned")));
    }
    Ok((expected.linears.len(), plain))
}

/// Both models on `windows`: the original from `source`, the quantized one from the staged folder, as an engine computes
/// with its activations and cache.
pub(crate) fn compare_models(
    plan: &Plan,
    spec: &DecoderSpec,
    source: &Checkpoint,
    written: &QuantizedCheckpoint,
    engine: &Engine,
    windows: &Windows,
    progress: &dyn Fn(&'static str, usize, usize) -> bool,
) -> Result<Comparison, JobError> {
    let shapes: BTreeMap<&str, (usize, usize)> =
        plan.sites.iter().map(|s| (s.module.as_str(), (s.out_features, s.in_features))).collect();
    let shape_of = |module: &str| shapes.get(module).copied();
    let original = ModelSource::new(source, spec);
    let quantized = QuantizedSource::new(written, &shape_of);
    let batch = plan.batch_for(windows.tokens.first().map_or(1, Vec::len));
    let subject = |name, source, engine| Subject { name, spec, source, kv: None, engine };
    let original = subject("original", &original as &dyn lite_decoder::WeightSource, None);
    let quantized = subject("quantized", &quantized, Some(engine));
    Ok(compare_subjects(&original, &quantized, &windows.tokens, batch, &plan.device, progress)?)
}

/// The bytes of a rescaled vector, as the plan writes it.
pub(crate) fn encode_edit(plan: &Plan, name: &str, values: &[f32]) -> Result<Vec<u8>, JobError> {
    let output = plan
        .tensors
        .iter()
        .flat_map(|row| &row.outputs)
        .find(|output| output.name == name)
        .ok_or_else(|| JobError::Input(format!("`{name}` absorbs scales but is not among the output's tensors")))?;
    encode(name, values, output.dtype)
}
