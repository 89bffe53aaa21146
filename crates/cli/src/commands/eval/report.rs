//! The result, for readers and as JSON.

use std::io::{self, Write};

use lite_calib::{EvalText, TaskName, Windows};
use lite_model::printable;
use lite_runtime::eval::{Canary, Estimate, GateResult, Perplexity, Repetition, ScoredItem, TaskScore};
use lite_runtime::{Comparison, Engine};
use serde_json::{Value, json};

use super::measure::Session;
use crate::memory::resident;
use crate::output::{duration, mib};

/// Layers shown of the worst.
const WORST: usize = 5;

/// What must be said with a perplexity.
pub(super) struct Protocol {
    name: String,
    description: String,
    sha256: String,
    tokens: usize,
    windows: usize,
    seqlen: usize,
    /// The special token at the start of the text.
    first_special: Option<String>,
    /// SHA-256 over the token ids of the windows.
    digest: String,
}

impl Protocol {
    pub(super) fn new(text: &EvalText, windows: &Windows) -> Self {
        Self {
            name: text.source.name.clone(),
            description: text.source.description.clone(),
            sha256: text.sha256.clone(),
            tokens: text.ids.len(),
            windows: windows.tokens.len(),
            seqlen: windows.seqlen(),
            first_special: text.first_special.clone(),
            digest: windows.digest.clone(),
        }
    }
}

/// Accuracies of one task.
pub(super) struct TaskReport {
    pub(super) task: TaskName,
    pub(super) files: Vec<String>,
    pub(super) score: TaskScore,
    /// The original's, and how many questions the two answer differently.
    pub(super) original: Option<(TaskScore, usize)>,
    pub(super) items: Vec<ScoredItem>,
}

/// Everything that was measured.
pub(super) struct Report {
    model: String,
    layout: Option<&'static str>,
    against: Option<String>,
    kv_bits: &'static str,
    num_fewshot: usize,
    /// Whether inputs of linears are rounded as the checkpoint tells engines to.
    activations: bool,
    pub(super) protocol: Option<Protocol>,
    pub(super) perplexity: Option<Perplexity>,
    pub(super) comparison: Option<Comparison>,
    pub(super) canaries: Vec<Canary>,
    pub(super) tasks: Vec<TaskReport>,
    pub(super) gates: Vec<GateResult>,
    pub(super) seconds: f64,
}

impl Report {
    pub(super) fn new(session: &Session<'_>) -> Self {
        Self {
            model: session.dir.display().to_string(),
            layout: session.model.layout(),
            against: session.against.map(|dir| dir.display().to_string()),
            kv_bits: session.args.kv_bits.name(),
            num_fewshot: session.args.num_fewshot,
            activations: session.model.engine().is_some_and(Engine::quantizes_activations),
            protocol: None,
            perplexity: None,
            comparison: None,
            canaries: Vec::new(),
            tasks: Vec::new(),
            gates: Vec::new(),
            seconds: 0.0,
        }
    }
}

/// `value ± error` with so many digits.
fn pm(estimate: Estimate, digits: usize) -> String {
    format!("{:.digits$} ± {:.digits$}", estimate.value, estimate.standard_error)
}

fn percent(estimate: Estimate) -> String {
    let scaled = Estimate { value: estimate.value * 100.0, standard_error: estimate.standard_error * 100.0 };
    format!("{} %", pm(scaled, 3))
}

