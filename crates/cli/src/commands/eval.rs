//! `lite eval`: perplexity, divergence from the original, tasks, greedy continuations, gates.

mod measure;
mod report;

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};
use lite_calib::TaskName;
use lite_job::{Event, JobError, Observer, Recipe, locate_model, open_device};
use lite_runtime::RuntimeError;
use lite_runtime::eval::{EvalModel, Gate, Measured};
use lite_runtime::generate::KvPrecision;

use crate::args::{Format, bytes};
use crate::progress::Progress;

#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    /// The checkpoint to judge, quantized or not: a folder or a hub id
    #[arg(value_name = "DIR")]
    pub(crate) model: String,

    /// The model it was made from: adds KL divergence, top-1 agreement, the ratio of perplexities, errors by layer
    #[arg(long, value_name = "ORIGINAL")]
    pub(crate) against: Option<String>,

    /// Text of the perplexity: wikitext2, ptb, c4 (their test or validation split), builtin (held-out text inside this
    /// program), or a path [default: wikitext2; none if only tasks are asked for]
    #[arg(long, value_name = "NAME|PATH")]
    pub(crate) dataset: Option<String>,

    /// Tokens per window; windows do not overlap
    #[arg(long, default_value_t = 2048, value_name = "TOKENS")]
    pub(crate) seqlen: usize,

    /// At most this many windows [default: all of the text; 256 of c4]
    #[arg(long, value_name = "N")]
    pub(crate) windows: Option<usize>,

    /// Fail (exit code 6) if the mean KL divergence from ORIGINAL is larger, in nats
    #[arg(long, value_name = "NATS", value_parser = limit)]
    pub(crate) max_kl: Option<f64>,

    /// Fail if the perplexity is more than this times ORIGINAL's
    #[arg(long, value_name = "RATIO", value_parser = limit)]
    pub(crate) max_ppl_ratio: Option<f64>,

    /// Fail if both models rank the same token first on fewer of the tokens, in percent
    #[arg(long, value_name = "PERCENT", value_parser = limit)]
    pub(crate) min_top1: Option<f64>,

    /// Multiple-choice tasks, scored as lm-evaluation-harness does: hellaswag, mmlu, arc_challenge, arc_easy, winogrande,
    /// piqa
    #[arg(long, value_delimiter = ',', value_name = "TASKS", requires = "task_data")]
    pub(crate) tasks: Vec<String>,

    /// Folder with the tasks' files: NAME.jsonl, NAME.parquet, or NAME/ with the hub's files of the scored split
    #[arg(long, value_name = "DIR")]
    pub(crate) task_data: Option<PathBuf>,

    /// Only the first N questions of each task (of each subject of mmlu)
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<usize>,

    /// Answered questions before each question; mmlu only
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) num_fewshot: usize,

    /// Precision of the checkpoint's key/value cache, as LMDeploy's engines round it online; 16 is what the checkpoint
    /// says
    #[arg(long, value_enum, default_value_t = KvBits::B16, value_name = "BITS")]
    pub(crate) kv_bits: KvBits,

    /// Greedy continuations of this many prompts from the text by both models, side by side; both are held in memory,
    /// one after the other [default: 3 with --against where they fit]
    #[arg(long, value_name = "PROMPTS")]
    pub(crate) canary: Option<usize>,

    /// Where the blocks run: `cpu`, `cuda`, `cuda:N`, or `auto` for a GPU if there is one that works [default: auto]
    #[arg(long, value_parser = crate::args::device, value_name = "DEVICE")]
    pub(crate) device: Option<lite_job::DeviceChoice>,

    /// Memory budget, such as 16GB; more than that is refused before the run
    #[arg(long, value_parser = bytes, value_name = "SIZE")]
    pub(crate) max_memory: Option<u64>,

    /// Branch, tag or commit of a hub model
    #[arg(long, value_name = "REV")]
    pub(crate) revision: Option<String>,

    /// Where hub files are kept [default: the Hugging Face cache]
    #[arg(long, value_name = "DIR")]
    pub(crate) download_dir: Option<PathBuf>,
}

/// `--kv-bits`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvBits {
    /// Not rounded, unless the checkpoint says so
    #[value(name = "16")]
    B16,
    /// Integers of 8 bits, asymmetric, per token and head
    #[value(name = "8")]
    B8,
    /// Integers of 4 bits
    #[value(name = "4")]
    B4,
    /// fp8 e4m3, with the checkpoint's scales or 1
    Fp8,
}

impl KvBits {
    /// As typed.
    fn name(self) -> &'static str {
        match self {
            Self::B16 => "16",
            Self::B8 => "8",
            Self::B4 => "4",
            Self::Fp8 => "fp8",
        }
    }
}

/// A limit of a gate: a finite number, not negative.
fn limit(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err(format!("`{text}` is no limit; give a number such as 0.02")),
    }
}

