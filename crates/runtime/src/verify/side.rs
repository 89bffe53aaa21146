//! The files beside the weights.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lite_model::printable;
use serde_json::{Map, Value};

use super::Judged;
use super::config::quantization;
use super::findings::Findings;
use super::original::Original;

/// Any of these makes a tokenizer.
const TOKENIZERS: [&str; 6] =
    ["tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model", "tekken.json", "spiece.model"];
/// Files that change what a model says, though not its tokens.
const BEHAVIOUR: [&str; 4] =
    ["generation_config.json", "chat_template.jinja", "chat_template.json", "preprocessor_config.json"];
/// Keys of side files that transformers writes for itself: where the files came from, and by which version.
const BOOKKEEPING: [&str; 7] = [
    "_commit_hash",
    "_from_model_config",
    "_name_or_path",
    "is_local",
    "local_files_only",
    "name_or_path",
    "transformers_version",
];
/// Keys that a message lists.
const SHOWN_KEYS: usize = 4;
/// Largest file that is read here, in bytes.
const LARGEST: u64 = 256 << 20;

/// Tokenizer, generation config and chat template: present, sound, and those of the original.
pub(super) fn check(judged: &Judged<'_>, original: Option<&Original>, findings: &mut Findings) {
    let has = |name: &str| judged.dir.join(name).is_file();
    if !TOKENIZERS.iter().any(|name| has(name)) {
        let message = "no tokenizer is in the folder: copy the original's (tokenizer.json and tokenizer_config.json)";
        findings.error("tokenizer-missing", None, message);
    }
    let own = judged.dir.join("tokenizer.json");
    let tokens = own.is_file().then(|| tokens(&own));
    match &tokens {
        Some(Err(reason)) => findings.error("tokenizer-unreadable", Some("tokenizer.json"), reason.clone()),
        Some(Ok(tokens)) => vocabulary(judged, tokens, findings),
        None => {}
    }
    if let Some(original) = original {
        against(judged, original.dir(), tokens.as_ref().and_then(|t| t.as_ref().ok()), findings);
    }
}

/// Token ids against the rows of the embedding.
fn vocabulary(judged: &Judged<'_>, tokens: &BTreeMap<String, u64>, findings: &mut Findings) {
    let Some(spec) = judged.spec else { return };
    let Some(largest) = tokens.values().max() else {
        findings.error("tokenizer-vocab", Some("tokenizer.json"), "it holds no token");
        return;
    };
    if *largest >= spec.vocab as u64 {
        let message = format!(
            "token ids reach {largest}, the embedding has {} rows: the tokenizer is of another model",
            spec.vocab
        );
        findings.error("tokenizer-vocab", Some("tokenizer.json"), message);
    } else if 2 * tokens.len() < spec.vocab {
        let message = format!("it holds {} tokens, the embedding has {} rows", tokens.len(), spec.vocab);
        findings.warning("tokenizer-vocab", Some("tokenizer.json"), message);
    }
}

/// Side files against the original's.
fn against(judged: &Judged<'_>, original: &Path, own: Option<&BTreeMap<String, u64>>, findings: &mut Findings) {
    let theirs = tokens(&original.join("tokenizer.json")).ok();
    if let (Some(own), Some(theirs)) = (own, &theirs) {
        let changed = theirs.iter().filter(|(token, id)| own.get(*token) != Some(id)).count();
        let added = own.keys().filter(|token| !theirs.contains_key(*token)).count();
        if changed > 0 {
            let message = format!(
                "{changed} of {} tokens are missing or have another id than in the original's: copy the original's",
                theirs.len()
            );
            findings.error("tokenizer-differs", Some("tokenizer.json"), message);
        } else if added > 0 {
            let message = format!("it has {added} tokens more than the original's");
            findings.warning("tokenizer-differs", Some("tokenizer.json"), message);
        } else if bytes(&judged.dir.join("tokenizer.json")) != bytes(&original.join("tokenizer.json")) {
            let message = "the same tokens as in the original, but another file: it was saved again by a library";
            findings.note("side-file-differs", Some("tokenizer.json"), message);
        }
    }
    for name in TOKENIZERS.iter().chain(&["tokenizer_config.json"]).chain(&BEHAVIOUR) {
        let (ours, theirs) = (judged.dir.join(name), original.join(name));
        if !theirs.is_file() || *name == "tokenizer.json" && ours.is_file() {
            continue;
        }
        let tokenizer = TOKENIZERS.contains(name);
        if !ours.is_file() {
            let message = "the original has it, this checkpoint does not: copy it";
            if tokenizer && !judged.dir.join("tokenizer.json").is_file() {
                findings.error("side-file-missing", Some(name), message);
            } else {
                findings.warning("side-file-missing", Some(name), message);
            }
        } else if bytes(&ours) != bytes(&theirs) {
            match (tokenizer, name.ends_with(".json") && json(&ours).ok() == json(&theirs).ok()) {
                (_, true) => {}
                (true, false) => {
                    findings.error("tokenizer-differs", Some(name), "differs from the original's: copy that")
                }
                (false, false) => differing(&ours, &theirs, name, findings),
            }
        }
    }
}

