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
        kept(self.staging, name)
    }
}

/// Makes documents to publish beside the checkpoint: names without folders, and contents. A side file of the source in
/// their way is kept under another name, `README.base.md` for `README.md`.
pub type Documents<'a> = &'a dyn Fn(&Finished<'_>) -> Result<Vec<(String, Vec<u8>)>, JobError>;

/// Writes the documents into the staging folder.
pub(crate) fn write_documents(finished: &Finished<'_>, documents: Documents<'_>) -> Result<(), JobError> {
    for (name, text) in documents(finished)? {
        make_way(finished.staging, &name)?;
        atomic_write(&finished.staging.join(&name), &text)?;
    }
    Ok(())
}

fn make_way(staging: &Path, name: &str) -> Result<(), JobError> {
    let Some((old, free)) = kept(staging, name)? else { return Ok(()) };
    let from = staging.join(old);
    std::fs::rename(&from, staging.join(free)).map_err(JobError::io("rename", &from))
}

/// As [`Finished::kept`].
fn kept(staging: &Path, name: &str) -> Result<Option<(String, String)>, JobError> {
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
        make_way(dir.path(), "README.md").unwrap();
        make_way(dir.path(), "report.json").unwrap();
        assert_eq!(entries(dir.path()).unwrap(), ["README.base.2.md", "README.base.md", "config.json"]);
        assert_eq!(fs::read_to_string(dir.path().join("README.base.2.md")).unwrap(), "readme.MD");
    }
}
