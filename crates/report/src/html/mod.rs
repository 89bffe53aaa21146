//! `report.html`: one page without scripts, fonts or anything else from outside.

mod chart;
mod divergence;
mod experts;
mod heat;
mod style;

use std::fmt::Write as _;

use self::chart::{Series, columns, tick};
use crate::card::text;
use crate::escape::{html, html_sentence};
use crate::format::{change, count, number, seconds, size};
use crate::hub_id;
use crate::record::{Layer, Record};
use crate::settings::{label, shown};

/// Fallbacks and notes that are listed.
const LISTED: usize = 200;

/// The page.
pub fn page(record: &Record) -> String {
    let name = html(&record.model.name);
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><meta name=\"referrer\" content=\"no-referrer\">\
         <title>{name}, quantized</title><style>{}</style></head><body><main>",
        style::STYLE
    );
    out.push_str(&head(record));
    out.push_str(&tiles(record));
    out.push_str(&sizes(record));
    if let Some(comparison) = &record.comparison {
        out.push_str(&divergence::section(comparison));
    }
    out.push_str(&layers(record));
    out.push_str(&heat::section(record));
    out.push_str(&times(record));
    out.push_str(&experts::section(record));
    out.push_str(&fallbacks(record));
    out.push_str(&engines(record));
    out.push_str(&settings(record));
    out.push_str(&files(record));
    let _ = writeln!(
        out,
        "<footer>lite {}. The same numbers, and those of every linear, are in <code>report.json</code>.</footer></main></body></html>",
        html(&record.tool.version)
    );
    out
}

fn head(record: &Record) -> String {
    let model = &record.model;
    let base = match &model.base_model {
        Some(id) if hub_id(id) => {
            format!("<a href=\"https://huggingface.co/{id}\" rel=\"noreferrer\">{}</a>", html(id))
        }
        _ => html(&model.name),
    };
    format!(
        "<h1>{}, quantized</h1><p class=\"sub\">{base} ({}) with {}: {}, layout <code>{}</code></p>",
        html(&model.name),
        html(&model.architecture),
        html(text(record, "method").unwrap_or("quantization")),
        html(text(record, "scheme").unwrap_or("unknown scheme")),
        html(text(record, "layout").unwrap_or("unknown"))
    )
}

fn tiles(record: &Record) -> String {
    let sizes = &record.sizes;
    let mut out = String::from("<div class=\"tiles\">");
    let mut tile = |value: String, what: String| {
        let _ = write!(out, "<div class=\"tile\"><b>{value}</b><span>{what}</span></div>");
    };
    let share = 100.0 * sizes.output_bytes as f64 / sizes.source_bytes.max(1) as f64;
    tile(size(sizes.output_bytes), format!("{share:.0} % of {}", size(sizes.source_bytes)));
    tile(format!("{:.2}", sizes.bits_per_weight), "bits per quantized weight, with scales".to_owned());
    if let Some(c) = &record.comparison {
        tile(number(c.kl_mean.value), format!("mean KL, ± {}", number(c.kl_mean.standard_error)));
        tile(
            format!("{:.1} %", c.top1.value * 100.0),
            format!("same most likely token, ± {:.1}", c.top1.standard_error * 100.0),
        );
        tile(
            change(c.perplexity_ratio.value),
            format!("perplexity, {} → {}", number(c.perplexity_original.value), number(c.perplexity_quantized.value)),
        );
    } else {
        tile("not measured".to_owned(), "quality: no forward pass was run".to_owned());
    }
    tile(
        format!("✓ {}", count((record.linears_checked + record.tensors_checked) as u64)),
        "linears and other tensors, reopened and found equal".to_owned(),
    );
    out.push_str("</div>");
    out
}

