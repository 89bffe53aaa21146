//! `quant` of an LLMC config: method, weights, activations, cache.

use crate::error::{Fault, Place};
use crate::fields::{Fields, Ignored};
use crate::llmc::Warnings;
use crate::node::Node;

/// What `quant` says, in lite's keys.
pub(super) struct Quantized {
    pub(super) keys: Vec<(&'static str, Node)>,
    /// Whether the method looks at data.
    pub(super) needs_data: bool,
}

/// Methods of LLMC that are not here.
const ELSEWHERE: [&str; 22] = [
    "OsPlus",
    "OmniQuant",
    "NormTweaking",
    "AdaDim",
    "QUIK",
    "SpQR",
    "DGQ",
    "LlmInt8",
    "HQQ",
    "Quarot",
    "TesseraQ",
    "GPTBRECQ",
    "KVQuant",
    "FP_Quant",
    "OSPlus",
    "QuIP",
    "Kivi",
    "Magnitude",
    "Wanda",
    "ShortGPT",
    "Kvsparse",
    "Dense",
];

const HERE: [&str; 4] = ["RTN", "Awq", "GPTQ", "SmoothQuant"];

pub(super) fn read(file: &Fields<'_>, ignored: &mut Ignored, warnings: &mut Warnings) -> Result<Quantized, Fault> {
    let top = file.map("quant")?.ok_or_else(|| Fault::value(file.at(), "`quant` is missing"))?;
    for modality in ["vision", "video_gen", "audio"] {
        if top.get(modality).is_some() {
            let message =
                format!("`quant.{modality}` is not here: decoders of text are quantized, the rest stays as it is");
            return Err(Fault::unsupported(top.place(modality), message));
        }
    }
    let quant = match top.map("language")? {
        Some(language) => language,
        None => top,
    };
    let at = quant.need("method")?.at;
    let method = quant.text("method")?.unwrap_or_default();
    let float = quant.text("quant_type")?.is_some_and(|kind| kind == "float-quant");
    let weight = quant.map("weight")?.ok_or_else(|| Fault::value(quant.at(), "`quant.weight` is missing"))?;
    let calib_algo = weight.text("calib_algo")?.map(|algorithm| (weight.place("calib_algo"), algorithm));
    let weights = weights(&weight, float)?;
    finish(&weight, ignored)?;
    let activations = match quant.map("act")? {
        Some(act) => {
            let found = activations(&act, float)?;
            finish(&act, ignored)?;
            Some(found)
        }
        None => None,
    };
    let mut keys = Vec::new();
    if let Some(cache) = quant.map("kvcache")? {
        keys.push(("kv_cache", kv_cache(&cache)?));
        finish(&cache, ignored)?;
    }
    let special = quant.map("special")?;
    let quantized_inputs = activations.is_some();
    let stages = match method {
        "RTN" => vec![Node::single(at, "rtn", Node::map(at))],
        "SmoothQuant" => vec![Node::single(at, "smoothquant", smooth(at, special.as_ref())?)],
        "Awq" => awq(at, special.as_ref(), quantized_inputs)?,
        "GPTQ" => vec![Node::single(at, "gptq", gptq(at, special.as_ref(), warnings)?)],
        other if ELSEWHERE.contains(&other) => {
            let message = format!("`quant.method: {other}` is not (yet) here; here are {}", HERE.join(", "));
            return Err(Fault::unsupported(at, message));
        }
        other => {
            let known: Vec<&str> = HERE.iter().chain(&ELSEWHERE).copied().collect();
            return Err(Fault::value(at, crate::words::unknown("method of LLMC", other, &known)));
        }
    };
    let clip = match &special {
        Some(special) if method == "Awq" => special.bool("weight_clip")?,
        _ => None,
    };
    if let Some(special) = special {
        special.finish(SPECIAL, ignored)?;
    }
    keys.push(("stages", Node::list(at, stages)));
    keys.push(("range", range(at, method, clip, calib_algo)?));
    let mut scheme = Node::single(at, "weights", weights);
    if let Some(activations) = activations {
        scheme = scheme.with("activations", activations);
    }
    keys.push(("scheme", scheme));
    if quant.bool("quant_out")? == Some(false) {
        let message = "`quant.quant_out: False`: the next block always sees what the quantized block gives";
        warnings.push((quant.place("quant_out"), message.to_owned()));
    }
    if let Some(tp) = quant.int("tp")? {
        keys.push(("tensor_parallel", Node::scalar(quant.place("tp"), tp)));
    }
    quant.finish(&["modality", "token_reduction"], ignored)?;
    Ok(Quantized { keys, needs_data: method != "RTN" })
}

/// Keys of `special` that change how LLMC gets there, not what comes out here.
const SPECIAL: &[&str] = &[
    "save_mem",
    "awq_bs",
    "do_gqa_trans",
    "clip_version",
    "clip_sym",
    "save_scale",
    "scale_path",
    "save_clip",
    "clip_path",
    "blocksize",
    "chunk_num",
    "fp32_had",
    "online_rotate",
    "n_out",
    "owq",
    "trans",
    "weight_clip",
    "alpha",
];

/// Keys of `weight` and `act` that change nothing here.
fn finish(section: &Fields<'_>, ignored: &mut Ignored) -> Result<(), Fault> {
    section.finish(
        &[
            "need_pack",
            "pack_version",
            "pack_mode",
            "use_qtorch",
            "ste",
            "ste_all",
            "round_zp",
            "qmax_to_tensor",
            "mse_b_num",
            "maxshrink",
            "mse_grid",
            "quant_attn",
            "quant_softmax",
            "quant_act_fn",
            "float_range",
            "head_num",
            "special",
        ],
        ignored,
    )
}

/// Bits of integers, or the name of a float.
enum Codes<'n> {
    Int(i64),
    Float(&'n str),
}

fn codes<'n>(section: &Fields<'n>, name: &str, float: bool) -> Result<Codes<'n>, Fault> {
    let at = section.place("bit");
    let float = float || section.text("quant_type")?.is_some_and(|kind| kind == "float-quant");
    let text =
        section.text("bit")?.ok_or_else(|| Fault::value(section.at(), format!("`quant.{name}.bit` is missing")))?;
    match text {
        "e4m3" | "e5m2" | "e2m1" => Ok(Codes::Float(text)),
        "e3m2" | "e4m7" | "e3m4" => {
            Err(Fault::unsupported(at, format!("`bit: {text}`: no layout here holds such codes")))
        }
        "48" => Err(Fault::unsupported(at, "`bit: 48` (DGQ's two levels) is not here")),
        _ if float => {
            let message = format!(
                "`quant.{name}.bit` is `{}` with float-quant, wanted e4m3 or e5m2",
                lite_model::printable(text)
            );
            Err(Fault::value(at, message))
        }
        _ => section.int("bit").map(|bits| Codes::Int(bits.unwrap_or_default())),
    }
}

