//! `lite calibrate`.

use std::io::Write;

use lite_job::Recipe;

use crate::args::{CalibrateArgs, Format};
use crate::log::RunLog;
use crate::output;
use crate::progress::Progress;

/// Gathers statistics, and prints where they are on standard output.
pub(crate) fn run(args: &CalibrateArgs, format: Format) -> anyhow::Result<()> {
    let recipe = Recipe {
        arch: super::arch::named(),
        revision: args.resources.revision.clone(),
        download_dir: args.resources.download_dir.clone(),
        work_dir: args.work_dir.clone(),
        overwrite: args.overwrite,
        calib: args.calib.settings(),
        batch_size: args.calib.batch_size,
        device: args.resources.device,
        max_shard_bytes: args.resources.max_shard_size,
        max_memory: args.resources.max_memory,
        ..Recipe::new(args.model.clone())
    };
    let cancel = super::cancel_flag()?;
    let progress = Progress::new(format);
    let log = RunLog::new(&progress);
    crate::allocator::keep_within_budget(recipe.max_memory.is_some());
    let report = lite_job::calibrate(&recipe, &log, &cancel).inspect_err(|error| log.failed(error))?;
    drop(progress);
    let mut stdout = std::io::stdout().lock();
    match format {
        Format::Json => writeln!(stdout, "{}", output::statistics_json(&report))?,
        Format::Quiet => writeln!(stdout, "{}", report.output.display())?,
        Format::Auto | Format::Human => output::statistics(&mut stdout, &report)?,
    }
    Ok(())
}
