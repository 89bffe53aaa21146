//! What goes to standard output: the plan and the result.

use std::collections::BTreeMap;
use std::io::{self, Write};

use lite_job::{Action, Plan, RunReport, StatisticsPlan, StatisticsReport, TensorPlan, scheme_words};
use lite_model::{Checkpoint, OutputTensor, printable};
use lite_pack::targets::Verdict;
use lite_quant::WeightScheme;
use lite_quant::floats::ScaleKind;
use serde_json::{Value, json};

use crate::memory::resident;

/// Layers and linears shown of the worst.
const WORST: usize = 5;

/// `12.3 MiB`.
pub(crate) fn mib(bytes: u64) -> String {
    format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20))
}

/// A size with the unit that fits.
pub(crate) fn size(bytes: u64) -> String {
    let value = bytes as f64;
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", value / 1e6),
        _ => format!("{:.2} GB", value / 1e9),
    }
}

/// `1 h 02 min`, `3 min 20 s`, `12 s`, `0.4 s`.
pub(crate) fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..10 => format!("{seconds:.1} s"),
        10..60 => format!("{whole} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// The result of a run.
pub(crate) fn report(out: &mut impl Write, report: &RunReport) -> io::Result<()> {
    writeln!(out, "{}", report.output.display())?;
    writeln!(
        out,
        "  layout        {}, {:.2} bits per quantized weight; {} → {}",
        report.layout,
        report.bits_per_weight,
        size(report.source_bytes),
        size(report.output_bytes)
    )?;
    let calibration = report.calibration.as_deref().unwrap_or("none (quantized without data)");
    writeln!(out, "  calibration   {calibration}")?;
    let check = &report.check;
    writeln!(
        out,
        "  reopened      {} packed linears equal what was solved, {} other tensors what was to be written",
        check.linears, check.plain
    )?;
    match &check.comparison {
        None => writeln!(out, "  quality       not measured: no forward pass was run")?,
        Some(comparison) => {
            let s = &comparison.summary;
            let text = report.eval_source.as_deref().unwrap_or("held-out text");
            writeln!(out, "  compared on   {} windows of {} tokens: {text}", comparison.windows, comparison.seqlen)?;
            writeln!(
                out,
                "  mean KL       {:.6}   (median {:.6}, 99 % below {:.4}, largest {:.3})",
                s.kl_mean, s.kl_median, s.kl_p99, s.kl_max
            )?;
            writeln!(out, "  same top-1    {:.2} %", s.top1 * 100.0)?;
            writeln!(
                out,
                "  perplexity    {:.4} → {:.4}   ({:+.2} %)",
                s.perplexity_original,
                s.perplexity_quantized,
                (s.perplexity_quantized / s.perplexity_original - 1.0) * 100.0
            )?;
        }
    }
    worst_layers(out, report)?;
    for site in &report.sites {
        if let Some(fallback) = &site.fallback {
            writeln!(out, "  fallback      {}: {fallback}", printable(&site.module))?;
        }
    }
    let memory = resident().map_or(String::new(), |r| format!(", peak memory {}", mib(r.peak)));
    writeln!(out, "  took          {}{memory}", duration(report.seconds))
}

/// The relative error of each layer, worst first.
fn worst_layers(out: &mut impl Write, report: &RunReport) -> io::Result<()> {
    let mut worst_linear: BTreeMap<usize, (&str, f64)> = BTreeMap::new();
    for site in &report.sites {
        let Some(error) = site.error else { continue };
        let entry = worst_linear.entry(site.block).or_insert((&site.module, error));
        if error > entry.1 {
            *entry = (&site.module, error);
        }
    }
    if let Some(comparison) = &report.check.comparison {
        let mut layers = comparison.layers.clone();
        layers.sort_by(|a, b| b.own.total_cmp(&a.own));
        let shown = layers.len().min(WORST);
        writeln!(
            out,
            "  layers, worst first ({shown} of {}): relative error of the layer's own output; gathered so far; worst linear",
            layers.len()
        )?;
        for layer in &layers[..shown] {
            let linear = worst_linear
                .get(&layer.block)
                .map_or(String::new(), |(name, error)| format!("   {} {error:.4}", printable(name)));
            writeln!(out, "    {:>4}   {:.4}   {:.4}{linear}", layer.block, layer.own, layer.accumulated)?;
        }
    }
    Ok(())
}

/// The result as one JSON line.
pub(crate) fn report_json(report: &RunReport) -> Value {
    let comparison = report.check.comparison.as_ref().map(|c| {
        let s = &c.summary;
        let layers: Vec<Value> = c
            .layers
            .iter()
            .map(|l| json!({"layer": l.block, "own_error": l.own, "accumulated_error": l.accumulated}))
            .collect();
        json!({"windows": c.windows, "seqlen": c.seqlen, "text": report.eval_source, "kl_mean": s.kl_mean, "kl_median": s.kl_median,
               "kl_p99": s.kl_p99, "kl_max": s.kl_max, "top1": s.top1, "perplexity_original": s.perplexity_original,
               "perplexity_quantized": s.perplexity_quantized, "layers": layers})
    });
    let linears: Vec<Value> = report
        .sites
        .iter()
        .map(|s| json!({"module": s.module, "layer": s.block, "relative_error": s.error, "fallback": s.fallback}))
        .collect();
    json!({"event": "summary", "schema": 1, "output": report.output, "layout": report.layout, "bits_per_weight": report.bits_per_weight,
           "source_bytes": report.source_bytes, "output_bytes": report.output_bytes, "calibration": report.calibration,
           "linears_checked": report.check.linears, "tensors_checked": report.check.plain, "comparison": comparison,
           "linears": linears, "seconds": report.seconds, "peak_resident_bytes": resident().map(|r| r.peak)})
}

/// Gathered statistics.
pub(crate) fn statistics(out: &mut impl Write, report: &StatisticsReport) -> io::Result<()> {
    writeln!(out, "{}", report.output.display())?;
    writeln!(
        out,
        "  statistics    of {} inputs in {} blocks, {}; use them with --stats",
        report.inputs,
        report.blocks,
        size(report.bytes)
    )?;
    writeln!(out, "  calibration   {} tokens: {}", report.tokens, report.calibration)?;
    let memory = resident().map_or(String::new(), |r| format!(", peak memory {}", mib(r.peak)));
    writeln!(out, "  took          {}{memory}", duration(report.seconds))
}

/// The same as one JSON line.
pub(crate) fn statistics_json(report: &StatisticsReport) -> Value {
    json!({"event": "summary", "schema": 1, "output": report.output, "output_bytes": report.bytes, "blocks": report.blocks,
           "inputs": report.inputs, "tokens": report.tokens, "calibration": report.calibration, "sha256": report.text_digest,
           "seconds": report.seconds, "peak_resident_bytes": resident().map(|r| r.peak)})
}

/// What gathering statistics will take, as one JSON line.
pub(crate) fn statistics_plan_json(plan: &StatisticsPlan) -> Value {
    let memory = &plan.memory;
    json!({"event": "plan", "schema": 1, "method": "calibrate", "architecture": plan.arch, "blocks": plan.blocks,
           "inputs": plan.inputs, "windows": plan.windows, "seqlen": plan.seqlen, "batch_size": plan.batch,
           "output_bytes": plan.bytes, "disk_bytes": plan.disk_bytes, "disk_free_bytes": plan.disk_free,
           "memory": {"peak": memory.peak(), "block": memory.block, "grams": memory.grams, "hidden": memory.hidden,
           "spooled": memory.spooled, "activations": memory.activations}})
}

/// The plan for a reader.
pub(crate) fn plan(out: &mut impl Write, plan: &Plan, checkpoint: &Checkpoint, flops: f64) -> io::Result<()> {
    writeln!(out, "{} ({})", plan.model.display(), printable(&plan.arch))?;
    writeln!(
        out,
        "  {}{}; layout {}; {:.2} bits per quantized weight",
        scheme_words(&plan.scheme),
        scale_words(plan),
        plan.layout.name(),
        plan.bits_per_weight()
    )?;
    if plan.kv_cache.is_some() {
        let scales: usize = plan.added.iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum();
        writeln!(out, "  cache fp8 e4m3, {scales} calibrated scales in {} tensors", plan.added.len())?;
    }
    writeln!(out, "\n  {:<58} {:>16} {:>5} {:>10} {:>10}", "tensors", "shape", "count", "before", "after")?;
    for row in grouped(plan, checkpoint) {
        writeln!(
            out,
            "  {:<58} {:>16} {:>5} {:>10} {:>10}  {}",
            printable(&row.pattern),
            row.shape,
            row.count,
            size(row.before),
            size(row.after),
            row.action
        )?;
    }
    writeln!(
        out,
        "  {:<58} {:>16} {:>5} {:>10} {:>10}",
        "all",
        "",
        plan.tensors.len(),
        size(plan.source_bytes),
        size(plan.output_bytes)
    )?;
    let memory = &plan.memory;
    writeln!(
        out,
        "\n  memory   about {} at the peak: block {}, Grams {}, hidden states {}{}, activations {}, solving {}, final check {}",
        mib(memory.peak()),
        mib(memory.block),
        mib(memory.grams),
        mib(memory.hidden),
        if memory.spooled { " (in a file)" } else { "" },
        mib(memory.activations),
        mib(memory.solve.max(memory.tune)),
        mib(memory.check)
    )?;
    let free = plan.disk_free.map_or(String::new(), |free| format!(", {} are free", size(free)));
    writeln!(out, "  disk     {}{free}", size(plan.disk_bytes))?;
    let work = &plan.work;
    // Reading and writing at a cautious 500 MB/s, on top of the arithmetic at this machine's rate.
    let seconds = work.total() / flops + (plan.source_bytes + plan.output_bytes) as f64 / 5e8;
    writeln!(
        out,
        "  time     about {} here: {:.2} Tflop (forward {:.0} %, Grams {:.0} %, solving {:.0} %, check {:.0} %) at {:.0} Gflop/s",
        duration(seconds),
        work.total() / 1e12,
        share(work.forward, work.total()),
        share(work.gram, work.total()),
        share(work.solve, work.total()),
        share(work.check, work.total()),
        flops / 1e9
    )?;
    match plan.windows {
        0 => writeln!(out, "  data     none")?,
        windows => {
            writeln!(out, "  data     {windows} windows of {} tokens, {} per forward pass", plan.seqlen, plan.batch)?
        }
    }
    writeln!(out, "  engines")?;
    for (target, verdict) in &plan.engines {
        let (word, rules) = match verdict {
            Verdict::Loads(rules) => ("loads", rules),
            Verdict::Refuses(rules) => ("no", rules),
        };
        let why: Vec<&str> = rules.iter().map(|rule| rule.message.as_str()).collect();
        writeln!(out, "    {:<17} {word:<6} {}", target.name(), why.join("; "))?;
    }
    for warning in &plan.warnings {
        writeln!(out, "  warning: {warning}")?;
    }
    for note in &plan.notes {
        writeln!(out, "  note: {note}")?;
    }
    Ok(())
}

/// The type of the scales, where the scheme's words do not say.
fn scale_words(plan: &Plan) -> String {
    let dtype = match plan.scheme.weights {
        WeightScheme::Int(int) => Some(int.scale_dtype),
        WeightScheme::Float(float) => match float.scale {
            ScaleKind::Float(dtype) => Some(dtype),
            ScaleKind::E8M0 | ScaleKind::E4M3WithGlobal => None,
        },
    };
    dtype.map_or(String::new(), |dtype| format!(", {dtype:?} scales"))
}

fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { 100.0 * part / whole } else { 0.0 }
}

