//! Every quantized linear at a glance: kinds of linears by layers.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::escape::html;
use crate::format::number;
use crate::record::{Linear, Record};

/// Kinds of linears that get a row.
const ROWS: usize = 24;
/// Layers that get a column of their own.
const COLUMNS: usize = 256;
/// Linears listed as the worst.
const WORST: usize = 8;
/// Characters of the name of a kind.
const NAME: usize = 26;

/// Where a linear sits in its block, numbers of experts as stars: `mlp.experts.*.up_proj`.
pub(super) fn role(linear: &Linear) -> String {
    let parts: Vec<&str> = linear.module.split('.').collect();
    let layer = linear.layer.to_string();
    let from = parts.iter().position(|part| *part == layer).map_or(0, |at| at + 1);
    let part = |part: &&str| if part.bytes().all(|b| b.is_ascii_digit()) { "*".to_owned() } else { (*part).to_owned() };
    parts.get(from..).unwrap_or_default().iter().map(part).collect::<Vec<_>>().join(".")
}

/// The end of a name, which tells it from others.
fn cut(name: &str) -> String {
    let length = name.chars().count();
    if length <= NAME {
        name.to_owned()
    } else {
        format!("…{}", name.chars().skip(length - NAME + 1).collect::<String>())
    }
}

/// The section; empty without calibration.
pub(super) fn section(record: &Record) -> String {
    let mut rows: Vec<String> = Vec::new();
    // Worst error and number of linears, by row and layer.
    let mut cells: BTreeMap<(usize, usize), (f64, usize)> = BTreeMap::new();
    for linear in &record.linears {
        let Some(error) = linear.relative_error.filter(|error| error.is_finite()) else { continue };
        let role = role(linear);
        let row = rows.iter().position(|known| *known == role).unwrap_or_else(|| {
            rows.push(role);
            rows.len() - 1
        });
        let cell = cells.entry((row, linear.layer)).or_default();
        *cell = (cell.0.max(error), cell.1 + 1);
    }
    cells.retain(|(row, layer), _| *row < ROWS && *layer < COLUMNS);
    let max = cells.values().map(|cell| cell.0).fold(0.0, f64::max);
    if max <= 0.0 {
        return String::new();
    }
    format!(
        "<section><h2>Every quantized linear</h2><p class=\"note\">Relative error of its output on the calibration text, \
         ‖(W − Ŵ)x‖ / ‖Wx‖; the stronger the colour, the larger. Where several linears share a cell, as experts do, it shows the \
         worst.</p><div class=\"scroll wide\">{}</div>{}{}</section>",
        map(&rows, &cells, max),
        key(max),
        worst(record)
    )
}

fn map(rows: &[String], cells: &BTreeMap<(usize, usize), (f64, usize)>, max: f64) -> String {
    const LEFT: f64 = 186.0;
    const RIGHT: f64 = 950.0;
    const HEIGHT: f64 = 24.0;
    let shown = rows.len().min(ROWS);
    let columns = cells.keys().map(|(_, layer)| layer + 1).max().unwrap_or(1);
    let width = ((RIGHT - LEFT) / columns as f64).min(56.0);
    let bottom = shown as f64 * HEIGHT;
    let mut svg = format!(
        "<svg viewBox=\"0 0 960 {:.0}\" role=\"img\" aria-label=\"relative error of every quantized linear\">",
        bottom + 40.0
    );
    for (row, name) in rows.iter().take(ROWS).enumerate() {
        let _ = write!(
            svg,
            "<text class=\"ink\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            row as f64 * HEIGHT + HEIGHT / 2.0 + 4.0,
            html(&cut(name))
        );
    }
    let gap = if width > 6.0 { 2.0 } else { 0.0 };
    for ((row, layer), (error, linears)) in cells {
        let several = if *linears > 1 { format!(", worst of {linears}") } else { String::new() };
        let _ = write!(
            svg,
            "<rect class=\"b\" fill-opacity=\"{:.3}\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"2\"><title>layer {layer}, {}: {}{several}</title></rect>",
            opacity(error / max),
            LEFT + *layer as f64 * width,
            *row as f64 * HEIGHT + 1.0,
            width - gap,
            HEIGHT - 2.0,
            rows.get(*row).map_or(String::new(), |name| html(&cut(name))),
            number(*error)
        );
    }
    let every = ((columns as f64 / 24.0).ceil() as usize).max(1);
    for layer in (0..columns).step_by(every) {
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{layer}</text>",
            LEFT + (layer as f64 + 0.5) * width - gap / 2.0,
            bottom + 16.0
        );
    }
    let _ = write!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">layer</text></svg>",
        LEFT + columns as f64 * width / 2.0,
        bottom + 35.0
    );
    svg
}

fn opacity(share: f64) -> f64 {
    0.08 + 0.92 * share.clamp(0.0, 1.0)
}

fn key(max: f64) -> String {
    let mut out = String::from("<div class=\"key\"><span>0</span>");
    for step in 0..5 {
        let _ = write!(
            out,
            "<i style=\"background:var(--bar);opacity:{:.2};margin:4px -14px 0 0\"></i>",
            opacity(f64::from(step) / 4.0)
        );
    }
    let _ = write!(out, "<span style=\"margin-left:14px\">{}</span></div>", number(max));
    out
}

fn worst(record: &Record) -> String {
    let mut linears: Vec<(&Linear, f64)> =
        record.linears.iter().filter_map(|linear| Some((linear, linear.relative_error?))).collect();
    linears.sort_by(|a, b| b.1.total_cmp(&a.1));
    let mut out =
        String::from("<table><tr><th>worst linears</th><th>scheme</th><th class=\"n\">relative error</th></tr>");
    let common = crate::card::text(record, "scheme").unwrap_or("");
    for (linear, error) in linears.iter().take(WORST) {
        let _ = write!(
            out,
            "<tr><td><code>{}</code></td><td>{}</td><td class=\"n\">{}</td></tr>",
            html(&linear.module),
            html(linear.scheme.as_deref().unwrap_or(common)),
            number(*error)
        );
    }
    out.push_str("</table>");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_drop_the_layer_and_star_the_experts() {
        let role = |module: &str, layer| {
            let linear = Linear { module: module.to_owned(), layer, shape: [1, 1], scheme: None, relative_error: None };
            role(&linear)
        };
        assert_eq!(role("model.layers.12.self_attn.q_proj", 12), "self_attn.q_proj");
        assert_eq!(role("model.layers.3.mlp.experts.117.up_proj", 3), "mlp.experts.*.up_proj");
        assert_eq!(role("odd.name.9", 4), "odd.name.*");
        assert_eq!(cut(&"x".repeat(99)).chars().count(), NAME);
    }
}
