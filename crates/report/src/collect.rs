//! From what the job knows to a [`Record`].

use std::collections::BTreeMap;
use std::path::Path;

use lite_job::{Action, Plan, Recipe, RunReport, scheme_words};
use lite_model::OutputTensor;
use lite_pack::targets::Verdict;
use lite_runtime::eval::Estimate;
use lite_runtime::{DivergenceSummary, KlHistogram};

use crate::record::{
    Comparison, EngineVerdict, Fallback, FileFact, Histogram, Layer, LayerExperts, Linear, Measured, ModelFacts,
    Record, SCHEMA, Sizes, TextFact, Timing, Tool,
};
use crate::{serve, settings};

/// What the plan and the report do not say.
#[derive(Debug, Clone, Default)]
pub struct Context {
    /// Version of the program.
    pub version: String,
    /// SHA-256 over `config.json` and the headers of the source.
    pub header_sha256: String,
    /// `_name_or_path` of the source's `config.json`.
    pub name_or_path: Option<String>,
    /// Files of the output, with their digests.
    pub files: Vec<FileFact>,
    /// By block: what it took. Empty unless asked for.
    pub times: Vec<LayerTime>,
}

/// What one block took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerTime {
    /// Block index.
    pub layer: usize,
    /// Seconds, and memory at its end.
    pub timing: Timing,
}

impl Record {
    /// The record of a run.
    pub fn of(recipe: &Recipe, plan: &Plan, report: &RunReport, context: Context) -> Self {
        let base_model = base_model(&recipe.model, &plan.model, context.name_or_path.as_deref());
        let name = base_model.clone().unwrap_or_else(|| folder_name(&recipe.model, &plan.model));
        Self {
            schema: SCHEMA,
            tool: Tool { name: "lite".to_owned(), version: context.version },
            model: ModelFacts {
                name,
                base_model,
                revision: recipe.revision.clone(),
                architecture: plan.arch.clone(),
                header_sha256: context.header_sha256,
            },
            settings: settings::settings(recipe, plan),
            calibration: calibration(plan, report),
            sizes: sizes(plan, report),
            linears_checked: report.check.linears,
            tensors_checked: report.check.plain,
            comparison: report.check.comparison.as_ref().map(|c| comparison(report, c)),
            layers: layers(report, &context.times),
            linears: linears(plan, report),
            experts: experts(plan, report),
            fallbacks: fallbacks(report),
            engines: engines(plan),
            files: context.files,
            notes: notes(plan, report),
        }
    }
}

/// Whether `name` is an id of the hub, `owner/name`.
#[must_use]
pub fn hub_id(name: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && part.len() <= 96
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
            && !part.starts_with(['.', '-'])
            && !part.ends_with(['.', '-'])
    };
    matches!(name.split('/').collect::<Vec<_>>()[..], [owner, model] if part(owner) && part(model))
}

/// The hub id of the source: what was typed, where it is no folder; what the hub's cache calls its folder; what
/// `config.json` says.
fn base_model(typed: &str, folder: &Path, name_or_path: Option<&str>) -> Option<String> {
    let parts = || folder.components().filter_map(|part| part.as_os_str().to_str());
    // .../models--owner--name/snapshots/<commit>
    let cached = parts().find_map(|part| part.strip_prefix("models--")?.split_once("--"));
    if let Some(id) = cached.map(|(owner, name)| format!("{owner}/{name}")).filter(|id| hub_id(id)) {
        return Some(id);
    }
    let is_folder = Path::new(typed).exists();
    Some(typed)
        .filter(|typed| !is_folder && hub_id(typed))
        .or_else(|| name_or_path.filter(|name| hub_id(name)))
        .map(ToOwned::to_owned)
}

fn folder_name(typed: &str, folder: &Path) -> String {
    let last = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    last(Path::new(typed)).or_else(|| last(folder)).unwrap_or_else(|| "model".to_owned())
}

fn calibration(plan: &Plan, report: &RunReport) -> Option<TextFact> {
    let source = match &plan.statistics {
        // Without the folder they are in, which says nothing elsewhere.
        Some(statistics) => format!("{} (statistics of an earlier run)", statistics.calibration()),
        None => report.calibration.clone()?,
    };
    Some(TextFact { source, windows: plan.windows, seqlen: plan.seqlen, sha256: report.calibration_digest.clone() })
}

