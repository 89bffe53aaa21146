//! `lite verify`.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use clap::Args;
use lite_calib::{ModelTokenizer, held_out};
use lite_decoder::DecoderSpec;
use lite_job::{Event, JobError, Observer, Recipe, locate_model, open_device};
use lite_model::{Checkpoint, printable};
use lite_pack::targets::Target;
use lite_runtime::RuntimeError;
use lite_runtime::verify::{Finding, FindingSeverity, Verification, VerifyOptions, verify};
use serde_json::json;

use crate::args::Format;
use crate::progress::Progress;

/// Places of findings of one kind that text lists.
const SHOWN: usize = 3;
/// Windows where nobody says how many.
const USUAL_WINDOWS: usize = 4;
/// Tokens per window.
const SEQLEN: usize = 256;

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// The checkpoint to judge, whoever wrote it: a folder or a hub id
    #[arg(value_name = "DIR")]
    pub(crate) model: String,

    /// The model it was made from: compares every tensor, and runs both on held-out text
    #[arg(long, value_name = "ORIGINAL")]
    pub(crate) against: Option<String>,

    /// Engine that must load it: `vllm`, `turbomind`, `lmdeploy-pytorch` or `transformers`; repeatable
    #[arg(long, value_name = "ENGINE")]
    pub(crate) target: Vec<String>,

    /// Tensor-parallel degree that the targets will use
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) tp: usize,

    /// Windows of 256 tokens that both models are run on; 0 compares the weights only [default: 4 with --against]
    #[arg(long, value_name = "N")]
    pub(crate) windows: Option<usize>,

    /// Where the blocks run: `cpu`, `cuda`, `cuda:N`, or `auto` for a GPU if there is one that works [default: auto]
    #[arg(long, value_parser = crate::args::device, value_name = "DEVICE")]
    pub(crate) device: Option<lite_job::DeviceChoice>,

    /// Configs and headers only: no values are read
    #[arg(long)]
    pub(crate) quick: bool,

    /// Branch, tag or commit of a hub model
    #[arg(long, value_name = "REV")]
    pub(crate) revision: Option<String>,

    /// Where hub files are kept [default: the Hugging Face cache]
    #[arg(long, value_name = "DIR")]
    pub(crate) download_dir: Option<PathBuf>,
}

impl VerifyArgs {
    fn targets(&self) -> Result<Vec<Target>, JobError> {
        let usage = |text: String| Err(JobError::Usage(text));
        if self.tp == 0 {
            return usage("--tp 0: give at least one rank".to_owned());
        }
        match (&self.against, self.quick, self.windows) {
            (None, _, Some(1..)) => {
                return usage("--windows runs both models: give the original with --against".to_owned());
            }
            (_, true, Some(1..)) => {
                return usage("--windows runs both models, --quick reads no values: drop one".to_owned());
            }
            _ => {}
        }
        let known = Target::ALL.map(Target::name).join(", ");
        let find = |name: &String| {
            Target::from_name(name).ok_or_else(|| JobError::Usage(format!("--target: `{name}` is none of {known}")))
        };
        self.target.iter().map(find).collect()
    }

    fn windows(&self) -> usize {
        self.windows.unwrap_or(if self.against.is_some() && !self.quick { USUAL_WINDOWS } else { 0 })
    }
}

/// Judges, prints the findings, and fails if one is an error.
pub(crate) fn run(args: &VerifyArgs, format: Format) -> anyhow::Result<()> {
    let targets = args.targets()?;
    let cancel = super::cancel_flag()?;
    let progress = Progress::new(format);
    let (compute, on) = open_device(args.device)?;
    if let Some(on) = on {
        progress.event(Event::Note(&on));
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
    let windows = match &against {
        Some(original) if args.windows() > 0 => windows(original, args.windows(), &progress),
        _ => Vec::new(),
    };
    let options = VerifyOptions {
        against: against.as_deref(),
        targets: &targets,
        tp: args.tp,
        windows: &windows,
        quick: args.quick,
        compute: Some(&compute),
    };
    let go_on = |step: &'static str, done: usize, of: usize| {
        progress.event(Event::Checking { step, done, of });
        !cancel.load(Ordering::Relaxed)
    };
    let found = verify(&dir, &options, &go_on).map_err(|error| failure(error, &dir))?;
    drop(progress);
    let mut stdout = io::stdout().lock();
    match format {
        Format::Json => writeln!(stdout, "{}", as_json(&args.model, &found)?)?,
        Format::Quiet => writeln!(stdout, "{}", if found.passed() { "passed" } else { "failed" })?,
        Format::Auto | Format::Human => print(&mut stdout, &args.model, against.is_some(), &found)?,
    }
    let errors = found.count(FindingSeverity::Error);
    if !found.opened {
        let reason = found.findings.first().map_or("", |finding| finding.message.as_str());
        return Err(JobError::Input(reason.to_owned()).into());
    }
    if errors > 0 {
        return Err(JobError::Verification(format!("verify found {}", counted(errors, "error"))).into());
    }
    Ok(())
}

