//! The text perplexity is measured on, tokenised whole.

use sha2::{Digest, Sha256};

use crate::builtin;
use crate::document::{Document, Fields};
use crate::error::CalibError;
use crate::load::{DatasetFetcher, LocalText, fetch_all, has_eval_split, local_documents, read_all};
use crate::registry::{Construction, find};
use crate::source::hex;
use crate::stream::{JOIN, Refused, text_of, tokenise};
use crate::tokenizer::ModelTokenizer;
use crate::windows::{SourceInfo, Windows, consecutive};

/// A text by name, its tokens, and what must be said with any figure measured on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EvalText {
    /// Token ids of the whole text.
    pub ids: Vec<u32>,
    /// SHA-256 of the text in UTF-8 before it was tokenised, lower-case hex: rows joined as the protocol says.
    pub sha256: String,
    /// The special token the tokenizer put first, if it did.
    pub first_special: Option<String>,
    /// At most this many windows are used where the user says nothing: what the protocol asks for.
    pub usual_windows: Option<usize>,
    /// Where the text came from.
    pub source: SourceInfo,
    /// What the user should know, one sentence each.
    pub notes: Vec<String>,
}

/// The evaluation text of a registered name (its evaluation split; `builtin`: the held-out text inside this program) or
/// of a path.
///
/// Rows are joined by blank lines (`c4`: spaces) and tokenised in one go with the tokenizer's own special tokens, as
/// the GPTQ and AWQ papers' code does. Conversations in a local file go through the chat template.
///
/// # Errors
/// The dataset is unknown, cannot be had or read, has no evaluation split, or needs a chat template that is not there.
pub fn eval_text(name: &str, tokenizer: &ModelTokenizer, fetch: &dyn DatasetFetcher) -> Result<EvalText, CalibError> {
    let (documents, files, join, source_name, description, usual_windows, mut notes);
    match find(name)? {
        None => {
            LocalText { documents, files, notes } = local_documents(name)?;
            join = JOIN.to_owned();
            (source_name, description, usual_windows) = (name.to_owned(), format!("`{name}`"), None);
        }
        Some(spec) if spec.construction == Construction::Builtin => {
            (documents, files) = builtin::held_out()?;
            (join, notes, usual_windows) = (JOIN.to_owned(), Vec::new(), None);
            (source_name, description) = (spec.name, "the held-out text inside this program".to_owned());
        }
        Some(spec) => {
            has_eval_split(&spec)?;
            let found = fetch_all(&spec, fetch, true)?;
            let fields = Fields::of(spec.content, spec.column.as_deref(), &spec.roles);
            (documents, files) = read_all(&found, &fields, spec.eval_rows)?;
            join = spec.eval_join.unwrap_or_else(|| JOIN.to_owned());
            let split = spec.eval_split.as_deref().unwrap_or("evaluation");
            description = format!("{} {split} split", spec.name);
            (source_name, notes, usual_windows) = (spec.name, Vec::new(), spec.eval_windows);
        }
    }
    let text = documents.iter().map(text_of).collect::<Vec<_>>().join(&join);
    let ids = if documents.iter().all(|d| matches!(d, Document::Text(_))) {
        tokenizer.encode(&text, true)?
    } else {
        let stream = tokenise(&documents, tokenizer, name, Refused::Error, usize::MAX)?;
        notes.extend(stream.notes);
        stream.ids
    };
    let first_special = match ids.first() {
        Some(id) if tokenizer.special_ids().binary_search(id).is_ok() => Some(tokenizer.decode(&[*id], false)?),
        _ => None,
    };
    let source = SourceInfo {
        name: source_name,
        description,
        files,
        documents: documents.len(),
        tokens_available: ids.len() as u64,
    };
    let sha256 = hex(&Sha256::digest(text.as_bytes()));
    Ok(EvalText { ids, sha256, first_special, usual_windows, source, notes })
}

impl EvalText {
    /// Non-overlapping windows of `seqlen` tokens from the start, at most `limit`; what is left over is dropped.
    ///
    /// # Errors
    /// The text does not fill one window.
    pub fn windows(&self, seqlen: usize, limit: Option<usize>) -> Result<Windows, CalibError> {
        let tokens = consecutive(&self.ids, limit.or(self.usual_windows).unwrap_or(usize::MAX), seqlen.max(1));
        if tokens.is_empty() {
            return Err(CalibError::BadData {
                location: self.source.name.clone(),
                detail: format!(
                    "{} tokens, less than one window of {seqlen}; use a smaller --seqlen, or more text",
                    self.ids.len()
                ),
            });
        }
        Ok(Windows::new(tokens, self.source.clone(), Vec::new()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeHub, bare_tokenizer, tokenizer};

    #[test]
    fn rows_are_joined_hashed_and_tokenised_as_one() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("t.jsonl");
        std::fs::write(&path, "{\"text\": \"one two\"}\n{\"text\": \"\"}\n{\"text\": \" three\\n\"}\n").expect("write");
        let tokenizer = tokenizer();
        let text = eval_text(&path.display().to_string(), &tokenizer, &FakeHub(None)).expect("reads");
        assert_eq!(text.ids, tokenizer.encode("one two\n\n\n\n three\n", true).expect("encodes"));
        assert_eq!(text.first_special.as_deref(), Some("<s>"));
        // hashlib.sha256(b"one two\n\n\n\n three\n").hexdigest()
        assert_eq!(text.sha256, "5f8520051db0cb818a067778b0cf6db36f3fe6c2a30b0f8d196eadf2b9d9f783");
        assert_eq!(text.source.documents, 3);
        let windows = text.windows(4, None).expect("long enough");
        assert_eq!(windows.tokens.len(), text.ids.len() / 4);
        assert_eq!(text.windows(4, Some(1)).expect("long enough").tokens, [text.ids[..4].to_vec()]);
        let error = text.windows(10_000, None).expect_err("too short").to_string();
        assert!(error.contains("--seqlen"), "{error}");
    }

    #[test]
    fn names_mean_evaluation_splits() {
        let tokenizer = bare_tokenizer();
        let held_out = eval_text("builtin", &tokenizer, &FakeHub(None)).expect("reads");
        assert!(held_out.ids.len() > 1000 && held_out.source.description.contains("held-out"));
        assert!(matches!(eval_text("wikitext2", &tokenizer, &FakeHub(None)), Err(CalibError::Fetch { .. })));
        assert!(matches!(eval_text("gsm8k", &tokenizer, &FakeHub(None)), Err(CalibError::Unsupported(_))));
        assert!(matches!(eval_text("nothing", &tokenizer, &FakeHub(None)), Err(CalibError::UnknownDataset { .. })));
    }
}
