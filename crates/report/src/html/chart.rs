//! Charts as inline SVG. Every mark has a `<title>`, which browsers show as a tip.

use std::fmt::Write as _;

use crate::escape::html;
use crate::format::number;

/// Left and right edge, top and bottom of what is drawn between axes.
struct Frame {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

/// One value per label, in one colour.
pub(super) struct Series<'a> {
    /// What it is, for tips.
    pub(super) name: &'a str,
    /// Values; none where there is nothing to draw.
    pub(super) values: Vec<Option<f64>>,
}

/// A round step that cuts `max` into at most five parts, and a little more.
pub(super) fn step(max: f64) -> f64 {
    let raw = max / 5.0;
    let power = 10f64.powf(raw.log10().floor());
    let factor = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|factor| factor * power >= raw * 0.999).unwrap_or(10.0);
    factor * power
}

/// A tick of an axis of plain numbers, with the digits that its steps need.
pub(super) fn tick(value: f64, step: f64) -> String {
    if !(1e-4..1e6).contains(&step) {
        return number(value);
    }
    let digits = (0..8).find(|digits| ((step * 10f64.powi(*digits)).fract() - 0.5).abs() > 0.499).unwrap_or(8);
    format!("{value:.*}", digits as usize)
}

/// Columns over the numbers of layers, and a line over them.
pub(super) fn columns(
    what: &str,
    labels: &[usize],
    bars: &Series<'_>,
    line: Option<&Series<'_>>,
    format: &dyn Fn(f64) -> String,
    ticks_of: &dyn Fn(f64, f64) -> String,
) -> String {
    const FRAME: Frame = Frame { left: 68.0, right: 950.0, top: 12.0, bottom: 262.0 };
    let drawn =
        |series: &Series<'_>| series.values.iter().flatten().copied().filter(|v| v.is_finite()).fold(0.0, f64::max);
    let max = drawn(bars).max(line.map_or(0.0, drawn));
    let mut svg = String::new();
    if max <= 0.0 || labels.is_empty() {
        return svg;
    }
    let step = step(max);
    let ticks = (max / step).ceil().max(1.0);
    let y = |value: f64| FRAME.bottom - value / (ticks * step) * (FRAME.bottom - FRAME.top);
    let slot = (FRAME.right - FRAME.left) / labels.len() as f64;
    let x = |i: usize| FRAME.left + (i as f64 + 0.5) * slot;
    // Writing to a string cannot fail.
    let _ = write!(svg, "<svg viewBox=\"0 0 960 306\" role=\"img\" aria-label=\"{}\">", html(what));
    for tick in 0..=ticks as usize {
        let value = tick as f64 * step;
        let class = if tick == 0 { "axis" } else { "grid" };
        let _ = write!(
            svg,
            "<line class=\"{class}\" x1=\"{}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            FRAME.left,
            FRAME.right,
            FRAME.left - 8.0,
            y(value) + 4.0,
            html(&ticks_of(value, step)),
            y = y(value)
        );
    }
    let width = (slot * 0.68).clamp(1.0, 30.0);
    let tip = |label: usize, series: &Series<'_>, value: f64| {
        format!("<title>layer {label}: {} {}</title>", html(series.name), html(&format(value)))
    };
    for (i, (label, value)) in labels.iter().zip(&bars.values).enumerate() {
        let Some(value) = value.filter(|value| value.is_finite()) else { continue };
        let top = y(value.max(0.0));
        let _ = write!(
            svg,
            "<rect class=\"b\" x=\"{:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{:.1}\" rx=\"{:.1}\">{}</rect>",
            x(i) - width / 2.0,
            (FRAME.bottom - top).max(0.5),
            (width / 6.0).min(2.0),
            tip(*label, bars, value)
        );
    }
    let every = (labels.len() as f64 / 24.0).ceil() as usize;
    for (i, label) in labels.iter().enumerate().filter(|(i, _)| i.is_multiple_of(every.max(1))) {
        let _ = write!(svg, "<text x=\"{:.1}\" y=\"280\" text-anchor=\"middle\">{label}</text>", x(i));
    }
    let _ =
        write!(svg, "<text x=\"{}\" y=\"300\" text-anchor=\"middle\">layer</text>", (FRAME.left + FRAME.right) / 2.0);
    if let Some(line) = line {
        let points: Vec<(usize, usize, f64)> = labels
            .iter()
            .zip(&line.values)
            .enumerate()
            .filter_map(|(i, (label, value))| Some((i, *label, value.filter(|v| v.is_finite())?)))
            .collect();
        let path: Vec<String> = points.iter().map(|(i, _, v)| format!("{:.1},{:.1}", x(*i), y(*v))).collect();
        let _ = write!(svg, "<polyline class=\"l\" points=\"{}\"/>", path.join(" "));
        let radius = (slot / 4.0).clamp(1.5, 3.5);
        for (i, label, value) in points {
            let _ = write!(
                svg,
                "<circle class=\"m\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"{radius:.1}\">{}</circle>",
                x(i),
                y(value),
                tip(label, line, value)
            );
        }
    }
    svg.push_str("</svg>");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_round() {
        for (max, wanted) in [(0.19, 0.05), (1.0, 0.2), (0.042, 0.01), (7.0, 2.0), (100.0, 20.0), (0.101, 0.025)] {
            assert!((step(max) / wanted - 1.0).abs() < 1e-9, "{max}: {}", step(max));
        }
    }

    #[test]
    fn ticks_have_the_digits_of_their_step() {
        assert_eq!(
            [tick(0.05, 0.025), tick(0.1, 0.05), tick(0.0, 0.2), tick(40.0, 20.0), tick(2.5, 2.5)],
            ["0.050", "0.10", "0.0", "40", "2.5"]
        );
    }

    #[test]
    fn values_that_are_none_are_not_drawn() {
        let values = vec![Some(1.0), None, Some(f64::NAN), Some(f64::INFINITY), Some(2.0)];
        let svg = columns("x", &[0, 1, 2, 3, 4], &Series { name: "n", values }, None, &|v| v.to_string(), &tick);
        assert_eq!(svg.matches("<rect").count(), 2);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        let none = Series { name: "n", values: vec![None] };
        assert!(columns("x", &[0], &none, None, &|v| v.to_string(), &tick).is_empty());
    }
}
