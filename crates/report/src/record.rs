//! What is known of a finished run; serialized, this is `report.json`.

use serde::Serialize;
use serde_json::{Map, Value};

/// Version of the shape of `report.json`. It rises when a key changes its meaning or goes; new keys do not raise it.
pub const SCHEMA: u32 = 1;

/// Everything the documents say.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Record {
    /// [`SCHEMA`].
    pub schema: u32,
    /// What wrote the checkpoint.
    pub tool: Tool,
    /// The model it was made from.
    pub model: ModelFacts,
    /// Everything that decides the result, in words and numbers, in the order to show.
    pub settings: Map<String, Value>,
    /// The calibration text; `None` without data.
    pub calibration: Option<TextFact>,
    /// Bytes before and after.
    pub sizes: Sizes,
    /// Packed linears read back and found equal to what was solved.
    pub linears_checked: usize,
    /// Other tensors read back and found equal.
    pub tensors_checked: usize,
    /// Both models on held-out text; `None` if they were not run.
    pub comparison: Option<Comparison>,
    /// Every decoder block with a quantized linear or a measured error, in order.
    pub layers: Vec<Layer>,
    /// Every quantized linear, in the order of the blocks.
    pub linears: Vec<Linear>,
    /// Calibration tokens that routers sent to their experts; empty for models without.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<LayerExperts>,
    /// What was done instead of what was asked.
    pub fallbacks: Vec<Fallback>,
    /// Every engine known, and whether it loads the result.
    pub engines: Vec<EngineVerdict>,
    /// Files of weights and config of the output.
    pub files: Vec<FileFact>,
    /// Things the user should know.
    pub notes: Vec<String>,
}

/// The experts of one layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerExperts {
    /// Decoder block.
    pub layer: usize,
    /// Tokens of each expert, by its number.
    pub tokens: Vec<u64>,
}

/// The program.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tool {
    /// `lite`.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// The source model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelFacts {
    /// What to call it: a hub id, or the name of its folder.
    pub name: String,
    /// Hub id, where one is known: see [`crate::hub_id`].
    pub base_model: Option<String>,
    /// Hub revision that was asked for.
    pub revision: Option<String>,
    /// `architectures[0]`.
    pub architecture: String,
    /// SHA-256 over `config.json` and the headers of the weight files.
    pub header_sha256: String,
}

/// A text and how much of it was used.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TextFact {
    /// Where it comes from.
    pub source: String,
    /// Windows of it.
    pub windows: usize,
    /// Tokens per window.
    pub seqlen: usize,
    /// SHA-256 over the token ids, where known.
    pub sha256: Option<String>,
}

/// Bytes of tensors.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Sizes {
    /// Of the source.
    pub source_bytes: u64,
    /// Of the output.
    pub output_bytes: u64,
    /// Of the output, in quantized linears with their scales.
    pub quantized_bytes: u64,
    /// Bits per quantized weight, with scales and zero points.
    pub bits_per_weight: f64,
}

/// A number and its standard error, `null` where there is none.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Measured {
    /// The estimate.
    pub value: f64,
    /// Its standard error.
    pub standard_error: f64,
}

/// The quantized model against the original on held-out text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// The text.
    pub text: TextFact,
    /// Tokens compared.
    pub tokens: usize,
    /// Tokens of them that predict a next one.
    pub predictions: usize,
    /// Mean KL(original ‖ quantized), nats per token.
    pub kl_mean: Measured,
    /// `[["p50", …], …, ["max", …]]`: the value that so many percent of the tokens stay below.
    pub kl_percentiles: Vec<(&'static str, f64)>,
    /// Tokens by KL.
    pub kl_histogram: Histogram,
    /// Share of tokens on which both models rank the same token first.
    pub top1: Measured,
    /// Perplexity of the original.
    pub perplexity_original: Measured,
    /// Perplexity of the quantized model.
    pub perplexity_quantized: Measured,
    /// Quantized over original.
    pub perplexity_ratio: Measured,
    /// Mean change of the right token's probability.
    pub delta_p_mean: Measured,
    /// Root mean square of that change.
    pub delta_p_rms: Measured,
}

/// Counts in bins that follow each other.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Histogram {
    /// Edges in rising order, one more than there are bins.
    pub edges: Vec<f64>,
    /// Count in `[edges[i], edges[i + 1])`.
    pub counts: Vec<u64>,
    /// Count below the first edge.
    pub below: u64,
    /// Count at or above the last edge.
    pub above: u64,
}

/// One decoder block.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Layer {
    /// Index.
    pub layer: usize,
    /// The block's own error, `‖B_q(h) − B(h)‖ / ‖B(h) − h‖` on the original's hidden states, held-out text.
    pub own_error: Option<f64>,
    /// What has gathered up to and with this block, `‖h_q − h‖ / ‖h‖`.
    pub accumulated_error: Option<f64>,
    /// Root mean square of the relative output errors of its linears on the calibration text.
    pub linears_error: Option<f64>,
    /// Time and memory, only where asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timing: Option<Timing>,
}

/// What a block took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Timing {
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Memory of the process at its end, bytes, where the system tells.
    pub resident_bytes: Option<u64>,
}

/// One quantized linear.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Linear {
    /// Module name.
    pub module: String,
    /// Decoder block.
    pub layer: usize,
    /// Output and input features.
    pub shape: [usize; 2],
    /// Its scheme, where it is not the common one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheme: Option<String>,
    /// Relative error of its output on the calibration text; `None` without calibration.
    pub relative_error: Option<f64>,
}

/// Something done instead of what was asked.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fallback {
    /// The linear.
    pub module: String,
    /// What and why.
    pub reason: String,
}

/// An engine, and whether it loads the result.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EngineVerdict {
    /// Name on the command line.
    pub engine: &'static str,
    /// Name for a reader.
    pub title: &'static str,
    /// Whether it loads the checkpoint and computes what was written.
    pub loads: bool,
    /// Conditions where it loads, reasons where it does not.
    pub rules: Vec<String>,
    /// How to serve from it, where it loads: a shell command, or Python.
    pub serve: Option<String>,
    /// `sh` or `python`.
    pub serve_language: &'static str,
}

/// A file of the output.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FileFact {
    /// Name in the output folder.
    pub name: String,
    /// Size.
    pub bytes: u64,
    /// SHA-256, in hex.
    pub sha256: String,
}

/// Linears that share a scheme which is not the common one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OtherScheme {
    /// The scheme.
    pub scheme: String,
    /// How many linears have it.
    pub linears: usize,
}