struct Group {
    pattern: String,
    shape: String,
    action: String,
    count: usize,
    before: u64,
    after: u64,
}

/// Rows that differ only in the numbers of blocks, together.
fn grouped(plan: &Plan, checkpoint: &Checkpoint) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for row in &plan.tensors {
        let info = checkpoint.info(&row.source);
        let shape = info.map_or(String::new(), |i| format!("{:?}", i.shape));
        let pattern =
            row.source.split('.').map(|p| if p.parse::<u32>().is_ok() { "*" } else { p }).collect::<Vec<_>>().join(".");
        let action = action_word(row);
        let (before, after) = (info.map_or(0, |i| i.bytes), row.outputs.iter().map(OutputTensor::bytes).sum());
        match groups.iter_mut().find(|g| g.pattern == pattern && g.shape == shape && g.action == action) {
            Some(group) => {
                group.count += 1;
                group.before += before;
                group.after += after;
            }
            None => groups.push(Group { pattern, shape, action, count: 1, before, after }),
        }
    }
    groups
}

fn action_word(row: &TensorPlan) -> String {
    match &row.action {
        Action::Quantize { .. } => "quantized".to_owned(),
        Action::Rescale => "absorbs scales".to_owned(),
        Action::Copy => "copied".to_owned(),
        Action::Convert => row.outputs.first().map_or(String::new(), |o| format!("converted to {:?}", o.dtype)),
        Action::Drop { reason } => format!("dropped: {reason}"),
    }
}

