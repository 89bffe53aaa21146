//! The registered datasets: `calib_data/registry.yaml`, embedded.

use serde::Deserialize;

use crate::error::CalibError;

const REGISTRY: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../calib_data/registry.yaml"));

/// One registered dataset.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetSpec {
    /// The name users write.
    pub name: String,
    /// Other names for it.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// What it is, in one line.
    pub description: String,
    /// Where it lies on the hub; places are tried in order.
    #[serde(default)]
    pub sources: Vec<HubSource>,
    /// The split that `files` hold.
    #[serde(default)]
    pub split: Option<String>,
    /// The split that `eval_files` hold.
    #[serde(default)]
    pub eval_split: Option<String>,
    /// Only this many rows from the start.
    #[serde(default)]
    pub rows: Option<usize>,
    /// What a row is.
    #[serde(default)]
    pub content: Content,
    /// The column with the text or the messages.
    #[serde(default)]
    pub column: Option<String>,
    /// Roles kept of `messages`; empty keeps all.
    #[serde(default)]
    pub roles: Vec<String>,
    /// How windows are cut.
    pub construction: Construction,
    /// Rows are visited in the order of `Dataset.shuffle(seed)`.
    #[serde(default)]
    pub shuffle: bool,
    /// Texts are tokenised with the tokenizer's special tokens.
    #[serde(default)]
    pub special_tokens: bool,
    /// White space around a text is removed.
    #[serde(default)]
    pub strip: bool,
    /// Texts of more tokens than this are dropped.
    #[serde(default)]
    pub drop_longer_than: Option<usize>,
    /// Texts are cut to the window length, in tokens.
    #[serde(default)]
    pub truncate_to_seqlen: bool,
    /// For evaluation: only this many rows from the start.
    #[serde(default)]
    pub eval_rows: Option<usize>,
    /// For evaluation: at most this many windows where nobody says how many.
    #[serde(default)]
    pub eval_windows: Option<usize>,
    /// For evaluation: what joins the rows. Two newlines if absent.
    #[serde(default)]
    pub eval_join: Option<String>,
}

/// A place on the hub that holds a dataset.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HubSource {
    /// Dataset repository, `owner/name`.
    pub repo: String,
    /// Branch, tag or reference; the main branch if absent.
    #[serde(default)]
    pub revision: Option<String>,
    /// Files of the calibration split, in order.
    pub files: Vec<String>,
    /// Files of the evaluation split, in order.
    #[serde(default)]
    pub eval_files: Vec<String>,
}

/// What a row of a dataset is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// One text.
    #[default]
    Text,
    /// A conversation: a list of `{role, content}`.
    Messages,
    /// An Alpaca row: `instruction`, `input`, `output`.
    Instruction,
}

/// How windows are cut from rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Construction {
    /// Rows joined, tokenised once, windows at random starts.
    RandomWindows,
    /// Random rows that are long enough, one random window of each.
    RandomDocuments,
    /// Rows tokenised one by one, concatenated, consecutive windows.
    Concatenate,
    /// No text: random ids.
    RandomTokens,
    /// The corpora inside the program.
    Builtin,
}

/// All registered datasets, in the order of the registry.
///
/// # Errors
/// The embedded file does not parse, which a test rules out.
pub fn registry() -> Result<Vec<DatasetSpec>, CalibError> {
    serde_yaml::from_str(REGISTRY).map_err(|e| CalibError::bad("the embedded dataset registry", e.to_string()))
}

/// The dataset registered under a name or an alias (ASCII case ignored), if there is one.
///
/// # Errors
/// As [`registry`].
pub fn find(name: &str) -> Result<Option<DatasetSpec>, CalibError> {
    Ok(registry()?
        .into_iter()
        .find(|set| set.name.eq_ignore_ascii_case(name) || set.aliases.iter().any(|a| a.eq_ignore_ascii_case(name))))
}

/// The names of all registered datasets, for messages.
pub(crate) fn known_names() -> Result<String, CalibError> {
    Ok(registry()?.iter().map(|s| format!("`{}`", s.name)).collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_registry_is_complete_and_unambiguous() {
        let sets = registry().expect("parses");
        let names: Vec<_> = sets.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "wikitext2",
                "ptb",
                "c4",
                "pileval",
                "gsm8k",
                "neuralmagic_calibration",
                "open-platypus",
                "openwebtext",
                "ultrachat",
                "random",
                "builtin"
            ]
        );
        let mut seen = BTreeSet::new();
        for set in &sets {
            for name in std::iter::once(&set.name).chain(&set.aliases) {
                assert!(seen.insert(name.to_ascii_lowercase()), "`{name}` is registered twice");
            }
            let local = matches!(set.construction, Construction::RandomTokens | Construction::Builtin);
            assert_eq!(set.sources.is_empty(), local, "{}", set.name);
            assert!(set.sources.iter().all(|s| !s.files.is_empty()));
            let needs_column = !local && set.content != Content::Instruction;
            assert_eq!(set.column.is_some(), needs_column, "{}", set.name);
        }
    }

    #[test]
    fn names_and_aliases_are_found() {
        for (written, name) in
            [("wikitext", "wikitext2"), ("PTB_text_only", "ptb"), ("ultrachat_200k", "ultrachat"), ("pile", "pileval")]
        {
            assert_eq!(find(written).expect("parses").expect("found").name, name);
        }
        assert!(find("nothing").expect("parses").is_none());
    }

    #[test]
    fn unknown_keys_are_errors() {
        let text = "- {name: a, description: b, construction: builtin, colunm: text}";
        let error = serde_yaml::from_str::<Vec<DatasetSpec>>(text).expect_err("typo").to_string();
        assert!(error.contains("colunm"), "{error}");
    }
}