/// An `int_range` that is not what bits and symmetry say is another grid.
fn check_range(section: &Fields<'_>, codes: &Codes<'_>, symmetric: bool) -> Result<(), Fault> {
    let Some(node) = section.get("int_range") else { return Ok(()) };
    let Codes::Int(bits) = codes else {
        return Err(Fault::value(node.at, "`int_range` is for integers; leave it out"));
    };
    let half = 1i64.checked_shl(u32::try_from(bits - 1).unwrap_or(64)).unwrap_or(0);
    let wanted = if symmetric { [-half, half - 1] } else { [0, 2 * half - 1] };
    let found: Vec<Option<i64>> = section.texts("int_range")?.iter().map(|(_, text)| text.parse().ok()).collect();
    let unsigned = [Some(0), Some(2 * half - 1)];
    if found == [Some(wanted[0]), Some(wanted[1])]
        || (!symmetric && found == [Some(-half), Some(half - 1)])
        || (symmetric && found == unsigned)
    {
        return Ok(());
    }
    let message = format!("`int_range` other than [{}, {}], which is what {bits} bits hold here", wanted[0], wanted[1]);
    Err(Fault::unsupported(node.at, message))
}

fn weights(section: &Fields<'_>, float: bool) -> Result<Node, Fault> {
    let codes = codes(section, "weight", float)?;
    let symmetric = section.bool("symmetric")?.unwrap_or(true);
    check_range(section, &codes, symmetric)?;
    let width = |section: &Fields<'_>| match section.int("group_size")? {
        Some(width) => Ok(Node::scalar(section.place("group_size"), width)),
        None => Err(Fault::value(section.at(), "`granularity: per_group` needs a `group_size`")),
    };
    let granularity = section.text("granularity")?.unwrap_or("per_channel");
    let place = section.place("granularity");
    let node = code_keys(section, &codes, symmetric);
    let float = matches!(codes, Codes::Float(_));
    Ok(match granularity {
        "per_group" => node.with("group_size", width(section)?),
        "per_channel" => node.with("group_size", Node::scalar(place, -1)),
        "per_tensor" if float => node.with("per_tensor", Node::scalar(place, true)),
        "per_block" if float => {
            let size = section.int("block_size")?.unwrap_or(128);
            let side = || Node::scalar(place, size);
            node.with("block", Node::list(place, vec![side(), side()]))
        }
        "per_tensor" | "per_block" | "per_head" => {
            let message = format!(
                "`granularity: {granularity}` of integer weights: no layout here holds it; use per_channel or per_group"
            );
            return Err(Fault::unsupported(place, message));
        }
        other => {
            let known = ["per_tensor", "per_channel", "per_group", "per_block", "per_head"];
            return Err(Fault::value(place, crate::words::unknown("granularity", other, &known)));
        }
    })
}

