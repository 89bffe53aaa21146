//! The model card of a checkpoint that was converted from one layout to another.

use std::fmt::Write as _;

use lite_pack::targets::Target;

use crate::escape::{code, markdown, yaml};
use crate::format::{count, size};
use crate::{SourceCard, hub_id, serve};

/// Rounded linears that are listed.
const SHOWN: usize = 20;

/// What a conversion did.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conversion {
    /// Version of the program.
    pub version: String,
    /// What to call the source: a hub id, or the name of its folder.
    pub name: String,
    /// The source's layout.
    pub from: String,
    /// The result's layout; `plain` for floats.
    pub to: String,
    /// `quant_method` of the result; empty for floats.
    pub quant_method: String,
    /// Bytes of the source's tensors.
    pub source_bytes: u64,
    /// Bytes of the result's tensors.
    pub output_bytes: u64,
    /// Linears that hold the same values bit by bit.
    pub exact: usize,
    /// Linears that were rounded: module, scheme in words, relative error.
    pub rounded: Vec<(String, String, f64)>,
    /// Engines that load the result, by their names here.
    pub engines: Vec<String>,
}

/// The card. `source` is what the source's own card says; `kept` names the files that tell of the source, by the names
/// they have beside the card.
#[must_use]
pub fn conversion_card(facts: &Conversion, source: &SourceCard, kept: &[String]) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = front_matter(&mut out, facts, source).and_then(|()| body(&mut out, facts, kept));
    out
}

fn front_matter(out: &mut String, facts: &Conversion, source: &SourceCard) -> std::fmt::Result {
    writeln!(out, "---")?;
    // A source on the hub is what this was made from; of a folder, what its own card says.
    let base = Some(facts.name.as_str()).filter(|name| hub_id(name)).or(source.base_model.as_deref());
    if let Some(base) = base.filter(|base| hub_id(base)) {
        writeln!(out, "base_model: {}", yaml(base))?;
        if !facts.quant_method.is_empty() {
            writeln!(out, "base_model_relation: quantized")?;
        }
    }
    source.write_terms(out)?;
    source.write_languages(out)?;
    writeln!(out, "tags:\n- lite\n- converted\n- {}\n---", yaml(&facts.to))
}

fn body(out: &mut String, facts: &Conversion, kept: &[String]) -> std::fmt::Result {
    writeln!(out, "\n# {}, converted\n", markdown(&facts.name))?;
    let plain = facts.quant_method.is_empty();
    let to = if plain { "plain floats".to_owned() } else { format!("the {} layout", code(&facts.to)) };
    writeln!(
        out,
        "The quantized checkpoint {}, from the {} layout to {to}, by lite {}. Nothing was calibrated, and the original \
         model was not read.",
        markdown(&facts.name),
        code(&facts.from),
        markdown(&facts.version)
    )?;
    let all = facts.exact + facts.rounded.len();
    writeln!(
        out,
        "\n{} of {} linears hold the same values as the source's, bit by bit; this was read back from these files.",
        count(facts.exact as u64),
        count(all as u64)
    )?;
    if !facts.rounded.is_empty() {
        let squares: f64 = facts.rounded.iter().map(|(_, _, error)| error * error).sum();
        writeln!(
            out,
            "{} were rounded once more, with a relative error of {:.2e} in the mean. The quality of the result was not \
             measured.\n\n| linear | now | relative error |\n|---|---|---:|",
            count(facts.rounded.len() as u64),
            (squares / facts.rounded.len() as f64).sqrt()
        )?;
        let mut worst: Vec<_> = facts.rounded.iter().collect();
        worst.sort_by(|a, b| b.2.total_cmp(&a.2));
        for (module, scheme, error) in worst.iter().take(SHOWN) {
            writeln!(out, "| {} | {} | {error:.2e} |", code(module), markdown(scheme))?;
        }
        if let Some(more) = worst.len().checked_sub(SHOWN).filter(|more| *more > 0) {
            writeln!(out, "\nand {more} more, with smaller errors.")?;
        }
    }
    writeln!(
        out,
        "\n| | source | this |\n|---|---:|---:|\n| tensors | {} | {} |",
        size(facts.source_bytes),
        size(facts.output_bytes)
    )?;
    if !kept.is_empty() {
        let names: Vec<String> = kept.iter().map(|name| code(name)).collect();
        writeln!(out, "\nWhat was written about the source is kept in {}: it tells of the source.", names.join(", "))?;
    }
    let engines = Target::ALL.iter().filter(|target| facts.engines.iter().any(|name| name == target.name()));
    let mut engines = engines.peekable();
    if !plain && engines.peek().is_some() {
        writeln!(out, "\n## How to serve it\n\n`DIR` is this folder, or the id of this repository.")?;
        let how = serve::Facts { quant_method: &facts.quant_method, layout: &facts.to, kv_cache: None };
        for target in engines {
            let (language, command) = (serve::language(*target), serve::command(*target, how));
            writeln!(out, "\n{}:\n\n```{language}\n{command}\n```", markdown(serve::title(*target)))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Conversion {
        Conversion {
            version: "0.1.0".to_owned(),
            name: "quantized".to_owned(),
            from: "awq".to_owned(),
            to: "gptq".to_owned(),
            quant_method: "gptq".to_owned(),
            source_bytes: 4_600_000,
            output_bytes: 4_700_000,
            exact: 42,
            rounded: Vec::new(),
            engines: vec!["vllm".to_owned()],
        }
    }

    #[test]
    fn it_tells_of_the_result_and_of_the_source_as_such() {
        let source = SourceCard { base_model: Some("Qwen/Qwen3-0.6B".to_owned()), ..SourceCard::default() };
        let card = conversion_card(&facts(), &source, &["README.base.md".to_owned()]);
        for wanted in [
            "base_model: \"Qwen/Qwen3-0.6B\"\nbase_model_relation: quantized\n",
            "from the `awq` layout to the `gptq` layout",
            "42 of 42 linears hold the same values",
            "kept in `README.base.md`: it tells of the source",
            "vllm serve DIR",
        ] {
            assert!(card.contains(wanted), "{wanted}: {card}");
        }
        assert!(!card.contains("perplexity") && !card.contains("LMDeploy") && !card.contains("rounded"), "{card}");
    }

    #[test]
    fn rounding_is_told_worst_first() {
        let rounded = [("a", 0.01), ("b|c", 0.03)].map(|(m, e)| (m.to_owned(), "4-bit".to_owned(), e)).to_vec();
        let card = conversion_card(&Conversion { rounded, exact: 0, ..facts() }, &SourceCard::default(), &[]);
        assert!(card.contains("0 of 2 linears") && card.contains("2 were rounded once more"), "{card}");
        assert!(card.contains("2.24e-2") && card.contains("not measured"), "{card}");
        assert!(card.find("3.00e-2").unwrap() < card.find("1.00e-2").unwrap(), "{card}");
        assert!(!card.contains("base_model") && !card.contains("kept in"), "{card}");
    }

    #[test]
    fn floats_are_served_by_anything() {
        let plain = Conversion { to: "plain".to_owned(), quant_method: String::new(), ..facts() };
        let card = conversion_card(&plain, &SourceCard::default(), &[]);
        assert!(card.contains("to plain floats") && !card.contains("How to serve"), "{card}");
    }
}
