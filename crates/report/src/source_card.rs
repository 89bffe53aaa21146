//! What the source model's own card says, as far as the new card repeats it.

use std::fmt::{Result, Write};

use serde_yaml::Value;

use crate::escape::yaml;

/// Largest front matter that is read, bytes.
const LARGEST: usize = 64 << 10;
/// Longest value that is repeated, characters.
const LONGEST: usize = 200;
/// Most languages that are repeated.
const LANGUAGES: usize = 64;

/// Keys of the front matter of a `README.md` that hold for the quantized model too.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SourceCard {
    /// `license`.
    pub license: Option<String>,
    /// `license_name`.
    pub license_name: Option<String>,
    /// `license_link`.
    pub license_link: Option<String>,
    /// `language`, one or several.
    pub languages: Vec<String>,
    /// `pipeline_tag`.
    pub pipeline_tag: Option<String>,
    /// `base_model`, of one or the first of several: what the source itself was made from.
    pub base_model: Option<String>,
}

impl SourceCard {
    /// The licence and the pipeline tag as lines of front matter.
    pub(crate) fn write_terms(&self, out: &mut String) -> Result {
        let scalars = [
            ("license", &self.license),
            ("license_name", &self.license_name),
            ("license_link", &self.license_link),
            ("pipeline_tag", &self.pipeline_tag),
        ];
        for (key, value) in scalars {
            if let Some(value) = value {
                writeln!(out, "{key}: {}", yaml(value))?;
            }
        }
        Ok(())
    }

    /// The languages as lines of front matter.
    pub(crate) fn write_languages(&self, out: &mut String) -> Result {
        if !self.languages.is_empty() {
            writeln!(out, "language:")?;
        }
        self.languages.iter().try_for_each(|language| writeln!(out, "- {}", yaml(language)))
    }

    /// Reads the front matter of a card. What cannot be read is left out: a card is prose, and no reason to stop.
    #[must_use]
    pub fn read(text: &str) -> Self {
        let Some(front) = front_matter(text).and_then(|yaml| serde_yaml::from_str::<Value>(yaml).ok()) else {
            return Self::default();
        };
        let scalar = |key: &str| front.get(key).and_then(text_of);
        let languages = match front.get("language") {
            Some(Value::Sequence(items)) => items.iter().filter_map(text_of).take(LANGUAGES).collect(),
            Some(value) => text_of(value).into_iter().collect(),
            None => Vec::new(),
        };
        Self {
            license: scalar("license"),
            license_name: scalar("license_name"),
            // A link within the source's repository would lead nowhere from here, but its files are copied along.
            license_link: scalar("license_link"),
            languages,
            pipeline_tag: scalar("pipeline_tag"),
            base_model: match front.get("base_model") {
                Some(Value::Sequence(items)) => items.iter().find_map(text_of),
                value => value.and_then(text_of),
            },
        }
    }
}

fn text_of(value: &Value) -> Option<String> {
    value.as_str().filter(|text| !text.is_empty() && text.chars().count() <= LONGEST).map(ToOwned::to_owned)
}

/// What stands between the first line `---` and the next.
fn front_matter(text: &str) -> Option<&str> {
    let text = text.trim_start_matches('\u{feff}');
    let rest = text.strip_prefix("---\n").or_else(|| text.strip_prefix("---\r\n"))?;
    let mut at = 0;
    for line in rest.split_inclusive('\n') {
        if line.trim_end() == "---" {
            return rest.get(..at).filter(|yaml| yaml.len() <= LARGEST);
        }
        at += line.len();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn front_matter_is_read() {
        let card = SourceCard::read(
            "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\nlanguage:\n- en\n- de\n---\n# Title\n---\n",
        );
        assert_eq!((card.license.as_deref(), card.license_name.as_deref()), (Some("other"), Some("llama3")));
        assert_eq!(card.languages, ["en", "de"]);
        assert_eq!(SourceCard::read("---\r\nlicense: mit\r\nlanguage: en\r\n---\r\n").languages, ["en"]);
    }

    #[test]
    fn cards_without_or_with_broken_front_matter_give_nothing() {
        for text in ["", "# Title", "---\nlicense: mit", "---\n: : [\n---\n", "---\nlicense: [1]\n---\n", "---\n---\n"]
        {
            assert_eq!(SourceCard::read(text), SourceCard::default(), "{text:?}");
        }
        let huge = format!("---\nlicense: mit\nx: {}\n---\n", "y".repeat(LARGEST));
        assert_eq!(SourceCard::read(&huge), SourceCard::default());
    }
}