/// The keys that weights and activations share.
fn code_keys(section: &Fields<'_>, codes: &Codes<'_>, symmetric: bool) -> Node {
    let at = section.at();
    match codes {
        Codes::Int(bits) => Node::single(at, "type", Node::text(at, "int"))
            .with("bits", Node::scalar(section.place("bit"), bits))
            .with("symmetric", Node::scalar(section.place("symmetric"), symmetric)),
        Codes::Float(name) => Node::single(at, "type", Node::text(section.place("bit"), name)),
    }
}

fn activations(section: &Fields<'_>, float: bool) -> Result<Node, Fault> {
    let codes = codes(section, "act", float)?;
    let symmetric = section.bool("symmetric")?.unwrap_or(true);
    check_range(section, &codes, symmetric)?;
    let fixed = section.bool("static")?.unwrap_or(false);
    let place = section.place("granularity");
    section.text("calib_algo")?;
    let node = code_keys(section, &codes, symmetric);
    Ok(match (section.text("granularity")?.unwrap_or("per_token"), fixed) {
        ("per_token", false) => node.with("scale", Node::text(place, "token")),
        ("per_tensor", true) => node.with("scale", Node::text(place, "static")),
        ("per_group", false) => {
            let width = section.int("group_size")?.unwrap_or(128);
            node.with("scale", Node::text(place, "group")).with("group_size", Node::scalar(place, width))
        }
        (granularity, fixed) => {
            let kind = if fixed { "static" } else { "dynamic" };
            let message = format!(
                "`quant.act`: {kind} scales `{}`: no engine here runs them; use per_token, or per_tensor with `static: True`",
                lite_model::printable(granularity)
            );
            return Err(Fault::unsupported(place, message));
        }
    })
}