fn sizes(plan: &Plan, report: &RunReport) -> Sizes {
    let quantized = plan.tensors.iter().filter(|row| matches!(row.action, Action::Quantize { .. }));
    Sizes {
        source_bytes: report.source_bytes,
        output_bytes: report.output_bytes,
        quantized_bytes: quantized.flat_map(|row| &row.outputs).map(OutputTensor::bytes).sum(),
        bits_per_weight: report.bits_per_weight,
    }
}

fn comparison(report: &RunReport, found: &lite_runtime::Comparison) -> Comparison {
    let s = &found.summary;
    let plain = |value, standard_error| Measured { value, standard_error };
    let estimate = |estimate: Estimate| plain(estimate.value, estimate.standard_error);
    Comparison {
        text: TextFact {
            source: report.eval_source.clone().unwrap_or_else(|| "held-out text".to_owned()),
            windows: found.windows,
            seqlen: found.seqlen,
            sha256: report.eval_digest.clone(),
        },
        tokens: s.tokens,
        predictions: s.predictions,
        kl_mean: plain(s.kl_mean, s.kl_standard_error),
        kl_percentiles: percentiles(s),
        kl_histogram: histogram(&s.kl_histogram),
        top1: plain(s.top1, s.top1_standard_error),
        perplexity_original: plain(s.perplexity_original, s.perplexity_original_standard_error),
        perplexity_quantized: plain(s.perplexity_quantized, s.perplexity_quantized_standard_error),
        perplexity_ratio: estimate(s.perplexity_ratio),
        delta_p_mean: estimate(s.delta_p_mean),
        delta_p_rms: estimate(s.delta_p_rms),
    }
}

fn percentiles(s: &DivergenceSummary) -> Vec<(&'static str, f64)> {
    vec![("p50", s.kl_median), ("p90", s.kl_p90), ("p99", s.kl_p99), ("p99.9", s.kl_p999), ("max", s.kl_max)]
}

fn histogram(found: &KlHistogram) -> Histogram {
    Histogram {
        edges: (0..=KlHistogram::BINS).map(KlHistogram::edge).collect(),
        counts: found.counts.to_vec(),
        below: found.below,
        above: found.above,
    }
}

fn layers(report: &RunReport, times: &[LayerTime]) -> Vec<Layer> {
    let mut squares: BTreeMap<usize, (f64, usize)> = BTreeMap::new();
    for site in &report.sites {
        let entry = squares.entry(site.block).or_default();
        if let Some(error) = site.error {
            *entry = (entry.0 + error * error, entry.1 + 1);
        }
    }
    let measured: BTreeMap<usize, (f64, f64)> = (report.check.comparison.iter())
        .flat_map(|comparison| &comparison.layers)
        .map(|layer| (layer.block, (layer.own, layer.accumulated)))
        .collect();
    let mut indices: Vec<usize> = squares.keys().chain(measured.keys()).copied().collect();
    indices.sort_unstable();
    indices.dedup();
    let layer = |layer| Layer {
        layer,
        own_error: measured.get(&layer).map(|errors| errors.0),
        accumulated_error: measured.get(&layer).map(|errors| errors.1),
        linears_error: squares.get(&layer).filter(|(_, n)| *n > 0).map(|(sum, n)| (sum / *n as f64).sqrt()),
        timing: times.iter().find(|time| time.layer == layer).map(|time| time.timing),
    };
    indices.into_iter().map(layer).collect()
}

fn linears(plan: &Plan, report: &RunReport) -> Vec<Linear> {
    let planned: BTreeMap<&str, _> = plan.sites.iter().map(|site| (site.module.as_str(), site)).collect();
    let linear = |found: &lite_job::SiteReport| {
        let site = planned.get(found.module.as_str());
        Linear {
            module: found.module.clone(),
            layer: found.block,
            shape: site.map_or([0; 2], |site| [site.out_features, site.in_features]),
            scheme: site.filter(|site| site.scheme != plan.scheme).map(|site| scheme_words(&site.scheme)),
            relative_error: found.error,
        }
    };
    report.sites.iter().map(linear).collect()
}