fn sizes(record: &Record) -> String {
    let sizes = &record.sizes;
    let largest = sizes.source_bytes.max(sizes.output_bytes).max(1) as f64;
    let width = |bytes: u64| 700.0 * bytes as f64 / largest;
    let rest = sizes.output_bytes.saturating_sub(sizes.quantized_bytes);
    let quantized = width(sizes.quantized_bytes);
    format!(
        "<section><h2>Size</h2><svg viewBox=\"0 0 960 76\" role=\"img\" aria-label=\"size before and after\">\
         <text class=\"ink\" x=\"82\" y=\"22\" text-anchor=\"end\">base</text>\
         <rect class=\"r\" x=\"92\" y=\"6\" width=\"{before:.1}\" height=\"24\" rx=\"3\"><title>base: {source}</title></rect>\
         <text class=\"ink\" x=\"{before_end:.1}\" y=\"22\">{source}</text>\
         <text class=\"ink\" x=\"82\" y=\"60\" text-anchor=\"end\">quantized</text>\
         <rect class=\"b\" x=\"92\" y=\"44\" width=\"{quantized:.1}\" height=\"24\" rx=\"3\"><title>quantized linears: {q}</title></rect>\
         <rect class=\"r\" x=\"{rest_start:.1}\" y=\"44\" width=\"{rest_width:.1}\" height=\"24\" rx=\"3\"><title>other tensors: {r}</title></rect>\
         <text class=\"ink\" x=\"{after_end:.1}\" y=\"60\">{output}</text></svg>\
         <div class=\"key\"><span><i style=\"background:var(--bar)\"></i>quantized linears with their scales, {q}</span>\
         <span><i style=\"background:var(--rest)\"></i>16-bit or wider: embeddings, norms, what was left plain, {r}</span></div></section>",
        before = width(sizes.source_bytes),
        before_end = 100.0 + width(sizes.source_bytes),
        rest_start = 94.0 + quantized,
        rest_width = (width(rest) - 2.0).max(0.0),
        after_end = 100.0 + width(sizes.output_bytes),
        source = size(sizes.source_bytes),
        output = size(sizes.output_bytes),
        q = size(sizes.quantized_bytes),
        r = size(rest),
    )
}

fn layers(record: &Record) -> String {
    let labels: Vec<usize> = record.layers.iter().map(|layer| layer.layer).collect();
    let series = |name, of: fn(&Layer) -> Option<f64>| Series { name, values: record.layers.iter().map(of).collect() };
    if record.comparison.is_some() {
        let own = series("own error", |layer| layer.own_error);
        let gathered = series("gathered error", |layer| layer.accumulated_error);
        let chart = columns("relative error by layer", &labels, &own, Some(&gathered), &number, &tick);
        return format!(
            "<section><h2>Error by layer</h2><p class=\"note\">On the text above. Own: what the quantized layer makes of the \
             original's hidden states, relative to what the layer adds. Gathered: how far the hidden states of the two models are \
             apart after the layer, relative to their size.</p><div class=\"scroll wide\">{chart}</div>\
             <div class=\"key\"><span><i style=\"background:var(--bar)\"></i>own error</span>\
             <span><i class=\"line\" style=\"background:var(--mark)\"></i>gathered error</span></div></section>"
        );
    }
    let errors = series("relative error", |layer| layer.linears_error);
    let chart = columns("relative error by layer", &labels, &errors, None, &number, &tick);
    if chart.is_empty() {
        return String::new();
    }
    format!(
        "<section><h2>Error by layer</h2><p class=\"note\">Root mean square of the relative output errors of the layer's linears \
         on the calibration text.</p><div class=\"scroll wide\">{chart}</div></section>"
    )
}

/// Time and memory, where they were asked for.
fn times(record: &Record) -> String {
    if record.layers.iter().all(|layer| layer.timing.is_none()) {
        return String::new();
    }
    let labels: Vec<usize> = record.layers.iter().map(|layer| layer.layer).collect();
    let series = |name, of: fn(&Layer) -> Option<f64>| Series { name, values: record.layers.iter().map(of).collect() };
    let time = series("took", |layer| layer.timing.map(|timing| timing.seconds));
    let memory = series("memory", |layer| layer.timing.and_then(|timing| timing.resident_bytes).map(|b| b as f64));
    format!(
        "<section><h2>Time by layer</h2><div class=\"scroll wide\">{}</div></section>\
         <section><h2>Memory of the process at the end of each layer</h2><div class=\"scroll wide\">{}</div></section>",
        columns("seconds by layer", &labels, &time, None, &seconds, &|value, _| seconds(value)),
        columns("memory by layer", &labels, &memory, None, &|bytes| size(bytes as u64), &|bytes, _| size(bytes as u64))
    )
}