/// The plan as one JSON line.
pub(crate) fn plan_json(plan: &Plan) -> Value {
    let tensors: Vec<Value> = plan
        .tensors
        .iter()
        .map(|row| {
            let outputs: Vec<Value> = row
                .outputs
                .iter()
                .map(|o| json!({"name": o.name, "dtype": format!("{:?}", o.dtype), "shape": o.shape}))
                .collect();
            json!({"source": row.source, "action": action_word(row), "outputs": outputs})
        })
        .collect();
    let engines: BTreeMap<&str, Value> = plan
        .engines
        .iter()
        .map(|(target, verdict)| {
            let (loads, rules) = match verdict {
                Verdict::Loads(rules) => (true, rules),
                Verdict::Refuses(rules) => (false, rules),
            };
            let rules: Vec<Value> = rules.iter().map(|r| json!({"rule": r.rule, "message": r.message})).collect();
            (target.name(), json!({"loads": loads, "rules": rules}))
        })
        .collect();
    let memory = &plan.memory;
    let int = plan.scheme.weights.int();
    let bits = match plan.scheme.weights {
        WeightScheme::Int(int) => int.bits,
        WeightScheme::Float(float) => float.format.bits(),
    };
    json!({"event": "plan", "schema": 1, "model": plan.model, "architecture": plan.arch,
           "scheme": scheme_words(&plan.scheme), "bits": bits, "group_size": int.map(|int| int.group_size.to_flag()),
           "symmetric": int.is_none_or(|int| int.symmetric), "kv_cache": plan.kv_cache.map(|_| "fp8"), "layout": plan.layout.name(),
           "bits_per_weight": plan.bits_per_weight(), "windows": plan.windows, "seqlen": plan.seqlen, "batch_size": plan.batch,
           "source_bytes": plan.source_bytes, "output_bytes": plan.output_bytes, "disk_bytes": plan.disk_bytes,
           "disk_free_bytes": plan.disk_free, "memory": {"peak": memory.peak(), "block": memory.block, "grams": memory.grams,
           "hidden": memory.hidden, "middle": memory.middle, "spooled": memory.spooled, "activations": memory.activations,
           "solve": memory.solve, "tune": memory.tune, "check": memory.check},
           "flops": plan.work.total(), "engines": engines, "tensors": tensors, "notes": plan.notes, "warnings": plan.warnings})
}
