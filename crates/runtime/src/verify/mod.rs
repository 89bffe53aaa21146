//! `verify`: whether a checkpoint on disk is what it claims to be, whoever wrote it.
//!
//! Every finding has a stable code. Errors fail the checkpoint; warnings and notes do not.
//!
//! | codes | subject |
//! |---|---|
//! | `folder` `shard-truncated` `shard-header` `index-mismatch` `config-unreadable` `io` | the folder cannot be opened |
//! | `folder-odd` `tokenizer-missing` `tokenizer-unreadable` `tokenizer-vocab` `side-config-differs` | files beside the weights |
//! | `decoder-config` `architecture-unknown` `quantization-config` `quantization-undeclared` `not-quantized` | `config.json` |
//! | `tensor-missing` `tensor-extra` `tensor-shape` `tensor-dtype` `stale-twin` `layout-mismatch` `mtp-undeclared` | which tensors there are |
//! | `declared-but-plain` `ignored-but-packed` `override-absent` `head-declared-plain` `head-undeclared` `tied-head` | declared against stored |
//! | `kv-scales-missing` `kv-scales-undeclared` `kv-scale-value` | key/value cache |
//! | `value-not-finite` `norm-zero` `zero-points` `unpack` `scale-zero` `scale-negative` `scale-subnormal` `scale-outlier` | values |
//! | `codes-constant` `codes-saturated` `codes-one-sided` `codes-range` `zero-offset` `pack-order` | distribution of the codes |
//! | `tokenizer-differs` `side-file-missing` `side-file-differs` `decoder-differs` `config-value-differs` `plain-differs` | against the original: files |
//! | `weights-differ` `plain-on-grid` `fold-inconsistent` `column-scale` `group-scale` `zero-shift` `code-outlier` | against the original: weights |
//! | `forward-failed` `forward-diverges` `layer-diverges` | against the original: both models on held-out text |
//!
//! With a target engine, its rules add codes of their own (`vllm-…`, `turbomind-…`).
//!
//! # What statistics cannot tell
//!
//! Checkpoints hold no hashes of their tensors. A solver with error feedback may move any code by several steps, so a
//! flip of a low bit of one code, or of a low mantissa bit of one scale, is within what it may do, and is not found.
//! Found are: a code of 4 or more bits that is off by more than four steps and twelve times its tensor's usual error; a
//! scale that is off by more than 8 %; a zero point that is off by one.

mod codes;
mod config;
mod findings;
mod folds;
mod forward;
mod original;
mod side;
mod structure;
mod targets;
mod values;
mod weights;

use std::path::Path;

use lite_decoder::{Compute, DecoderSpec};
use lite_model::{Checkpoint, ModelError};
use lite_pack::targets::Target;
use serde::Serialize;

pub use findings::{Finding, FindingSeverity};

use self::findings::Findings;
use crate::compare::CompareProgress;
use crate::stored::{StoredLinear, stored_linears};
use crate::{Comparison, QuantizedCheckpoint, RuntimeError};

/// What to judge a checkpoint by.
#[derive(Debug, Clone, Copy, Default)]
pub struct VerifyOptions<'a> {
    /// The model it was made from.
    pub against: Option<&'a Path>,
    /// Engines that must load it.
    pub targets: &'a [Target],
    /// Tensor-parallel ranks of the engines; 0 counts as 1.
    pub tp: usize,
    /// Token windows, all of one length, that both models are run on; needs [`VerifyOptions::against`].
    pub windows: &'a [Vec<u32>],
    /// Only configs and headers; no values.
    pub quick: bool,
    /// Where both models run; by default the CPU.
    pub compute: Option<&'a Compute>,
}

/// The verdict on a checkpoint.
#[derive(Debug, Clone, Serialize)]
pub struct Verification {
    /// Whether the folder could be opened at all.
    pub opened: bool,
    /// The layout that the config names, if it is one that is read.
    pub layout: Option<&'static str>,
    /// Packed linears whose values were judged.
    pub linears: usize,
    /// Other tensors whose values were judged.
    pub plain: usize,
    /// Packed linears compared with the original's weights.
    pub compared: usize,
    /// What was found, errors first.
    pub findings: Vec<Finding>,
    /// Both models on held-out text.
    #[serde(skip)]
    pub comparison: Option<Comparison>,
}

impl Verification {
    /// Whether there is no error.
    pub fn passed(&self) -> bool {
        self.count(FindingSeverity::Error) == 0
    }

    /// Findings of this severity.
    pub fn count(&self, severity: FindingSeverity) -> usize {
        self.findings.iter().filter(|finding| finding.severity == severity).count()
    }
}

