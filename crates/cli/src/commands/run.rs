//! `lite run`: jobs from recipe files, one after the other.

mod outcome;

use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Instant;

use clap::Args;
use lite_job::{JobError, Recipe, RunReport, TextCache};
use lite_model::printable;
use lite_recipe::{Entry, Loaded, json_schema, load, to_yaml};
use lite_runtime::eval::{Gate, Measured};
use serde_json::{Value, json};

use super::plan::Planned;
use super::report_args::ReportArgs;
use crate::args::Format;
use crate::exit;

pub(crate) use self::outcome::BatchFailed;
use self::outcome::{Outcome, Row, summary, verdict};

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Recipes: lite's own YAML, a config of LLMC, or a recipe.yaml of llm-compressor; paths in them are relative to the
    /// current folder
    #[arg(value_name = "FILE", required_unless_present_any = ["print_schema", "plan"])]
    pub(crate) files: Vec<PathBuf>,

    /// Put a value into every job, such as `calibration.samples=64` or `stages.gptq.damp_percent=0.05`; repeatable, and
    /// always in lite's own keys
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) sets: Vec<String>,

    /// The model of every job, as `--set model=…`
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: Option<String>,

    /// Where the checkpoint appears, as `--set save.path=…`; `{name}` stands for the job's name
    #[arg(long, value_name = "DIR")]
    pub(crate) work_dir: Option<String>,

    /// Run only job number N, from 0
    #[arg(long, value_name = "N")]
    pub(crate) only: Option<usize>,

    /// Hold the run to this plan of `lite plan --out`: refuse if the model, the recipe or the calibration text changed
    /// since. Without a recipe file, the planned job runs
    #[arg(long, value_name = "FILE")]
    pub(crate) plan: Option<PathBuf>,

    /// Go on after a job that failed; the exit code is the largest of all jobs
    #[arg(long)]
    pub(crate) keep_going: bool,

    /// Pass over jobs whose folder already holds a finished checkpoint
    #[arg(long)]
    pub(crate) skip_existing: bool,

    /// Start over where an interrupted run could go on
    #[arg(long)]
    pub(crate) restart: bool,

    /// Show what the jobs would do and cost, and run nothing
    #[arg(long, conflicts_with_all = ["skip_existing", "list", "print_recipe"])]
    pub(crate) plan_only: bool,

    /// Print number, name and folder of every job, and run nothing
    #[arg(long, conflicts_with = "print_recipe")]
    pub(crate) list: bool,

    /// Print the jobs with every setting, in lite's own keys, and run nothing
    #[arg(long)]
    pub(crate) print_recipe: bool,

    /// Print the JSON schema of lite's own recipes
    #[arg(long, exclusive = true)]
    pub(crate) print_schema: bool,

    #[command(flatten)]
    pub(crate) report: ReportArgs,
}

/// Runs the jobs, and prints their results on standard output.
pub(crate) fn run(args: &RunArgs, format: Format) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout();
    if args.print_schema {
        writeln!(stdout, "{:#}", json_schema())?;
        return Ok(());
    }
    let text = |value: &String| Value::String(value.clone());
    let named = [("model", &args.model), ("save.path", &args.work_dir)];
    let named = named.into_iter().filter_map(|(key, value)| value.as_ref().map(|v| format!("{key}={}", text(v))));
    let sets: Vec<String> = named.chain(super::arch::set()).chain(args.sets.iter().cloned()).collect();
    let planned = args.plan.as_deref().map(super::plan::Planned::read).transpose()?;
    let loaded = match (&planned, args.files.is_empty()) {
        (Some(planned), true) => {
            if !sets.is_empty() {
                let message = "--plan runs the planned job as it is; give the recipe file as well to change it";
                return Err(JobError::Usage(message.to_owned()).into());
            }
            Loaded { jobs: vec![planned.job.clone()], warnings: Vec::new() }
        }
        _ => load(&args.files, &sets, args.only)?,
    };
    warn(&loaded.warnings, format);
    let chosen = chosen(&loaded.jobs, args.only)?;
    if planned.is_some() && chosen.len() > 1 {
        let count = chosen.len();
        return Err(JobError::Usage(format!("--plan is the plan of one job, here are {count}: add --only N")).into());
    }
    if args.list {
        for (number, job) in &chosen {
            let line =
                json!({"number": number, "name": job.name, "model": job.recipe.model, "output": job.recipe.work_dir});
            match format {
                Format::Json => writeln!(stdout, "{line}")?,
                _ => writeln!(stdout, "{number}\t{}\t{}", printable(&job.name), job.recipe.work_dir.display())?,
            }
        }
        return Ok(());
    }
    if args.print_recipe {
        return print_recipes(&chosen);
    }
    super::arch::of(chosen.iter().map(|(_, job)| &job.recipe))?;
    let rows = run_all(args, &chosen, planned.as_ref(), format)?;
    if chosen.len() > 1 && !args.plan_only {
        summary(&rows, format)?;
    }
    verdict(rows)
}

