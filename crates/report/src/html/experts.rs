//! How evenly the calibration text reached the experts.

use std::fmt::Write as _;

use crate::Record;

/// One row per layer; nothing for models without experts.
pub(super) fn section(record: &Record) -> String {
    if record.experts.is_empty() {
        return String::new();
    }
    let mut out = String::from(
        "<section><h2>Calibration tokens per expert</h2><div class=\"scroll\"><table><tr><th>layer</th><th>experts</th>\
         <th>fewest</th><th>median</th><th>most</th><th>least used</th></tr>",
    );
    for layer in &record.experts {
        let mut order: Vec<(u64, usize)> = layer.tokens.iter().copied().zip(0..).collect();
        order.sort_unstable();
        let at = |i: usize| order.get(i).map_or(0, |(tokens, _)| *tokens);
        let least: Vec<String> = order.iter().take(4).map(|(tokens, e)| format!("{e} ({tokens})")).collect();
        let _ = write!(
            out,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            layer.layer,
            order.len(),
            at(0),
            at(order.len() / 2),
            at(order.len().saturating_sub(1)),
            least.join(", ")
        );
    }
    out.push_str("</table></div></section>");
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LayerExperts;

    #[test]
    fn the_least_used_experts_are_named() {
        let mut record = crate::testing::record();
        assert_eq!(section(&record), "");
        record.experts = vec![LayerExperts { layer: 3, tokens: vec![900, 2, 70, 800, 60] }];
        let html = section(&record);
        assert!(html.contains("<td>3</td><td>5</td><td>2</td><td>70</td><td>900</td>"), "{html}");
        assert!(html.contains("1 (2), 4 (60), 2 (70), 3 (800)"), "{html}");
    }
}