/// Tokens by layer and expert, of layers where they are known for any.
fn experts(plan: &Plan, report: &RunReport) -> Vec<LayerExperts> {
    let blocks = plan.spec.iter().flat_map(|spec| &spec.blocks);
    let with_experts = blocks.filter_map(|block| Some((block, block.moe()?.experts)));
    let layer = |(block, experts): (&lite_decoder::BlockSpec, usize)| {
        let mut tokens = vec![None; experts];
        for (site, report) in plan.sites.iter().zip(&report.sites).filter(|(site, _)| site.block == block.index) {
            if let Some(lite_decoder::Role::Expert(e, _)) = site.site.map(|id| id.role)
                && let Some(slot) = tokens.get_mut(e as usize)
            {
                *slot = report.tokens.or(*slot);
            }
        }
        let known = tokens.iter().any(Option::is_some);
        let tokens = tokens.into_iter().map(Option::unwrap_or_default).collect();
        known.then_some(LayerExperts { layer: block.index, tokens })
    };
    with_experts.filter_map(layer).collect()
}

fn fallbacks(report: &RunReport) -> Vec<Fallback> {
    let fallback =
        |site: &lite_job::SiteReport| Some(Fallback { module: site.module.clone(), reason: site.fallback.clone()? });
    report.sites.iter().filter_map(fallback).collect()
}

fn engines(plan: &Plan) -> Vec<EngineVerdict> {
    let facts =
        serve::Facts { quant_method: plan.layout.quant_method(), layout: plan.layout.name(), kv_cache: plan.kv_cache };
    let verdict = |(target, verdict): &(lite_pack::targets::Target, Verdict)| {
        let (loads, rules) = match verdict {
            Verdict::Loads(rules) => (true, rules),
            Verdict::Refuses(rules) => (false, rules),
        };
        EngineVerdict {
            engine: target.name(),
            title: serve::title(*target),
            loads,
            rules: rules.iter().map(|rule| rule.message.clone()).collect(),
            serve: loads.then(|| serve::command(*target, facts)),
            serve_language: serve::language(*target),
        }
    };
    plan.engines.iter().map(verdict).collect()
}

/// The plan's notes, and one where a difference is no more than noise. Warnings of the plan are about this machine's
/// memory and the source's files, and were said when the run began.
fn notes(plan: &Plan, report: &RunReport) -> Vec<String> {
    let mut notes = plan.notes.clone();
    if let Some(comparison) = &report.check.comparison {
        let Estimate { value, standard_error } = comparison.summary.perplexity_ratio;
        if (value - 1.0).abs() < 2.0 * standard_error {
            notes.push(format!(
                "The change of perplexity, {:+.2} %, is smaller than twice its standard error, {:.2} %: on this much text \
                 it cannot be told from none.",
                (value - 1.0) * 100.0,
                standard_error * 100.0
            ));
        }
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_told_from_paths() {
        for id in ["Qwen/Qwen3-8B", "a/b", "meta-llama/Llama-3.1-8B_x"] {
            assert!(hub_id(id), "{id}");
        }
        for path in ["Qwen3", "/a/b", "./a", "../b", "a/b/c", "a/", "/b", "a/b c", "a/<b>", "a/..", "a\n/b"] {
            assert!(!hub_id(path), "{path}");
        }
    }

    #[test]
    fn the_base_model_is_found_where_it_is_known() {
        let cached = Path::new("/c/models--Qwen--Qwen3-8B/snapshots/0123");
        assert_eq!(base_model("Qwen/Qwen3-8B", cached, None).as_deref(), Some("Qwen/Qwen3-8B"));
        assert_eq!(
            base_model("/c/models--Qwen--Qwen3-8B/snapshots/0123", cached, None).as_deref(),
            Some("Qwen/Qwen3-8B")
        );
        assert_eq!(
            base_model("/models/mine", Path::new("/models/mine"), Some("org/known")).as_deref(),
            Some("org/known")
        );
        assert_eq!(base_model("/models/mine", Path::new("/models/mine"), Some("/home/x")), None);
        assert_eq!(base_model("/models/mine", Path::new("/models/mine"), None), None);
        assert_eq!(folder_name("/models/mine/", Path::new("/models/mine")), "mine");
        assert_eq!(folder_name(".", Path::new("/models/mine")), "mine");
    }
}