/// For a reader.
pub(super) fn text(out: &mut impl Write, report: &Report) -> io::Result<()> {
    writeln!(out, "{} ({})", report.model, report.layout.unwrap_or("not quantized"))?;
    if let Some(against) = &report.against {
        writeln!(out, "  against       {against}")?;
    }
    if report.kv_bits != "16" {
        let bits = if report.kv_bits == "fp8" { "" } else { " bits" };
        writeln!(out, "  KV cache      {}{bits}, of the checkpoint only", report.kv_bits)?;
    }
    if report.activations {
        writeln!(out, "  activations   rounded as engines do for this checkpoint")?;
    }
    if let Some(p) = &report.protocol {
        let special = match &p.first_special {
            Some(token) => format!("{} first", printable(token)),
            None => "no special token first".to_owned(),
        };
        writeln!(out, "  text          {}, {} tokens, {special}", p.description, p.tokens)?;
        writeln!(out, "  text SHA-256  {}", p.sha256)?;
        writeln!(
            out,
            "  windows       {} of {} tokens, not overlapping; mean over {} predictions each",
            p.windows,
            p.seqlen,
            p.seqlen - 1
        )?;
    }
    if let Some(p) = &report.perplexity {
        writeln!(out, "  perplexity    {}", pm(p.perplexity, 4))?;
        if report.layout.is_some() {
            writeln!(out, "                --against ORIGINAL adds its perplexity and the KL divergence from it")?;
        }
    }
    if let Some(comparison) = &report.comparison {
        compared(out, comparison)?;
    }
    for (number, canary) in report.canaries.iter().enumerate() {
        let looped = |name: &str, found: Option<Repetition>| {
            let cycle = |n: usize| if n == 1 { "1 token".to_owned() } else { format!("{n} tokens") };
            found.map_or(String::new(), |r| format!("; from token {} on {name} repeats {}", r.start, cycle(r.cycle)))
        };
        writeln!(
            out,
            "  canary {}      {} of {} greedy tokens{}{}{}",
            number + 1,
            if canary.identical { "all".to_owned() } else { format!("the first {}", canary.matching) },
            canary.length,
            if canary.identical { " are the original's" } else { " are the original's, then they differ" },
            looped("the checkpoint", canary.quantized),
            looped("the original", canary.original)
        )?;
    }
    for task in &report.tasks {
        let line = |score: &TaskScore| {
            let norm = if task.task.has_acc_norm() {
                format!(", acc_norm {}", percent(score.acc_norm))
            } else {
                String::new()
            };
            format!("acc {}{norm}", percent(score.acc))
        };
        writeln!(
            out,
            "  {:<13} {} ({} questions, {}-shot)",
            task.task.name(),
            line(&task.score),
            task.score.items,
            report.num_fewshot
        )?;
        if let Some((original, flips)) = &task.original {
            writeln!(out, "    original    {}; {flips} answers differ", line(original))?;
        }
    }
    for gate in &report.gates {
        let verdict = if gate.passed { "passed" } else { "FAILED" };
        writeln!(out, "  {verdict}        {} {}: {:.6}", gate.gate.flag(), gate.gate.limit(), gate.measured)?;
    }
    let memory = resident().map_or(String::new(), |r| format!(", peak memory {}", mib(r.peak)));
    writeln!(out, "  took          {}{memory}", duration(report.seconds))
}

fn compared(out: &mut impl Write, comparison: &Comparison) -> io::Result<()> {
    let s = &comparison.summary;
    let original = Estimate { value: s.perplexity_original, standard_error: s.perplexity_original_standard_error };
    let quantized = Estimate { value: s.perplexity_quantized, standard_error: s.perplexity_quantized_standard_error };
    writeln!(out, "  perplexity    {}", pm(quantized, 4))?;
    writeln!(out, "    original    {}", pm(original, 4))?;
    writeln!(out, "    ratio       {}", pm(s.perplexity_ratio, 5))?;
    if within_noise(s.perplexity_ratio) {
        writeln!(
            out,
            "                within two standard errors of 1: this text cannot tell the two perplexities apart"
        )?;
    }
    writeln!(out, "  KL(original ‖ checkpoint), nats per token, {} tokens", s.tokens)?;
    let mean = Estimate { value: s.kl_mean, standard_error: s.kl_standard_error };
    writeln!(out, "    mean        {}", pm(mean, 6))?;
    writeln!(out, "    median      {:.6}", s.kl_median)?;
    writeln!(out, "    90 %        {:.6}", s.kl_p90)?;
    writeln!(out, "    99 %        {:.6}", s.kl_p99)?;
    writeln!(out, "    99.9 %      {:.6}", s.kl_p999)?;
    writeln!(out, "    largest     {:.6}", s.kl_max)?;
    let top1 = Estimate { value: s.top1, standard_error: s.top1_standard_error };
    writeln!(out, "  same top-1    {}", percent(top1))?;
    writeln!(out, "  Δp of the correct token")?;
    writeln!(out, "    RMS         {}", percent(s.delta_p_rms))?;
    writeln!(out, "    mean        {}", percent(s.delta_p_mean))?;
    let mut layers = comparison.layers.clone();
    layers.sort_by(|a, b| b.own.total_cmp(&a.own));
    let shown = layers.len().min(WORST);
    writeln!(
        out,
        "  layers, worst first ({shown} of {}): relative error of the layer's own output; gathered so far",
        layers.len()
    )?;
    writeln!(out, "    layer    own   so far")?;
    for layer in &layers[..shown] {
        writeln!(out, "    {:>5} {:.4}   {:.4}", layer.block, layer.own, layer.accumulated)?;
    }
    Ok(())
}