fn fallbacks(record: &Record) -> String {
    let mut out = String::from("<section><h2>Done otherwise than asked</h2>");
    if record.fallbacks.is_empty() {
        out.push_str("<p class=\"note\">Nothing: every linear was solved as asked.</p>");
    } else {
        out.push_str("<table><tr><th>linear</th><th>what was done</th></tr>");
        for fallback in record.fallbacks.iter().take(LISTED) {
            let (module, reason) = (html(&fallback.module), html_sentence(&fallback.reason));
            let _ = write!(out, "<tr><td><code>{module}</code></td><td>{reason}</td></tr>");
        }
        out.push_str("</table>");
        if record.fallbacks.len() > LISTED {
            let more = record.fallbacks.len() - LISTED;
            let _ = write!(out, "<p class=\"note\">And {more} more, in <code>report.json</code>.</p>");
        }
    }
    if !record.notes.is_empty() {
        out.push_str("<h2>Notes</h2><ul class=\"notes\">");
        record.notes.iter().take(LISTED).for_each(|note| {
            let _ = write!(out, "<li>{}</li>", html_sentence(note));
        });
        out.push_str("</ul>");
    }
    out.push_str("</section>");
    out
}

fn engines(record: &Record) -> String {
    let mut out = String::from(
        "<section><h2>Engines</h2><p class=\"note\">By the rules in the engines' sources. <code>DIR</code> is the folder of the \
         checkpoint, or its id on the hub.</p>",
    );
    for engine in &record.engines {
        let verdict =
            if engine.loads { "<span class=\"yes\">✓ loads</span>" } else { "<span class=\"no\">✗ no</span>" };
        let _ = write!(out, "<div class=\"engine\"><div><b>{}</b><br>{verdict}</div><div>", html(engine.title));
        if let Some(serve) = &engine.serve {
            let _ = write!(out, "<pre>{}</pre>", html_lines(serve));
        }
        if !engine.rules.is_empty() {
            let rules: String = engine.rules.iter().map(|rule| format!("<li>{}</li>", html_sentence(rule))).collect();
            let _ = write!(out, "<ul>{rules}</ul>");
        }
        out.push_str("</div></div>");
    }
    out.push_str("</section>");
    out
}

fn html_lines(text: &str) -> String {
    text.lines().map(html).collect::<Vec<_>>().join("\n")
}

fn settings(record: &Record) -> String {
    let mut out = String::from("<section><h2>Recipe</h2><table class=\"settings\">");
    let mut row = |key: &str, value: String| {
        let _ = write!(out, "<tr><th>{}</th><td>{value}</td></tr>", html(key));
    };
    for (key, value) in &record.settings {
        row(&label(key), html(&shown(value)));
    }
    match &record.calibration {
        None => row("calibration", "none, quantized without data".to_owned()),
        Some(text) => {
            row("calibration", format!("{} windows of {} tokens: {}", text.windows, text.seqlen, html(&text.source)))
        }
    }
    if let Some(revision) = &record.model.revision {
        row("revision", html(revision));
    }
    out.push_str("</table></section>");
    out
}

