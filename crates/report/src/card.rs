//! The model card, `README.md`: front matter that the hub reads, and what a reader wants to know first.

use std::fmt::Write as _;

use crate::escape::{code, markdown, markdown_sentence, yaml};
use crate::format::{change, count, measured, number, size};
use crate::record::{Comparison, EngineVerdict, Record};
use crate::settings::{label, shown};
use crate::{SourceCard, hub_id};

/// Fallbacks that are listed.
const FALLBACKS: usize = 20;

/// The card. `source` is what the source model's own card says; `kept` names the file that card is kept in, if there
/// was one.
///
/// Metadata keys: <https://huggingface.co/docs/hub/model-cards>.
pub fn model_card(record: &Record, source: &SourceCard, kept: Option<&str>) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = front_matter(&mut out, record, source).and_then(|()| body(&mut out, record, kept));
    out
}

fn front_matter(out: &mut String, record: &Record, source: &SourceCard) -> std::fmt::Result {
    writeln!(out, "---")?;
    if let Some(base) = record.model.base_model.as_deref().filter(|base| hub_id(base)) {
        writeln!(out, "base_model: {}", yaml(base))?;
        writeln!(out, "base_model_relation: quantized")?;
    }
    source.write_terms(out)?;
    if source.pipeline_tag.is_none() && record.model.architecture.ends_with("ForCausalLM") {
        writeln!(out, "pipeline_tag: text-generation")?;
    }
    source.write_languages(out)?;
    if loads(record).any(|engine| engine.engine == "transformers") {
        writeln!(out, "library_name: transformers")?;
    }
    writeln!(out, "tags:\n- {}\n- {}", yaml(&record.tool.name), yaml("quantized"))?;
    if let Some(layout) = text(record, "layout") {
        writeln!(out, "- {}", yaml(layout))?;
    }
    writeln!(out, "---")
}

fn body(out: &mut String, record: &Record, kept: Option<&str>) -> std::fmt::Result {
    let model = &record.model;
    let scheme = text(record, "scheme").unwrap_or("unknown scheme");
    writeln!(out, "\n# {}, quantized\n", markdown(&model.name))?;
    let base = match &model.base_model {
        Some(base) if hub_id(base) => format!("[{}](https://huggingface.co/{base})", markdown(base)),
        _ => markdown(&model.name),
    };
    writeln!(
        out,
        "{base} ({}) with {}: {}, in the {} layout, made by lite {}.",
        markdown(&model.architecture),
        markdown(text(record, "method").unwrap_or("quantization")),
        markdown(scheme),
        code(text(record, "layout").unwrap_or("unknown")),
        markdown(&record.tool.version)
    )?;
    if let Some(kept) = kept {
        writeln!(out, "The card of the base model is kept in {}.", code(kept))?;
    }
    let sizes = &record.sizes;
    writeln!(out, "\n| | base | quantized |\n|---|---:|---:|")?;
    writeln!(
        out,
        "| tensors | {} | {} ({:.0} %) |",
        size(sizes.source_bytes),
        size(sizes.output_bytes),
        100.0 * sizes.output_bytes as f64 / sizes.source_bytes.max(1) as f64
    )?;
    writeln!(out, "| bits per quantized weight | | {:.2} |", sizes.bits_per_weight)?;
    quality(out, record)?;
    serving(out, record)?;
    recipe(out, record)?;
    hashes(out, record)
}

fn quality(out: &mut String, record: &Record) -> std::fmt::Result {
    writeln!(out, "\n## Quality\n")?;
    match &record.comparison {
        Some(comparison) => comparison_table(out, comparison)?,
        None => writeln!(out, "Not measured: no forward pass was run.")?,
    }
    writeln!(
        out,
        "\nBefore publishing, the files were reopened: {} packed linears equal what was solved, {} other tensors what was \
         to be written.",
        count(record.linears_checked as u64),
        count(record.tensors_checked as u64)
    )?;
    if !record.fallbacks.is_empty() {
        writeln!(out, "\nDone otherwise than asked:\n")?;
        for fallback in record.fallbacks.iter().take(FALLBACKS) {
            writeln!(out, "- {}: {}", code(&fallback.module), markdown_sentence(&fallback.reason))?;
        }
        if let Some(more) = record.fallbacks.len().checked_sub(FALLBACKS).filter(|more| *more > 0) {
            writeln!(out, "- and {more} more, in `report.json`")?;
        }
    }
    if !record.notes.is_empty() {
        writeln!(out)?;
        record.notes.iter().try_for_each(|note| writeln!(out, "- Note: {}", markdown_sentence(note)))?;
    }
    Ok(())
}

fn comparison_table(out: &mut String, c: &Comparison) -> std::fmt::Result {
    writeln!(
        out,
        "Both models on {} tokens ({} windows of {}): {}. ± is one standard error.\n",
        count(c.tokens as u64),
        c.text.windows,
        c.text.seqlen,
        markdown(&c.text.source)
    )?;
    let row = |out: &mut String, name: &str, base: String, quantized: String| {
        writeln!(out, "| {name} | {base} | {quantized} |")
    };
    writeln!(out, "| | base | quantized |\n|---|---:|---:|")?;
    let (p, q, ratio) = (c.perplexity_original, c.perplexity_quantized, c.perplexity_ratio);
    let quantized = format!("{} ({})", measured(q.value, q.standard_error), change(ratio.value));
    row(out, "perplexity", measured(p.value, p.standard_error), quantized)?;
    row(
        out,
        "mean KL(base ‖ quantized), nats per token",
        "0".to_owned(),
        measured(c.kl_mean.value, c.kl_mean.standard_error),
    )?;
    for (name, value) in &c.kl_percentiles {
        let name = match *name {
            "max" => "largest KL".to_owned(),
            name => format!("KL, {} % of tokens below", name.trim_start_matches('p')),
        };
        row(out, &name, "0".to_owned(), number(*value))?;
    }
    let top = format!("{} %", measured(c.top1.value * 100.0, c.top1.standard_error * 100.0));
    row(out, "same most likely token", "100 %".to_owned(), top)?;
    let rms = c.delta_p_rms;
    let rms = format!("{} %", measured(rms.value * 100.0, rms.standard_error * 100.0));
    row(out, "change of the right token's probability, RMS", "0 %".to_owned(), rms)
}

