//! The YAML of ModelTC/llmc (LightCompress): `base`, `model`, `calib`, `eval`, `quant`, `ignored_layers`, `save`.
//!
//! Each `save_*` that stands for a quantized checkpoint becomes one job, written where LLMC writes it: in a folder of
//! `save_path`. What the keys mean here is told in `configs/README.md`.

mod quant;
mod save;

use std::path::Path;

use crate::batch::Draft;
use crate::error::Fault;
use crate::fields::{Fields, Ignored, sentence};
use crate::node::Node;

type Warnings = Vec<(crate::error::Place, String)>;

/// The jobs of an LLMC config.
///
/// # Errors
/// Methods and exports that are not here ([`RecipeError::Unsupported`](crate::RecipeError::Unsupported)), values that
/// cannot be, and keys that look like slips of the pen.
pub(crate) fn jobs(root: &Node, warnings: &mut Warnings) -> Result<Vec<Draft>, Fault> {
    let mut ignored = Ignored::new();
    let file = Fields::new(root, "")?;
    for (key, tool) in [("sparse", "sparsification"), ("token_reduction", "token reduction")] {
        if file.get(key).is_some() {
            return Err(Fault::unsupported(file.place(key), format!("`{key}`: {tool} is not here; `lite` quantizes")));
        }
    }
    let mut job = Node::map(root.at);
    let seed = match file.map("base")? {
        Some(base) => {
            let seed = base.int("seed")?.map(|seed| (base.place("seed"), seed));
            base.finish(&[], &mut ignored)?;
            seed
        }
        None => None,
    };
    let model = file.map("model")?.ok_or_else(|| Fault::value(root.at, "`model` is missing"))?;
    let path = model.need("path")?;
    job = job.with("model", Node::text(path.at, model.text("path")?.unwrap_or_default()));
    if let Some(dtype) = dtype(&model)? {
        job = job.with("dtype", dtype);
    }
    model.finish(
        &["type", "tokenizer_mode", "block_wise_quant", "use_cpu_to_save_cuda_mem_for_catcher", "load_mode"],
        &mut ignored,
    )?;
    let quantized = quant::read(&file, &mut ignored, warnings)?;
    for (key, value) in quantized.keys {
        job = job.with(key, value);
    }
    match file.map("calib")? {
        Some(calib) => job = job.with("calibration", calibration(&calib, seed, &mut ignored, warnings)?),
        None if quantized.needs_data => {
            warnings.push((root.at, "no `calib` section: calibrating on the default set".to_owned()));
        }
        None => {}
    }
    if let Some(eval) = evaluation(&file, &mut ignored, warnings)? {
        job = job.with("eval", eval);
    }
    if let Some(layers) = file.map("ignored_layers")? {
        let patterns = ignored_layers(&layers)?;
        if !patterns.items().is_empty() {
            job = job.with("ignore", patterns);
        }
        layers.finish(&[], &mut ignored)?;
    }
    let drafts = save::split(&file, job, &mut ignored, warnings)?;
    if file.get("opencompass").is_some() {
        ignored.push((file.place("opencompass"), "opencompass".to_owned()));
    }
    file.finish(&[], &mut ignored)?;
    warnings.extend(sentence(&ignored));
    Ok(drafts)
}

fn dtype(model: &Fields<'_>) -> Result<Option<Node>, Fault> {
    let at = model.place("torch_dtype");
    let name = match model.text("torch_dtype")? {
        // The type of a checkpoint is what its files say; fp8 ones are read as what they stand for.
        None | Some("auto" | "torch.float8_e4m3fn" | "torch.float32") => return Ok(None),
        Some("torch.float16") => "float16",
        Some("torch.bfloat16") => "bfloat16",
        Some(other) => {
            let message = format!(
                "`model.torch_dtype` is `{}`, wanted auto, torch.float16 or torch.bfloat16",
                lite_model::printable(other)
            );
            return Err(Fault::value(at, message));
        }
    };
    Ok(Some(Node::text(at, name)))
}

fn calibration(
    calib: &Fields<'_>,
    seed: Option<(crate::error::Place, i64)>,
    ignored: &mut Ignored,
    warnings: &mut Warnings,
) -> Result<Node, Fault> {
    let mut found = Node::map(calib.at());
    if let Some(dataset) = dataset(calib, warnings)? {
        found = found.with("dataset", dataset);
    }
    for (theirs, ours) in [("n_samples", "samples"), ("seq_len", "seqlen")] {
        if let Some(value) = calib.int(theirs)? {
            found = found.with(ours, Node::scalar(calib.place(theirs), value));
        }
    }
    // −1 is one batch of everything, which changes nothing but memory.
    if let Some(batch) = calib.int("bs")?.filter(|&batch| batch != -1) {
        found = found.with("batch_size", Node::scalar(calib.place("bs"), batch));
    }
    if let Some((at, seed)) = calib.int("seed")?.map(|seed| (calib.place("seed"), seed)).or(seed) {
        found = found.with("seed", Node::scalar(at, seed));
    }
    calib.get("download");
    calib.finish(&["preproc", "padding", "apply_chat_template", "load_from_txt", "tokenizer_mode"], ignored)?;
    Ok(found)
}

