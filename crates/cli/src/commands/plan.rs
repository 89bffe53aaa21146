//! `lite plan`.

use std::io::Write;

use lite_job::{Recipe, WorkDir, locate_model, measured_gemm_rate, prepare};
use lite_model::Checkpoint;

use crate::args::{Format, MethodName, QuantizeArgs};
use crate::output;
use crate::progress::Progress;

/// Prints what a run would do; writes nothing (a hub model is downloaded, for its headers are needed).
pub(crate) fn run(method: MethodName, args: &QuantizeArgs, format: Format) -> anyhow::Result<()> {
    let recipe = super::quantize::recipe(method, args)?;
    if args.print_recipe { super::run::print_recipe(&recipe) } else { show(&recipe, format) }
}

/// Prints what a recipe would do; writes nothing.
pub(crate) fn show(recipe: &Recipe, format: Format) -> anyhow::Result<()> {
    let cancel = super::cancel_flag()?;
    let progress = Progress::new(format);
    WorkDir::check(&recipe.work_dir, None, recipe.overwrite)?;
    let model = locate_model(recipe, &progress, &cancel)?;
    drop(progress);
    let checkpoint = Checkpoint::open(&model).map_err(lite_job::JobError::from)?;
    let plan = prepare(recipe, &checkpoint)?;
    let rate = measured_gemm_rate();
    let mut stdout = std::io::stdout().lock();
    match format {
        Format::Json => writeln!(stdout, "{}", output::plan_json(&plan))?,
        Format::Quiet => {}
        Format::Auto | Format::Human => output::plan(&mut stdout, &plan, &checkpoint, rate)?,
    }
    Ok(())
}