fn serving(out: &mut String, record: &Record) -> std::fmt::Result {
    writeln!(out, "\n## How to serve it\n")?;
    if loads(record).next().is_none() {
        return writeln!(out, "No engine known to lite loads this checkpoint; the reasons are in `report.json`.");
    }
    writeln!(out, "`DIR` is this folder, or the id of this repository.")?;
    for engine in loads(record) {
        writeln!(out, "\n{}:\n", markdown(engine.title))?;
        if let Some(serve) = &engine.serve {
            writeln!(out, "```{}\n{serve}\n```", engine.serve_language)?;
        }
        for rule in &engine.rules {
            writeln!(out, "\n> {}", markdown_sentence(rule))?;
        }
    }
    Ok(())
}

fn recipe(out: &mut String, record: &Record) -> std::fmt::Result {
    writeln!(out, "\n## Recipe\n\n| setting | value |\n|---|---|")?;
    for (key, value) in &record.settings {
        writeln!(out, "| {} | {} |", label(key), markdown(&shown(value)))?;
    }
    let calibration = match &record.calibration {
        Some(text) => format!("{} windows of {} tokens: {}", text.windows, text.seqlen, markdown(&text.source)),
        None => "none, quantized without data".to_owned(),
    };
    writeln!(out, "| calibration | {calibration} |")
}

fn hashes(out: &mut String, record: &Record) -> std::fmt::Result {
    writeln!(out, "\n## Hashes\n\n| SHA-256 | of |\n|---|---|")?;
    for file in &record.files {
        writeln!(out, "| {} | {} ({}) |", code(&file.sha256), code(&file.name), size(file.bytes))?;
    }
    writeln!(out, "| {} | the base model's config.json and tensor headers |", code(&record.model.header_sha256))?;
    let texts = [
        ("token ids of the calibration text", record.calibration.as_ref()),
        ("token ids of the text the models were compared on", record.comparison.as_ref().map(|c| &c.text)),
    ];
    for (what, fact) in texts {
        if let Some(sha256) = fact.and_then(|fact| fact.sha256.as_ref()) {
            writeln!(out, "| {} | {what} |", code(sha256))?;
        }
    }
    Ok(())
}

fn loads(record: &Record) -> impl Iterator<Item = &EngineVerdict> {
    record.engines.iter().filter(|engine| engine.loads)
}

/// A setting that is text.
pub(crate) fn text<'a>(record: &'a Record, key: &str) -> Option<&'a str> {
    record.settings.get(key).and_then(|value| value.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{hostile, record};

    fn front(card: &str) -> serde_yaml::Value {
        let yaml = card.strip_prefix("---\n").unwrap().split_once("\n---\n").unwrap().0;
        serde_yaml::from_str(yaml).unwrap()
    }

    #[test]
    fn the_card_is_what_it_was() {
        let source = SourceCard {
            license: Some("apache-2.0".to_owned()),
            languages: vec!["en".to_owned(), "no".to_owned()],
            ..SourceCard::default()
        };
        let card = model_card(&record(), &source, Some("README.base.md"));
        let wanted = include_str!("../tests/card.md");
        assert_eq!(card, wanted);
        assert_eq!(front(&card)["base_model"], "Qwen/Qwen3-0.6B");
        assert_eq!(front(&card)["base_model_relation"], "quantized");
        assert_eq!(front(&card)["language"][1], "no");
    }

    #[test]
    fn hostile_names_stay_text() {
        let card = model_card(
            &hostile(),
            &SourceCard { license: Some("x\"\n---\nevil: 1".into()), ..SourceCard::default() },
            None,
        );
        let front = front(&card);
        assert_eq!(front["license"], "x\"\n---\nevil: 1");
        assert!(front.get("base_model").is_none() && front.get("evil").is_none());
        let named = card.lines().filter(|line| line.starts_with("- \"a")).count();
        assert_eq!(named, 1, "the layout's tag, a scalar of YAML");
        let card: String = card.lines().filter(|line| !line.starts_with("- \"a")).map(|l| format!("{l}\n")).collect();
        assert!(!card.contains("<script") && !card.contains("</script") && !card.contains("](javascript:"), "{card}");
        // Every row of a table has as many cells as its head.
        let bars = |line: &str| line.replace("\\|", "").matches('|').count();
        let lines: Vec<&str> = card.lines().collect();
        for pair in lines.windows(2).filter(|pair| pair.iter().all(|line| line.starts_with('|'))) {
            assert_eq!(bars(pair[0]), bars(pair[1]), "{pair:#?}");
        }
        assert!(!card.contains("\n# injected"), "{card}");
    }

    #[test]
    fn no_engine_and_no_measure_are_said() {
        let mut record = record();
        record.engines.iter_mut().for_each(|engine| engine.loads = false);
        record.comparison = None;
        record.calibration = None;
        let card = model_card(&record, &SourceCard::default(), None);
        assert!(card.contains("No engine known") && card.contains("Not measured") && card.contains("without data"));
        assert!(!card.contains("vllm serve"));
    }
}