/// A dataset by name, or the text that `path` holds.
fn dataset(section: &Fields<'_>, warnings: &mut Warnings) -> Result<Option<Node>, Fault> {
    let at = section.place("name");
    let name = section.text("name")?;
    let path = section.text("path")?.filter(|path| !path.is_empty());
    let readable = path.is_some_and(|path| holds_text(Path::new(path)));
    let Some(name) = name else {
        return Ok(path.filter(|_| readable).map(|path| Node::text(section.place("path"), path)));
    };
    let known = match name {
        "pile" => "pileval",
        "pileval" | "wikitext2" | "c4" | "ptb" | "ultrachat" => name,
        "custom_txt" | "custom_ppl" | "custom" => match path {
            Some(path) => return Ok(Some(Node::text(section.place("path"), path))),
            None => return Err(Fault::value(at, format!("`name: {name}` needs a `path`"))),
        },
        "custom_mm" | "images" | "t2v" | "i2v" | "custom_gen" => {
            return Err(Fault::unsupported(at, format!("`name: {name}`: calibration here is on text")));
        }
        // A set that this program knows and LLMC does not: its loader says if there is none of the name.
        other => other,
    };
    if readable && let Some(path) = path {
        return Ok(Some(Node::text(section.place("path"), path)));
    }
    if section.bool("download")? == Some(false)
        && let Some(path) = path
    {
        warnings.push((
            section.place("path"),
            format!(
                "`{}` holds no .txt, .json, .jsonl or .parquet file (Arrow folders are not read): `{known}` is taken from the hub or its cache",
                lite_model::printable(path)
            ),
        ));
    }
    Ok(Some(Node::text(at, known)))
}

/// Whether a path is, or a folder holds, text in a form that is read here.
fn holds_text(path: &Path) -> bool {
    let text = |path: &Path| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        extension.is_some_and(|extension| ["txt", "json", "jsonl", "parquet"].contains(&extension))
    };
    // An Arrow folder holds json files as well: those that describe it.
    let arrow = |path: &Path| path.extension().is_some_and(|extension| extension == "arrow");
    if path.is_file() {
        return text(path);
    }
    let Ok(entries) = std::fs::read_dir(path) else { return false };
    let files: Vec<_> = entries.flatten().take(10_000).map(|entry| entry.path()).collect();
    !files.iter().any(|path| arrow(path)) && files.iter().any(|path| text(path))
}

/// The first evaluation of perplexity, on which the final comparison is made.
fn evaluation(file: &Fields<'_>, ignored: &mut Ignored, warnings: &mut Warnings) -> Result<Option<Node>, Fault> {
    let Some(node) = file.get("eval") else { return Ok(None) };
    let sections = if node.items().is_empty() { std::slice::from_ref(node) } else { node.items() };
    let mut chosen = None;
    for section in sections {
        let eval = Fields::new(section, "eval")?;
        let wanted = eval.texts("eval_pos")?.iter().any(|(_, position)| position.starts_with("fake_quant"));
        let perplexity = eval.text("type")?.is_none_or(|kind| kind == "ppl");
        if chosen.is_some() || !wanted || !perplexity {
            if !perplexity {
                warnings
                    .push((eval.at(), "only perplexity is evaluated in a run; see `lite eval` for tasks".to_owned()));
            }
            continue;
        }
        let mut found = Node::map(section.at);
        if let Some(dataset) = dataset(&eval, &mut Vec::new())? {
            found = found.with("dataset", dataset);
        }
        for (theirs, ours) in [("num_samples", "samples"), ("seq_len", "seqlen")] {
            if let Some(value) = eval.int(theirs)? {
                found = found.with(ours, Node::scalar(eval.place(theirs), value));
            }
        }
        eval.get("download");
        let known = ["bs", "inference_per_block", "num_eval_tokens", "eval_token_consist", "tokenizer_mode"];
        eval.finish(&known, ignored)?;
        chosen = Some(found);
    }
    Ok(chosen)
}

/// Regular expressions of the linears that stay plain.
fn ignored_layers(layers: &Fields<'_>) -> Result<Node, Fault> {
    let mut patterns = Vec::new();
    let mut blocks = Vec::new();
    for (at, range) in layers.texts("block_ids")? {
        let bad =
            || Fault::value(at, format!("`{}` is no block and no range such as 15-23", lite_model::printable(range)));
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) =
            (first.trim().parse::<u32>().map_err(|_| bad())?, last.trim().parse::<u32>().map_err(|_| bad())?);
        if first > last || last > 10_000 {
            return Err(bad());
        }
        blocks.extend((first..=last).map(|block| block.to_string()));
    }
    let names: Vec<String> = layers.texts("layer_names")?.iter().map(|(_, name)| escape(name)).collect();
    if !blocks.is_empty() || !names.is_empty() {
        let blocks = if blocks.is_empty() { r"\d+".to_owned() } else { blocks.join("|") };
        let names = if names.is_empty() { ".*".to_owned() } else { names.join("|") };
        patterns.push(Node::text(layers.at(), format!(r"\.({blocks})\.({names})$")));
    }
    // Spelt like this in LLMC.
    for (at, name) in layers.texts("speical_names")? {
        patterns.push(Node::text(at, format!("^{}$", escape(name))));
    }
    Ok(Node::list(layers.at(), patterns))
}

/// `name` as a regular expression for itself.
pub(crate) fn escape(name: &str) -> String {
    let mut out = String::with_capacity(name.len() + 8);
    for c in name.chars() {
        if c.is_ascii_punctuation() && c != '_' {
            out.push('\\');
        }
        out.push(c);
    }
    out
}