/// A side file that is not the original's: a note where only what libraries write for themselves differs.
fn differing(ours: &Path, theirs: &Path, name: &str, findings: &mut Findings) {
    let (Ok(ours), Ok(theirs)) = (json(ours), json(theirs)) else {
        return findings.warning("side-file-differs", Some(name), "differs from the original's");
    };
    let keys: BTreeSet<&String> =
        ours.keys().chain(theirs.keys()).filter(|key| ours.get(*key) != theirs.get(*key)).collect();
    let list = |keys: &[&String]| {
        let shown: Vec<String> = keys.iter().take(SHOWN_KEYS).map(|key| format!("`{}`", printable(key))).collect();
        let more = if keys.len() > SHOWN_KEYS { " and more" } else { "" };
        format!("{}{more}", shown.join(", "))
    };
    let told: Vec<&String> = keys.iter().filter(|key| !BOOKKEEPING.contains(&key.as_str())).copied().collect();
    if told.is_empty() {
        let keys: Vec<&String> = keys.into_iter().collect();
        let message =
            format!("differs from the original's only in what libraries note for themselves: {}", list(&keys));
        findings.note("side-file-differs", Some(name), message);
    } else {
        let message =
            format!("differs from the original's in {}: copy the original's unless that is meant", list(&told));
        findings.warning("side-file-differs", Some(name), message);
    }
}

/// `quantize_config.json` and `config.json` say the same of what readers use.
pub(super) fn quantize_config(judged: &Judged<'_>, findings: &mut Findings) {
    const FILE: &str = "quantize_config.json";
    const KEYS: [&str; 6] = ["bits", "group_size", "sym", "desc_act", "checkpoint_format", "quant_method"];
    let path = judged.dir.join(FILE);
    if !path.is_file() {
        return;
    }
    let beside = match json(&path) {
        Ok(beside) => beside,
        Err(reason) => return findings.error("side-config-differs", Some(FILE), reason),
    };
    let Some(declared) = quantization(judged.checkpoint.config()) else { return };
    for key in KEYS {
        if let (Some(here), Some(there)) = (declared.get(key), beside.get(key))
            && here != there
        {
            let message = format!(
                "`{key}` is {}, but {} in config.json: engines differ in which they read; make them the same",
                printable(&there.to_string()),
                printable(&here.to_string())
            );
            findings.error("side-config-differs", Some(FILE), message);
        }
    }
}

/// Token to id of a `tokenizer.json` of the `tokenizers` library, added tokens included.
fn tokens(path: &Path) -> Result<BTreeMap<String, u64>, String> {
    let file = json(path)?;
    let mut found = BTreeMap::new();
    match file.get("model").and_then(|model| model.get("vocab")) {
        Some(Value::Object(vocab)) => {
            found.extend(vocab.iter().filter_map(|(token, id)| Some((token.clone(), id.as_u64()?))));
        }
        // Unigram: pairs of token and score, numbered as they come.
        Some(Value::Array(vocab)) => {
            let token = |pair: &Value| Some(pair.get(0)?.as_str()?.to_owned());
            found.extend(vocab.iter().enumerate().filter_map(|(id, pair)| Some((token(pair)?, id as u64))));
        }
        _ => return Err("holds no `model.vocab`, wanted a file of the tokenizers library".to_owned()),
    }
    for added in file.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
        if let (Some(token), Some(id)) =
            (added.get("content").and_then(Value::as_str), added.get("id").and_then(Value::as_u64))
        {
            found.insert(token.to_owned(), id);
        }
    }
    Ok(found)
}

fn bytes(path: &Path) -> Option<Vec<u8>> {
    let length = std::fs::metadata(path).ok()?.len();
    if length > LARGEST { None } else { std::fs::read(path).ok() }
}

fn json(path: &Path) -> Result<Map<String, Value>, String> {
    let bytes = bytes(path).ok_or_else(|| "cannot be read".to_owned())?;
    serde_json::from_slice(&bytes).map_err(|error| format!("is no JSON object: {error}"))
}
