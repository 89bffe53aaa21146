//! Both models on held-out text, block by block.

use lite_decoder::{BATCH_TOKENS, Compute, DecoderError, WeightSource};
use lite_quant::ActivationFormat;
use lite_quant::floats::FloatFormat;

use super::findings::Findings;
use super::original::Original;
use super::weights::bits;
use super::{Judged, VerifyOptions};
use crate::compare::{CompareProgress, compare_subjects};
use crate::eval::EvalModel;
use crate::{Comparison, Engine, QuantizedCheckpoint, QuantizedSource, RuntimeError, Subject};

/// Findings that keep both models from being run side by side.
const STRUCTURE: [&str; 8] = [
    "tensor-missing",
    "tensor-shape",
    "tensor-dtype",
    "layout-mismatch",
    "unpack",
    "zero-points",
    "quantization-config",
    "decoder-config",
];

/// What is too much: mean KL in nats, and a block's own error over its update. Far above what any sound checkpoint of so
/// many bits shows, far below what damage does.
struct Limits {
    kl: f64,
    own: f64,
}

/// Runs both and judges the differences; `None` where that was not asked for, or cannot be done.
pub(super) fn check(
    judged: &Judged<'_>,
    original: &Original,
    options: &VerifyOptions<'_>,
    dequantized: Option<u8>,
    progress: CompareProgress<'_>,
    findings: &mut Findings,
) -> Result<Option<Comparison>, RuntimeError> {
    let windows = options.windows;
    let (false, Some(reference)) = (windows.is_empty(), original.model()) else { return Ok(None) };
    if findings.has_error(&STRUCTURE) {
        findings.note("forward-failed", None, "the models were not run side by side because of the errors above");
        return Ok(None);
    }
    let batch = (BATCH_TOKENS / windows.first().map_or(1, Vec::len).max(1)).max(1);
    let reference_weights = reference.source();
    let run = |quantized: &Subject<'_>| {
        let source = &reference_weights;
        let (spec, engine) = (reference.spec(), reference.engine());
        let original = Subject { name: "original", spec, source, kv: None, engine };
        let compute = options.compute.cloned().unwrap_or_else(Compute::cpu);
        compare_subjects(&original, quantized, windows, batch, &compute, progress)
    };
    let run = || match (judged.quantized, judged.spec) {
        (Some(quantized), Some(spec)) if judged.has(&spec.embed.weight) => {
            let shape_of = |module: &str| {
                judged.linears.iter().find(|linear| linear.module == module).map(|linear| (linear.n, linear.k))
            };
            let source = Packed { quantized, source: QuantizedSource::new(quantized, &shape_of) };
            let engine = Engine::of(quantized, spec)?;
            run(&Subject { name: "quantized", spec, source: &source, kv: None, engine: Some(&engine) })
        }
        _ => {
            let model = EvalModel::open(judged.dir)?;
            let (spec, engine) = (model.spec(), model.engine());
            run(&Subject { name: "quantized", spec, source: &model.source(), kv: None, engine })
        }
    };
    match run() {
        Ok(comparison) => {
            judge(&comparison, &limits(judged, dequantized), findings);
            Ok(Some(comparison))
        }
        Err(RuntimeError::Interrupted) => Err(RuntimeError::Interrupted),
        Err(error) => {
            findings.error("forward-failed", None, format!("the model cannot be run: {error}"));
            Ok(None)
        }
    }
}

/// The weights of a quantized checkpoint, rows of a packed head included.
struct Packed<'a> {
    quantized: &'a QuantizedCheckpoint,
    source: QuantizedSource<'a>,
}

impl WeightSource for Packed<'_> {
    fn load(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), DecoderError> {
        self.source.load(name)
    }

    fn contains(&self, name: &str) -> bool {
        self.source.contains(name)
    }

    fn release(&self, names: &[String]) {
        self.source.release(names);
    }

    fn rows(&self, name: &str, rows: &[u32]) -> Result<Vec<f32>, DecoderError> {
        if !name.strip_suffix(".weight").is_some_and(|module| self.quantized.is_packed(module)) {
            return self.source.rows(name, rows);
        }
        let (shape, values) = self.load(name)?;
        let width = shape.last().copied().unwrap_or(0);
        let mut out = Vec::with_capacity(rows.len().saturating_mul(width));
        for &row in rows {
            let at = (row as usize).saturating_mul(width);
            let found = values.get(at..at.saturating_add(width)).ok_or_else(|| DecoderError::Tensor {
                tensor: lite_model::printable(name),
                reason: format!("has shape {shape:?}, row {row} was wanted"),
            })?;
            out.extend_from_slice(found);
        }
        Ok(out)
    }
}

/// Limits for the coarsest scheme in the checkpoint, linears that are stored as the values of so many bits included.
fn limits(judged: &Judged<'_>, dequantized: Option<u8>) -> Limits {
    let Some(config) = judged.quantized.map(QuantizedCheckpoint::config) else {
        return match dequantized {
            None => Limits { kl: 0.01, own: 0.05 },
            Some(bits) => by_bits(bits, false),
        };
    };
    let schemes = || config.overrides.iter().map(|(_, scheme)| scheme).chain([&config.scheme]);
    let coarse = schemes().any(|scheme| {
        let format = scheme.activations.map(|activations| activations.format);
        matches!(format, Some(ActivationFormat::Int { bits: 0..=4, .. } | ActivationFormat::Float(FloatFormat::E2M1)))
    });
    let activations = schemes().any(|scheme| scheme.activations.is_some());
    let narrow = schemes().map(bits).chain(dequantized).min().unwrap_or(16);
    match by_bits(narrow, activations || config.kv_cache.is_some()) {
        Limits { kl, .. } if coarse && kl < 2.0 => Limits { kl: 2.0, own: 1.2 },
        limits => limits,
    }
}

fn by_bits(narrow: u8, inputs_or_cache: bool) -> Limits {
    match (narrow, inputs_or_cache) {
        (0..=2, _) => Limits { kl: 8.0, own: 3.0 },
        (3, _) => Limits { kl: 2.0, own: 1.2 },
        (4 | 5, _) => Limits { kl: 0.6, own: 0.6 },
        (_, true) => Limits { kl: 0.4, own: 0.4 },
        _ => Limits { kl: 0.1, own: 0.15 },
    }
}

/// Holds a comparison against limits.
fn judge(comparison: &Comparison, limits: &Limits, findings: &mut Findings) {
    let kl = comparison.summary.kl_mean;
    if kl.is_nan() || kl > limits.kl {
        let message = format!(
            "the mean KL divergence from the original is {kl:.4} nats on {} windows, wanted at most {} for its scheme: \
             together the weights make another model, also where each by itself passes",
            comparison.windows, limits.kl
        );
        findings.error("forward-diverges", None, message);
    }
    let mut own: Vec<f64> = comparison.layers.iter().map(|layer| layer.own).collect();
    own.sort_by(f64::total_cmp);
    let median = own.get(own.len() / 2).copied().unwrap_or(0.0);
    for layer in &comparison.layers {
        let place = format!("block {}", layer.block);
        if layer.own.is_nan() || layer.own > limits.own {
            let message = format!(
                "its output is off by {:.3} of what it adds, wanted at most {} for its scheme: a tensor of it is damaged",
                layer.own, limits.own
            );
            findings.error("layer-diverges", Some(&place), message);
        } else if layer.own > 8.0 * median && layer.own > 0.05 {
            let message = format!("its output is off by {:.3} of what it adds, the median is {median:.3}", layer.own);
            findings.warning("layer-diverges", Some(&place), message);
        }
    }
}
