//! `lite convert`.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use lite_convert::{ConvertReport, Converted, Recipe, convert_with};
use lite_job::JobError;
use lite_model::printable;
use lite_pack::targets::Target;
use lite_report::{Conversion, SourceCard, conversion_card};

use crate::args::{Dtype, Format, bytes};
use crate::output::{duration, size};
use crate::progress::Progress;

/// Rounded linears that are listed.
const SHOWN: usize = 5;

#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// A quantized checkpoint (config.json and safetensors), or a hub id
    pub(crate) model: String,

    /// Where the result appears
    #[arg(long, default_value = "./work_dir", value_name = "DIR")]
    pub(crate) work_dir: PathBuf,

    /// Layout to write: `awq`, `gptq`, `compressed-tensors`, `lmdeploy-w8a8`, `fp8`, `modelopt`, or `plain` for a
    /// checkpoint of dequantized floats [default: what the target asks for]
    #[arg(long, value_name = "NAME")]
    pub(crate) layout: Option<String>,

    /// Engine that must load the result: `vllm`, `turbomind`, `lmdeploy-pytorch` or `transformers`
    #[arg(long, value_name = "ENGINE")]
    pub(crate) target: Option<String>,

    /// Tensor-parallel degree that the target will use
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) tp: usize,

    /// Round linears that the layout cannot hold as they are to the nearest scheme it has, and say what that costs
    #[arg(long)]
    pub(crate) requantize: bool,

    /// Type of the floats of `--layout plain`
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub(crate) dtype: Dtype,

    /// Replace a checkpoint that is already in the work directory
    #[arg(long)]
    pub(crate) overwrite: bool,

    /// Largest weight file, such as 5GB or 500MB
    #[arg(long, default_value = "5GB", value_parser = bytes, value_name = "SIZE")]
    pub(crate) max_shard_size: u64,

    /// Branch, tag or commit of a hub model
    #[arg(long, value_name = "REV")]
    pub(crate) revision: Option<String>,

    /// Where hub files are kept [default: the Hugging Face cache]
    #[arg(long, value_name = "DIR")]
    pub(crate) download_dir: Option<PathBuf>,

    /// Write no model card
    #[arg(long)]
    pub(crate) no_report: bool,
}

/// Converts, and prints the result on standard output.
pub(crate) fn run(args: &ConvertArgs, format: Format) -> anyhow::Result<()> {
    let target = match args.target.as_deref() {
        None => None,
        Some(name) => Some(Target::from_name(name).ok_or_else(|| {
            let known: Vec<&str> = Target::ALL.iter().map(|target| target.name()).collect();
            JobError::Usage(format!("--target {}: give one of {}", printable(name), known.join(", ")))
        })?),
    };
    if args.tp == 0 {
        return Err(
            JobError::Usage("--tp 0: give the number of GPUs a model is split over, at least 1".to_owned()).into()
        );
    }
    let plain = args.layout.as_deref() == Some(lite_convert::PLAIN);
    if args.dtype != Dtype::Auto && !plain {
        return Err(JobError::Usage("--dtype is for --layout plain only: codes keep their scales".to_owned()).into());
    }
    if plain && target.is_some() {
        return Err(JobError::Usage("--layout plain is loaded by every engine; leave --target out".to_owned()).into());
    }
    let recipe = Recipe {
        model: args.model.clone(),
        revision: args.revision.clone(),
        download_dir: args.download_dir.clone(),
        work_dir: args.work_dir.clone(),
        overwrite: args.overwrite,
        layout: args.layout.clone(),
        target,
        tensor_parallel: args.tp,
        requantize: args.requantize,
        dtype: match args.dtype {
            Dtype::Auto => None,
            Dtype::Float16 => Some(lite_model::Dtype::F16),
            Dtype::Bfloat16 => Some(lite_model::Dtype::BF16),
        },
        max_shard_bytes: args.max_shard_size,
    };
    let report = perform(&recipe, !args.no_report, format)?;
    let mut stdout = io::stdout().lock();
    match format {
        Format::Json => {
            let mut value = serde_json::to_value(&report)?;
            if let Some(keys) = value.as_object_mut() {
                keys.insert("event".to_owned(), "summary".into());
                keys.insert("schema".to_owned(), 1.into());
            }
            writeln!(stdout, "{value}")?;
        }
        Format::Quiet => writeln!(stdout, "{}", report.output.display())?,
        Format::Auto | Format::Human => print(&mut stdout, &report)?,
    }
    Ok(())
}

/// Converts; `card`: with a model card.
pub(crate) fn perform(recipe: &Recipe, card: bool, format: Format) -> anyhow::Result<ConvertReport> {
    let cancel = super::cancel_flag()?;
    let progress = Progress::new(format);
    let documents = |done: &Converted<'_>| {
        if !card {
            return Ok(Vec::new());
        }
        Ok(vec![("README.md".to_owned(), self::card(recipe, done)?.into_bytes())])
    };
    Ok(convert_with(recipe, &progress, &documents, &cancel)?)
}

/// The model card of the result.
fn card(recipe: &Recipe, done: &Converted<'_>) -> Result<String, JobError> {
    let old = done.set_aside.iter().find(|(name, _)| name.eq_ignore_ascii_case("README.md"));
    let source = match old {
        Some((_, kept)) => SourceCard::read(&super::report_args::beginning(&done.staging.join(kept))?),
        None => SourceCard::default(),
    };
    let report = done.report;
    let local = done.checkpoint.root().file_name().filter(|_| std::path::Path::new(&recipe.model).exists());
    let facts = Conversion {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        name: local.map_or_else(|| recipe.model.clone(), |name| name.to_string_lossy().into_owned()),
        from: report.from.clone(),
        to: report.layout.clone(),
        quant_method: done.quant_method.unwrap_or_default().to_owned(),
        source_bytes: report.source_bytes,
        output_bytes: report.output_bytes,
        exact: report.exact,
        rounded: report.rounded.iter().map(|l| (l.module.clone(), l.scheme.clone(), l.error)).collect(),
        engines: report.engines.clone(),
    };
    let kept: Vec<String> = done.set_aside.iter().map(|(_, kept)| kept.clone()).collect();
    Ok(conversion_card(&facts, &source, &kept))
}

fn print(out: &mut impl Write, report: &ConvertReport) -> io::Result<()> {
    writeln!(out, "{}", report.output.display())?;
    writeln!(
        out,
        "  layout        {} → {}; {} → {}",
        report.from,
        report.layout,
        size(report.source_bytes),
        size(report.output_bytes)
    )?;
    writeln!(
        out,
        "  reopened      {} linears equal the source's bit by bit, {} other tensors byte for byte",
        report.exact, report.copied
    )?;
    if !report.rounded.is_empty() {
        let mut worst: Vec<_> = report.rounded.iter().collect();
        worst.sort_by(|a, b| b.error.total_cmp(&a.error));
        let squares: f64 = worst.iter().map(|linear| linear.error * linear.error).sum();
        let mean = (squares / worst.len() as f64).sqrt();
        writeln!(out, "  rounded       {} linears, relative error {mean:.2e}; worst first:", worst.len())?;
        for linear in worst.iter().take(SHOWN) {
            writeln!(out, "    {:.2e}  {}  ({})", linear.error, printable(&linear.module), linear.scheme)?;
        }
    }
    if report.layout != lite_convert::PLAIN {
        let engines =
            if report.engines.is_empty() { "no engine known here".to_owned() } else { report.engines.join(", ") };
        writeln!(out, "  loaded by     {engines}")?;
    }
    writeln!(out, "  took          {}", duration(report.seconds))
}
