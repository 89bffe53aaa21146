//! The histogram of KL, and what is read from it.

use std::fmt::Write as _;

use super::chart::{step, tick};
use crate::escape::html;
use crate::format::{change, count, measured, number};
use crate::record::{Comparison, Histogram};

/// The section.
pub(super) fn section(comparison: &Comparison) -> String {
    let text = &comparison.text;
    format!(
        "<section><h2>Against the original</h2><p class=\"note\">Both models on {} tokens, {} windows of {}: {}. KL is \
         KL(original ‖ quantized) in nats per token, 0 where both say the same; ± is one standard error.</p>\
         <div class=\"two\"><div>{}</div>{}</div></section>",
        count(comparison.tokens as u64),
        text.windows,
        text.seqlen,
        html(&text.source),
        histogram(comparison),
        table(comparison)
    )
}

fn table(c: &Comparison) -> String {
    let mut out = String::from("<table>");
    let mut row = |name: &str, value: String| {
        let _ = write!(out, "<tr><th>{name}</th><td class=\"n\">{value}</td></tr>");
    };
    row("mean KL", measured(c.kl_mean.value, c.kl_mean.standard_error));
    for (name, value) in &c.kl_percentiles {
        let name = match *name {
            "max" => "largest KL".to_owned(),
            "p50" => "median KL".to_owned(),
            name => format!("{} % below", name.trim_start_matches('p')),
        };
        row(&name, number(*value));
    }
    let percent = |m: crate::Measured| format!("{} %", measured(m.value * 100.0, m.standard_error * 100.0));
    row("same top token", percent(c.top1));
    row("Δp of the right token, RMS", percent(c.delta_p_rms));
    row("Δp, mean", percent(c.delta_p_mean));
    row("perplexity, original", measured(c.perplexity_original.value, c.perplexity_original.standard_error));
    row("perplexity, quantized", measured(c.perplexity_quantized.value, c.perplexity_quantized.standard_error));
    let ratio = c.perplexity_ratio;
    row("its change", format!("{} ± {:.2}", change(ratio.value), ratio.standard_error * 100.0));
    out.push_str("</table>");
    out
}

