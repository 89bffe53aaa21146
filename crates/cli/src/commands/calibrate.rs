//! `lite calibrate`.

use std::io::Write;
use std::sync::atomic::AtomicBool;

use lite_job::{JobError, Observer, Recipe, StatsSource};

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
    let report = observed(&recipe, format, lite_job::calibrate)?;
    let mut stdout = std::io::stdout().lock();
    match format {
        Format::Json => writeln!(stdout, "{}", output::statistics_json(&report))?,
        Format::Quiet => writeln!(stdout, "{}", report.output.display())?,
        Format::Auto | Format::Human => output::statistics(&mut stdout, &report)?,
    }
    Ok(())
}

/// Gathers the statistics that a job shares with others, if it is the first of them. They are told of on the way, for the
/// result is the job's.
pub(crate) fn awaited(recipe: &Recipe, format: Format) -> anyhow::Result<()> {
    if recipe.stats.as_ref().is_some_and(StatsSource::awaited) {
        observed(recipe, format, lite_job::gather_statistics)?;
    }
    Ok(())
}

fn observed<R>(
    recipe: &Recipe,
    format: Format,
    work: impl FnOnce(&Recipe, &dyn Observer, &AtomicBool) -> Result<R, JobError>,
) -> anyhow::Result<R> {
    let cancel = super::cancel_flag()?;
    let progress = Progress::new(format);
    let log = RunLog::new(&progress);
    crate::allocator::keep_within_budget(recipe.max_memory.is_some());
    Ok(work(recipe, &log, &cancel).inspect_err(|error| log.failed(error))?)
}
