//! `lite run`: jobs from recipe files, one after the other.

use std::fmt;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Instant;

use clap::Args;
use lite_job::{ErrorKind, JobError, Recipe, RunReport};
use lite_model::printable;
use lite_recipe::{Entry, json_schema, load, to_yaml};
use lite_runtime::eval::{Gate, Measured};
use serde_json::{Value, json};

use crate::args::Format;
use crate::exit;
use crate::output::duration;
use crate::progress::Progress;

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Recipes: lite's own YAML, a config of LLMC, or a recipe.yaml of llm-compressor; paths in them are relative to the
    /// current folder
    #[arg(value_name = "FILE", required_unless_present = "print_schema")]
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

    /// Go on after a job that failed; the exit code is the largest of all jobs
    #[arg(long)]
    pub(crate) keep_going: bool,

    /// Pass over jobs whose folder already holds a finished checkpoint
    #[arg(long)]
    pub(crate) skip_existing: bool,

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
}

/// Some jobs of several did not do what they were to do.
#[derive(Debug)]
pub(crate) struct BatchFailed {
    /// The kind with the largest exit code.
    pub(crate) kind: ErrorKind,
    message: String,
}

impl fmt::Display for BatchFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for BatchFailed {}

/// What became of a job.
enum Outcome {
    Done(Box<RunReport>),
    Planned,
    Skipped,
    Failed { error: anyhow::Error, report: Option<Box<RunReport>> },
    NotRun,
}

struct Row<'j> {
    number: usize,
    job: &'j Entry,
    outcome: Outcome,
    seconds: f64,
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
    let sets: Vec<String> = named.chain(args.sets.iter().cloned()).collect();
    let loaded = load(&args.files, &sets)?;
    warn(&loaded.warnings, format);
    let count = loaded.jobs.len();
    let chosen: Vec<(usize, &Entry)> = match args.only {
        None => loaded.jobs.iter().enumerate().collect(),
        Some(only) => match loaded.jobs.get(only) {
            Some(job) => vec![(only, job)],
            None => {
                return Err(JobError::Usage(format!("--only {only}: there are {count} jobs, 0 to {}", count - 1)).into());
            }
        },
    };
    if args.list {
        for (number, job) in &chosen {
            let line = json!({"number": number, "name": job.name, "model": job.recipe.model, "output": job.recipe.work_dir});
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
    let rows = run_all(args, &chosen, format)?;
    if chosen.len() > 1 && !args.plan_only {
        summary(&rows, format)?;
    }
    verdict(rows)
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

fn warn(warnings: &[String], format: Format) {
    for warning in warnings {
        if format == Format::Json {
            let _ = writeln!(std::io::stdout(), "{}", json!({"event": "warning", "message": warning}));
        }
        // Nowhere to report a standard error that is closed.
        let _ = writeln!(std::io::stderr(), "warning: {warning}");
    }
}

fn run_all<'j>(args: &RunArgs, chosen: &[(usize, &'j Entry)], format: Format) -> anyhow::Result<Vec<Row<'j>>> {
    let cancel = super::cancel_flag()?;
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
            one(args, job, format)
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

fn announce(number: usize, job: &Entry, of: usize, format: Format) {
    if format == Format::Json {
        let line = json!({"event": "job", "number": number, "jobs": of, "name": job.name, "model": job.recipe.model,
                          "output": job.recipe.work_dir});
        let _ = writeln!(std::io::stdout(), "{line}");
    } else if format != Format::Quiet {
        let _ = writeln!(std::io::stderr(), "job {number} of {of}: {}", printable(&job.name));
    }
}

/// Runs one job, then makes its plain copy, then looks at its gates.
fn one(args: &RunArgs, job: &Entry, format: Format) -> Outcome {
    if args.skip_existing && !job.recipe.overwrite && job.recipe.work_dir.join("config.json").is_file() {
        return Outcome::Skipped;
    }
    if args.plan_only {
        return match super::plan::show(&job.recipe, format) {
            Ok(()) => Outcome::Planned,
            Err(error) => Outcome::Failed { error, report: None },
        };
    }
    let report = match super::quantize::perform(&job.recipe, format) {
        Ok(report) => report,
        Err(error) => return Outcome::Failed { error, report: None },
    };
    match plain_copy(job, format).and_then(|()| judge(job, &report, format)) {
        Ok(()) => Outcome::Done(Box::new(report)),
        Err(error) => Outcome::Failed { error, report: Some(Box::new(report)) },
    }
}

