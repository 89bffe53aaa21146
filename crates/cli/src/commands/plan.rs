//! `lite plan`, and the plan files that `lite run --plan` holds a run to.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, Parser};
use lite_job::{JobError, Recipe, TextCache, WorkDir, locate_model, measured_gemm_rate, planned_identity, prepare};
use lite_job::{Silent, same_identity};
use lite_model::{Checkpoint, atomic_write};
use lite_recipe::{Entry, load, load_text, to_yaml};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::{Cli, Command, Format, MethodName, QuantizeArgs};
use crate::output;
use crate::progress::Progress;

/// Version of plan files.
const FORMAT: u32 = 1;
/// Longest plan file that is read, bytes.
const LONGEST: u64 = 256 << 20;

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    /// The method to plan; a recipe file in the model's place names its own
    #[arg(long, value_enum, default_value_t = MethodName::Awq)]
    pub(crate) method: MethodName,

    /// Write the plan to this file too, for `lite run --plan`; the calibration text is read for it
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,

    /// Put a value into the jobs of a recipe file, as `lite run --set` does; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) sets: Vec<String>,

    /// Plan only job number N of a recipe file, from 0
    #[arg(long, value_name = "N")]
    pub(crate) only: Option<usize>,

    #[command(flatten)]
    pub(crate) args: QuantizeArgs,
}

/// What `--out` writes.
#[derive(Debug, Serialize, Deserialize)]
struct PlanFile {
    format: u32,
    /// The recipe, as `lite run` reads it.
    recipe: String,
    /// Everything the result depends on, by name.
    identity: BTreeMap<String, String>,
    /// As `lite plan --format json` prints it.
    plan: Value,
}

/// Prints what a run would do; writes nothing (a hub model is downloaded, for its headers are needed).
pub(crate) fn run(args: &PlanArgs, format: Format) -> anyhow::Result<()> {
    if !is_recipe(Path::new(&args.args.model)) {
        if !args.sets.is_empty() || args.only.is_some() {
            return Err(JobError::Usage("--set and --only are for recipe files; use the flags here".to_owned()).into());
        }
        let recipe = super::quantize::recipe(args.method, &args.args)?;
        return match (args.args.print_recipe, &args.out) {
            (true, _) => super::run::print_recipe(&recipe),
            (false, None) => show(&recipe, format),
            (false, Some(out)) => show(&recipe, format).and_then(|()| write(&recipe, to_yaml(&recipe, &[]), out)),
        };
    }
    refuse_flags(args)?;
    let sets: Vec<String> = super::arch::set().into_iter().chain(args.sets.iter().cloned()).collect();
    let loaded = load(&[PathBuf::from(&args.args.model)], &sets, args.only)?;
    super::run::warn(&loaded.warnings, format);
    let chosen = super::run::chosen(&loaded.jobs, args.only)?;
    if let (Some(_), true) = (&args.out, chosen.len() > 1) {
        let count = chosen.len();
        return Err(JobError::Usage(format!("--out takes the plan of one job, here are {count}: add --only N")).into());
    }
    super::arch::of(chosen.iter().map(|(_, job)| &job.recipe))?;
    for (number, job) in &chosen {
        if chosen.len() > 1 {
            super::run::announce(*number, job, loaded.jobs.len(), format);
        }
        show(&job.recipe, format)?;
        if let Some(out) = &args.out {
            write(&job.recipe, job.to_yaml(), out)?;
        }
    }
    Ok(())
}

/// Whether what stands in the model's place is a recipe file.
fn is_recipe(path: &Path) -> bool {
    path.extension().is_some_and(|end| end == "yaml" || end == "yml") && !path.is_dir()
}

/// A recipe file says everything itself: flags beside it would be lost without a word.
fn refuse_flags(args: &PlanArgs) -> Result<(), JobError> {
    let bare = Cli::try_parse_from(["lite", "plan", "--", &args.args.model]);
    let same = match bare.map(|cli| cli.command) {
        Ok(Command::Plan(bare)) => {
            bare.method == args.method && format!("{:?}", bare.args) == format!("{:?}", args.args)
        }
        _ => false,
    };
    if same {
        return Ok(());
    }
    Err(JobError::Usage("flags that set up a run are not for recipe files: use --set KEY=VALUE".to_owned()))
}

/// Prints what a recipe would do; writes nothing.
pub(crate) fn show(recipe: &Recipe, format: Format) -> anyhow::Result<()> {
    let cancel = super::cancel_flag()?;
    let progress = Progress::new(format);
    WorkDir::check_named(recipe)?;
    let model = locate_model(recipe, &progress, &cancel)?;
    drop(progress);
    let checkpoint = Checkpoint::open(&model).map_err(JobError::from)?;
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

/// The identity of a run, and its plan.
fn identify(recipe: &Recipe, texts: &TextCache) -> anyhow::Result<(BTreeMap<String, String>, Value)> {
    let cancel = super::cancel_flag()?;
    let model = locate_model(recipe, &Silent, &cancel)?;
    let checkpoint = Checkpoint::open(&model).map_err(JobError::from)?;
    let plan = prepare(recipe, &checkpoint)?;
    Ok((planned_identity(recipe, &plan, &checkpoint, texts, &Silent, &cancel)?, output::plan_json(&plan)))
}

fn write(recipe: &Recipe, text: String, out: &Path) -> anyhow::Result<()> {
    let (identity, plan) = identify(recipe, &TextCache::default())?;
    let file = PlanFile { format: FORMAT, recipe: text, identity, plan };
    let text = format!("{}\n", serde_json::to_string_pretty(&file)?);
    Ok(atomic_write(out, text.as_bytes()).map_err(JobError::from)?)
}

/// A plan that `lite plan --out` wrote.
pub(crate) struct Planned {
    identity: BTreeMap<String, String>,
    /// The job that was planned.
    pub(crate) job: Entry,
}

impl Planned {
    /// Reads a plan file.
    ///
    /// # Errors
    /// [`JobError::Input`] for what is no such file; I/O errors.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let wrong = |why: String| {
            JobError::Input(format!("`{}` is no plan of `lite plan --out`: {why}", lite_model::printable_path(path)))
        };
        let io = |source| JobError::Io { what: "read the plan", path: path.to_owned(), source };
        let length = std::fs::metadata(path).map_err(io)?.len();
        if length > LONGEST {
            return Err(wrong(format!("it has {length} bytes")).into());
        }
        let text = std::fs::read_to_string(path).map_err(io)?;
        let file: PlanFile = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        if file.format != FORMAT {
            return Err(wrong(format!("its format is {}, this version reads {FORMAT}; plan again", file.format)).into());
        }
        let mut jobs = load_text(file.recipe, path)?.jobs;
        match (jobs.pop(), jobs.is_empty()) {
            (Some(job), true) => Ok(Self { identity: file.identity, job }),
            _ => Err(wrong("it does not hold one job".to_owned()).into()),
        }
    }

    /// Whether `recipe` still gives what was planned.
    ///
    /// # Errors
    /// [`JobError::State`] naming every difference.
    pub(crate) fn check(&self, recipe: &Recipe, texts: &TextCache) -> anyhow::Result<()> {
        let (found, _) = identify(recipe, texts)?;
        Ok(same_identity(&self.identity, &found)?)
    }
}