fn files(record: &Record) -> String {
    let mut out =
        String::from("<section><h2>Hashes</h2><table><tr><th>of</th><th>SHA-256</th><th class=\"n\">size</th></tr>");
    let mut row = |what: String, sha256: &str, bytes: String| {
        let _ =
            write!(out, "<tr><td>{what}</td><td><code>{}</code></td><td class=\"n\">{bytes}</td></tr>", html(sha256));
    };
    for file in &record.files {
        row(format!("<code>{}</code>", html(&file.name)), &file.sha256, size(file.bytes));
    }
    row("base model: config.json and tensor headers".to_owned(), &record.model.header_sha256, String::new());
    let texts = [
        ("token ids of the calibration text", record.calibration.as_ref()),
        ("token ids of the text compared on", record.comparison.as_ref().map(|c| &c.text)),
    ];
    for (what, fact) in texts {
        if let Some(sha256) = fact.and_then(|fact| fact.sha256.as_ref()) {
            row(what.to_owned(), sha256, String::new());
        }
    }
    out.push_str("</table></section>");
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Timing;
    use crate::testing::{hostile, record};

    /// Every tag that is opened is closed in order; void and self-closed ones aside.
    fn assert_balanced(page: &str) {
        let mut open: Vec<&str> = Vec::new();
        for tag in page.split('<').skip(1) {
            let tag = tag.split_once('>').unwrap().0;
            let name = tag.trim_start_matches('/').split([' ', '\n', '/']).next().unwrap();
            if tag.starts_with('!') || tag.ends_with('/') || ["meta", "br"].contains(&name) {
                continue;
            }
            match tag.strip_prefix('/') {
                Some(name) => assert_eq!(open.pop(), Some(name), "in {tag}"),
                None => open.push(name),
            }
        }
        assert!(open.is_empty(), "{open:?} left open");
    }

    /// Nothing is fetched: no attribute that loads, no import, no script; links are links.
    fn assert_self_contained(page: &str) {
        for loads in ["src=", "srcset=", "<link", "<script", "@import", "url(", "<iframe", "<object", "<img"] {
            assert!(!page.contains(loads), "{loads}");
        }
        for tag in page.split('<').filter_map(|part| part.split('>').next()) {
            assert!(!tag.contains(" on"), "a handler in {tag}");
        }
        for (at, _) in page.match_indices("http") {
            let before = &page[..at];
            let after = &page[at..];
            let link = before.ends_with("<a href=\"") && after.starts_with("https://huggingface.co/");
            assert!(link || after.starts_with("http-equiv"), "{}", &after[..60]);
        }
    }

    #[test]
    fn the_page_says_everything() {
        let page = page(&record());
        assert_balanced(&page);
        assert_self_contained(&page);
        for wanted in [
            "Qwen/Qwen3-0.6B",
            "542.0 MB",
            "1.19 GB",
            "4.19",
            "0.0312",
            "91.2 %",
            "99.9 % below",
            "not positive definite",
            "vllm serve DIR",
            "✗ no",
            "TurboMind reads 4-bit integers only",
            "wikitext2, train split",
            "tied to the embedding",
            "layer 3, mlp.down_proj",
            "layer 27: own error",
            "prefers-color-scheme:dark",
            "@media print",
        ] {
            assert!(page.contains(wanted), "no `{wanted}`");
        }
        assert_eq!(page.matches("<svg").count(), 4);
        assert!(!page.contains("NaN") && !page.contains("Time by layer"));
        assert!(page.len() < 100 << 10, "{} bytes", page.len());
    }

    #[test]
    fn hostile_names_stay_text() {
        let page = page(&hostile());
        assert_balanced(&page);
        assert_self_contained(&page);
        assert!(!page.contains('\u{202e}'));
        assert!(!page.contains("href"), "a name that is no hub id is no link");
    }

    #[test]
    fn what_is_missing_leaves_no_hole() {
        let mut record = record();
        record.comparison = None;
        record.calibration = None;
        record.fallbacks.clear();
        record.notes.clear();
        for layer in &mut record.layers {
            (layer.own_error, layer.accumulated_error, layer.linears_error) = (None, None, None);
        }
        record.linears.iter_mut().for_each(|linear| linear.relative_error = None);
        let page = page(&record);
        assert_balanced(&page);
        assert_eq!(page.matches("<svg").count(), 1, "only the sizes");
        assert!(page.contains("not measured") && page.contains("solved as asked"));
    }

    #[test]
    fn times_are_shown_where_they_are_known() {
        let mut record = record();
        for layer in &mut record.layers {
            layer.timing = Some(Timing { seconds: 1.5 + layer.layer as f64, resident_bytes: Some(900_000_000) });
        }
        let page = page(&record);
        assert_balanced(&page);
        assert!(page.contains("Time by layer") && page.contains("900.0 MB"));
    }
}