/// The same weights as plain floats, where the job asks for them.
fn plain_copy(job: &Entry, format: Format) -> anyhow::Result<()> {
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
    let cancel = super::cancel_flag()?;
    let progress = Progress::new(format);
    let report = lite_convert::convert(&recipe, &progress, &cancel)?;
    drop(progress);
    match format {
        Format::Json => {
            let line = json!({"event": "plain", "schema": 1, "output": report.output, "output_bytes": report.output_bytes});
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

/// One line for each job.
fn summary(rows: &[Row<'_>], format: Format) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    let kl = |report: &RunReport| report.check.comparison.as_ref().map(|c| c.summary.kl_mean);
    if format == Format::Json {
        let jobs: Vec<Value> = rows
            .iter()
            .map(|row| {
                let (status, code, report) = status(&row.outcome);
                json!({"number": row.number, "name": row.job.name, "status": status, "code": code, "output": row.job.recipe.work_dir,
                       "kl_mean": report.and_then(kl), "bits_per_weight": report.map(|r| r.bits_per_weight),
                       "output_bytes": report.map(|r| r.output_bytes), "seconds": row.seconds})
            })
            .collect();
        writeln!(stdout, "{}", json!({"event": "batch", "schema": 1, "jobs": jobs}))?;
        return Ok(());
    }
    if format == Format::Quiet {
        return Ok(());
    }
    let width = rows.iter().map(|row| printable(&row.job.name).chars().count()).max().unwrap_or(0).max(3);
    writeln!(stdout, "\n  {:>3}  {:<width$}  {:<18} {:>9} {:>10} {:>12}", "", "job", "", "bits", "mean KL", "took")?;
    for row in rows {
        let (word, _, report) = status(&row.outcome);
        let bits = report.map_or(String::new(), |r| format!("{:.2}", r.bits_per_weight));
        let kl = report.and_then(kl).map_or(String::new(), |kl| format!("{kl:.6}"));
        let name = printable(&row.job.name);
        let took = if matches!(row.outcome, Outcome::NotRun) { String::new() } else { duration(row.seconds) };
        writeln!(stdout, "  {:>3}  {name:<width$}  {word:<18} {bits:>9} {kl:>10} {took:>12}", row.number)?;
    }
    Ok(())
}

fn status(outcome: &Outcome) -> (&'static str, u8, Option<&RunReport>) {
    match outcome {
        Outcome::Done(report) => ("done", 0, Some(report)),
        Outcome::Planned => ("planned", 0, None),
        Outcome::Skipped => ("already there", 0, None),
        Outcome::NotRun => ("not run", 0, None),
        Outcome::Failed { error, report } => {
            let (code, name) = exit::code(exit::kind(error));
            (name, code, report.as_deref())
        }
    }
}

/// The failure of the whole: of a single job its own, of several the worst.
fn verdict(rows: Vec<Row<'_>>) -> anyhow::Result<()> {
    let count = rows.len();
    let unrun = rows.iter().filter(|row| matches!(row.outcome, Outcome::NotRun)).count();
    let mut failed: Vec<(String, anyhow::Error)> = Vec::new();
    for row in rows {
        if let Outcome::Failed { error, .. } = row.outcome {
            failed.push((row.job.name.clone(), error));
        }
    }
    if count == 1 {
        return failed.pop().map_or(Ok(()), |(_, error)| Err(error));
    }
    let Some(kind) = failed.iter().map(|(_, error)| exit::kind(error)).max_by_key(|kind| exit::code(*kind).0) else {
        return Ok(());
    };
    let names: Vec<String> = failed.iter().map(|(name, _)| format!("`{}`", printable(name))).collect();
    let rest = match unrun {
        0 => String::new(),
        unrun => format!(", {unrun} not run (--keep-going goes on after a failure)"),
    };
    Err(BatchFailed { kind, message: format!("{} of {count} jobs failed: {}{rest}", failed.len(), names.join(", ")) }.into())
}
