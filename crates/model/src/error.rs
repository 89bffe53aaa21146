//! What can go wrong with a checkpoint on disk.

use std::io;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use thiserror::Error;

use crate::text::{printable, printable_path};

/// Broad class of an error, for whoever maps errors to exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The files are wrong: missing, damaged, contradictory.
    Input,
    /// The files are fine, but of a kind this program does not read or write.
    Unsupported,
    /// The operating system refused to read or write.
    Io,
    /// Not enough memory.
    Resources,
}

/// What can go wrong with a checkpoint on disk. Names and paths are kept as found and escaped when displayed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The model folder does not exist.
    #[error("folder `{}` does not exist: check the path of the model", printable_path(.path))]
    MissingFolder {
        /// The folder asked for.
        path: PathBuf,
    },
    /// A file was given where a folder is wanted.
    #[error("`{}` is not a folder: give the folder that holds config.json and the weights", printable_path(.path))]
    NotAFolder {
        /// The path asked for.
        path: PathBuf,
    },
    /// Nothing (or nothing but hidden files) in the folder.
    #[error("folder `{}` is empty: a model folder holds config.json and *.safetensors", printable_path(.path))]
    EmptyFolder {
        /// The folder asked for.
        path: PathBuf,
    },
    /// No config.json.
    #[error("`{}` holds no config.json: copy the one of the model into the folder", printable_path(.path))]
    NoConfig {
        /// The folder asked for.
        path: PathBuf,
    },
    /// No file that looks like weights.
    #[error("`{}` holds no weights: {next}", printable_path(.path))]
    NoWeights {
        /// The folder asked for.
        path: PathBuf,
        /// What to do.
        next: String,
    },
    /// Weights of a format that is not read.
    #[error("`{}` holds weights only as {format} (`{}`): {next}", printable_path(.path), printable(.file))]
    ForeignWeights {
        /// The folder asked for.
        path: PathBuf,
        /// One of the files.
        file: String,
        /// What they are.
        format: &'static str,
        /// The way out.
        next: &'static str,
    },
    /// More than one reading of the folder.
    #[error("`{}` is ambiguous: {found}; {next}", printable_path(.path))]
    Ambiguous {
        /// The folder asked for.
        path: PathBuf,
        /// The candidates.
        found: String,
        /// What to do.
        next: &'static str,
    },
    /// A path that must be a regular file is something else.
    #[error("`{}` is {found}, a regular file is wanted", printable_path(.path))]
    NotRegular {
        /// The path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// A file that is recognisably something other than its name says.
    #[error("`{}` is not {wanted} but {found}: {next}", printable_path(.path))]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What its name promises.
        wanted: &'static str,
        /// What it holds.
        found: &'static str,
        /// What to do.
        next: &'static str,
    },
    /// The header of a safetensors file breaks the format.
    #[error("`{}`: {reason}", printable_path(.path))]
    Container {
        /// The file.
        path: PathBuf,
        /// What was found and what was wanted.
        reason: String,
    },
    /// One tensor of a safetensors header breaks the format.
    #[error("`{}`: tensor `{}`: {reason}", printable_path(.path), printable(.tensor))]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What was found and what was wanted.
        reason: String,
    },
    /// A dtype, or a use of one, that this program does not read.
    #[error("`{}`: tensor `{}`: {reason}", printable_path(.path), printable(.tensor))]
    UnsupportedTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What was found and what is supported.
        reason: String,
    },
    /// The file ends before its header says.
    #[error("`{}`: found {found} bytes, header asks for {wanted}: the file was cut; download it again", printable_path(.path))]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        found: u64,
        /// The length in bytes that its header implies.
        wanted: u64,
    },
    /// A shard was modified after it was opened.
    #[error("`{}` changed while it was in use: leave the model folder alone during a run, then start again", printable_path(.path))]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The shard index is wrong, or disagrees with the shards.
    #[error("`{}`: {reason}", printable_path(.path))]
    Index {
        /// The index file.
        path: PathBuf,
        /// What was found and what was wanted.
        reason: String,
    },
    /// config.json is wrong.
    #[error("`{}`: {reason}", printable_path(.path))]
    Config {
        /// The file.
        path: PathBuf,
        /// What was found and what was wanted.
        reason: String,
    },
    /// Experts stored in one tensor per layer, in a form that nobody publishes.
    #[error("tensor `{}` holds all experts of a layer, and {found}; wanted {wanted}", printable(.tensor))]
    FusedExperts {
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        found: String,
        /// What experts look like.
        wanted: String,
    },
    /// A tensor was asked for that the checkpoint does not hold.
    #[error("tensor `{}` is not in `{}`: {hint}", printable(.tensor), printable_path(.path))]
    UnknownTensor {
        /// The model folder.
        path: PathBuf,
        /// The tensor asked for.
        tensor: String,
        /// What the folder does hold.
        hint: String,
    },
    /// A buffer does not have the length a tensor asks for.
    #[error("tensor `{}`: the data has {found} {unit}, its shape asks for {wanted}", printable(.tensor))]
    Length {
        /// The tensor.
        tensor: String,
        /// What is counted.
        unit: &'static str,
        /// How many were given.
        found: u64,
        /// How many the shape asks for.
        wanted: u64,
    },
    /// A tensor as floats whose dtype is not one.
    #[error("tensor `{}` has dtype {dtype}: only F32, F16 and BF16 convert to floats here", printable(.tensor))]
    NotFloat {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
    },
    /// The caller of the writer broke its rules, or the output folder is not fit to write to.
    #[error("output `{}`: {reason}", printable_path(.path))]
    Output {
        /// The output folder or file.
        path: PathBuf,
        /// What was found and what was wanted.
        reason: String,
    },
    /// The operating system refused; `source` keeps the cause (for example [`io::ErrorKind::StorageFull`]).
    #[error("cannot {action} `{}`", printable_path(.path))]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// An allocation failed.
    #[error("not enough memory for `{}`: {bytes} bytes are needed; free some, or lower the memory limit of the run", printable(.what))]
    OutOfMemory {
        /// What it was for.
        what: String,
        /// Its size.
        bytes: u64,
    },
}