/// The jobs to run, with their numbers.
///
/// # Errors
/// [`JobError::Usage`] if there is no job of this number.
pub(crate) fn chosen(jobs: &[Entry], only: Option<usize>) -> Result<Vec<(usize, &Entry)>, JobError> {
    let Some(only) = only else { return Ok(jobs.iter().enumerate().collect()) };
    let count = jobs.len();
    let job = jobs.get(only).ok_or_else(|| {
        JobError::Usage(format!("--only {only}: there are {count} jobs, 0 to {}", count.saturating_sub(1)))
    })?;
    Ok(vec![(only, job)])
}

/// `recipe` as a file, on standard output.
pub(crate) fn print_recipe(recipe: &Recipe) -> anyhow::Result<()> {
    write!(std::io::stdout(), "{}", to_yaml(recipe, &[]))?;
    Ok(())
}

fn print_recipes(chosen: &[(usize, &Entry)]) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    if let [(_, job)] = chosen {
        write!(stdout, "{}", job.to_yaml())?;
        return Ok(());
    }
    writeln!(stdout, "jobs:")?;
    for (_, job) in chosen {
        for (i, line) in job.to_yaml().lines().enumerate() {
            writeln!(stdout, "{}{line}", if i == 0 { "- " } else { "  " })?;
        }
    }
    Ok(())
}

pub(crate) fn warn(warnings: &[String], format: Format) {
    for warning in warnings {
        if format == Format::Json {
            let _ = writeln!(std::io::stdout(), "{}", json!({"event": "warning", "message": warning}));
        }
        // Nowhere to report a standard error that is closed.
        let _ = writeln!(std::io::stderr(), "warning: {warning}");
    }
}

fn run_all<'j>(
    args: &RunArgs,
    chosen: &[(usize, &'j Entry)],
    planned: Option<&Planned>,
    format: Format,
) -> anyhow::Result<Vec<Row<'j>>> {
    let cancel = super::cancel_flag()?;
    let texts = TextCache::default();
    let mut rows: Vec<Row<'j>> = Vec::new();
    let mut stop = false;
    for &(number, job) in chosen {
        let start = Instant::now();
        let outcome = if stop || cancel.load(Ordering::Relaxed) {
            Outcome::NotRun
        } else {
            if chosen.len() > 1 {
                announce(number, job, chosen.len(), format);
            }
            one(args, &resumable(args, number, chosen.len(), job), planned, &texts, format)
        };
        if let Outcome::Failed { error, .. } = &outcome {
            stop |= !args.keep_going;
            if chosen.len() > 1 {
                exit::tell(error, format);
            }
        }
        rows.push(Row { number, job, outcome, seconds: start.elapsed().as_secs_f64() });
    }
    Ok(rows)
}

/// The job, with the command line that runs it again alone, for `lite resume`.
fn resumable(args: &RunArgs, number: usize, of: usize, job: &Entry) -> Entry {
    let mut job = job.clone();
    let mut command = super::resume::command();
    if of > 1 && !command.is_empty() {
        command.extend(["--only".to_owned(), number.to_string()]);
    }
    job.recipe.resume.restart = args.restart;
    job.recipe.resume.command = command;
    job
}

pub(crate) fn announce(number: usize, job: &Entry, of: usize, format: Format) {
    if format == Format::Json {
        let line = json!({"event": "job", "number": number, "jobs": of, "name": job.name, "model": job.recipe.model,
                          "output": job.recipe.work_dir});
        let _ = writeln!(std::io::stdout(), "{line}");
    } else if format != Format::Quiet {
        let _ = writeln!(std::io::stderr(), "job {number} of {of}: {}", printable(&job.name));
    }
}

