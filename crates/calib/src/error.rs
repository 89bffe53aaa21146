//! The errors of this crate, and the class of each.

use std::path::{Path, PathBuf};

/// The class of a [`CalibError`]; the command line turns it into an exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request itself is wrong (exit code 2).
    Usage,
    /// The data or the tokenizer is wrong (exit code 3).
    Input,
    /// A combination this crate does not support (exit code 4).
    Unsupported,
    /// Reading or downloading failed (exit code 7).
    Io,
}

impl ErrorKind {
    /// The process exit code of this class: 2, 3, 4 or 7.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Usage => 2,
            Self::Input => 3,
            Self::Unsupported => 4,
            Self::Io => 7,
        }
    }
}

/// What can go wrong between a dataset name and its windows of token ids.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CalibError {
    /// The request is neither a registered dataset nor an existing path.
    #[error(
        "unknown calibration dataset `{name}`: it is neither a path that exists nor one of {known}; \
         pass one of these names or the path of a .txt, .jsonl, .json or .parquet file"
    )]
    UnknownDataset {
        /// What the user wrote.
        name: String,
        /// The registered names, comma separated.
        known: String,
    },
    /// A number in the request is out of range.
    #[error("{0}")]
    BadRequest(String),
    /// The tokenizer's files are missing, damaged or do not fit the model.
    #[error("tokenizer `{}`: {detail}", path.display())]
    Tokenizer {
        /// File or folder.
        path: PathBuf,
        /// What was found, what was wanted, what to do.
        detail: String,
    },
    /// Text encoded to an id that has no embedding row.
    #[error(
        "the text encodes to token `{token}` with id {id}, but the model's embedding has {vocab_size} rows \
         (ids 0 to {}); use the tokenizer that belongs to this model, or resize the embedding", vocab_size.saturating_sub(1)
    )]
    TokenOutOfVocab {
        /// The token's text.
        token: String,
        /// Its id.
        id: u32,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// The data cannot be read as what it claims to be.
    #[error("{location}: {detail}")]
    BadData {
        /// `file`, `file:line` or `file, row n`.
        location: String,
        /// What was found, what was wanted, what to do.
        detail: String,
    },
    /// The text has fewer tokens than the windows need.
    #[error(
        "`{name}` has {found} usable tokens, but {samples} windows of {seqlen} need {required}; {hint}",
        required = (*samples as u64).saturating_mul(*seqlen as u64)
    )]
    TooLittleText {
        /// Dataset or path.
        name: String,
        /// Tokens found.
        found: u64,
        /// Windows wanted.
        samples: usize,
        /// Tokens per window.
        seqlen: usize,
        /// What would work instead.
        hint: String,
    },
    /// Windows are cut from single documents, and no document is long enough.
    #[error(
        "the windows of `{name}` are cut from single documents, and none of {tried} tried has {seqlen} tokens \
         (longest: {longest}); use a smaller --calib-seqlen, or wikitext2, whose text is continuous"
    )]
    NoLongDocument {
        /// Registered name.
        name: String,
        /// Documents tokenised.
        tried: usize,
        /// Tokens of the longest of them.
        longest: usize,
        /// Tokens per window.
        seqlen: usize,
    },
    /// The dataset is made of conversations, and the tokenizer cannot render them.
    #[error(
        "`{name}` is made of conversations and needs a chat template, but {reason}; \
         use a set of plain text instead: --calib-dataset wikitext2, c4 or builtin"
    )]
    NoChatTemplate {
        /// Dataset or path.
        name: String,
        /// Why there is none.
        reason: String,
    },
    /// The chat template is wrong, or refused the conversation.
    #[error("chat template: {detail}")]
    ChatTemplate {
        /// Message of the template or of the template engine.
        detail: String,
    },
    /// A file type or a dataset that cannot be used for this.
    #[error("{0}")]
    Unsupported(String),
    /// A dataset of the hub that was asked for by name could not be had.
    #[error(
        "cannot get calibration dataset `{name}` from the hub: {reason}; \
         run `huggingface-cli download --repo-type dataset {repo}{revision} {file}` on a machine with network \
         (HF_HOME names the cache, HF_ENDPOINT a mirror), or use --calib-dataset builtin, or the path of a local file"
    )]
    Fetch {
        /// Registered name.
        name: String,
        /// Hub repository.
        repo: String,
        /// `" --revision …"`, or nothing.
        revision: String,
        /// First file that is missing.
        file: String,
        /// Why.
        reason: String,
    },
    /// The operating system refused to read.
    #[error("cannot read `{}`: {source}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// The system's message.
        source: std::io::Error,
    },
}

impl CalibError {
    /// The class of this error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::UnknownDataset { .. } | Self::BadRequest(_) => ErrorKind::Usage,
            Self::Tokenizer { .. }
            | Self::TokenOutOfVocab { .. }
            | Self::BadData { .. }
            | Self::TooLittleText { .. }
            | Self::NoLongDocument { .. }
            | Self::ChatTemplate { .. } => ErrorKind::Input,
            Self::NoChatTemplate { .. } | Self::Unsupported(_) => ErrorKind::Unsupported,
            Self::Fetch { .. } | Self::Io { .. } => ErrorKind::Io,
        }
    }

    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), source }
    }

    pub(crate) fn bad(location: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::BadData { location: location.into(), detail: detail.into() }
    }

    pub(crate) fn tokenizer(path: &Path, detail: impl Into<String>) -> Self {
        Self::Tokenizer { path: path.to_path_buf(), detail: detail.into() }
    }
}

/// Runs `work` and turns a panic inside a third-party parser into its message.
///
/// `parquet` asserts on hostile schemas and unwraps on missing row groups, and `tokenizers` unwraps in
/// its regex and post-processing code: damaged files must end in an error, not in a crash.
pub(crate) fn guard<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    // Everything `work` touches is dropped or abandoned when it panics, so no broken state survives.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).map_err(|payload| {
        payload
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| payload.downcast_ref::<&str>().map(|s| (*s).to_owned()))
            .unwrap_or_else(|| "the reader failed without a message".to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_its_message() {
        assert_eq!(guard(|| 3), Ok(3));
        assert_eq!(guard(|| -> u8 { panic!("row group {}", 7) }), Err("row group 7".to_owned()));
        assert_eq!(guard(|| -> u8 { panic!("plain") }), Err("plain".to_owned()));
    }

    #[test]
    fn messages_carry_the_numbers() {
        let e = CalibError::TooLittleText {
            name: "a.txt".into(),
            found: 100,
            samples: 3,
            seqlen: 64,
            hint: "use --calib-samples 1".into(),
        };
        assert_eq!(e.to_string(), "`a.txt` has 100 usable tokens, but 3 windows of 64 need 192; use --calib-samples 1");
        assert_eq!(e.kind().exit_code(), 3);
    }
}