impl ModelError {
    /// The broad class of this error.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::ForeignWeights { .. } | Self::UnsupportedTensor { .. } | Self::NotFloat { .. } => {
                ErrorKind::Unsupported
            }
            Self::Io { .. } | Self::Changed { .. } | Self::Output { .. } => ErrorKind::Io,
            Self::OutOfMemory { .. } => ErrorKind::Resources,
            _ => ErrorKind::Input,
        }
    }

    /// Closure for `map_err`: an [`ModelError::Io`] with its context.
    pub(crate) fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::Io { action, path: path.to_path_buf(), source }
    }

    pub(crate) fn container(path: &Path, reason: impl Into<String>) -> Self {
        Self::Container { path: path.to_path_buf(), reason: reason.into() }
    }

    pub(crate) fn index(path: &Path, reason: impl Into<String>) -> Self {
        Self::Index { path: path.to_path_buf(), reason: reason.into() }
    }

    pub(crate) fn config(path: &Path, reason: impl Into<String>) -> Self {
        Self::Config { path: path.to_path_buf(), reason: reason.into() }
    }

    pub(crate) fn output(path: &Path, reason: impl Into<String>) -> Self {
        Self::Output { path: path.to_path_buf(), reason: reason.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error;

    #[test]
    fn a_full_disk_stays_recognisable() {
        let full = io::Error::from(io::ErrorKind::StorageFull);
        let error = ModelError::io("write", Path::new("out/model.safetensors"))(full);
        assert_eq!(error.to_string(), "cannot write `out/model.safetensors`");
        assert_eq!(error.kind(), ErrorKind::Io);
        let source = error.source().and_then(|s| s.downcast_ref::<io::Error>()).unwrap();
        assert_eq!(source.kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn names_are_escaped() {
        let error = ModelError::NotFloat { tensor: "w\u{1b}[2J".into(), dtype: Dtype::I32 };
        assert!(error.to_string().starts_with("tensor `w\\u{1b}[2J` has dtype I32"));
    }
}