fn kv_cache(cache: &Fields<'_>) -> Result<Node, Fault> {
    let at = cache.at();
    let method = cache.text("method")?.unwrap_or("Naive");
    let bit = cache.text("bit")?.unwrap_or_default();
    cache.bool("static")?;
    cache.bool("symmetric")?;
    cache.text("quant_type")?;
    match (method, bit, cache.text("granularity")?.unwrap_or("per_tensor")) {
        ("Naive", "e4m3", "per_tensor") => Ok(Node::text(at, "fp8")),
        ("Naive", "e4m3", "per_head") => Ok(Node::text(at, "fp8-head")),
        _ => {
            let message = format!(
                "`quant.kvcache` with method `{}` and bit `{}`: only e4m3 with Naive, per_tensor or per_head, has calibrated scales here; engines quantize integer caches by themselves",
                lite_model::printable(method),
                lite_model::printable(bit)
            );
            Err(Fault::unsupported(at, message))
        }
    }
}

fn smooth(at: Place, special: Option<&Fields<'_>>) -> Result<Node, Fault> {
    let alpha = special.map(|special| special.float("alpha")).transpose()?.flatten();
    Ok(match (alpha, special) {
        (Some(alpha), Some(special)) => Node::single(at, "alpha", Node::scalar(special.place("alpha"), alpha)),
        _ => Node::map(at),
    })
}

/// `trans_version` v1 and v2 name one formula each; the search here tries both and keeps the better.
fn awq(at: Place, special: Option<&Fields<'_>>, quantized_inputs: bool) -> Result<Vec<Node>, Fault> {
    let mut trans = true;
    if let Some(special) = special {
        trans = special.bool("trans")?.unwrap_or(true);
        if let Some(version) = special.text("trans_version")?
            && !["v1", "v2"].contains(&version)
        {
            let message = format!("`trans_version` is `{}`, wanted v1 or v2", lite_model::printable(version));
            return Err(Fault::value(special.place("trans_version"), message));
        }
    }
    Ok(match (trans, quantized_inputs) {
        (true, false) => vec![Node::single(at, "awq", Node::map(at))],
        (true, true) => {
            vec![Node::single(at, "smoothquant", Node::single(at, "algorithm", Node::text(at, "awq")))]
        }
        // Clipping alone: ranges by output error, no scales.
        (false, false) => vec![Node::single(at, "gptq", Node::single(at, "rounding", Node::text(at, "nearest")))],
        (false, true) => vec![Node::single(at, "rtn", Node::map(at))],
    })
}

fn gptq(at: Place, special: Option<&Fields<'_>>, warnings: &mut Warnings) -> Result<Node, Fault> {
    let mut node = Node::single(at, "rounding", Node::text(at, "gptq"));
    let (mut order, mut aware) = (false, false);
    if let Some(special) = special {
        order = special.bool("actorder")?.unwrap_or(false);
        aware = special.bool("true_sequential")?.unwrap_or(false);
        if special.bool("static_groups")? == Some(false) && order {
            let message =
                "`static_groups: False` with `actorder`: groups are static here, so that no engine pays for the order";
            warnings.push((special.place("static_groups"), message.to_owned()));
        }
        if let Some(damp) = special.float("percdamp")? {
            node = node.with("damp_percent", Node::scalar(special.place("percdamp"), damp));
        }
        for heavy in ["owq", "online_rotate"] {
            if special.bool(heavy)? == Some(true) {
                return Err(Fault::unsupported(special.place(heavy), format!("`special.{heavy}` is not (yet) here")));
            }
        }
    }
    Ok(node.with("act_order", Node::scalar(at, order)).with("error_aware", Node::scalar(at, aware)))
}

fn range(at: Place, method: &str, clip: Option<bool>, calib_algo: Option<(Place, &str)>) -> Result<Node, Fault> {
    if clip == Some(true) {
        return Ok(Node::text(at, "search"));
    }
    match calib_algo {
        None | Some((_, "minmax")) => Ok(Node::text(at, "minmax")),
        Some((at, "mse")) => Ok(Node::text(at, "search")),
        Some((at, other)) => {
            let message = format!(
                "`calib_algo: {}` of weights for {method} is not (yet) here; use minmax or mse",
                lite_model::printable(other)
            );
            Err(Fault::unsupported(at, message))
        }
    }
}