fn within_noise(ratio: Estimate) -> bool {
    (ratio.value - 1.0).abs() <= 2.0 * ratio.standard_error
}

fn estimate(e: Estimate) -> Value {
    json!({"value": e.value, "standard_error": e.standard_error})
}

/// As one JSON line.
pub(super) fn json(report: &Report) -> Value {
    let protocol = report.protocol.as_ref().map(|p| {
        json!({"dataset": p.name, "description": p.description, "text_sha256": p.sha256, "tokens": p.tokens, "windows": p.windows,
               "seqlen": p.seqlen, "first_special_token": p.first_special, "windows_sha256": p.digest, "overlapping": false})
    });
    let perplexity = report.perplexity.as_ref().map(|p| {
        json!({"value": p.perplexity.value, "standard_error": p.perplexity.standard_error, "predictions": p.predictions})
    });
    let gates: Vec<Value> = report
        .gates
        .iter()
        .map(|g| json!({"gate": g.gate.flag(), "limit": g.gate.limit(), "measured": g.measured, "passed": g.passed}))
        .collect();
    json!({"event": "eval", "schema": 1, "model": report.model, "layout": report.layout, "against": report.against,
           "kv_bits": report.kv_bits, "quantized_activations": report.activations, "protocol": protocol, "perplexity": perplexity,
           "comparison": report.comparison.as_ref().map(comparison_json),
           "canaries": report.canaries.iter().map(canary_json).collect::<Vec<_>>(),
           "tasks": report.tasks.iter().map(|task| task_json(task, report.num_fewshot)).collect::<Vec<_>>(),
           "gates": gates, "seconds": report.seconds, "peak_resident_bytes": resident().map(|r| r.peak)})
}

fn comparison_json(comparison: &Comparison) -> Value {
    let s = &comparison.summary;
    let layers: Vec<Value> = comparison
        .layers
        .iter()
        .map(|l| json!({"layer": l.block, "own_error": l.own, "accumulated_error": l.accumulated}))
        .collect();
    json!({"tokens": s.tokens, "predictions": s.predictions,
           "perplexity": {"value": s.perplexity_quantized, "standard_error": s.perplexity_quantized_standard_error},
           "perplexity_original": {"value": s.perplexity_original, "standard_error": s.perplexity_original_standard_error},
           "perplexity_ratio": estimate(s.perplexity_ratio), "ratio_within_noise": within_noise(s.perplexity_ratio),
           "kl": {"mean": s.kl_mean, "standard_error": s.kl_standard_error, "median": s.kl_median, "p90": s.kl_p90, "p99": s.kl_p99,
                  "p999": s.kl_p999, "max": s.kl_max},
           "top1": {"value": s.top1, "standard_error": s.top1_standard_error},
           "delta_p_mean": estimate(s.delta_p_mean), "delta_p_rms": estimate(s.delta_p_rms), "layers": layers})
}

fn canary_json(canary: &Canary) -> Value {
    let looped = |found: Option<Repetition>| found.map(|r| json!({"start": r.start, "cycle": r.cycle}));
    json!({"prompt": canary.prompt, "length": canary.length, "matching": canary.matching, "identical": canary.identical,
           "repetition": looped(canary.quantized), "repetition_original": looped(canary.original)})
}

fn task_json(task: &TaskReport, num_fewshot: usize) -> Value {
    let score = |s: &TaskScore| json!({"acc": estimate(s.acc), "acc_norm": task.task.has_acc_norm().then(|| estimate(s.acc_norm))});
    let items: Vec<Value> =
        task.items.iter().map(|item| json!({"log_likelihoods": item.log_likelihoods, "gold": item.gold})).collect();
    json!({"task": task.task.name(), "num_fewshot": num_fewshot, "questions": task.score.items, "files": task.files,
           "score": score(&task.score), "original": task.original.as_ref().map(|(s, _)| score(s)),
           "flips": task.original.as_ref().map(|(_, flips)| flips), "items": items})
}
