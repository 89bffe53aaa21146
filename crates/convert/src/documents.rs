//! Documents that are published beside a converted checkpoint, and what becomes of the source's.

use std::path::Path;

use lite_job::{JobError, kept_name, set_aside, write_document};
use lite_model::Checkpoint;

use crate::ConvertReport;
use crate::plan::Plan;
use crate::source::Source;

/// What is known when a conversion was written and checked, and nothing published.
#[derive(Debug, Clone, Copy)]
pub struct Converted<'a> {
    /// The source.
    pub checkpoint: &'a Checkpoint,
    /// What was done.
    pub report: &'a ConvertReport,
    /// `quant_method` of the result; `None` for plain floats.
    pub quant_method: Option<&'static str>,
    /// Where the files of the output are until they are published.
    pub staging: &'a Path,
    /// What told of the source, set aside: its name there, and its name in the output.
    pub set_aside: &'a [(String, String)],
}

/// Makes documents to publish beside the checkpoint: names without folders, and contents.
pub type Documents<'a> = &'a dyn Fn(&Converted<'_>) -> Result<Vec<(String, Vec<u8>)>, JobError>;

/// Files that tell of the checkpoint they lie beside, and not of what is made from it. They are kept under other names.
const TOLD: [&str; 3] = ["README.md", "report.json", "report.html"];

/// Sets aside what tells of the source, and writes what tells of the result.
pub(crate) fn write_documents(
    source: &Source,
    plan: &Plan,
    report: &ConvertReport,
    staging: &Path,
    documents: Documents<'_>,
) -> Result<(), JobError> {
    let mut aside = Vec::new();
    for name in TOLD {
        aside.extend(kept_name(staging, name)?);
        set_aside(staging, name)?;
    }
    let converted = Converted {
        checkpoint: source.checkpoint(),
        report,
        quant_method: plan.layout.map(|layout| layout.quant_method()),
        staging,
        set_aside: &aside,
    };
    documents(&converted)?.iter().try_for_each(|(name, text)| write_document(staging, name, text))
}
