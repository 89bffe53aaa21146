//! The result: windows of token ids, and where they come from.

use sha2::{Digest, Sha256};

use crate::error::CalibError;
use crate::source::{SourceFile, hex};

/// Where the text of some windows came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceInfo {
    /// Registered name or path.
    pub name: String,
    /// What it is and how windows were cut, in one line.
    pub description: String,
    /// The files read, with their hashes.
    pub files: Vec<SourceFile>,
    /// Documents (rows, conversations, text files) read.
    pub documents: usize,
    /// Tokens the windows were cut from; sets that need not be tokenised to the end count only what was.
    pub tokens_available: u64,
}

/// Calibration windows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// Token ids, one vector per window, all of the same length.
    pub tokens: Vec<Vec<u32>>,
    /// Where they come from.
    pub source: SourceInfo,
    /// What the user should know, one sentence each.
    pub notes: Vec<String>,
    /// SHA-256 over all ids, little-endian `u32`s window after window, in lower-case hex.
    pub digest: String,
}

impl Windows {
    pub(crate) fn new(tokens: Vec<Vec<u32>>, source: SourceInfo, notes: Vec<String>) -> Self {
        let mut hasher = Sha256::new();
        for id in tokens.iter().flatten() {
            hasher.update(id.to_le_bytes());
        }
        let digest = hex(&hasher.finalize());
        Self { tokens, source, notes, digest }
    }

    /// Tokens per window; 0 if there is no window.
    pub fn seqlen(&self) -> usize {
        self.tokens.first().map_or(0, Vec::len)
    }

    /// Tokens in all windows.
    pub fn total_tokens(&self) -> u64 {
        self.tokens.iter().map(|w| w.len() as u64).sum()
    }
}

/// At most `samples` consecutive windows from the start of `ids`; what is left over is dropped.
pub(crate) fn consecutive(ids: &[u32], samples: usize, seqlen: usize) -> Vec<Vec<u32>> {
    ids.chunks_exact(seqlen).take(samples).map(<[u32]>::to_vec).collect()
}

/// The error for a text of `found` tokens that should have given `samples` windows.
pub(crate) fn too_little(name: &str, found: u64, samples: usize, seqlen: usize) -> CalibError {
    let most = found / (seqlen.max(1) as u64);
    let hint = if most > 0 {
        format!("use --calib-samples {most} or less, a smaller --calib-seqlen, or more text")
    } else if found >= 8 {
        format!("use --calib-seqlen {found} or less with --calib-samples 1, or more text")
    } else {
        "use a file with more text, or --calib-dataset builtin".to_owned()
    };
    CalibError::TooLittleText { name: name.to_owned(), found, samples, seqlen, hint }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_follow_each_other() {
        let ids: Vec<u32> = (0..10).collect();
        assert_eq!(consecutive(&ids, 9, 4), [[0, 1, 2, 3], [4, 5, 6, 7]]);
        assert_eq!(consecutive(&ids, 1, 4), [[0, 1, 2, 3]]);
        assert!(consecutive(&ids, 1, 11).is_empty());
    }

    #[test]
    fn the_digest_is_over_little_endian_ids() {
        let source = SourceInfo {
            name: String::new(),
            description: String::new(),
            files: vec![],
            documents: 0,
            tokens_available: 0,
        };
        let windows = Windows::new(vec![vec![1, 2], vec![3, 0x01020304]], source, vec![]);
        // hashlib.sha256(struct.pack('<4I', 1, 2, 3, 0x01020304)).hexdigest()
        assert_eq!(windows.digest, "fba827db1c52c666397ba91ab0a87f120c9bc92a7547bd445c69ce49ea74cbc5");
        assert_eq!((windows.seqlen(), windows.total_tokens()), (2, 4));
    }

    #[test]
    fn hints_fit_what_was_found() {
        for (found, wanted) in [(300, "--calib-samples 2"), (100, "--calib-seqlen 100"), (3, "builtin")] {
            let error = too_little("x", found, 128, 128).to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