impl EvalArgs {
    fn gates(&self) -> Vec<Gate> {
        let gates = [
            self.max_kl.map(Gate::MaxKl),
            self.max_ppl_ratio.map(Gate::MaxPerplexityRatio),
            self.min_top1.map(Gate::MinTop1),
        ];
        gates.into_iter().flatten().collect()
    }

    /// Whether perplexity is measured: unless tasks, and nothing else, are asked for.
    fn wants_text(&self) -> bool {
        self.tasks.is_empty()
            || self.dataset.is_some()
            || !self.gates().is_empty()
            || self.canary.is_some_and(|n| n > 0)
    }

    fn check(&self) -> Result<Vec<TaskName>, JobError> {
        let usage = |text: String| Err(JobError::Usage(text));
        if self.against.is_none() {
            if let Some(gate) = self.gates().first() {
                return usage(format!("{} compares with the original: give it with --against", gate.flag()));
            }
            if self.canary.is_some_and(|prompts| prompts > 0) {
                return usage("--canary compares with the original: give it with --against".to_owned());
            }
        }
        if self.min_top1.is_some_and(|percent| percent > 100.0) {
            return usage("--min-top1 is in percent, at most 100".to_owned());
        }
        if self.seqlen < 8 {
            return usage(format!("--seqlen {}: a window needs at least 8 tokens", self.seqlen));
        }
        if self.windows == Some(0) || self.limit == Some(0) {
            return usage(
                "--windows 0 or --limit 0 would measure nothing; give at least 1, or leave it out".to_owned(),
            );
        }
        let known = || TaskName::ALL.map(TaskName::name).join(", ");
        let find = |name: &String| {
            TaskName::from_name(name)
                .ok_or_else(|| JobError::Usage(format!("--tasks: `{name}` is none of {}", known())))
        };
        self.tasks.iter().map(find).collect()
    }
}

/// Judges, prints the result, and fails if a gate does.
pub(crate) fn run(args: &EvalArgs, format: Format) -> anyhow::Result<()> {
    let start = Instant::now();
    let tasks = args.check()?;
    let cancel = super::cancel_flag()?;
    let progress = Progress::new(format);
    let (compute, on) = open_device(args.device)?;
    if let Some(on) = on {
        note(&progress, &on);
    }
    let locate = |model: &str| {
        let recipe = Recipe {
            revision: args.revision.clone(),
            download_dir: args.download_dir.clone(),
            ..Recipe::new(model.to_owned())
        };
        locate_model(&recipe, &progress, &cancel)
    };
    let dir = locate(&args.model)?;
    let against = args.against.as_deref().map(locate).transpose()?;
    let failed = |error: RuntimeError| failure(error, &dir);
    let model = EvalModel::open(&dir).map_err(failed)?;
    let original = against.as_deref().map(EvalModel::open).transpose().map_err(failed)?;
    let session =
        measure::Session { args, dir: &dir, against: against.as_deref(), model, original, compute, progress, cancel };
    let mut result = session.measure(&tasks)?;
    drop(session);
    if let Some(comparison) = &result.comparison {
        let measured = Measured::from(&comparison.summary);
        result.gates = args.gates().into_iter().map(|gate| gate.judge(measured)).collect();
    }
    result.seconds = start.elapsed().as_secs_f64();
    let mut stdout = std::io::stdout().lock();
    match format {
        Format::Json => writeln!(stdout, "{}", report::json(&result))?,
        Format::Quiet => {}
        Format::Auto | Format::Human => report::text(&mut stdout, &result)?,
    }
    let broken: Vec<&str> = result.gates.iter().filter(|g| !g.passed).map(|g| g.gate.flag()).collect();
    if !broken.is_empty() {
        return Err(JobError::Verification(format!("the checkpoint does not keep {}", broken.join(", "))).into());
    }
    Ok(())
}

/// What the flag makes of keys and values.
fn kv_transform(bits: KvBits) -> Option<KvPrecision> {
    match bits {
        KvBits::B16 => None,
        KvBits::B8 => Some(KvPrecision::Int8),
        KvBits::B4 => Some(KvPrecision::Int4),
        KvBits::Fp8 => Some(KvPrecision::Fp8),
    }
}

/// A failure of the forward pass, with the class it has here: what is measured is the input.
fn failure(error: RuntimeError, dir: &std::path::Path) -> JobError {
    match error {
        RuntimeError::Model(error) => error.into(),
        RuntimeError::Decoder(error) => error.into(),
        RuntimeError::Pack(error) => error.into(),
        RuntimeError::Interrupted => JobError::Interrupted(dir.to_owned()),
        other => JobError::Input(other.to_string()),
    }
}

/// Sends a note.
fn note(progress: &Progress, text: &str) {
    progress.event(Event::Note(text));
}