/// A linear that the checkpoint must hold or does hold.
#[derive(Debug, Clone)]
struct Linear {
    module: String,
    n: usize,
    k: usize,
}

/// What is judged.
struct Judged<'a> {
    dir: &'a Path,
    checkpoint: &'a Checkpoint,
    quantized: Option<&'a QuantizedCheckpoint>,
    /// `None` for an architecture that is not known.
    spec: Option<&'a DecoderSpec>,
    /// Linears of the decoder (the head last, if it is stored packed), or those found by their tensors.
    linears: &'a [Linear],
    stored: &'a [StoredLinear],
}

impl Judged<'_> {
    fn is_packed(&self, module: &str) -> bool {
        self.quantized.is_some_and(|quantized| quantized.is_packed(module))
    }

    fn has(&self, name: &str) -> bool {
        self.checkpoint.info(name).is_some()
    }
}

/// Judges the checkpoint in `dir`. Memory: one linear at a time; with an original, one block of both.
///
/// # Errors
/// Only what keeps it from judging: an original that cannot be opened, a file that changes meanwhile, or a stop asked
/// for by `progress`. A folder that cannot be opened is a [`Verification`] with [`Verification::opened`] false.
pub fn verify(
    dir: &Path,
    options: &VerifyOptions<'_>,
    progress: CompareProgress<'_>,
) -> Result<Verification, RuntimeError> {
    let mut findings = Findings::default();
    let checkpoint = match Checkpoint::open(dir) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return Ok(unopened(&error)),
    };
    for warning in &checkpoint.warnings {
        findings.warning("folder-odd", None, warning.clone());
    }
    let quantized = match QuantizedCheckpoint::open(dir) {
        Ok(quantized) => Some(quantized),
        Err(RuntimeError::NotQuantized) => None,
        Err(RuntimeError::Pack(error)) => {
            findings.error("quantization-config", Some("config.json"), error.to_string());
            None
        }
        Err(other) => return Err(other),
    };
    let spec = config::decoder(&checkpoint, &mut findings);
    let (stored, unknown) = stored_linears(&checkpoint);
    let linears = structure::linears(spec.as_ref(), quantized.as_ref(), &stored);
    let judged = Judged {
        dir,
        checkpoint: &checkpoint,
        quantized: quantized.as_ref(),
        spec: spec.as_ref(),
        linears: &linears,
        stored: &stored,
    };
    let original = options.against.map(|path| original::Original::open(path, judged.spec)).transpose()?;
    config::check(&judged, &mut findings);
    structure::check(&judged, &unknown, original.as_ref(), &mut findings);
    side::check(&judged, original.as_ref(), &mut findings);
    targets::check(&judged, options, &mut findings);
    let mut counts = (0, 0, 0);
    if options.quick {
        structure::headers(&judged, &mut findings);
    } else {
        counts.1 = values::plain(&judged, progress, &mut findings)?;
        counts.0 = values::packed(&judged, options, progress, &mut findings)?;
    }
    let mut comparison = None;
    if let Some(original) = &original {
        original::config(&judged, original, &mut findings);
        if !options.quick {
            original::plain(&judged, original, progress, &mut findings)?;
            let compared = weights::check(&judged, original, progress, &mut findings)?;
            counts.2 = compared.linears;
            comparison = forward::check(&judged, original, options, compared.dequantized, progress, &mut findings)?;
        }
    }
    Ok(Verification {
        opened: true,
        layout: quantized.as_ref().map(|quantized| quantized.layout().name()),
        linears: counts.0,
        plain: counts.1,
        compared: counts.2,
        findings: findings.finish(),
        comparison,
    })
}

/// The verdict on a folder that cannot be opened.
fn unopened(error: &ModelError) -> Verification {
    let code = match error {
        ModelError::Truncated { .. } => "shard-truncated",
        ModelError::Container { .. }
        | ModelError::Tensor { .. }
        | ModelError::UnsupportedTensor { .. }
        | ModelError::Foreign { .. } => "shard-header",
        ModelError::Index { .. } | ModelError::Ambiguous { .. } => "index-mismatch",
        ModelError::Config { .. } | ModelError::NoConfig { .. } => "config-unreadable",
        ModelError::MissingFolder { .. }
        | ModelError::NotAFolder { .. }
        | ModelError::EmptyFolder { .. }
        | ModelError::NoWeights { .. }
        | ModelError::ForeignWeights { .. }
        | ModelError::NotRegular { .. } => "folder",
        _ => "io",
    };
    let mut findings = Findings::default();
    findings.error(code, None, error.to_string());
    Verification {
        opened: false,
        layout: None,
        linears: 0,
        plain: 0,
        compared: 0,
        findings: findings.finish(),
        comparison: None,
    }
}
