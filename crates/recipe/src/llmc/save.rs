//! `save` of an LLMC config: which checkpoints, and where.

use crate::batch::Draft;
use crate::error::Fault;
use crate::fields::{Fields, Ignored};
use crate::llmc::Warnings;
use crate::node::Node;

/// A checkpoint that a key of `save` asks for.
struct Export {
    key: &'static str,
    /// Folder below `save_path`, as LLMC names it.
    folder: &'static str,
    layout: Option<&'static str>,
    target: Option<&'static str>,
}

const EXPORTS: [Export; 4] = [
    Export { key: "save_vllm", folder: "vllm_quant_model", layout: Some("compressed-tensors"), target: Some("vllm") },
    Export { key: "save_sgl", folder: "sgl_quant_model", layout: Some("compressed-tensors"), target: None },
    Export { key: "save_autoawq", folder: "autoawq_quant_model", layout: Some("awq"), target: None },
    Export { key: "save_trtllm", folder: "trtllm_quant_model", layout: None, target: Some("trtllm") },
];

/// Exports of engines that are not known here.
const ELSEWHERE: [(&str, &str); 4] = [
    ("save_lightllm", "LightLLM"),
    ("save_mlcllm", "MLC LLM"),
    ("save_lightx2v", "LightX2V"),
    ("save_lightllm_kv_cache_calib", "LightLLM"),
];

/// One job for each checkpoint asked for.
pub(super) fn split(
    file: &Fields<'_>,
    job: Node,
    ignored: &mut Ignored,
    warnings: &mut Warnings,
) -> Result<Vec<Draft>, Fault> {
    let Some(save) = file.map("save")? else {
        return Err(Fault::value(
            file.at(),
            "`save` is missing: give `save_path` and what to save, such as `save_vllm: True`",
        ));
    };
    for (key, engine) in ELSEWHERE {
        if save.bool(key)? == Some(true) {
            let message =
                format!("`save.{key}`: the format of {engine} is not here; use save_vllm, save_autoawq or save_trtllm");
            return Err(Fault::unsupported(save.place(key), message));
        }
    }
    let Some(path) = save.text("save_path")? else {
        return Err(Fault::value(save.at(), "`save.save_path` is missing"));
    };
    let at = save.place("save_path");
    let below = |folder: &str| Node::text(at, format!("{}/{folder}", path.trim_end_matches('/')));
    let fake = save.bool("save_fake")? == Some(true);
    let trans = save.bool("save_trans")? == Some(true);
    let mut tensor_parallel = None;
    if let Some(cfg) = save.map("trtllm_cfg")? {
        tensor_parallel = cfg.int("tp_size")?.map(|tp| Node::scalar(cfg.place("tp_size"), tp));
        cfg.finish(&["pp_size"], ignored)?;
    }
    let mut drafts = Vec::new();
    for export in &EXPORTS {
        if save.bool(export.key)? != Some(true) {
            continue;
        }
        let at = save.place(export.key);
        let mut tree = job.clone().with("save", Node::single(at, "path", below(export.folder)));
        if let Some(layout) = export.layout {
            tree = tree.with("layout", Node::text(at, layout));
        }
        if let Some(target) = export.target {
            tree = tree.with("target", Node::text(at, target));
        }
        if export.key == "save_trtllm"
            && let Some(tp) = &tensor_parallel
        {
            tree = tree.with("tensor_parallel", tp.clone());
        }
        drafts.push(tree);
    }
    if trans && drafts.is_empty() && !fake {
        let message = "`save.save_trans` alone: transformed weights without quantization are not written here; scales are found and folded in the run that quantizes: set save_vllm, save_autoawq, save_trtllm or save_fake";
        return Err(Fault::unsupported(save.place("save_trans"), message));
    }
    if trans {
        let message = "`save.save_trans`: the transformed float model is not written; what is saved holds its scales";
        warnings.push((save.place("save_trans"), message.to_owned()));
    }
    if drafts.is_empty() {
        if !fake {
            warnings
                .push((save.at(), "nothing under `save` is true: the checkpoint is written all the same".to_owned()));
        }
        drafts.push(job.with("save", Node::single(save.at(), "path", below("quant_model"))));
    }
    if fake && let Some((key, mut place)) = drafts[0].remove("save") {
        place = place.with("plain", below("fake_quant_model"));
        drafts[0].put(key, place);
    }
    save.finish(&["lightllm_kv_cache_calib_name"], ignored)?;
    let several = drafts.len() > 1;
    let named = |tree: Node| {
        let folder = tree.get("save").and_then(|save| save.get("path")).map(Node::words).unwrap_or_default();
        let folder = folder.trim_matches('`').rsplit('/').next().unwrap_or_default().to_owned();
        let at = tree.at;
        if several { tree.with("name", Node::text(at, folder)) } else { tree }
    };
    Ok(drafts.into_iter().map(named).map(Draft::of).collect())
}
