//! `lite inspect`.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use lite_job::{JobError, Recipe, locate_model};
use lite_model::printable;
use lite_runtime::{Inspection, inspect};

use crate::args::Format;
use crate::output::size;
use crate::progress::Progress;

/// Names that are listed without `--tensors`.
const SHOWN: usize = 8;

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// A checkpoint folder, quantized or not, of any architecture, or a hub id such as `Qwen/Qwen3-8B`
    pub(crate) model: String,

    /// List every tensor and every quantized linear
    #[arg(long)]
    pub(crate) tensors: bool,

    /// Branch, tag or commit of a hub model
    #[arg(long, value_name = "REV")]
    pub(crate) revision: Option<String>,

    /// Where hub files are kept [default: the Hugging Face cache]
    #[arg(long, value_name = "DIR")]
    pub(crate) download_dir: Option<PathBuf>,
}

/// Prints what a checkpoint is; reads its headers only.
pub(crate) fn run(args: &InspectArgs, format: Format) -> anyhow::Result<()> {
    let recipe = Recipe {
        revision: args.revision.clone(),
        download_dir: args.download_dir.clone(),
        ..Recipe::new(args.model.clone())
    };
    let cancel = super::cancel_flag()?;
    let progress = Progress::new(format);
    let folder = locate_model(&recipe, &progress, &cancel)?;
    drop(progress);
    let found = inspect(&folder).map_err(JobError::from)?;
    let mut stdout = io::stdout().lock();
    match format {
        Format::Json => {
            let mut value = serde_json::to_value(&found)?;
            if let Some(keys) = value.as_object_mut() {
                keys.insert("event".to_owned(), "inspection".into());
                keys.insert("schema".to_owned(), 1.into());
            }
            writeln!(stdout, "{value}")?;
        }
        Format::Quiet => writeln!(stdout, "{}", found.layout.as_deref().unwrap_or("plain"))?,
        Format::Auto | Format::Human => print(&mut stdout, &found, args.tensors)?,
    }
    Ok(())
}

fn print(out: &mut impl Write, found: &Inspection, all: bool) -> io::Result<()> {
    let text = |text: &Option<String>| text.as_deref().map_or("not given".to_owned(), printable);
    writeln!(out, "{}", printable(&found.model))?;
    writeln!(out, "  architecture  {} ({})", text(&found.architecture), text(&found.model_type))?;
    let layout = match (&found.layout, &found.quant_method, found.linears.is_empty()) {
        (Some(layout), ..) => layout.clone(),
        (None, Some(method), _) => format!("not read here (quant_method `{}`)", printable(method)),
        (None, None, false) => "quantized, but not declared in config.json".to_owned(),
        (None, None, true) => "plain".to_owned(),
    };
    writeln!(out, "  layout        {layout}")?;
    for (scheme, count) in found.schemes.iter().take(if all { usize::MAX } else { SHOWN }) {
        writeln!(out, "  scheme        {scheme}: {count} linears")?;
    }
    writeln!(
        out,
        "  size          {} parameters, {} in {}; {:.2} bits per weight",
        count(found.parameters),
        size(found.bytes),
        if found.shards == 1 { "one file".to_owned() } else { format!("{} shards", found.shards) },
        found.bits_per_weight
    )?;
    if let Some(bits) = found.quantized_bits_per_weight {
        writeln!(out, "  quantized     {} linears, {bits:.3} bits per weight with scales", found.linears.len())?;
    }
    for total in &found.dtypes {
        writeln!(out, "  {:<13} {} tensors, {}", total.dtype, total.tensors, size(total.bytes))?;
    }
    let tied = match found.tied_head {
        Some(true) => "tied to the embedding",
        Some(false) => "its own",
        None => "not given",
    };
    writeln!(out, "  head          {tied}")?;
    names(out, "ignored", &found.ignored, all)?;
    names(out, "kv scales", &found.kv_scales, all)?;
    names(out, "also here", &found.quantization_files, true)?;
    if all {
        for linear in &found.linears {
            writeln!(
                out,
                "  {}  {:?}  {}  {:.3} bits per weight",
                printable(&linear.name),
                linear.shape,
                linear.scheme,
                linear.bits_per_weight
            )?;
        }
        for tensor in &found.tensors {
            writeln!(
                out,
                "  {}  {}  {:?}  {}",
                printable(&tensor.name),
                tensor.dtype,
                tensor.shape,
                size(tensor.bytes)
            )?;
        }
    }
    for warning in &found.warnings {
        writeln!(out, "  warning       {warning}")?;
    }
    Ok(())
}

fn names(out: &mut impl Write, label: &str, names: &[String], all: bool) -> io::Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let shown = if all { names.len() } else { names.len().min(SHOWN) };
    let list: Vec<String> = names[..shown].iter().map(|name| printable(name)).collect();
    let more = if shown < names.len() { format!(" and {} more", names.len() - shown) } else { String::new() };
    writeln!(out, "  {label:<13} {}{more}", list.join(", "))
}

/// `6.23 M`, `70.55 B`.
fn count(number: u64) -> String {
    let value = number as f64;
    match number {
        0..1_000_000 => number.to_string(),
        1_000_000..1_000_000_000 => format!("{:.2} M", value / 1e6),
        _ => format!("{:.2} B", value / 1e9),
    }
}
