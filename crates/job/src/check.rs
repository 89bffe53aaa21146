//! Reopening what was written, before it is published.

use std::collections::BTreeMap;

use lite_calib::Windows;
use lite_decoder::DecoderSpec;
use lite_model::{Checkpoint, printable};
use lite_quant::QuantizedLinear;
use lite_runtime::{Comparison, QuantizedCheckpoint, QuantizedSource, compare};
use sha2::{Digest, Sha256};

use crate::passthrough::encode;
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
}

impl SiteReport {
    pub(crate) fn new(site: &QuantSite, error: Option<f64>, fallback: Option<String>) -> Self {
        Self { module: site.module.clone(), block: site.block, error, fallback }
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

/// A fingerprint of codes, scales and zero points.
pub(crate) fn fingerprint(linear: &QuantizedLinear) -> [u8; 32] {
    let mut hash = Sha256::new();
    let scheme = &linear.scheme;
    // Not the symmetry: a layout that stores zero points reads a symmetric weight back as what it is, one
    // whose zero points all happen to be in the middle.
    hash.update([scheme.bits]);
    for number in [linear.out_features as i64, linear.in_features as i64, scheme.group_size.to_flag()] {
        hash.update(number.to_le_bytes());
    }
    hash.update(&linear.codes);
    for scale in &linear.scales {
        hash.update(scale.to_le_bytes());
    }
    hash.update(&linear.zeros);
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
        self.tensors.insert(name.to_owned(), Sha256::digest(data).into());
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
                let linear = written.linear(&site.module, site.out_features, site.in_features)?;
                if expected.linears.get(&site.module) != Some(&fingerprint(&linear)) {
                    return Err(differs(&site.module, "codes, scales or zero points"));
                }
                let names: Vec<String> = row.outputs.iter().map(|o| o.name.clone()).collect();
                out.release(names.iter().map(String::as_str));
            }
            Action::Copy | Action::Convert | Action::Rescale => {
                for output in &row.outputs {
                    let view = out.tensor(&output.name)?;
                    let same = match expected.tensors.get(&output.name) {
                        Some(hash) => *hash == <[u8; 32]>::from(Sha256::digest(view.data)),
                        None => view.data == source.tensor(&row.source)?.data,
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
    let found = out.names().count();
    if found != wanted {
        return Err(JobError::Verification(format!("the output holds {found} tensors, {wanted} were planned")));
    }
    Ok((expected.linears.len(), plain))
}

/// Both models on `windows`, the original from `source`, the quantized one from the staged folder.
pub(crate) fn compare_models(
    plan: &Plan,
    spec: &DecoderSpec,
    source: &Checkpoint,
    written: &QuantizedCheckpoint,
    windows: &Windows,
    progress: &dyn Fn(&'static str, usize, usize) -> bool,
) -> Result<Comparison, JobError> {
    let shapes: BTreeMap<&str, (usize, usize)> =
        plan.sites.iter().map(|s| (s.module.as_str(), (s.out_features, s.in_features))).collect();
    let shape_of = |module: &str| shapes.get(module).copied();
    let original = ModelSource::new(source, spec);
    let quantized = QuantizedSource::new(written, &shape_of);
    let batch = plan.batch_for(windows.tokens.first().map_or(1, Vec::len));
    Ok(compare(spec, &original, &quantized, &windows.tokens, batch, &plan.device, progress)?)
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