/// Runs one job, then makes its plain copy, then looks at its gates.
fn one(args: &RunArgs, job: &Entry, planned: Option<&Planned>, texts: &TextCache, format: Format) -> Outcome {
    if args.skip_existing && !job.recipe.overwrite && job.recipe.work_dir.join("config.json").is_file() {
        return Outcome::Skipped;
    }
    if args.plan_only {
        return match super::plan::show(&job.recipe, format) {
            Ok(()) => Outcome::Planned,
            Err(error) => Outcome::Failed { error, report: None },
        };
    }
    if let Some(error) = planned.and_then(|planned| planned.check(&job.recipe, texts).err()) {
        return Outcome::Failed { error, report: None };
    }
    let report = match super::quantize::perform(&job.recipe, &args.report, texts, format) {
        Ok(report) => report,
        Err(error) => return Outcome::Failed { error, report: None },
    };
    match plain_copy(job, !args.report.no_report, format).and_then(|()| judge(job, &report, format)) {
        Ok(()) => Outcome::Done(Box::new(report)),
        Err(error) => Outcome::Failed { error, report: Some(Box::new(report)) },
    }
}

/// The same weights as plain floats, where the job asks for them.
fn plain_copy(job: &Entry, card: bool, format: Format) -> anyhow::Result<()> {
    let Some(folder) = &job.plain else { return Ok(()) };
    let recipe = lite_convert::Recipe {
        model: job.recipe.work_dir.to_string_lossy().into_owned(),
        revision: None,
        download_dir: None,
        work_dir: folder.clone(),
        overwrite: job.recipe.overwrite,
        layout: Some(lite_convert::PLAIN.to_owned()),
        target: None,
        tensor_parallel: 1,
        requantize: false,
        dtype: None,
        max_shard_bytes: job.recipe.max_shard_bytes,
    };
    let report = super::convert::perform(&recipe, card, format)?;
    match format {
        Format::Json => {
            let line =
                json!({"event": "plain", "schema": 1, "output": report.output, "output_bytes": report.output_bytes});
            writeln!(std::io::stdout(), "{line}")?;
        }
        Format::Quiet => writeln!(std::io::stdout(), "{}", report.output.display())?,
        Format::Auto | Format::Human => writeln!(std::io::stdout(), "{}\n  plain floats", report.output.display())?,
    }
    Ok(())
}

/// The key of a gate in recipes.
fn key(gate: Gate) -> &'static str {
    match gate {
        Gate::MaxKl(_) => "max_kl",
        Gate::MaxPerplexityRatio(_) => "max_ppl_ratio",
        Gate::MinTop1(_) => "min_top1",
    }
}

/// Compares what the run measured with the job's gates.
fn judge(job: &Entry, report: &RunReport, format: Format) -> anyhow::Result<()> {
    if job.gates.is_empty() {
        return Ok(());
    }
    let Some(comparison) = &report.check.comparison else {
        let message = format!(
            "`{}` has limits under `eval`, and nothing was measured: its decoder is not known here; the checkpoint is in `{}`",
            printable(&job.name),
            report.output.display()
        );
        return Err(JobError::Verification(message).into());
    };
    let s = &comparison.summary;
    let measured = Measured {
        kl: s.kl_mean,
        perplexity_ratio: s.perplexity_quantized / s.perplexity_original,
        top1: s.top1 * 100.0,
    };
    let results: Vec<_> = job.gates.iter().map(|gate| gate.judge(measured)).collect();
    let mut stdout = std::io::stdout().lock();
    match format {
        Format::Json => {
            let gates: Vec<Value> = results
                .iter()
                .map(|r| json!({"gate": key(r.gate), "limit": r.gate.limit(), "measured": r.measured, "passed": r.passed}))
                .collect();
            writeln!(stdout, "{}", json!({"event": "gates", "schema": 1, "name": job.name, "gates": gates}))?;
        }
        Format::Quiet => {}
        Format::Auto | Format::Human => {
            for r in &results {
                let word = if r.passed { "kept" } else { "MISSED" };
                writeln!(stdout, "  limit         {} {}: {:.6}, {word}", key(r.gate), r.gate.limit(), r.measured)?;
            }
        }
    }
    let missed: Vec<String> = results
        .iter()
        .filter(|r| !r.passed)
        .map(|r| format!("{} is {:.6}, limit {}", key(r.gate), r.measured, r.gate.limit()))
        .collect();
    if missed.is_empty() {
        return Ok(());
    }
    let message = format!(
        "`{}` is not as good as it has to be: {}; the checkpoint is in `{}`",
        printable(&job.name),
        missed.join(", "),
        report.output.display()
    );
    Err(JobError::Verification(message).into())
}