/// Bins from the first to the last that holds a token, on a logarithmic axis.
fn histogram(c: &Comparison) -> String {
    const LEFT: f64 = 46.0;
    const RIGHT: f64 = 590.0;
    const TOP: f64 = 58.0;
    const BOTTOM: f64 = 270.0;
    let Histogram { edges, counts, below, above } = &c.kl_histogram;
    let total: u64 = counts.iter().sum::<u64>() + below + above;
    let held = |i: &usize| counts[*i] > 0;
    let (Some(first), Some(last)) = ((0..counts.len()).find(held), (0..counts.len()).rfind(held)) else {
        return "<p class=\"note\">No token's KL is large enough to be drawn.</p>".to_owned();
    };
    if edges.len() != counts.len() + 1 {
        return String::new();
    }
    // Whole decades, so that the axis begins and ends at a label.
    let decade = |edge: f64| edge.log10();
    let (low, high) = ((decade(edges[first]) + 1e-9).floor(), (decade(edges[last + 1]) - 1e-9).ceil());
    let x = |value: f64| LEFT + (decade(value) - low) / (high - low).max(1.0) * (RIGHT - LEFT);
    let share = |count: u64| 100.0 * count as f64 / total.max(1) as f64;
    let max = counts.iter().map(|count| share(*count)).fold(0.0, f64::max);
    let step = step(max);
    let ticks = (max / step).ceil();
    let y = |value: f64| BOTTOM - value / (ticks * step) * (BOTTOM - TOP);
    let mut svg = String::from("<svg viewBox=\"0 0 600 316\" role=\"img\" aria-label=\"histogram of KL over tokens\">");
    for at in 0..=ticks as usize {
        let value = at as f64 * step;
        let class = if at == 0 { "axis" } else { "grid" };
        let _ = write!(
            svg,
            "<line class=\"{class}\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}%</text>",
            LEFT - 6.0,
            y(value) + 4.0,
            tick(value, step),
            y = y(value)
        );
    }
    for i in first..=last {
        let (from, to) = (x(edges[i]), x(edges[i + 1]));
        let top = y(share(counts[i]));
        let _ = write!(
            svg,
            "<rect class=\"b\" x=\"{:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"1.5\"><title>{} to {}: {} tokens, {:.2} %</title></rect>",
            from + 1.0,
            (to - from - 2.0).max(0.5),
            BOTTOM - top,
            number(edges[i]),
            number(edges[i + 1]),
            count(counts[i]),
            share(counts[i])
        );
    }
    for power in low as i32..=high as i32 {
        let at = LEFT + (f64::from(power) - low) / (high - low).max(1.0) * (RIGHT - LEFT);
        let _ = write!(svg, "<text x=\"{at:.1}\" y=\"288\" text-anchor=\"middle\">{}</text>", power_of_ten(power));
    }
    let _ =
        write!(svg, "<text x=\"{}\" y=\"310\" text-anchor=\"middle\">KL per token, nats</text>", (LEFT + RIGHT) / 2.0);
    svg.push_str(&markers(c, &x, (LEFT, RIGHT), BOTTOM));
    svg.push_str("</svg>");
    let outside: Vec<String> = [(below, "below", edges.first()), (above, "above", edges.last())]
        .into_iter()
        .filter(|(count, ..)| **count > 0)
        .map(|(n, word, edge)| {
            format!("{} tokens are {word} {}", count(*n), edge.map_or(String::new(), |e| number(*e)))
        })
        .collect();
    if !outside.is_empty() {
        let _ = write!(svg, "<p class=\"note\">{} and not drawn.</p>", outside.join(", "));
    }
    svg
}

fn power_of_ten(power: i32) -> String {
    match power {
        0 => "1".to_owned(),
        1 => "10".to_owned(),
        -3..=-1 => format!("{:.*}", power.unsigned_abs() as usize, 10f64.powi(power)),
        _ => format!("10<tspan dy=\"-5\" font-size=\"9\">{}</tspan>", power.to_string().replace('-', "−")),
    }
}

/// Mean and percentiles; each on its own line where it would touch the one before.
fn markers(c: &Comparison, x: &dyn Fn(f64) -> f64, (left, right): (f64, f64), bottom: f64) -> String {
    let mut marks: Vec<(&str, f64)> = vec![("mean", c.kl_mean.value)];
    marks.extend(c.kl_percentiles.iter().filter(|(name, _)| *name != "max").copied());
    let mut marks: Vec<(&str, f64, f64)> = marks
        .into_iter()
        .filter(|(_, value)| value.is_finite() && *value > 0.0)
        .map(|(name, value)| (name, value, x(value)))
        .filter(|(.., at)| (left..=right).contains(at))
        .collect();
    marks.sort_by(|a, b| a.2.total_cmp(&b.2));
    let mut ends = [f64::NEG_INFINITY; 3];
    let mut out = String::new();
    for (name, value, at) in marks {
        let label = match name {
            "p50" => "median".to_owned(),
            name => name.strip_prefix('p').filter(|_| name != "mean").map_or(name.to_owned(), |p| format!("{p} %")),
        };
        let half = label.len() as f64 * 3.4 + 4.0;
        let at_label = at.clamp(left + half, right - half);
        let row = ends.iter().position(|end| at_label - half > *end).unwrap_or(ends.len() - 1);
        ends[row] = at_label + half;
        let y = 14.0 + 15.0 * row as f64;
        let _ = write!(
            out,
            "<line class=\"d\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.1}\" y2=\"{bottom}\"><title>{label}: {}</title></line>\
             <text class=\"mt\" x=\"{at_label:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{label}</text>",
            y + 4.0,
            number(value)
        );
    }
    out
}
