//! Documents that are published beside the checkpoint.

use std::path::Path;

use lite_model::{Checkpoint, atomic_write};

use crate::workdir::entries;
use crate::{JobError, Plan, RunReport};

/// What is known when everything was written and checked, and nothing published.
#[derive(Debug, Clone, Copy)]
pub struct Finished<'a> {
    /// The source.
    pub checkpoint: &'a Checkpoint,
    /// What was planned.
    pub plan: &'a Plan,
    /// What was done.
    pub report: &'a RunReport,
    /// Where the files of the output are until they are published.
    pub staging: &'a Path,
}

impl Finished<'_> {
    /// The file of the output that stands in the way of a document of this name, and the name it is kept under:
    /// `README.md` becomes `README.base.md`, or gets a number where that is taken too. Names that differ only in case
    /// are one name on many file systems.
    ///
    /// # Errors
    /// [`JobError::Io`] if the folder cannot be listed.
    pub fn kept(&self, name: &str) -> Result<Option<(String, String)>, JobError> {
        kept_name(self.staging, name)
    }
}

/// Makes documents to publish beside the checkpoint: names without folders, and contents. A side file of the source in
/// their way is kept under another name, `README.base.md` for `README.md`.
pub type Documents<'a> = &'a dyn Fn(&Finished<'_>) -> Result<Vec<(String, Vec<u8>)>, JobError>;

/// Writes the documents into the staging folder.
pub(crate) fn write_documents(finished: &Finished<'_>, documents: Documents<'_>) -> Result<(), JobError> {
    documents(finished)?.iter().try_for_each(|(name, text)| write_document(finished.staging, name, text))
}

/// Writes one document into a staging folder; a file in its way is kept under the name that [`kept_name`] says.
///
/// # Errors
/// [`JobError::Io`] and [`JobError::Model`].
pub fn write_document(staging: &Path, name: &str, text: &[u8]) -> Result<(), JobError> {
    set_aside(staging, name)?;
    Ok(atomic_write(&staging.join(name), text)?)
}

/// Gives a file in the way of a document another name.
///
/// # Errors
/// [`JobError::Io`].
pub fn set_aside(staging: &Path, name: &str) -> Result<(), JobError> {
    let Some((old, free)) = kept_name(staging, name)? else { return Ok(()) };
    let from = staging.join(old);
    std::fs::rename(&from, staging.join(free)).map_err(JobError::io("rename", &from))
}

/// As [`Finished::kept`], in any folder.
///
/// # Errors
/// [`JobError::Io`] if the folder cannot be listed.
pub fn kept_name(staging: &Path, name: &str) -> Result<Option<(String, String)>, JobError> {
    let taken = entries(staging)?;
    let found = |name: &str| taken.iter().find(|taken| taken.eq_ignore_ascii_case(name));
    let Some(old) = found(name) else { return Ok(None) };
    let (stem, extension) = name.rsplit_once('.').unwrap_or((name, ""));
    let numbers = std::iter::once(String::new()).chain((2..).map(|i| format!(".{i}")));
    let mut names = numbers.map(|number| format!("{stem}.base{number}.{extension}"));
    Ok(names.find(|name| found(name).is_none()).map(|free| (old.clone(), free)))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn nothing_of_the_source_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["readme.MD", "README.base.md", "config.json"] {
            fs::write(dir.path().join(name), name).unwrap();
        }
        set_aside(dir.path(), "README.md").unwrap();
        set_aside(dir.path(), "report.json").unwrap();
        assert_eq!(entries(dir.path()).unwrap(), ["README.base.2.md", "README.base.md", "config.json"]);
        assert_eq!(fs::read_to_string(dir.path().join("README.base.2.md")).unwrap(), "readme.MD");
    }
}