/// Held-out text in the original's own tokens; without it nothing is run, which is said.
fn windows(original: &Path, count: usize, progress: &Progress) -> Vec<Vec<u32>> {
    // A model whose decoder is not known is not run.
    let spec = Checkpoint::open(original).ok().and_then(|original| DecoderSpec::of(&original).ok());
    let vocab = spec.as_ref().map_or(usize::MAX, |spec| spec.vocab);
    let seqlen = SEQLEN.min(spec.map_or(SEQLEN, |spec| spec.max_positions)).max(8);
    let found = ModelTokenizer::from_dir(original, vocab).and_then(|tokenizer| held_out(&tokenizer, count, seqlen));
    match found {
        Ok(windows) => windows.tokens,
        Err(error) => {
            progress.event(Event::Warning(&format!("the models are not run side by side: {error}")));
            Vec::new()
        }
    }
}

/// A failure that is no finding.
fn failure(error: RuntimeError, dir: &Path) -> JobError {
    match error {
        RuntimeError::Model(error) => error.into(),
        RuntimeError::Decoder(error) => error.into(),
        RuntimeError::Pack(error) => error.into(),
        RuntimeError::Interrupted => JobError::Interrupted(dir.to_owned()),
        other => JobError::Input(other.to_string()),
    }
}

fn as_json(model: &str, found: &Verification) -> serde_json::Result<String> {
    let comparison = found.comparison.as_ref().map(|comparison| {
        let layers: Vec<_> = comparison
            .layers
            .iter()
            .map(|layer| json!({"block": layer.block, "own": layer.own, "accumulated": layer.accumulated}))
            .collect();
        json!({"windows": comparison.windows, "seqlen": comparison.seqlen, "mean_kl": comparison.summary.kl_mean,
               "top1": comparison.summary.top1, "perplexity_original": comparison.summary.perplexity_original,
               "perplexity": comparison.summary.perplexity_quantized, "layers": layers})
    });
    let value = json!({"event": "verification", "schema": 1, "model": model,
        "verdict": if found.passed() { "passed" } else { "failed" }, "opened": found.opened, "layout": found.layout,
        "errors": found.count(FindingSeverity::Error), "warnings": found.count(FindingSeverity::Warning),
        "notes": found.count(FindingSeverity::Note), "packed_linears": found.linears, "plain_tensors": found.plain,
        "compared_linears": found.compared, "findings": serde_json::to_value(&found.findings)?, "comparison": comparison});
    serde_json::to_string(&value)
}

/// Findings of one code and severity.
struct Group<'f> {
    first: &'f Finding,
    places: Vec<&'f str>,
}

/// `1 error`, `2 errors`.
fn counted(count: usize, word: &str) -> String {
    format!("{count} {word}{}", if count == 1 { "" } else { "s" })
}

fn print(out: &mut impl Write, model: &str, against: bool, found: &Verification) -> io::Result<()> {
    writeln!(out, "{}", printable(model))?;
    let mut groups: BTreeMap<(FindingSeverity, &str), Group<'_>> = BTreeMap::new();
    for finding in &found.findings {
        let group = groups
            .entry((finding.severity, finding.code))
            .or_insert_with(|| Group { first: finding, places: Vec::new() });
        group.places.push(finding.place.as_deref().unwrap_or(""));
    }
    for ((severity, code), group) in &groups {
        let word = match severity {
            FindingSeverity::Error => "error",
            FindingSeverity::Warning => "warning",
            FindingSeverity::Note => "note",
        };
        let place = group.places.first().filter(|place| !place.is_empty());
        let place = place.map_or_else(String::new, |place| format!("{}: ", printable(place)));
        writeln!(out, "  {word:<8} {code:<20} {place}{}", group.first.message)?;
        if group.places.len() > 1 {
            let others: Vec<String> = group.places[1..].iter().take(SHOWN).map(|place| printable(place)).collect();
            let more = group.places.len() - 1 - others.len();
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            writeln!(out, "  {:<29} and {}{more}", "", others.join(", "))?;
        }
    }
    if let Some(layout) = found.layout {
        let compared = match against {
            true => format!("{} linears compared with the original's", found.compared),
            false => "nothing compared: --against ORIGINAL finds more".to_owned(),
        };
        writeln!(
            out,
            "  layout {layout}, {} packed linears and {} plain tensors judged, {compared}",
            found.linears, found.plain
        )?;
    }
    if let Some(comparison) = &found.comparison {
        let worst = comparison.layers.iter().max_by(|a, b| a.own.total_cmp(&b.own));
        let worst = worst.map_or(String::new(), |layer| {
            format!(", error of a block's own output at most {:.4} of it (block {})", layer.own, layer.block)
        });
        writeln!(
            out,
            "  both models on {} windows of {} tokens: mean KL {:.6} nats, same top-1 {:.2} %{worst}",
            comparison.windows,
            comparison.seqlen,
            comparison.summary.kl_mean,
            100.0 * comparison.summary.top1
        )?;
    }
    let count = |severity, word: &str| counted(found.count(severity), word);
    writeln!(
        out,
        "{}: {}, {}, {}",
        if found.passed() { "passed" } else { "failed" },
        count(FindingSeverity::Error, "error"),
        count(FindingSeverity::Warning, "warning"),
        count(FindingSeverity::Note, "note")
    )
}
